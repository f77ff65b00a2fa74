"""Pack the rows of a model whose weights are spread over processes, which must all call its layers equally often."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from grpo_plus.packing.candidates import candidates_of_spread_weights
from grpo_plus.packing.check import FAILURES, PaddedLogps, SelfCheck, Verdict
from grpo_plus.packing.forward import Form, Head
from grpo_plus.packing.joint import JointPacker
from grpo_plus.packing.layout import Group
from grpo_plus.packing.padded import Layout, Packed, PaddedRows


class SpreadPacker(JointPacker):
    """Forwards rows of text in forms that run every layer once, with the model's own head.

    A layer whose weights are gathered waits for all processes. So the number of calls depends on shapes alone. A
    process that has no groups to pack forwards padded rows, in as many calls as the others.

    Args:
        reference: a model that is never trained, and is checked without a gradient. None where there is none.
    """

    def __init__(self, packing: str, *, reference: PreTrainedModel | None = None, **keywords: Any) -> None:
        super().__init__(packing, **keywords)
        self.reference = reference

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
        """As `Packer.logps`, where `padded_logps` calls `model`, and the number of calls depends on shapes alone."""
        if base in self._choices and self._choices[base] is None:
            return None
        parts = list(_parts(rows, max_tokens))
        if self._is_open(base, bound):
            self._settle(model, base, parts, padded_logps, bound)
        if base not in self._choices or not all(part.layout is not None and part.layout.groups for part in parts):
            return None
        scored: list[Packed] = []
        for part in parts:
            packed = super().logps(model, base, part, padded_logps, bound=bound, policy=policy)
            if packed is None:  # the verdict on the first part, which all processes share
                return None
            scored.append(packed)
        return Packed(
            torch.cat([packed.logps for packed in scored]),
            torch.cat([packed.entropies for packed in scored]),
            sum(packed.tokens for packed in scored),
        )

    def _candidates(self, base: PreTrainedModel, rows: PaddedRows) -> tuple[list[Form], list[str]]:
        return self._offered(*candidates_of_spread_weights(self.packing, base, self.no_segments))

    def _verdict(
        self,
        model: nn.Module,
        base: PreTrainedModel,
        forms: Sequence[Form],
        heads: Sequence[Head | None],
        groups: Sequence[Group],
        padded_logps: PaddedLogps,
    ) -> Verdict:
        reasons: list[str] = []
        # DeepSpeed gives no gradient of a model without an optimizer.
        gradient = self.gradient_check and base is not self.reference
        try:
            check = SelfCheck.of(base, groups, padded_logps, gradient=gradient, called=model)
            for form in forms:
                reason = self._agreed(check.why_not_exact(form, None))
                if reason is None:
                    return Verdict(form, None, tuple(reasons))
                reasons.append(reason)
        except FAILURES as failure:
            # Half of the layers have gathered their weights, and no further forward is right.
            raise RuntimeError(
                f"packing: the self-check failed within a model whose weights are spread over processes, which cannot "
                f"go on from there: {type(failure).__name__}: {failure}. Set packing='none'."
            ) from failure
        return Verdict(None, None, tuple(reasons))


def _parts(rows: PaddedRows, max_tokens: int | None) -> Iterator[PaddedRows]:
    """The rows so many at a time as TRL's forward takes them, with their layouts."""
    count, length = rows.input_ids.shape
    at_once = count if max_tokens is None else max(1, max_tokens // length)
    if at_once >= count:
        yield replace(rows, layout=rows.layout or Layout.of(rows))
        return
    for ids, mask in zip(rows.input_ids.split(at_once), rows.attention_mask.split(at_once), strict=True):
        part = PaddedRows(ids, mask, rows.completion_length)
        yield replace(part, layout=Layout.of(part))
