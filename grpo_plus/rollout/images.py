"""Images in a rollout: read once for each distinct prompt, by the encoder that transformers calls before a loop."""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from grpo_plus.models.pictures import PIXELS, TOKEN_TYPES, Pictures

ENCODED = "mm_encoder_outputs"
LAID_OUT_BY_ROW = {"input_ids", "attention_mask", "position_ids", *TOKEN_TYPES}

ByRow = Callable[[Mapping[str, Tensor]], Pictures | str]  # tensors of images -> by row, or the reason why not


def image_arguments(arguments: Mapping[str, Any]) -> dict[str, Tensor]:
    """The arguments of `generate` that images are made of. Empty where there are no images."""
    if arguments.get(PIXELS) is None:
        return {}
    tensors = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
    return {name: value for name, value in tensors.items() if name not in LAID_OUT_BY_ROW}


def without_images(arguments: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    """What is laid out by row, out of the arguments that `generate` has prepared. `names` are those of the images."""
    left = {name: value for name, value in arguments.items() if name not in names}
    if not left.get(ENCODED):
        left.pop(ENCODED, None)
    return left


def encoded(
    model: PreTrainedModel, input_ids: Tensor, arguments: dict[str, Any], images: dict[str, Tensor]
) -> dict[str, Any]:
    """The arguments of some rows with their images, encoded as `generate` does it: outside of the model's forward."""
    if not images:
        return arguments
    seen: dict[str, Any] = arguments | images
    config = model.generation_config  # which is read for encoder-decoders alone
    return model._maybe_prepare_encoder_kwargs_for_generation(input_ids, seen, "input_ids", config)


@contextmanager
def offsets_kept(model: nn.Module) -> Iterator[None]:
    """Put back what Qwen's models keep of the rows of their last call: how far images move the positions of tokens."""
    kept = [(module, vars(module)["rope_deltas"]) for module in model.modules() if "rope_deltas" in vars(module)]
    try:
        yield
    finally:
        for module, offsets in kept:
            module.rope_deltas = offsets
