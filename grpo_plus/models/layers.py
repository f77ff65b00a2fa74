"""What the attention layers of a model say about themselves: which tokens they may look at."""

from typing import Any

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

WINDOWED = "sliding_attention"
LAYER_TYPES = frozenset({"full_attention", WINDOWED})


class UnsupportedLayerError(ValueError):
    """A packed row cannot tell what the tokens of a layer may see."""


def why_not_packed_row(model: PreTrainedModel) -> str | None:
    """Reason why the model's layers cannot take a packed row, whatever computes their attention."""
    if not getattr(model, "_supports_attention_backend", False):
        return "the model does not use transformers' attention interface"
    others = set(getattr(model.config.get_text_config(), "layer_types", None) or ()) - LAYER_TYPES
    if others:
        return f"layers of type {', '.join(sorted(others))} are not attention to a prompt and oneself"
    return None


def window_of(module: nn.Module, kwargs: dict[str, Any]) -> int | None:
    """Number of tokens that a token of this layer sees, itself among them. None for all tokens.

    Args:
        kwargs: what the layer gives its attention function.

    Raises:
        UnsupportedLayerError: the layer has a window that its attention function does not hear of.
    """
    window: int | None = kwargs.get("sliding_window")
    config: PretrainedConfig = module.config
    kinds = getattr(config, "layer_types", None)
    # Without layer types, a window that the attention function does not hear of lives in the mask.
    hidden = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    windowed = kinds[module.layer_idx] == WINDOWED if kinds else hidden
    if window is None and windowed:
        raise UnsupportedLayerError(f"{type(module).__name__} does not tell its attention function the sliding window")
    return window
