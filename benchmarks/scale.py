"""What a step costs on 8 and on 64 GPUs, by the planner's arithmetic: memory of a GPU, bytes on the wire, operations.

python -m benchmarks.scale

Nothing is measured here. `python -m tests.readme` writes the tables into docs/scale.md, where the assumptions stand.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from benchmarks.memory_run import MODELS, QWEN3
from grpo_plus.planner import QLORA, ModelShape, Run, plan, shape_of
from grpo_plus.planner.constants import GIB

CONFIGS = {name: MODELS[name] for name in ("Qwen3-8B", "Llama-3.1-8B")} | {
    "Qwen3-32B": QWEN3
    | {
        "hidden_size": 5120,
        "intermediate_size": 25600,
        "num_attention_heads": 64,
        "num_hidden_layers": 64,
        "tie_word_embeddings": False,
    },
    "Llama-3.1-70B": MODELS["Llama-3.1-8B"]
    | {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_hidden_layers": 80},
}
GPUS = (8, 64)
HALF, SINGLE = 2, 4  # bytes of bfloat16 and of float32

LORA = Run(max_completion_length=1024, dtype="bfloat16", lora_r=16)
TRAINS = {
    "LoRA on nf4": replace(LORA, **QLORA),
    "LoRA": LORA,
    "all weights": replace(LORA, dtype="float32", lora_r=None),
}

# Bytes per second that a GPU sends, by what connects the GPUs.
NODE = {"NVLink": 450e9, "PCIe 4.0": 32e9}
NETWORK = {"400 Gb/s for each": 50e9, "25 Gb/s for each": 3.125e9}
FLOPS, READS = 400e12, 3.35e12  # operations per second of an H100 at 40 % of its peak, and bytes that it reads


@dataclass(frozen=True)
class Engine:
    """How an engine lays a training out over n processes.

    Attributes:
        spread: causes of the planner's memory of which a process keeps 1/n.
        trained: bytes by cause of a weight, where all weights train and the forward sees them in bfloat16. None: they
            train as the planner has it, in float32 under autocast.
        reduced: bytes of a gradient on the wire.
        buckets: whether gradients are copied for their reduction.
    """

    name: str
    spread: tuple[str, ...] = ()
    trained: Mapping[str, int] | None = None
    reduced: int = HALF
    buckets: bool = False

    @property
    def gathers(self) -> bool:
        """Whether a layer's weights are gathered when it is called."""
        return "weights" in self.spread


STATE, GRADIENTS, WEIGHTS = ("optimizer state", "optimizer copies"), ("gradients",), ("weights", "adapters")
# DeepSpeed keeps a float32 copy of a weight beside Adam's two states. FSDP2 keeps all in float32.
DEEPSPEED = {"weights": HALF, "gradients": HALF, "optimizer state": 3 * SINGLE}
FLOAT32 = {"weights": SINGLE, "gradients": SINGLE, "optimizer state": 2 * SINGLE}
ENGINES = (
    Engine("DDP", reduced=SINGLE, buckets=True),
    Engine("ZeRO-1", STATE, DEEPSPEED),
    Engine("ZeRO-2", STATE + GRADIENTS, DEEPSPEED),
    Engine("ZeRO-3", STATE + GRADIENTS + WEIGHTS, DEEPSPEED),
    Engine("FSDP2", STATE + GRADIENTS + WEIGHTS, FLOAT32),
)
WHOLE, SPREAD = ENGINES[0], ENGINES[-1]


def cases() -> Iterator[tuple[str, ModelShape, Run]]:
    """Every model with every way to train."""
    for model, config in CONFIGS.items():
        for trains, run in TRAINS.items():
            yield f"{model}, {trains}", shape_of(config), run


def unquantized() -> Iterator[tuple[str, ModelShape, Run]]:
    """The cases in which all weights are numbers."""
    return (case for case in cases() if not case[2].quantized)


def update_memory(shape: ModelShape, run: Run, engine: Engine, gpus: int) -> float:
    """Bytes of a GPU at the fullest moment of an update or an optimizer's step."""
    trained = engine.trained if engine.trained and not run.lora_r else {}
    if trained:
        run = replace(run, dtype="bfloat16")
    if engine.gathers:  # such an engine takes a micro-batch in one pass, without tiles of ours
        run = replace(run, max_tokens_per_pass=None, mlp_tile_tokens=None)
    planned, shares = plan(shape, run), dict.fromkeys(engine.spread, 1 / gpus)
    known = {cause: size * shape.parameters for cause, size in trained.items()}
    phases = [planned.phases[name] | known for name in ("update", "optimizer")]
    fullest = max(sum(size * shares.get(cause, 1) for cause, size in phase.items()) for phase in phases)
    gathered = _gathered(shape) if engine.gathers else 0
    return fullest + gathered + (phases[0]["gradients"] if engine.buckets else 0)


