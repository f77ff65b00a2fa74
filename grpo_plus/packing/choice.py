"""What a packer has chosen for the rows of one model."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from transformers import PreTrainedModel

from grpo_plus.packing.forward import Form, Head, Logps, Pass, Ready
from grpo_plus.packing.kept import Truncated
from grpo_plus.packing.recomputed import one_by_one


@dataclass(frozen=True)
class Choice:
    """Form of one model's rows, and the head that scores the rows. A head of None is the model's fused head."""

    form: Form
    head: Head | None

    @property
    def description(self) -> str:
        """Form and head in a few words."""
        return str(self.form) + (", single-pass head" if self.head else "")

    def run(self, model: nn.Module, parts: Sequence[Ready], truncated: Truncated | None = None) -> Logps:
        """All parts within one forward of the model, as DDP and mixed precision need it."""

        def passes_of(part: Ready, base: PreTrainedModel, forward: Callable[..., Any]) -> Iterator[Pass]:
            if truncated is None:
                return self.form.passes(part.call, self.head, base, forward)
            return truncated.passes(self.form, part, base, forward)

        def call(base: PreTrainedModel, forward: Callable[..., Any]) -> Logps:
            passes = (one for part in parts for one in passes_of(part, base, forward))
            return one_by_one(passes, sum(part.passes for part in parts), base.device)

        logps: Tensor
        logps, entropies = model(packed=call)
        return logps, entropies


Choices = WeakKeyDictionary[PreTrainedModel, Choice | None]  # None: the model's rows stay padded
