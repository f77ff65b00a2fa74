"""Bytes of a GRPO step by phase and cause, from a shape and the settings of a run.

Phases follow each other and free their memory, so a run needs the largest phase, not the sum of phases. The causes
within a phase live together. The facts behind the formulas were read in, or measured on, torch 2.13, transformers 5.23,
peft 0.21, bitsandbytes 0.50 and trl 1.16, on CPUs. `constants` holds what is assumed.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace

from grpo_plus.planner.activations import forward_activations, mask_bytes
from grpo_plus.planner.constants import GIB, Bytes, Constants
from grpo_plus.planner.run import FULL, MIXED, Run
from grpo_plus.planner.saved_quantization import LORA_R
from grpo_plus.planner.shapes import Layer, ModelShape
from grpo_plus.planner.trained import largest_tensor, trained_bytes
from grpo_plus.planner.update import host_inputs, scoring_bytes, update_bytes

PHASES = ("load", "generate", "score", "update", "optimizer")

# Bytes of a weight in nf4: half a byte, and a scale per block of 64 weights. The scale is a float32. Nested, it has 8
# bits and shares a float32 with 255 other scales.
NF4 = 0.5 + 4 / 64
NF4_NESTED = 0.5 + 1 / 64 + 4 / (64 * 256)


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes by phase and cause. A phase that the run does not have is missing.

    on_host: bytes of the host's memory by cause, of what the run keeps off the card.
    """

    shape: ModelShape
    run: Run
    constants: Constants
    phases: Mapping[str, Mapping[str, float]]
    on_host: Mapping[str, float]

    @property
    def host(self) -> float:
        """Bytes of the host's memory that the run needs for what it keeps off the card."""
        return sum(self.on_host.values())

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
        lines += [f"on the host: {size / GIB:.2f} GiB of {cause}" for cause, size in self.on_host.items()]
        return "\n".join(line.rstrip() for line in lines)


def plan(shape: ModelShape, run: Run | None = None, *, constants: Constants | None = None) -> MemoryPlan:
    """Plan the bytes of each phase of a step on one GPU, for prompts and completions of full length."""
    run, constants = _as_saved(shape, run or Run()), constants or Constants()
    counted = shape.counted if shape.counted is not None and shape.counted.belongs_to(run) else None
    weights = weight_bytes(shape, run) if counted is None else counted.frozen_bytes
    trained = trained_bytes(shape, run, counted)
    always: Bytes = {"context": constants.context_bytes, "weights": weights}
    if run.lora_r:
        always["adapters"] = trained.size
    if run.beta and not run.lora_r:  # with LoRA the reference is the model without its adapters
        always["reference model"] = weights
    training = always | {"optimizer state": trained.state} | _present({"adapter copies": trained.copies})
    gradients: Bytes = {"gradients": trained.size}
    between = training | (gradients if run.generates_within_a_step else {})
    phases: dict[str, Bytes] = {
        "load": always | {"being loaded": largest_tensor(shape) * run.weight_size},
        "generate": between | _spread(generation_bytes(shape, run, constants), constants),
    }
    if run.scores:
        phases["score"] = between | _spread(scoring_bytes(shape, run, constants), constants)
    phases["update"] = training | gradients | _spread(update_bytes(shape, run, constants), constants)
    phases["optimizer"] = training | gradients | _present({"optimizer copies": trained.stepping})
    on_host = {"layer inputs": host_inputs(shape, run), "optimizer state": trained.paged}
    return MemoryPlan(shape, run, constants, phases, _present(on_host))


def _present(causes: Bytes) -> Bytes:
    return {cause: size for cause, size in causes.items() if size}


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
    prefill = max(forward_activations(shape, layer, run, full, tokens=rows * prompt) for layer in shape.layers)
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
