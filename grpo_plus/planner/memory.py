"""Bytes of a GRPO step by phase and cause, from a shape and the settings of a run.

Phases follow each other and free their memory, so a run needs the largest phase, not the sum of phases. The causes
within a phase live together. The facts behind the formulas were read in, or measured on, torch 2.13, transformers 5.23,
peft 0.21, bitsandbytes 0.50 and trl 1.16, on CPUs. `constants` holds what is assumed.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from itertools import groupby

from grpo_plus.planner.activations import (
    attention_activations,
    backward_activations,
    forward_activations,
    forwarded_tokens,
    layer_activations,
    mask_bytes,
    row_masks,
    weight_copies,
)
from grpo_plus.planner.constants import GIB, Constants
from grpo_plus.planner.run import FULL, MIXED, OPTIMIZERS, Run
from grpo_plus.planner.saved_quantization import LORA_R
from grpo_plus.planner.shapes import Layer, ModelShape

PHASES = ("load", "generate", "score", "update", "optimizer")
Bytes = dict[str, float]

# Bytes of a weight in nf4: half a byte, and a scale per block of 64 weights. The scale is a float32. Nested, it has 8
# bits and shares a float32 with 255 other scales.
NF4 = 0.5 + 4 / 64
NF4_NESTED = 0.5 + 1 / 64 + 4 / (64 * 256)


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes by phase and cause. A phase that the run does not have is missing."""

    shape: ModelShape
    run: Run
    constants: Constants
    phases: Mapping[str, Mapping[str, float]]

    def phase(self, name: str) -> float:
        """Bytes of one phase. 0 for a phase that the run does not have."""
        return sum(self.phases.get(name, {}).values())

    @property
    def binding(self) -> str:
        """Phase that needs most."""
        return max(self.phases, key=self.phase)

    @property
    def peak(self) -> float:
        """Bytes that the run needs, which are the bytes of its largest phase."""
        return self.phase(self.binding)

    def fits(self, gpu_bytes: float) -> bool:
        """Whether a card of this size is enough, after the driver took its part."""
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
    """Plan the bytes of each phase of a step on one GPU, for prompts and completions of full length."""
    run, constants = _as_saved(shape, run or Run()), constants or Constants()
    counted = shape.counted if shape.counted is not None and shape.counted.belongs_to(run) else None
    weights = weight_bytes(shape, run) if counted is None else counted.frozen_bytes
    trained = shape.lora(run.lora_r) if run.lora_r else shape.parameters
    trained_bytes: float = trained * (run.adapter_size if run.lora_r else run.weight_size)
    if counted is not None:
        trained, trained_bytes = counted.trained, counted.trained_bytes
    count, state_size = OPTIMIZERS[run.optim]
    always: Bytes = {"context": constants.context_bytes, "weights": weights}
    if run.lora_r:
        always["adapters"] = trained_bytes
    if run.beta and not run.lora_r:  # with LoRA the reference is the model without its adapters
        always["reference model"] = weights
    state: Bytes = {"optimizer state": count * (trained_bytes if state_size is None else trained * state_size)}
    gradients: Bytes = {"gradients": trained_bytes}
    copied = adapter_copies(shape, run)
    if copied and counted is not None:  # of a loaded model with fewer or smaller adapters than on all layers
        copied *= min(1, trained / shape.lora(run.lora_r or 1))
    training = always | state | ({"adapter copies": copied} if copied else {})
    between = training | (gradients if run.generates_within_a_step else {})
    phases: dict[str, Bytes] = {
        "load": always | {"being loaded": _largest_tensor(shape) * run.weight_size},
        "generate": between | _spread(generation_bytes(shape, run, constants), constants),
    }
    if run.scores:
        phases["score"] = between | _spread(scoring_bytes(shape, run, constants), constants)
    phases["update"] = training | gradients | _spread(update_bytes(shape, run, constants), constants)
    # The unfused AdamW works on copies: one list of all denominators.
    copies = trained_bytes if run.optim == "adamw_torch" else 0
    phases["optimizer"] = training | gradients | ({"optimizer copies": copies} if copies else {})
    return MemoryPlan(shape, run, constants, phases)


