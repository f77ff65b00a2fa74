"""Bytes that a layer computes and keeps, from its widths, the rows of a micro-batch and the dtypes.

The facts behind the formulas were read in, or measured on, torch 2.13, transformers 5.23, peft 0.21, bitsandbytes 0.50
and trl 1.16. `tests/planner/test_memory.py` compares the formulas with the tensors that autograd saves.
"""

from grpo_plus.planner.run import FULL, MIXED, Run
from grpo_plus.planner.shapes import Layer, Linear, ModelShape


def layer_activations(shape: ModelShape, layer: Layer, run: Run) -> float:
    """Bytes per token that autograd saves in one layer, without what attention saves.

    A norm keeps its input in float32, and a norm that trains also what it scales. The MLP keeps its two halves and
    their gate. A linear layer that trains, or has an adapter, keeps its input. All layers that read an input share one
    tensor, unless each layer makes a copy. Copies come from a cast of a float32 residual under autocast, from PEFT's
    cast for float32 adapters on a base that is not quantized, and from dropout.
    """
    output = run.weight_size if run.quantized or not run.autocast else MIXED
    taken = MIXED if run.autocast else (run.adapter_size if run.lora_r else run.weight_size)
    apart = (run.autocast and run.weight_size == FULL) or _casts_inputs(run) or run.lora_dropout > 0
    trained_norms = 0 if run.lora_r else (FULL if shape.float_norms else run.weight_size)
    inputs = sum(linear.inputs for linear in layer.linears) if apart else _shared_inputs(layer)
    if apart and not _casts_inputs(run) and not run.lora_dropout:
        inputs -= layer.query  # what attention returns is in half precision already
    routed = layer.routed * shape.hidden + (layer.feed_forward if layer.routed else 0)
    dropped = sum(linear.inputs for linear in layer.linears) if run.lora_dropout else 0
    linear_attention = 4 * layer.mixer  # ASSUMED: the projections, the convolved ones, and the recurrence's inputs
    return (
        (FULL + trained_norms) * sum(layer.norms)
        + taken * inputs
        + output * (3 * layer.feed_forward + routed + linear_attention)
        + dropped  # a byte each, on a GPU
    )


def _casts_inputs(run: Run) -> bool:
    return run.lora_r is not None and not run.quantized and run.adapter_size == FULL


def _shared_inputs(layer: Layer) -> int:
    """Widths of the distinct inputs of the layer's linear modules. The output projection reads what attention saved."""
    distinct: dict[bool, Linear] = {}
    mixer = [linear for linear in layer.linears if not _is_feed_forward(linear)]
    feed_forward = [linear for linear in layer.linears if _is_feed_forward(linear)]
    distinct[True] = (mixer or feed_forward)[0]
    return distinct[True].inputs + (feed_forward[0].inputs + feed_forward[-1].inputs if feed_forward else 0)


def _is_feed_forward(linear: Linear) -> bool:
    return linear.name in ("gate_proj", "up_proj", "gate_up_proj", "down_proj")


def attention_activations(shape: ModelShape, layer: Layer, run: Run) -> float:
    """Bytes that the attention of one layer saves for the rows of a pass.

    Fused attention saves queries, keys, values and its output. With a mask, transformers repeats keys and values for
    every query head, and torch turns the mask from booleans into numbers, per layer. Each completion of a shared prompt
    gets a copy of the prompt's keys and values. A completion alone with its prompt is one causal sequence, but for a
    model with linear attention, where prompts go through the cache. Eager attention saves the softmax twice, in float32
    and cast.
    """
    size = MIXED if run.autocast else run.weight_size
    rows, prompt, completion = run.per_device_train_batch_size, run.prompt_length, run.max_completion_length
    total = prompt + completion
    if not layer.query:
        return 0
    if shape.eager:
        spans = rows * total * total if run.rows != "shared_prompt" else rows * completion * total + prompt * prompt
        return spans * shape.heads * (FULL + size) + rows * total * 4 * layer.query * size
    if run.rows == "shared_prompt" and (rows > distinct_prompts(run) or shape.carries_state):
        prompts = distinct_prompts(run) * prompt * 2 * (layer.query + layer.keys)
        return size * (prompts + rows * layer.query * (2 * completion + 2 * total) + completion * total)
    if run.rows != "none":
        return size * rows * total * 2 * (layer.query + layer.keys)
    return size * (rows * total * 4 * layer.query + rows * total * total)


def forward_activations(shape: ModelShape, layer: Layer, run: Run, size: int, tokens: int) -> float:
    """Bytes that live at a time in one layer without gradients: attention or MLP, and the residual."""
    attention = tokens * (4 * layer.query + 2 * layer.keys + 2 * layer.mixer) * size
    feed_forward = tokens * (3 * layer.feed_forward + layer.routed * shape.hidden) * size
    return tokens * 2 * shape.hidden * run.weight_size + max(attention, feed_forward)


def backward_activations(shape: ModelShape, layer: Layer, run: Run, tokens: int) -> float:
    """Bytes of derivatives that live at a time in a layer's backward: those of the MLP's two halves."""
    output = run.weight_size if run.quantized or not run.autocast else MIXED
    widened = FULL * layer.feed_forward if _casts_inputs(run) else 0
    return tokens * (2 * output * max(layer.feed_forward, layer.query, layer.mixer) + widened)


def weight_copies(shape: ModelShape, layer: Layer, run: Run) -> float:
    """Bytes of other versions of a layer's weights that the graph keeps.

    Autocast makes half-precision copies of float32 weights. PEFT adds the adapters of experts to the experts' weights;
    the product and the sum are each as large as these weights.
    """
    adapted = 2 * run.weight_size * layer.experts if run.lora_r and layer.expert_lora else 0
    if run.quantized or not run.autocast or run.weight_size != FULL:
        return adapted
    return adapted + MIXED * (layer.weights + layer.experts)


def row_masks(shape: ModelShape, run: Run, size: int) -> float:
    """Bytes of the masks that all layers share, one mask per kind of attention. Only TRL's padded rows have masks."""
    if run.rows != "none":
        return 0
    return mask_bytes(shape, run.per_device_train_batch_size, run.prompt_length + run.max_completion_length, size)


def mask_bytes(shape: ModelShape, rows: int, length: int, size: int) -> float:
    """Bytes of masks of so many rows and positions, one mask per kind of attention. Eager masks hold numbers."""
    kinds = len({layer.window for layer in shape.layers if layer.query})
    return kinds * rows * length * length * (size if shape.eager else 1)


def distinct_prompts(run: Run) -> int:
    """Distinct prompts in a pass."""
    return -(-run.per_device_train_batch_size // run.num_generations)


def forwarded_tokens(run: Run) -> int:
    """Tokens that go through the layers together."""
    rows = run.per_device_train_batch_size
    prompts = distinct_prompts(run) if run.rows == "shared_prompt" else rows
    return prompts * run.prompt_length + rows * run.max_completion_length
