"""Bytes of a GRPO step by phase and cause: arithmetic on a shape and the run's settings.

Phases follow each other and free what they leave, so a run needs the largest of them, not their sum. Within a phase
the causes are alive together. The facts behind the formulas were read in, or measured on, torch 2.13, transformers
5.23, peft 0.21, bitsandbytes 0.50 and trl 1.16, on CPUs; what is assumed is in `constants`.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from grpo_plus.planner.constants import GIB, Constants
from grpo_plus.planner.run import OPTIMIZERS, Run
from grpo_plus.planner.shapes import Layer, Linear, ModelShape

PHASES = ("load", "generate", "score", "update", "optimizer")
Bytes = dict[str, float]

# Bytes of a weight in nf4: half a byte, and a scale per block of 64: float32, or 8 bits with a float32 per 256 of them.
NF4 = 0.5 + 4 / 64
NF4_NESTED = 0.5 + 1 / 64 + 4 / (64 * 256)
MIXED = 2  # bytes of an element under autocast, in either half precision
FULL = 4  # float32


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes by phase and cause. A phase that the run does not have is missing."""

    shape: ModelShape
    run: Run
    constants: Constants
    phases: Mapping[str, Mapping[str, float]]

    def phase(self, name: str) -> float:
        """Bytes of one phase; 0 for one that the run does not have."""
        return sum(self.phases.get(name, {}).values())

    @property
    def binding(self) -> str:
        """The phase that needs most."""
        return max(self.phases, key=self.phase)

    @property
    def peak(self) -> float:
        """Bytes that the run needs: those of its largest phase."""
        return self.phase(self.binding)

    def fits(self, gpu_bytes: float) -> bool:
        """Whether a card of this size is enough, with what the driver keeps of it."""
        return self.peak <= gpu_bytes - self.constants.unusable_bytes

    def table(self) -> str:
        """Phases as columns, causes as rows, in GiB."""
        names = list(dict.fromkeys(cause for causes in self.phases.values() for cause in causes))
        width = max(map(len, names))
        lines = [" ".join([f"{'GiB':<{width}}", *(f"{phase:>9}" for phase in self.phases)])]
        for name in names:
            cells = (f"{causes[name] / GIB:9.2f}" if name in causes else " " * 9 for causes in self.phases.values())
            lines.append(" ".join([f"{name:<{width}}", *cells]))
        totals = (f"{self.phase(phase) / GIB:9.2f}" for phase in self.phases)
        lines.append(" ".join([f"{'sum':<{width}}", *totals]))
        lines.append(f"peak: {self.peak / GIB:.2f} GiB, in {self.binding}")
        return "\n".join(line.rstrip() for line in lines)


def plan(shape: ModelShape, run: Run | None = None, *, constants: Constants | None = None) -> MemoryPlan:
    """Bytes of each phase of a step on one GPU, where prompts and completions have their full length."""
    run, constants = run or Run(), constants or Constants()
    weights = weight_bytes(shape, run)
    trained = shape.lora(run.lora_r) if run.lora_r else shape.parameters
    size = run.adapter_size if run.lora_r else run.weight_size
    count, state_size = OPTIMIZERS[run.optim]
    always: Bytes = {"context": constants.context_bytes, "weights": weights}
    if run.lora_r:
        always["adapters"] = trained * size
    if run.beta and not run.lora_r:  # with LoRA the reference is the model without its adapters
        always["reference model"] = weights
    state: Bytes = {"optimizer state": trained * count * (size if state_size is None else state_size)}
    gradients: Bytes = {"gradients": trained * size}
    phases: dict[str, Bytes] = {
        "load": always | {"being loaded": _largest_tensor(shape) * run.weight_size},
        "generate": always | state | _spread(generation_bytes(shape, run, constants), constants),
    }
    if run.scores:
        phases["score"] = always | state | _spread(scoring_bytes(shape, run, constants), constants)
    phases["update"] = always | state | gradients | _spread(update_bytes(shape, run, constants), constants)
    # The unfused AdamW works on copies: one list of all denominators.
    copies = trained * size if run.optim == "adamw_torch" else 0
    phases["optimizer"] = always | state | gradients | ({"optimizer copies": copies} if copies else {})
    return MemoryPlan(shape, run, constants, phases)


