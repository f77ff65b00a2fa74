"""The base as it was before it was quantized, loaded by its name, with the vocabulary of the trained model."""

from typing import Any

import torch
from transformers import PreTrainedModel

from grpo_plus.qlora.checks import saved_quantization
from grpo_plus.qlora.unwrapped import dtype_of, untie_as, unwrapped


def original_base(model: Any, base: str | None = None) -> PreTrainedModel:
    """Load the unquantized base of a model with adapters, from `base` or by the name that the model has.

    Raises:
        ValueError: the base has no name, cannot be loaded, or is quantized itself.
    """
    trained = model.get_base_model()
    name = base or name_of(model)
    if not name:
        raise ValueError(
            "method='base' merges into the original weights, but the base was made in memory and has no name. Give "
            "the folder of its weights as base=..., or use method='dequantize', which needs no original."
        )
    if saved_quantization(name, None) is not None:
        raise ValueError(f"base={name!r} is quantized itself. Give the unquantized one, or use method='dequantize'.")
    try:
        original = type(trained).from_pretrained(
            name, dtype=dtype_of(trained), revision=None if base else revision_of(model)
        )
    except OSError as error:
        raise ValueError(
            f"The original weights of base={name!r} cannot be loaded ({str(error).splitlines()[0]}). Give their folder "
            "as base=..., or use method='dequantize', which needs no original."
        ) from error
    untie_as(trained, original)
    return _resized(original, trained)


def name_of(model: Any) -> str:
    """Name or folder of the base of a model with adapters. Empty for a base that was made in memory."""
    return model.peft_config[model.active_adapters[0]].base_model_name_or_path or model.config.name_or_path or ""


def revision_of(model: Any) -> str | None:
    """Commit of the hub's repository that the base was loaded from. None for a folder."""
    return getattr(model.config, "_commit_hash", None)


def _resized(original: PreTrainedModel, trained: Any) -> PreTrainedModel:
    """Give the original the vocabulary of the trained base. Tokens that were added have the trained base's rows."""
    rows = unwrapped(trained.get_input_embeddings()).weight.shape[0]
    before = dict(original.get_input_embeddings().named_parameters())["weight"].shape[0]
    if rows == before:
        return original
    original.resize_token_embeddings(rows, mean_resizing=False)
    ends: list[Any] = [(original.get_input_embeddings(), trained.get_input_embeddings())]
    if original.get_output_embeddings() is not None:
        ends.append((original.get_output_embeddings(), trained.get_output_embeddings()))
    with torch.no_grad():
        for mine, theirs in ends:
            mine.weight[before:] = unwrapped(theirs).weight[before:].to(mine.weight)
    return original
