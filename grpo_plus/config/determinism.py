"""What a run that shall end with the same bits twice must not do: choose by the clock, or by free memory."""

from typing import TYPE_CHECKING

from grpo_plus.config.speed import AUTO_CHUNKS, AUTO_PASSES

if TYPE_CHECKING:
    from grpo_plus.config.fields import GRPOPlusConfig

# Fields of TRL's that are on or off, with what they let the clock or the free memory decide.
SCHEDULERS = {
    "use_vllm": "vLLM's scheduler decides which completions are computed together",
    "use_transformers_continuous_batching": "the free memory decides which completions are computed together",
    "use_transformers_paged": "the free memory decides which completions are computed together",
}


def fixes_choices(config: "GRPOPlusConfig") -> bool:
    """Whether no choice of ours may depend on the clock or on free memory. `full_determinism` asks for that, too."""
    return config.deterministic or config.full_determinism


def check_determinism(config: "GRPOPlusConfig") -> None:
    """Refuse, by its field, what cannot be repeated to the last bit. Passes whose size memory decides become one."""
    if not isinstance(config.deterministic, bool):
        raise ValueError(f"deterministic={config.deterministic!r} must be True or False.")
    if fixes_choices(config) and config.generation_chunk_size == AUTO_CHUNKS:
        mode = "deterministic" if config.deterministic else "full_determinism"
        raise ValueError(
            f"{mode}=True with generation_chunk_size={AUTO_CHUNKS!r}: the free memory decides which completions are "
            "drawn together, and so what is drawn. Set generation_chunk_size to a number of rows, or leave it unset."
        )
    if fixes_choices(config) and config.max_tokens_per_pass == AUTO_PASSES:
        config.max_tokens_per_pass = None  # the planner and the record of the run read it, too
    if config.deterministic and (reason := why_not_repeatable(config, config.device.type)):
        raise ValueError(f"deterministic=True with {reason}, or leave deterministic unset.")


def why_not_repeatable(config: "GRPOPlusConfig", device: str) -> str | None:
    """Which field of TRL's gives other bits each time, why, and what to set. None where all can be repeated.

    Args:
        device: kind of device that the run computes on.
    """
    for name, reason in SCHEDULERS.items():
        if getattr(config, name):
            return f"{name}=True: {reason}. Set {name}=False"
    if device == "cuda" and config.top_p < 1.0:
        return f"top_p={config.top_p}: torch has no deterministic sum for it on a GPU. Set top_p=1.0, or top_k or min_p"
    return None