def _spread(causes: Bytes, constants: Constants) -> Bytes:
    return {cause: size * constants.fragmentation for cause, size in causes.items()}


def weight_bytes(shape: ModelShape, run: Run) -> float:
    """Bytes of the base model.

    nf4 quantizes nn.Linear modules other than the LM head: embeddings, head, norms and experts (which transformers 5
    keeps in plain parameters) stay in `dtype`.
    """
    if not run.load_in_4bit:
        return shape.parameters * run.weight_size
    return shape.linear * (NF4_NESTED if run.use_bnb_nested_quant else NF4) + run.weight_size * (
        shape.parameters - shape.linear
    )


def _largest_tensor(shape: ModelShape) -> int:
    """Elements that exist twice while they are cast, quantized or, of experts, stacked."""
    linears = (linear.weights for layer in shape.layers for linear in layer.linears)
    return max(shape.embedding, *linears, *(layer.experts for layer in shape.layers))


def generation_bytes(shape: ModelShape, run: Run, constants: Constants) -> Bytes:
    """Generation by transformers, its rows to the full length, in the larger of its two moments.

    Prefill: one layer's activations of all prompts. The last step: the whole cache, one layer's keys twice (the cache
    grows by concatenation) and the logits.
    """
    rows, prompt, total = run.generated_at_once, run.prompt_length, run.prompt_length + run.max_completion_length
    full = run.weight_size
    # PEFT generates outside autocast. Inside, rotary embeddings in float32 still widen the keys, not the values.
    values = full if run.lora_r or not run.bf16 else MIXED
    cache = {length: _cache_elements(shape, length) * rows * (full + values) / 2 for length in (prompt, total)}
    states = sum(layer.state for layer in shape.layers) * rows * FULL
    prefill = max(forward_activations(shape, layer, run, full) for layer in shape.layers) * rows * prompt
    prefill += _mask_bytes(shape, rows, prompt, full)
    last = max((layer.keys * _visible(layer, total) for layer in shape.layers), default=0) * rows * full
    logits = rows * shape.vocab * (full + constants.sampling_copies * FULL)
    if cache[prompt] + prefill > cache[total] + last + logits:
        return {"KV cache": cache[prompt] + states, "activations": prefill}
    return {"KV cache": cache[total] + states, "activations": last, "logits": logits}


def _visible(layer: Layer, length: int) -> int:
    # transformers' cache keeps window - 1 positions.
    return length if layer.window is None else min(length, layer.window - 1)


def _cache_elements(shape: ModelShape, length: int) -> int:
    """Keys and values of one row."""
    return sum(2 * layer.keys * _visible(layer, length) for layer in shape.layers)


def scoring_bytes(shape: ModelShape, run: Run, constants: Constants) -> Bytes:
    """Log-probabilities without gradients, of a micro-batch at a time."""
    tokens, scored = _tokens(run), run.per_device_train_batch_size * run.max_completion_length
    size = MIXED if run.bf16 else run.weight_size
    layer = max(forward_activations(shape, layer, run, size) for layer in shape.layers) * tokens
    layer += _masks(shape, run, size)
    final = tokens * shape.hidden * (run.weight_size + FULL)
    head = _tile(shape, run, scored, constants) + scored * shape.hidden * run.weight_size
    if layer > final + head:
        return {"activations": layer}
    return {"activations": final, "logits": head}


