"""The model that every arm starts from: what is trainable is remembered once, and put back before each arm."""

import hashlib
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from grpo_plus.models.adapters import has_adapters


class Start:
    """A model and a copy, on the CPU, of whatever a training could change in it.

    Frozen weights, such as a quantized base, are neither copied nor touched.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self._adapters = set(self._all_adapters())
        self._trainable = {name for name, weight in model.named_parameters() if weight.requires_grad}
        self._saved = {name: tensor.detach().cpu().clone() for name, tensor in self._changeable().items()}
        if not self._trainable:
            raise ValueError("Nothing of the model is trainable. Add adapters, or unfreeze it.")

    @property
    def size(self) -> int:
        """How many numbers are trained."""
        return sum(self._saved[name].numel() for name in self._trainable)

    def restore(self) -> PreTrainedModel:
        """The model, as it was; the same object each time."""
        for name in set(self._all_adapters()) - self._adapters:  # TRL adds a copy as the reference where beta > 0
            self.model.delete_adapter(name)
        for name, weight in self.model.named_parameters():
            weight.requires_grad_(name in self._trainable)
        for name, tensor in self._changeable().items():
            # A new tensor, not a copy into the old one: a trainer may have changed its dtype.
            tensor.data = self._saved[name].to(tensor.device, copy=True)
        return self.model

    def digest(self) -> str:
        """A fingerprint of the copy: equal for equal starts."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self._saved.items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def _changeable(self) -> dict[str, Tensor]:
        weights = {name: weight for name, weight in self.model.named_parameters() if name in self._trainable}
        return weights | dict(self.model.named_buffers())

    def _all_adapters(self) -> dict[str, Any]:
        return dict(getattr(self.model, "peft_config", {})) if has_adapters(self.model) else {}
