"""Changes that make a run need less memory, in the order of their cost."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from grpo_plus.planner.largest import resized
from grpo_plus.planner.run import AUTO, Run

Settings = dict[str, Any]


@dataclass(frozen=True)
class Change:
    """A way to need less memory. `settings` gives what to set in a run, or None where that would change nothing."""

    cost: str
    settings: Callable[[Run], Settings | None]


def _packs(run: Run) -> Settings | None:
    return {"packing": "auto"} if run.packing in ("none", "padding_free") else None


def _halves_weights(run: Run) -> Settings | None:
    # Not weights that train: at GRPO's learning rates their updates would round to nothing.
    return {"dtype": "bfloat16"} if run.dtype == "float32" and run.lora_r else None


def _nests(run: Run) -> Settings | None:
    return {"use_bnb_nested_quant": True} if run.load_in_4bit and not run.use_bnb_nested_quant else None


def _chunks(run: Run) -> Settings | None:
    rows = run.generated_at_once
    return {"generation_chunk_size": -(-rows // 2)} if rows > 1 else None


def _checkpoints(run: Run) -> Settings | None:
    return None if run.gradient_checkpointing else {"gradient_checkpointing": True}


def _halves_micro_batch(run: Run) -> Settings | None:
    rows = run.per_device_train_batch_size
    if rows % 2 or run.rows_per_pass == 1:
        return None
    settings = {
        "per_device_train_batch_size": rows // 2,
        "gradient_accumulation_steps": 2 * run.gradient_accumulation_steps,
    }
    return settings | ({"steps_per_generation": 2 * run.steps_per_generation} if run.steps_per_generation else {})


def _drops_dropout(run: Run) -> Settings | None:
    return {"lora_dropout": 0.0} if run.lora_dropout else None


def _shrinks_state(run: Run) -> Settings | None:
    return {"optim": "adamw_8bit"} if run.optim in ("adamw_torch", "adamw_torch_fused", "paged_adamw_32bit") else None


def _drops_reference(run: Run) -> Settings | None:
    return {"beta": 0.0} if run.beta else None


def _adapts(run: Run) -> Settings | None:
    return {"lora_r": 16} if run.lora_r is None else None


def _quantizes(run: Run) -> Settings | None:
    if run.quantized:
        return None
    return {"load_in_4bit": True, "use_bnb_nested_quant": True, "lora_r": run.lora_r or 16, "adapter_dtype": "float32"}


def _tiles(run: Run) -> Settings | None:
    return None if run.tile_tokens or not run.gradient_checkpointing else {"mlp_tile_tokens": AUTO}


def _offloads(run: Run) -> Settings | None:
    if run.offload_activations or not run.gradient_checkpointing:
        return None
    # The host holds the inputs of a whole micro-batch, in however many passes it goes through the model.
    single = resized(run, "per_device_train_batch_size", 1) if run.rows_per_pass == 1 else run
    return {"offload_activations": True} | single.changed_from(run)


def _splits(run: Run) -> Settings | None:
    return {"max_tokens_per_pass": AUTO} if run.rows_per_pass > 1 else None


def _pages_state(run: Run) -> Settings | None:
    return {"optim": "paged_adamw_8bit"} if run.optim in ("adamw_8bit", "adamw_bnb_8bit") else None


# Cheapest first: what costs nothing, then time. The gradients are those of the run without the change.
EXACT = (
    Change("same gradients, faster", _packs),
    Change("same update, more calls of generate", _chunks),
    Change("same gradients, about a third more time in the update", _checkpoints),
    Change("same gradients, MLPs and norms in tiles", _tiles),
    Change("same update in more and smaller micro-batches", _halves_micro_batch),
    Change("same gradients, a further forward of all passes but the last", _splits),
    Change("same gradients, layer inputs wait in the host's memory", _offloads),
)
CHANGES = (
    EXACT[0],
    Change("frozen weights in half precision; adapters stay as they are", _halves_weights),
    Change("dropout belongs off in GRPO: it makes the old policy another one", _drops_dropout),
    Change("a little time to load", _nests),
    Change("optimizer state in 8 bits", _shrinks_state),
    *EXACT[1:],
    Change("optimizer state in the host's memory where the card is full", _pages_state),
    Change("no KL to a reference: changes the loss", _drops_reference),
    Change("trains adapters; in training: --use_peft --lora_target_modules all-linear --lora_dropout 0", _adapts),
    Change("quantizes the frozen weights; in training: --qlora", _quantizes),
)


def leanest(run: Run) -> Run:
    """The run after every exact change, however small what it saves."""
    for change in EXACT:
        while (settings := change.settings(run)) is not None:
            run = replace(run, **settings)
    return run
