"""What a form of packed rows is: log-probabilities of a model's completions without padding.

A form makes groups of rows `Ready` for the model's device, then turns them into calls of the model, and returns one
value per scored token. The calls run *inside* the forward of the outermost module (DDP, mixed precision), handed in by
`model(packed=call)`.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from types import MethodType
from typing import Any, Self

import torch
from torch import Tensor
from transformers import PreTrainedModel

from grpo_plus.packing.layout import IGNORED, Group
from grpo_plus.packing.transfer import on_device

Logps = tuple[Tensor, Tensor]  # log-probabilities and entropies, (M,) each, of M scored tokens in the order of the form
Head = Callable[[PreTrainedModel, Tensor, Tensor], Logps]  # base model, (M, H) hidden states, (M,) targets
PackedCall = Callable[[PreTrainedModel, Callable[..., Any]], Logps]


def install_packed_forward(model: PreTrainedModel) -> None:
    """Let `model(packed=call)` run `call(model, forward)` in place of its forward. TRL adds its fused head this way."""
    before = model.forward
    if "packed" in inspect.signature(before, follow_wrapped=False).parameters:
        return  # another trainer has had this model

    @wraps(before)
    def packed_forward(self: PreTrainedModel, *args: Any, packed: PackedCall | None = None, **kwargs: Any) -> Any:
        # A copy of the model brings this function along and must not compute with the original's weights.
        forward = MethodType(before.__func__, self) if isinstance(before, MethodType) else before
        return forward(*args, **kwargs) if packed is None else packed(self, forward)

    model.forward = MethodType(packed_forward, model)


@dataclass(frozen=True)
class Tokens:
    """Rows of tokens, and what of them is scored.

    input_ids, position_ids, shift_labels: (rows, length). The label is -100 where nothing is scored.
    places: (M,) where the scored tokens are in the flattened labels.
    targets: (M,) their labels.
    """

    input_ids: Tensor
    position_ids: Tensor
    shift_labels: Tensor
    places: Tensor
    targets: Tensor

    @classmethod
    def of(cls, input_ids: Tensor, position_ids: Tensor, shift_labels: Tensor) -> Self:
        """Find what is scored, on the host, where counting waits for no device."""
        labels = shift_labels.flatten()
        places = (labels != IGNORED).nonzero().squeeze(1)
        return cls(input_ids, position_ids, shift_labels, places, labels[places])


@dataclass(frozen=True)
class Ready:
    """Groups as a form forwards them, laid out once and on the model's device.

    call: what the form's `run` takes.
    rows, columns: (M,) places in the padded (B, T) completions, of the scored tokens in the order of the form.
    tokens: number of tokens that go through the model.
    """

    call: Any
    rows: Tensor
    columns: Tensor
    tokens: int


@dataclass(frozen=True)
class Form:
    """A way to forward groups of rows.

    share: whether completions of one prompt go together.
    lay_out: (groups, device) -> Ready, with all tensors on the CPU. The device says what is cheap on it.
    run: call inside the model's forward, (`call` of `Ready`, head, base model, its forward) -> Logps. `head=None` means
        the model's fused head.
    tokens: (groups, device) -> number of tokens that go through the model.
    """

    name: str
    detail: str
    share: bool
    lay_out: Callable[[Sequence[Group], torch.device], Ready]
    run: Callable[[Any, Head | None, PreTrainedModel, Callable[..., Any]], Logps]
    tokens: Callable[[Sequence[Group], torch.device], int]

    def __str__(self) -> str:
        return f"{self.name} ({self.detail})"

    def arrange(self, groups: Sequence[Group]) -> list[Group]:
        """Groups as `lay_out` and `tokens` take them."""
        return list(groups) if self.share else [row for group in groups for row in group.apart()]

    def ready(self, groups: Sequence[Group], device: torch.device) -> Ready:
        """Lay out groups from `arrange`, and copy what was laid out to the device."""
        return on_device(self.lay_out(groups, device), device)


def score(
    model: PreTrainedModel, forward: Callable[..., Any], head: Head | None, tokens: Tokens, **inputs: Any
) -> Logps:
    """Run rows through the model, and get the values of the scored tokens in the order of their places."""
    inputs |= {"input_ids": tokens.input_ids, "position_ids": tokens.position_ids}
    if head is not None:
        hidden = model.base_model(**inputs, use_cache=False).last_hidden_state.flatten(0, 1)
        return head(model, hidden.index_select(0, tokens.places), tokens.targets)
    output = forward(**inputs, shift_labels=tokens.shift_labels, fused_lm_head=True)
    # A reference model's head computes no entropies, and nobody asks for them.
    entropies = torch.zeros_like(output.log_probs) if output.entropy is None else output.entropy
    return output.log_probs.flatten().index_select(0, tokens.places), entropies.flatten().index_select(0, tokens.places)
