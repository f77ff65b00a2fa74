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


def tiled_activations(shape: ModelShape, layer: Layer, run: Run) -> float:
    """Bytes per token that autograd saves in a layer whose MLP and norms go in tiles, without what attention saves.

    A tiled module keeps its input, in the input's dtype. The first norm's is the layer's, which checkpointing keeps.
    """
    output = run.weight_size if run.quantized or not run.autocast else MIXED
    trained_norms = 0 if run.lora_r else (FULL if shape.float_norms else run.weight_size)
    norms = 0 if run.gradient_checkpointing else run.weight_size * shape.hidden
    norms += sum(width * (run.weight_size if width == shape.hidden else output) for width in layer.norms[1:])
    whole = (FULL + trained_norms) * sum(layer.norms) + feed_forward_activations(layer, run)
    return layer_activations(shape, layer, run) - whole + norms


def feed_forward_activations(layer: Layer, run: Run) -> float:
    """Bytes per token of what autograd saves inside the MLP, its input aside: two halves, their gate, their product."""
    output = run.weight_size if run.quantized or not run.autocast else MIXED
    taken = MIXED if run.autocast else (run.adapter_size if run.lora_r else run.weight_size)
    dropped = layer.feed_forward if run.lora_dropout else 0
    return layer.feed_forward * (3 * output + taken) + dropped


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
    rows, prompt, completion = run.rows_per_pass, run.prompt_length, run.max_completion_length
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


def forward_activations(
    shape: ModelShape, layer: Layer, run: Run, size: int, *, tokens: int, in_mlp: int | None = None
) -> float:
    """Bytes that live at a time in one layer without gradients: attention or MLP, and the residual.

    Args:
        in_mlp: tokens that are in the MLP at a time. None: all.
    """
    attention = tokens * (4 * layer.query + 2 * layer.keys + 2 * layer.mixer) * size
    in_mlp = tokens if in_mlp is None else in_mlp
    feed_forward = (in_mlp * 3 * layer.feed_forward + tokens * layer.routed * shape.hidden) * size
    return tokens * 2 * shape.hidden * run.weight_size + max(attention, feed_forward)


def mlp_derivatives(layer: Layer, run: Run) -> float:
    """Bytes per token of derivatives in the backward of the MLP: of its two halves."""
    output = run.weight_size if run.quantized or not run.autocast else MIXED
    return (2 * output + (FULL if _casts_inputs(run) else 0)) * layer.feed_forward


def norm_derivatives(shape: ModelShape, layer: Layer, run: Run) -> tuple[float, float]:
    """Bytes per token at the backward of the norm before the MLP, and at the backward of the widest norm in attention.

    A norm's backward has five float32 tensors of the norm's width at a time. The first figure comes on top of what the
    layer saves without its MLP. The second is all that lives then: the layer's normed input, and the norm's own input.
    """
    size = MIXED if run.autocast else run.weight_size
    widest = max(layer.norms, default=0)
    before_mlp = (5 * FULL + run.weight_size) * shape.hidden
    in_attention = (FULL + 2 * run.weight_size) * shape.hidden + (6 * FULL + size) * widest
    return before_mlp, in_attention


def attention_derivatives(shape: ModelShape, layer: Layer, run: Run) -> float:
    """Bytes per token of derivatives in the backward of attention: of its output, queries, keys, values, and input."""
    output = run.weight_size if run.quantized or not run.autocast else MIXED
    return output * 2 * (max(layer.query, layer.mixer) + layer.keys) + 2 * run.weight_size * shape.hidden


def tiled_tokens(layer: Layer, run: Run, tokens: int) -> int:
    """Tokens that are in the layer's MLP at a time. Routed experts take all."""
    return tokens if layer.routed or run.tile_tokens is None else min(run.tile_tokens, tokens)


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
    return mask_bytes(shape, run.rows_per_pass, run.prompt_length + run.max_completion_length, size)


def mask_bytes(shape: ModelShape, rows: int, length: int, size: int) -> float:
    """Bytes of masks of so many rows and positions, one mask per kind of attention. Eager masks hold numbers."""
    kinds = len({layer.window for layer in shape.layers if layer.query})
    return kinds * rows * length * length * (size if shape.eager else 1)


def distinct_prompts(run: Run) -> int:
    """Distinct prompts in a pass."""
    return -(-run.rows_per_pass // run.num_generations)


def forwarded_tokens(run: Run) -> int:
    """Tokens that go through the layers together."""
    return run.tokens_of(run.rows_per_pass)
