"""Weights of a checkpoint whose file has other names for them than the model."""

import json
import logging
from pathlib import Path

from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

logger = logging.getLogger("grpo_plus")


def load_renamed(folder: str | Path, model: nn.Module) -> None:
    """Load a model's weights by `from_pretrained` where the file does not name them as the model does.

    transformers saves Qwen2.5-VL and others under older names, which `from_pretrained` alone translates. The trainer of
    transformers passes over names that the model lacks, and the model would keep the weights that it began with.
    """
    if not isinstance(model, PreTrainedModel) or _saved_names(Path(folder)) <= model.state_dict().keys():
        return
    saved = type(model).from_pretrained(folder, dtype="auto")
    model.load_state_dict(saved.state_dict())
    logger.info("%s has other names for the weights than the model. They were translated and loaded.", folder)


def _saved_names(folder: Path) -> set[str]:
    """Names of the weights in the file, or in several files. Empty where there are none, as of adapters."""
    if (index := folder / SAFE_WEIGHTS_INDEX_NAME).exists():
        return set(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    if not (file := folder / SAFE_WEIGHTS_NAME).exists():
        return set()
    with safe_open(file, framework="pt") as weights:
        return set(weights.keys())
