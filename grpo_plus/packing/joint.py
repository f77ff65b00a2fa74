"""Pack the rows of one of several processes, which all take the same form of a model's rows, or none of them does."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from grpo_plus.models.pictures import reads_images
from grpo_plus.models.positions import rescaled_from
from grpo_plus.packing.check import PaddedLogps, Verdict, choose
from grpo_plus.packing.forward import Form, Head
from grpo_plus.packing.layout import Group
from grpo_plus.packing.packer import Packer
from grpo_plus.packing.padded import Layout, Packed, PaddedRows
from grpo_plus.packing.passes import CACHED

TEXT, IMAGES = "text", "images"


class JointPacker(Packer):
    """Packs as the packers of all other processes do.

    The processes check a model in the first call in which each of them has rows to check with. Until then, rows stay
    padded on all of them. They try the same forms in the same order, and a form that is not exact on one process is
    taken by none. Every process asks the others equally often, so that none waits for ever.

    Args:
        gathered: gives every process what each process has given, in the same order. All processes must call it.
    """

    _chooses_alone = False

    def __init__(self, packing: str, *, gathered: Callable[[Any], list[Any]], **keywords: Any) -> None:
        super().__init__(packing, **keywords)
        self.gathered = gathered

    def logps(
        self,
        model: nn.Module,
        base: PreTrainedModel,
        rows: PaddedRows,
        padded_logps: PaddedLogps,
        *,
        max_tokens: int | None = None,
        bound: int | None = None,
        policy: bool = False,
    ) -> Packed | None:
        """As `Packer.logps`. All processes call it equally often, with the same model and the same `bound`."""
        if self._is_open(base, bound):
            rows = replace(rows, layout=rows.layout or Layout.of(rows))
            self._settle(model, base, [rows], padded_logps, bound)
        if base not in self._choices_of(rows):
            return None
        limits = {"max_tokens": max_tokens, "bound": bound}
        return super().logps(model, base, rows, padded_logps, **limits, policy=policy)

    def _is_open(self, base: PreTrainedModel, bound: int | None) -> bool:
        """Whether something about the model is to be decided. The answer is the same on all processes."""
        if base not in self._choices or (reads_images(base) and base not in self._choices_with_images):
            return True
        return self._cut_is_open(base, bound)

    def _cut_is_open(self, base: PreTrainedModel, bound: int | None) -> bool:
        choice = self._choices.get(base)
        cuts = bound is not None and choice is not None and choice.form.share and choice.form is not CACHED
        return cuts and base not in self._cut

    def _settle(
        self,
        model: nn.Module,
        base: PreTrainedModel,
        parts: Sequence[PaddedRows],
        padded_logps: PaddedLogps,
        bound: int | None,
    ) -> None:
        """Decide about rows as all processes have them, if there are such rows.

        Args:
            parts: the rows in their calls of the model, with layouts.
        """
        kinds = {self._kind(base, part) for part in parts}
        kind = next(iter(kinds)) if len(kinds) == 1 else None
        if set(self.gathered(kind)) != {kind} or kind is None:
            return
        rows, choices = parts[0], self._choices_of(parts[0])
        groups = rows.layout.groups if rows.layout is not None else None
        assert groups is not None
        if base not in choices:
            choices[base] = self._decide(model, base, groups, padded_logps, rows)
        choice = self._choices.get(base)
        if kind == TEXT and choice is not None and self._cut_is_open(base, bound):
            self._judge_cut(model, base, choice.head, groups, padded_logps)

    def _kind(self, base: PreTrainedModel, rows: PaddedRows) -> str | None:
        """What the rows are. None where a model cannot be checked with them."""
        if rows.are_unsorted or rows.input_ids.shape[1] > rescaled_from(base):
            return None
        if rows.layout is None or not rows.layout.groups or not self._sees(base, rows, rows.layout):
            return None
        return TEXT if rows.pictures is None else IMAGES

    def _verdict(
        self,
        model: nn.Module,
        base: PreTrainedModel,
        forms: Sequence[Form],
        heads: Sequence[Head | None],
        groups: Sequence[Group],
        padded_logps: PaddedLogps,
    ) -> Verdict:
        gradient = self.gradient_check
        return choose(forms, base, groups, padded_logps, heads, gradient=gradient, agreed=self._agreed)

    def _offered(self, forms: list[Form], reasons: list[str]) -> tuple[list[Form], list[str]]:
        """The forms that every process can try: machines may differ in what is installed."""
        lists = self.gathered([str(form) for form in forms])
        shared = set(lists[0]).intersection(*lists[1:])
        missing = [f"{form}: another process cannot take it" for form in forms if str(form) not in shared]
        return [form for form in forms if str(form) in shared], reasons + missing

    def _agreed(self, reason: str | None) -> str | None:
        """The first reason that a process has. None where none has one."""
        return next((found for found in self.gathered(reason) if found is not None), None)