def forward_activations(shape: ModelShape, layer: Layer, run: Run, size: int) -> float:
    """Bytes per token alive at a time in one layer without gradients: its attention or its MLP, and the residual."""
    attention = (4 * layer.query + 2 * layer.keys + 2 * layer.mixer) * size
    feed_forward = (3 * layer.feed_forward + layer.routed * shape.hidden) * size
    return 2 * shape.hidden * run.weight_size + max(attention, feed_forward)


def update_bytes(shape: ModelShape, run: Run, constants: Constants) -> Bytes:
    """Forward and backward of one micro-batch, gradients aside.

    With checkpointing, every layer's input lives until one layer after the other is computed again; without, all that
    the layers save. The head's tiles are gone before the first layer's backward, so the larger of the two counts.
    """
    tokens, scored = _tokens(run), run.per_device_train_batch_size * run.max_completion_length
    inputs = len(shape.layers) * tokens * shape.hidden * run.weight_size
    saved = [tokens * layer_activations(shape, layer, run) * constants.activations
             + attention_activations(shape, layer, run) + weight_copies(shape, layer, run)
             for layer in shape.layers]  # fmt: skip
    backward = max(tokens * backward_activations(shape, layer, run) for layer in shape.layers) + _dequantized(
        shape, run
    )
    masks = _masks(shape, run, MIXED if run.bf16 else run.weight_size)
    kept = inputs + masks if run.gradient_checkpointing else sum(saved) + masks
    layer = (max(saved) if run.gradient_checkpointing else 0) + backward + tokens * shape.hidden * run.weight_size
    final = tokens * shape.hidden * (FULL + 2 * run.weight_size)
    head = final + _head_backward(shape, run, scored, constants)
    if run.lora_r is None and run.weight_size == FULL and run.bf16:
        # Autocast remembers the half-precision copy of each trained weight until the forward ends.
        copies = MIXED * (shape.linear + shape.experts) if run.gradient_checkpointing else 0
        layer = max(layer, copies)
    causes = {"layer inputs" if run.gradient_checkpointing else "saved activations": kept}
    return causes | ({"one layer": layer} if layer >= head else {"logits": head})


def layer_activations(shape: ModelShape, layer: Layer, run: Run) -> float:
    """Bytes per token that autograd saves in one layer, but for what attention saves.

    Norms keep their input in float32 (and, trained, what they scale); the MLP its two halves and their gate; a linear
    layer with an adapter, or trained, its input. That input is one tensor for all that read it, unless each casts it
    for itself: from a float32 residual under autocast, and as PEFT does for float32 adapters on a base that is not
    quantized. Dropout gives each its own, too.
    """
    output = run.weight_size if run.load_in_4bit or not run.bf16 else MIXED
    taken = MIXED if run.bf16 else (run.adapter_size if run.lora_r else run.weight_size)
    apart = (run.bf16 and run.weight_size == FULL) or _casts_inputs(run) or run.lora_dropout > 0
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
    return run.lora_r is not None and not run.load_in_4bit and run.adapter_size == FULL


def _shared_inputs(layer: Layer) -> int:
    """Widths of the distinct inputs of the layer's linear modules; the output projection reads what attention saved."""
    distinct: dict[bool, Linear] = {}
    mixer = [linear for linear in layer.linears if not _is_feed_forward(linear)]
    feed_forward = [linear for linear in layer.linears if _is_feed_forward(linear)]
    distinct[True] = mixer[0]
    return distinct[True].inputs + (feed_forward[0].inputs + feed_forward[-1].inputs if feed_forward else 0)


def _is_feed_forward(linear: Linear) -> bool:
    return linear.name in ("gate_proj", "up_proj", "gate_up_proj", "down_proj")