def _as_saved(shape: ModelShape, run: Run) -> Run:
    """Settings of the run with the quantization that the weights were saved with, which transformers keeps."""
    if shape.saved is None:
        return run
    return replace(run, **asdict(shape.saved), lora_r=run.lora_r or LORA_R)


def _spread(causes: Bytes, constants: Constants) -> Bytes:
    return {cause: size * constants.fragmentation for cause, size in causes.items()}


def weight_bytes(shape: ModelShape, run: Run) -> float:
    """Bytes of the base model.

    bitsandbytes quantizes nn.Linear modules other than the LM head. Embeddings, head, norms and experts stay in
    `dtype`. (transformers 5 keeps experts in plain parameters.) 8 bits have one float32 scale per row.
    """
    if not run.quantized:
        return shape.parameters * run.weight_size
    codes = shape.linear * (NF4_NESTED if run.use_bnb_nested_quant else NF4)
    if run.load_in_8bit:
        codes = shape.linear + FULL * shape.quantized_rows
    return codes + run.weight_size * (shape.parameters - shape.linear)


def adapter_copies(shape: ModelShape, run: Run) -> float:
    """Bytes of what `lora_backend` keeps of the adapters for their products. 0 for TRL's trainer and with a dropout.

    All A and B in autocast's dtype; of adapters that have it already, the A of layers that share an input, stacked.
    """
    if run.lora_r is None or run.packing == "none" or run.lora_dropout:
        return 0
    size = MIXED if run.autocast else run.adapter_size
    adapted = [[linear for linear in layer.linears if linear.adapted] for layer in shape.layers]
    if size != run.adapter_size:
        return run.lora_r * size * sum(linear.inputs + linear.outputs for linears in adapted for linear in linears)
    runs = [list(same) for linears in adapted for _, same in groupby(linears, key=lambda linear: linear.inputs)]
    return run.lora_r * size * sum(linear.inputs for same in runs if len(same) > 1 for linear in same)


def _largest_tensor(shape: ModelShape) -> int:
    """Elements of the largest tensor, which exists twice while it is cast, quantized or, for experts, stacked."""
    linears = (linear.weights for layer in shape.layers for linear in layer.linears)
    return max(shape.embedding, shape.outside_small or 0, *linears, *(layer.experts for layer in shape.layers))


def generation_bytes(shape: ModelShape, run: Run, constants: Constants) -> Bytes:
    """Bytes of generation by transformers, with rows of full length, at the larger of two moments.

    The prefill holds one layer's activations of all prompts. The last step holds the whole cache, the logits, and one
    layer's keys once more, because the cache grows by concatenation.
    """
    rows, prompt, total = run.generated_at_once, run.prompt_length, run.prompt_length + run.max_completion_length
    full = run.weight_size
    # PEFT generates outside autocast. Inside, rotary embeddings in float32 still widen the keys, not the values.
    values = full if run.lora_r or not run.autocast else MIXED
    cache = {length: _cache_elements(shape, length) * rows * (full + values) / 2 for length in (prompt, total)}
    states = sum(layer.state for layer in shape.layers) * rows * FULL
    prefill = max(forward_activations(shape, layer, run, full) for layer in shape.layers) * rows * prompt
    prefill += mask_bytes(shape, rows, prompt, full)
    last = (
        max((layer.cached_per_token * _visible(layer, total) for layer in shape.layers), default=0) // 2 * rows * full
    )
    logits = rows * shape.vocab * (full + constants.sampling_copies * FULL)
    if cache[prompt] + prefill > cache[total] + last + logits:
        return {"KV cache": cache[prompt] + states, "activations": prefill}
    return {"KV cache": cache[total] + states, "activations": last, "logits": logits}


def row_bytes(shape: ModelShape, run: Run) -> float:
    """Bytes of each row that is generated at the same time."""
    constants = Constants()
    one = generation_bytes(shape, replace(run, generation_chunk_size=1), constants)
    return sum(_spread(one, constants).values())


