"""What a form of packed rows is: log-probabilities of a model's completions without padding.

A form makes groups of rows `Ready` for the model's device, then turns them into passes through the model, each of which
returns one value per scored token. The passes run *inside* the forward of the outermost module (DDP, mixed precision),
handed in by `model(packed=call)`.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import wraps
from operator import itemgetter
from types import MethodType
from typing import Any, Self

import torch
from torch import Tensor
from transformers import PreTrainedModel

from grpo_plus.models.routers import without_router_loss
from grpo_plus.packing.layout import IGNORED, Group, merged, runs
from grpo_plus.packing.transfer import on_device

Logps = tuple[Tensor, Tensor]  # log-probabilities and entropies, (M,) each, of M scored tokens in the order of the form
Head = Callable[[PreTrainedModel, Tensor, Tensor], Logps]  # base model, (M, H) hidden states, (M,) targets
PackedCall = Callable[[PreTrainedModel, Callable[..., Any]], Logps]
Pass = Callable[[], Logps]


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

    input_ids, shift_labels: (rows, length). The label is -100 where nothing is scored.
    position_ids: (rows, length), or (3, rows, length).
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
    sizes: scored tokens of each pass. None where one pass scores all.
    """

    call: Any
    rows: Tensor
    columns: Tensor
    tokens: int
    sizes: tuple[int, ...] | None = None

    @property
    def passes(self) -> int:
        """Number of passes."""
        return len(self.sizes or (0,))

    @property
    def places(self) -> list[tuple[Tensor, Tensor]]:
        """Rows and columns of each pass."""
        sizes = self.sizes or (len(self.rows),)
        return list(zip(self.rows.split(sizes), self.columns.split(sizes), strict=True))


@dataclass(frozen=True)
class Form:
    """A way to forward groups of rows.

    share: whether completions of one prompt go together.
    lay_out: (groups, device) -> Ready, with all tensors on the CPU. The device says what is cheap on it.
    passes: call inside the model's forward, (`call` of `Ready`, head, base model, its forward) -> passes, in order.
        `head=None` means the model's fused head. A pass may run again in the backward.
    tokens: (groups, device) -> number of tokens that go through the model.
    lay_out_long: (group, device, most tokens of a pass) -> Ready of one group in several passes, which share the pass
        of its prompt. None where each pass has the prompt to itself.
    """

    name: str
    detail: str
    share: bool
    lay_out: Callable[[Sequence[Group], torch.device], Ready]
    passes: Callable[[Any, Head | None, PreTrainedModel, Callable[..., Any]], Iterator[Pass]]
    tokens: Callable[[Sequence[Group], torch.device], int]
    lay_out_long: Callable[[Group, torch.device, int], Ready] | None = None

    def __str__(self) -> str:
        return f"{self.name} ({self.detail})"

    def arrange(self, groups: Sequence[Group]) -> list[Group]:
        """Groups as `lay_out` and `tokens` take them."""
        return list(groups) if self.share else [row for group in groups for row in group.apart()]

    def ready(self, groups: Sequence[Group], device: torch.device) -> Ready:
        """Lay out groups from `arrange`, and copy what was laid out to the device."""
        return on_device(self.lay_out(groups, device), device)

    def ready_in_parts(self, group: Group, device: torch.device, max_tokens: int) -> list[Ready]:
        """Lay out one group, at most `max_tokens` at a time, or one completion where that is longer."""
        if self.lay_out_long is not None:
            return [on_device(self.lay_out_long(group, device, max_tokens), device)]
        # Rows that begin alike come together.
        rows = [row for _, row in sorted(zip(group.tree.last, group.apart(), strict=True), key=itemgetter(0))]
        parts = runs(rows, lambda rows: self.tokens([merged(rows)], device) <= max_tokens)
        return [self.ready([merged(rows)], device) for rows in parts]

    def run(self, call: Any, head: Head | None, model: PreTrainedModel, forward: Callable[..., Any]) -> Logps:
        """All passes of one `Ready`, called inside the model's forward."""
        return joined(part() for part in self.passes(call, head, model, forward))


def score(
    model: PreTrainedModel, forward: Callable[..., Any], head: Head | None, tokens: Tokens, **inputs: Any
) -> Logps:
    """Run rows through the model, and get the values of the scored tokens in the order of their places."""
    inputs |= {"input_ids": tokens.input_ids, "position_ids": tokens.position_ids, **without_router_loss(model)}
    if head is not None:
        hidden = model.base_model(**inputs, use_cache=False).last_hidden_state.flatten(0, 1)
        return head(model, hidden.index_select(0, tokens.places), tokens.targets)
    output = forward(**inputs, shift_labels=tokens.shift_labels, fused_lm_head=True)
    # A reference model's head computes no entropies, and nobody asks for them.
    entropies = torch.zeros_like(output.log_probs) if output.entropy is None else output.entropy
    return output.log_probs.flatten().index_select(0, tokens.places), entropies.flatten().index_select(0, tokens.places)


def joined(scores: Iterable[Logps]) -> Logps:
    """Values of several passes, end to end."""
    logps, entropies = (torch.cat(values) for values in zip(*scores, strict=True))
    return logps, entropies