def _gathered(shape: ModelShape) -> float:
    """Bytes of the weights that are whole at a time: embedding and head, a layer, and the layer after it."""
    layer = max(layer.weights for layer in shape.layers)
    return HALF * (shape.embedding + shape.head + 2 * layer)


def trained(shape: ModelShape, run: Run) -> int:
    """Weights that train."""
    return shape.lora(run.lora_r) if run.lora_r else shape.parameters


def sent(shape: ModelShape, run: Run, engine: Engine, gpus: int) -> float:
    """Bytes that a GPU sends in a step of one micro-batch, in rings.

    Whole weights: gradients are reduced and handed back. Spread weights: gathered in the forward and in the backward,
    and gradients are reduced.
    """
    others = (gpus - 1) / gpus
    if engine.gathers:
        return others * (2 * HALF * shape.parameters + engine.reduced * trained(shape, run))
    return others * 2 * engine.reduced * trained(shape, run)


def operations(shape: ModelShape, run: Run) -> float:
    """Floating-point operations of an update of a GPU's rows: forward, the layers again, and the backward.

    A product takes two operations per weight and token, attention four per width of the queries and pair of tokens. The
    backward of weights that train takes as much once more.
    """
    rows, prompt, completion = run.per_device_train_batch_size, run.prompt_length, run.max_completion_length
    prompts = rows // run.num_generations if run.rows == "shared_prompt" else rows
    pairs = prompts * prompt**2 / 2 + rows * (completion * prompt + completion**2 / 2)
    products = shape.linear * run.tokens_of(rows) + shape.head * rows * completion
    attention = sum(layer.query for layer in shape.layers) * pairs
    passes = 3 if run.lora_r else 4
    return passes * (2 * products + 4 * attention)


def memory_rows() -> list[tuple[str, ...]]:
    """Memory of an update, in GiB, on 8 and on 64 GPUs."""
    header = ("GiB of a GPU, on 8 and on 64 GPUs", *(engine.name for engine in ENGINES))
    rows = [(name, *(_memory(shape, run, engine) for engine in ENGINES)) for name, shape, run in cases()]
    return [header, *rows]


def _memory(shape: ModelShape, run: Run, engine: Engine) -> str:
    if run.quantized and engine.gathers:
        return "not counted"
    found = [f"{update_memory(shape, run, engine, gpus) / GIB:,.0f}" for gpus in GPUS]
    return ", ".join(dict.fromkeys(found))


def wire_rows() -> list[tuple[str, ...]]:
    """Gigabytes that a GPU sends in a step, and seconds by what connects the GPUs."""
    node, many = GPUS
    links = [(f"{node} GPUs, {name}", node, speed) for name, speed in NODE.items()]
    links += [(f"{many} GPUs, {name}", many, speed) for name, speed in NETWORK.items()]
    rows = [("a step sends", "engine", f"by a GPU of {many}", *(name for name, *_ in links))]
    for name, shape, run in unquantized():
        for engine, title in ((WHOLE, "DDP"), (SPREAD, "FSDP2, ZeRO-3")):
            seconds = (_seconds(sent(shape, run, engine, gpus) / speed) for _, gpus, speed in links)
            rows.append((name, title, f"{sent(shape, run, engine, many) / 1e9:.2f} GB", *seconds))
    return rows


def compute_rows() -> list[tuple[str, ...]]:
    """Operations of an update with padded and with shared prompts, and the least seconds of generation."""
    header = (
        "a GPU's 8 completions of one prompt", "update, padded", "update, shared prompt", "generation, whole weights",
        "gathered for each token, NVLink", "gathered for each token, 400 Gb/s",
    )  # fmt: skip
    rows = []
    for name, shape, run in unquantized():
        counts = [operations(shape, replace(run, packing=packing)) for packing in ("none", "shared_prompt")]
        updates = [f"{count / 1e15:.1f} PFLOP, {_seconds(count / FLOPS)}" for count in counts]
        reads = run.max_completion_length * HALF * shape.parameters
        links = [(GPUS[0], NODE["NVLink"]), (GPUS[1], NETWORK["400 Gb/s for each"])]
        gathers = [_seconds(reads * (gpus - 1) / gpus / speed) for gpus, speed in links]
        rows.append((name, *updates, _seconds(reads / READS), *gathers))
    return [header, *rows]


def _seconds(seconds: float) -> str:
    return f"{seconds:,.0f} s" if seconds >= 10 else f"{seconds:.1f} s" if seconds >= 0.1 else f"{seconds:.3f} s"


def main() -> None:
    """Print the tables."""
    for rows in (memory_rows(), wire_rows(), compute_rows()):
        print(*(" | ".join(row) for row in rows), "", sep="\n")


if __name__ == "__main__":
    main()