def attention_activations(shape: ModelShape, layer: Layer, run: Run) -> float:
    """Bytes that the attention of one layer saves for a micro-batch.

    Fused attention saves queries, keys, values and its output. Where it has a mask, transformers repeats keys and
    values for every query head, and torch turns the mask from booleans into numbers, per layer. Completions that share
    a prompt each get a copy of its keys and values. Eager attention saves the softmax twice: float32, and cast.
    """
    size = MIXED if run.bf16 else run.weight_size
    rows, prompt, completion = run.per_device_train_batch_size, run.prompt_length, run.max_completion_length
    total = prompt + completion
    if not layer.query:
        return 0
    if shape.eager:
        spans = rows * total * total if run.rows != "shared_prompt" else rows * completion * total + prompt * prompt
        return spans * shape.heads * (FULL + size) + rows * total * 4 * layer.query * size
    if run.rows == "shared_prompt":
        prompts = _prompts(run) * prompt * 2 * (layer.query + layer.keys)
        return size * (prompts + rows * layer.query * (2 * completion + 2 * total) + completion * total)
    if run.rows == "padding_free":
        return size * rows * total * 2 * (layer.query + layer.keys)
    return size * (rows * total * 4 * layer.query + rows * total * total)


def _masks(shape: ModelShape, run: Run, size: int) -> float:
    """Bytes of the masks that all layers share, one for each kind of attention: TRL's rows have them."""
    if run.rows != "none":
        return 0
    return _mask_bytes(shape, run.per_device_train_batch_size, run.prompt_length + run.max_completion_length, size)


def _mask_bytes(shape: ModelShape, rows: int, length: int, size: int) -> float:
    kinds = len({layer.window for layer in shape.layers if layer.query})
    return kinds * rows * length * length * (size if shape.eager else 1)


def backward_activations(shape: ModelShape, layer: Layer, run: Run) -> float:
    """Bytes per token of derivatives alive at a time in a layer's backward: those of the MLP's two halves."""
    output = run.weight_size if run.load_in_4bit or not run.bf16 else MIXED
    widened = FULL * layer.feed_forward if _casts_inputs(run) else 0
    return 2 * output * max(layer.feed_forward, layer.query, layer.mixer) + widened


def weight_copies(shape: ModelShape, layer: Layer, run: Run) -> float:
    """Bytes of other versions of a layer's weights that the graph keeps.

    Autocast makes half-precision copies of float32 weights. PEFT adds the adapters of experts to their weights: the
    product and the sum are as large as these.
    """
    adapted = 2 * run.weight_size * layer.experts if run.lora_r and layer.expert_lora else 0
    if run.load_in_4bit or not run.bf16 or run.weight_size != FULL:
        return adapted
    return adapted + MIXED * (layer.weights + layer.experts)


def _dequantized(shape: ModelShape, run: Run) -> float:
    """The largest nf4 weight, dequantized twice: to multiply by, and once more as it is transposed."""
    if not run.load_in_4bit:
        return 0
    return 2 * run.weight_size * max(linear.weights for layer in shape.layers for linear in layer.linears)


def _tile(shape: ModelShape, run: Run, scored: int, constants: Constants) -> float:
    """A tile of logits, and the weights that it is made with where they are cast."""
    size = MIXED if run.bf16 else run.weight_size
    columns = min(shape.vocab, constants.head_vocab)
    cast = columns * shape.hidden * size if run.weight_size != size else 0
    return min(scored, constants.head_tokens) * columns * size + cast


def _head_backward(shape: ModelShape, run: Run, scored: int, constants: Constants) -> float:
    """TRL's head: hidden states of the scored positions, their gradient in float32, a tile; what trains."""
    hidden = scored * shape.hidden * (2 * run.weight_size + FULL)
    weight = 0 if run.lora_r else shape.embedding * (FULL + run.weight_size)
    return hidden + _tile(shape, run, scored, constants) + weight


def _prompts(run: Run) -> int:
    """Distinct prompts in a micro-batch."""
    return -(-run.per_device_train_batch_size // run.num_generations)


def _tokens(run: Run) -> int:
    """Tokens of a micro-batch that go through the layers."""
    rows = run.per_device_train_batch_size
    prompts = _prompts(run) if run.rows == "shared_prompt" else rows
    return prompts * run.prompt_length + rows * run.max_completion_length
