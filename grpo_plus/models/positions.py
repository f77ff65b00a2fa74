"""Position embeddings of a model."""

from typing import Any

from transformers import PreTrainedModel

RESCALED = ("longrope", "dynamic")


def rescaled_from(model: PreTrainedModel) -> float:
    """Row length from which on a model's position frequencies depend on the longest row. Infinite where they never do.

    Beyond this length another batch of the same rows has other positions. A packed row, a pass through the cache and a
    batch that rows have left are such batches.
    """
    config: Any = model.config.get_text_config()
    rope: Any = getattr(config, "rope_parameters", None) or {}
    kinds = [kind for kind in (rope, *rope.values()) if isinstance(kind, dict) and kind.get("rope_type") in RESCALED]
    lengths = [kind.get("original_max_position_embeddings") or config.max_position_embeddings for kind in kinds]
    return min(lengths, default=float("inf"))
