"""Bytes of a GRPO step by phase and cause, from a shape and the settings of a run.

Phases follow each other and free their memory, so a run needs the largest phase, not the sum of phases. The causes
within a phase live together. The facts behind the formulas were read in, or measured on, torch 2.13, transformers 5.23,
peft 0.21, bitsandbytes 0.50 and trl 1.16, on CPUs. `constants` holds what is assumed.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace

from grpo_plus.planner.constants import GIB, Bytes, Constants
from grpo_plus.planner.generation import generation_bytes
from grpo_plus.planner.run import FULL, Run
from grpo_plus.planner.saved_quantization import LORA_R
from grpo_plus.planner.shapes import ModelShape
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

    Attributes:
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