def _visible(layer: Layer, length: int) -> int:
    # transformers' cache keeps window - 1 positions.
    return length if layer.window is None else min(length, layer.window - 1)


def _cache_elements(shape: ModelShape, length: int) -> int:
    """Keys and values of one row."""
    return sum(layer.cached_per_token * _visible(layer, length) for layer in shape.layers)


def scoring_bytes(shape: ModelShape, run: Run, constants: Constants) -> Bytes:
    """Bytes of log-probabilities without gradients, one micro-batch at a time."""
    tokens, scored = forwarded_tokens(run), run.per_device_train_batch_size * run.max_completion_length
    size = MIXED if run.autocast else run.weight_size
    layer = max(forward_activations(shape, layer, run, size) for layer in shape.layers) * tokens
    layer += row_masks(shape, run, size)
    final = tokens * shape.hidden * (run.weight_size + FULL)
    head = _tile(shape, run, scored, constants) + scored * shape.hidden * run.weight_size
    if layer > final + head:
        return {"activations": layer}
    return {"activations": final, "logits": head}


def update_bytes(shape: ModelShape, run: Run, constants: Constants) -> Bytes:
    """Bytes of forward and backward of one micro-batch, without the gradients of weights.

    With checkpointing, the inputs of all layers live while one layer after the other is computed again. Without
    checkpointing, everything lives that the layers save. The head's tiles are gone before the first backward of a
    layer, so the larger of head and layer counts.
    """
    tokens, scored = forwarded_tokens(run), run.per_device_train_batch_size * run.max_completion_length
    inputs = len(shape.layers) * tokens * shape.hidden * run.weight_size
    saved = [tokens * layer_activations(shape, layer, run) * constants.activations
             + attention_activations(shape, layer, run) + weight_copies(shape, layer, run)
             for layer in shape.layers]  # fmt: skip
    backward = max(tokens * backward_activations(shape, layer, run) for layer in shape.layers) + _dequantized(
        shape, run
    )
    masks = row_masks(shape, run, MIXED if run.autocast else run.weight_size)
    kept = inputs + masks if run.gradient_checkpointing else sum(saved) + masks
    layer = (max(saved) if run.gradient_checkpointing else 0) + backward + tokens * shape.hidden * run.weight_size
    final = tokens * shape.hidden * (FULL + 2 * run.weight_size)
    head = final + _head_backward(shape, run, scored, constants)
    if run.lora_r is None and run.weight_size == FULL and run.autocast:
        # Autocast remembers the half-precision copy of each trained weight until the forward ends.
        copies = MIXED * (shape.linear + shape.experts) if run.gradient_checkpointing else 0
        layer = max(layer, copies)
    causes = {"layer inputs" if run.gradient_checkpointing else "saved activations": kept}
    return causes | ({"one layer": layer} if layer >= head else {"logits": head})


def _dequantized(shape: ModelShape, run: Run) -> float:
    """Bytes of the largest quantized weight, dequantized twice: for the product, and once more for its transpose."""
    if not run.quantized:
        return 0
    return 2 * run.weight_size * max((lin.weights for layer in shape.layers for lin in layer.linears), default=0)


def _tile(shape: ModelShape, run: Run, scored: int, constants: Constants) -> float:
    """Bytes of a tile of logits, and of the head's weights for it where these are cast."""
    size = MIXED if run.autocast else run.weight_size
    columns = min(shape.vocab, constants.head_vocab)
    cast = columns * shape.hidden * size if run.weight_size != size else 0
    return min(scored, constants.head_tokens) * columns * size + cast


def _head_backward(shape: ModelShape, run: Run, scored: int, constants: Constants) -> float:
    """Bytes of TRL's head: hidden states of scored positions, their float32 gradient, a tile, a weight that trains."""
    hidden = scored * shape.hidden * (2 * run.weight_size + FULL)
    head_trains = not run.lora_r or (shape.counted is not None and shape.counted.head_trains)
    weight = shape.embedding * (FULL + run.weight_size) if head_trains else 0
    return hidden + _tile(shape, run, scored, constants) + weight
