"""The shape of a model from its config: by a row, or off the model that transformers builds."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from grpo_plus.planner.built import built_shape
from grpo_plus.planner.families import shape_by_row
from grpo_plus.planner.saved_quantization import quantization_of
from grpo_plus.planner.shapes import ModelShape


def shape_of(config: Mapping[str, Any], *, name: str = "config") -> ModelShape:
    """Get the shape that a config describes.

    A size that the config leaves out is the default of the config's class in transformers.

    Raises:
        ValueError: neither the planner nor transformers knows the architecture, or the config cannot be read.
    """
    if config.get("model_type") is None:
        raise ValueError(f"The config of {name!r} has no model_type. Fetch the model's config.json again.")
    quantization = quantization_of(config, name)
    shape = shape_by_row(config, name) if set(quantization.skipped or ()) <= {"lm_head"} else None
    if shape is None:
        shape = built_shape(config, name, skipped=quantization.skipped)
    text = config.get("text_config") or config
    return replace(
        shape,
        positions=text.get("max_position_embeddings"),
        saved=quantization.saved,
        notes=shape.notes + quantization.notes,
    )
