"""Choose the form of a model's rows, once, and compute the log-probabilities of padded rows in that form."""

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from grpo_plus.models.dropout import without_dropout
from grpo_plus.models.positions import rescaled_from
from grpo_plus.packing.attention import uninstall_segments
from grpo_plus.packing.candidates import candidates, candidates_with_images
from grpo_plus.packing.check import PaddedLogps, SelfCheck, Verdict, choose
from grpo_plus.packing.choice import Choice, Choices
from grpo_plus.packing.forward import Form, Head
from grpo_plus.packing.head import why_not_single_pass
from grpo_plus.packing.layout import Group, unpack
from grpo_plus.packing.measure import Measure, Way
from grpo_plus.packing.padded import Layout, Packed, PaddedRows, filled, imputed
from grpo_plus.packing.passes import CACHED, why_not_cached
from grpo_plus.packing.seen import why_not_seen

logger = logging.getLogger("grpo_plus")

PACKING = ("auto", "shared_prompt", "padding_free", "none")
Limits = tuple[int | None, int | None]  # the last two arguments of `Layout.ready`
LONG_ROWS = (
    "packing: rows longer than the model's original positions stay padded, since its position frequencies (longrope or "
    "dynamic) would depend on how they are packed."
)


class Packer:
    """Forwards padded rows in the best form that is exact on their model.

    Args:
        packing: the configuration's field.
        head: the head to try where the model's head is frozen. None leaves the model's fused head.
        insist_on_head: whether to warn where the fused head takes the place of `head`.
        gradient_check: whether the self-check can ask for a gradient.
        no_segments: reason against segment attention. None where there is no reason.
        note: what else is active, for the log line about the choice.
        measure: takes the fastest form and head in place of the first exact ones, from the first update on.

    Attributes:
        training: whether a training is running.
    """

    _chooses_alone = True

    def __init__(
        self,
        packing: str,
        *,
        head: Head | None = None,
        insist_on_head: bool = False,
        gradient_check: bool = True,
        no_segments: str | None = None,
        note: str | None = None,
        measure: Measure | None = None,
    ) -> None:
        self.packing = packing
        self.head = head
        self.insist_on_head = insist_on_head
        self.gradient_check = gradient_check
        self.no_segments = no_segments
        self.note = note
        self.measure = measure
        self.training = False
        self._choices: Choices = WeakKeyDictionary()
        self._choices_with_images: Choices = WeakKeyDictionary()
        self._cut: WeakKeyDictionary[PreTrainedModel, bool] = WeakKeyDictionary()  # whether `CACHED` is exact, too

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
        """Log-probabilities and entropies of the rows' completions.

        Outside of a training the model has its own attention again afterwards.

        Args:
            model: `base`, or the wrapper to call.
            padded_logps: the forward that the first call compares with.
            max_tokens, bound: as `Layout.ready` takes them. A backward holds one pass at a time, and computes every
                other pass again.
            policy: whether the model is the policy that trains, whose update is what the measure times.

        Returns:
            None where no form is exact, the rows have nothing to score, a prompt is empty, nothing tells which row has
            which image, or the rows are so long that the model rescales its positions.
        """
        if rows.are_unsorted:
            return None
        if rows.input_ids.shape[1] > rescaled_from(base):
            warnings.warn(LONG_ROWS, stacklevel=2)
            return None
        try:
            return self._logps(model, base, rows, padded_logps, (max_tokens, bound), policy)
        finally:
            if not (self.training or _backward_needs_attention(base, bound)):
                self.release()

    def _logps(
        self,
        model: nn.Module,
        base: PreTrainedModel,
        rows: PaddedRows,
        padded_logps: PaddedLogps,
        limits: Limits,
        policy: bool,
    ) -> Packed | None:
        choices = self._choices_of(rows)
        if base in choices and choices[base] is None:  # before the rows are laid out for nothing
            return None
        layout = rows.layout or Layout.of(rows)
        if not layout.groups or not self._sees(base, rows, layout):
            return None
        if base not in choices:
            choices[base] = self._decide(model, base, layout.groups, padded_logps, rows)
        choice = choices[base]
        if policy and choice is not None and self._is_to_measure(base, rows):
            choice = choices[base] = self._fastest(base, rows, layout, padded_logps, limits, choice)
        if choice is None:
            return None
        if self._cuts_prompts(model, base, choice, layout.groups, padded_logps, limits[1]):
            choice = Choice(CACHED, choice.head)
        parts = layout.ready(choice.form, base.device, *limits)
        logps, entropies = choice.run(model, parts, rows.truncated)
        places = torch.cat([part.rows for part in parts]), torch.cat([part.columns for part in parts])
        return Packed(
            unpack(logps, places, filled(rows, logps)),
            unpack(entropies, places, imputed(rows, entropies.detach().sum() / max(1, entropies.numel()))),
            sum(part.tokens for part in parts),
        )

    def _choices_of(self, rows: PaddedRows) -> Choices:
        return self._choices if rows.pictures is None else self._choices_with_images

    def _sees(self, base: PreTrainedModel, rows: PaddedRows, layout: Layout) -> bool:
        """Whether completions can go on from their prompts with images. True for rows of text."""
        if rows.pictures is None:
            return True
        uninstall_segments(base)  # rows of text may have put it there
        assert layout.groups is not None
        if reason := why_not_seen(base, layout.groups, rows.pictures.host, rows.completion_length):
            warnings.warn(f"packing: rows with images stay padded where {reason}.", stacklevel=2)
            return False
        layout.locate(base)
        return True

    @contextmanager
    def while_training(self) -> Iterator[None]:
        """Inside, the models keep the attention of packed rows between the calls. Afterwards they have their own."""
        self.training = True
        try:
            yield
        finally:
            self.training = False
            self.release()

    def release(self) -> None:
        """Give the models back the attention that they came with."""
        for base in (*self._choices, *self._choices_with_images):
            uninstall_segments(base)

    def go_on_with(self, measured: dict[str, Any] | None) -> None:
        """Choose anew, as in a new process, and take what an earlier run has measured on such a card."""
        if self.measure is not None:
            self.release()
            self._choices.clear()
            self._choices_with_images.clear()
            self.measure.go_on_with(measured)

    def describe(self) -> str:
        """Active form and head in a few words."""
        choices = (*self._choices.values(), *self._choices_with_images.values())
        return next((choice.description for choice in choices if choice is not None), "none")

    def _decide(
        self,
        model: nn.Module,
        base: PreTrainedModel,
        groups: Sequence[Group],
        padded_logps: PaddedLogps,
        rows: PaddedRows,
    ) -> Choice | None:
        forms, reasons = self._candidates(base, rows)
        with without_dropout(base):
            verdict = self._verdict(model, base, forms, self._heads(base), groups, padded_logps)
        if self.insist_on_head and verdict.head is not self._heads(base)[0]:
            warnings.warn(f"logprob_backend: the model's fused head. {'; '.join(verdict.reasons)}.", stacklevel=2)
        reasons += verdict.reasons
        if verdict.form in (CACHED, None):
            uninstall_segments(base)
        insists = self.packing != "auto" and (rows.pictures is None or self.packing == "shared_prompt")
        if verdict.form is None and insists:
            raise ValueError(
                f"packing={self.packing!r} cannot be exact here: {'; '.join(reasons)}. Set packing='auto' to take the "
                "best form that is, or packing='none'."
            )
        if verdict.form is None:
            which = "rows" if rows.pictures is None else "rows with images"
            warnings.warn(f"packing: none, {which} stay padded. {'; '.join(reasons)}.", stacklevel=2)
            return None
        choice = Choice(verdict.form, verdict.head)
        ratio = rows.input_ids.numel() / choice.form.tokens(choice.form.arrange(groups), base.device)
        parts = [f"packing: {choice.description}, {ratio:.1f}x fewer tokens in the first rows", self.note]
        logger.info("; ".join(part for part in parts if part))
        for reason in reasons:
            logger.info("packing: %s", reason)
        return choice

    def _verdict(
        self,
        model: nn.Module,
        base: PreTrainedModel,
        forms: Sequence[Form],
        heads: Sequence[Head | None],
        groups: Sequence[Group],
        padded_logps: PaddedLogps,
    ) -> Verdict:
        return choose(forms, base, groups, padded_logps, heads, gradient=self.gradient_check)

    def _candidates(self, base: PreTrainedModel, rows: PaddedRows) -> tuple[list[Form], list[str]]:
        if rows.pictures is not None:
            return self._offered(*candidates_with_images(self.packing, base))
        return self._offered(*candidates(self.packing, base, self.no_segments))

    def _offered(self, forms: list[Form], reasons: list[str]) -> tuple[list[Form], list[str]]:
        return forms, reasons

    def _cuts_prompts(
        self,
        model: nn.Module,
        base: PreTrainedModel,
        choice: Choice,
        groups: Sequence[Group],
        padded_logps: PaddedLogps,
        bound: int | None,
    ) -> bool:
        """Whether prompts longer than a pass go through the model's cache, which alone can cut them."""
        longest = max(len(group.prompt) for group in groups)
        if bound is None or longest <= bound or not choice.form.share or choice.form is CACHED:
            return False
        if base not in self._cut and self._chooses_alone:
            self._judge_cut(model, base, choice.head, groups, padded_logps)
        return self._cut.get(base, False)

    def _judge_cut(
        self,
        model: nn.Module,
        base: PreTrainedModel,
        head: Head | None,
        groups: Sequence[Group],
        padded_logps: PaddedLogps,
    ) -> None:
        reason = why_not_cached(base)
        if reason is None:
            verdict = self._verdict(model, base, [CACHED], [head], groups, padded_logps)
            reason = None if verdict.form else "; ".join(verdict.reasons)
        self._cut[base] = reason is None
        place = "go through the model's cache in parts" if reason is None else f"stay whole. {reason}"
        logger.info("packing: prompts longer than a pass %s.", place)

    def _heads(self, base: PreTrainedModel) -> list[Head | None]:
        return [self.head, None] if self.head is not None and why_not_single_pass(base) is None else [None]

    def _is_to_measure(self, base: PreTrainedModel, rows: PaddedRows) -> bool:
        if self.measure is None or self.measure.is_done:
            return False
        return self.measure.knows(base.device) or _can_be_timed(rows)

    def _fastest(
        self,
        base: PreTrainedModel,
        rows: PaddedRows,
        layout: Layout,
        padded_logps: PaddedLogps,
        limits: Limits,
        first: Choice,
    ) -> Choice | None:
        """The fastest exact form and head. The first exact ones where no way could be timed."""
        assert self.measure is not None
        can_time = _can_be_timed(rows)
        _, ids, mask, more = rows.forwarded()

        def forward_of(way: Way) -> Callable[[], Tensor] | None:
            if way.form is None:
                uninstall_segments(base)
                return lambda: padded_logps(ids, mask, rows.completion_length, **more)
            choice = Choice(way.form, way.head)
            if check.why_not(choice.form, choice.head) is not None:
                return None
            parts = layout.ready(choice.form, base.device, *limits)
            return lambda: choice.run(base, parts)[0]

        forms: list[Form | None] = [*self._candidates(base, rows)[0]]
        heads = self._heads(base)
        if self.insist_on_head:
            heads = heads[:1]
        if self.packing == "auto" and not (self.insist_on_head and heads[0]):
            forms.append(None)
        trained = [parameter for parameter in base.parameters() if parameter.requires_grad]
        with without_dropout(base), torch.enable_grad():
            check = SelfCheck.of(base, layout.groups or (), padded_logps, gradient=self.gradient_check)
            way = self.measure.fastest(base.device, trained, forms, heads, forward_of, can_time=can_time)
        if way is None:
            return first
        if way.form in (CACHED, None):
            uninstall_segments(base)
        return None if way.form is None else Choice(way.form, way.head)


def _can_be_timed(rows: PaddedRows) -> bool:
    """Whether the forward at hand tells how fast updates are."""
    # A forward alone is no update, and a micro-batch of a few live rows tells little of the others.
    return torch.is_grad_enabled() and (rows.live is None or 2 * len(rows.live) >= len(rows.input_ids))


def _backward_needs_attention(base: PreTrainedModel, bound: int | None) -> bool:
    """Whether a backward will call the attention again: checkpointed layers and passes compute their forward twice."""
    checkpoints = bound is not None or any(getattr(part, "gradient_checkpointing", False) for part in base.modules())
    return torch.is_grad_enabled() and checkpoints
