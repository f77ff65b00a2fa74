"""The generation of one run: which loop decodes, how transformers comes to call it, and what it has done."""

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from grpo_plus.rollout.cache import Expanded
from grpo_plus.rollout.check import why_not_exact, why_not_exact_in_passes
from grpo_plus.rollout.graphs import Graphed
from grpo_plus.rollout.installed import installed
from grpo_plus.rollout.keeper import Keeper
from grpo_plus.rollout.loop import Watch, decode, nobody
from grpo_plus.rollout.passes import Pass, passes_of, why_not_passes
from grpo_plus.rollout.prefix import SharedPrompts
from grpo_plus.rollout.prompts import Prompts
from grpo_plus.rollout.reasons import LOST, why_not_batch, why_not_config, why_not_worth
from grpo_plus.rollout.statistics import Statistics

logger = logging.getLogger("grpo_plus")

KEEPERS: tuple[type[Keeper], ...] = (Graphed, SharedPrompts, Expanded)  # the best first


class NotGroupedError(Exception):
    """A batch that transformers' own loop has to generate. Raised before anything is drawn.

    Args:
        reason: in words.
        quiet: whether nobody needs to know.
    """

    def __init__(self, reason: str, *, quiet: bool = False) -> None:
        super().__init__(reason)
        self.quiet = quiet


class Rollouts:
    """Decodes with prompts once and rows that leave, wherever that gives the same tokens.

    It is for models against which `why_not_model` has no reason.

    Args:
        insists: whether a batch that cannot be decoded so is an error.

    Attributes:
        statistics: of each batch since the last call of `decoding`.
    """

    def __init__(self, *, insists: bool = False) -> None:
        self.insists = insists
        self.statistics: list[Statistics] = []
        self._watch: Watch = nobody
        self._told: set[str] = set()
        self._verdicts: dict[tuple[type[Keeper], bool], str | None] = {}  # also by whether the model trains
        self._of_passes: dict[tuple[type[Keeper], bool], str | None] = {}  # of prefills in passes

    @contextmanager
    def decoding(self, model: Any, watch: Watch = nobody) -> Iterator[None]:
        """Inside, `model.generate` decodes with the grouped loop.

        Args:
            model: what the caller calls `generate` of, with wrappers like PEFT's.
            watch: is called after each token, with what the batch at hand has done so far.
        """
        self.statistics.clear()
        self._watch = watch
        with installed(model, self._grouped(model.generate)):
            yield

    def _grouped(self, generate: Callable[..., Any]) -> Callable[..., Any]:
        def grouped(*args: Any, **kwargs: Any) -> Any:
            try:
                if lost := sorted(LOST & kwargs.keys()):
                    raise NotGroupedError(f"generate is called with {', '.join(lost)}")
                return generate(*args, custom_generate=self._decode, **kwargs)
            except NotGroupedError as error:
                fallback = error
            self._tell(fallback)
            return generate(*args, **kwargs)

        return grouped

    def _tell(self, fallback: NotGroupedError) -> None:
        """Say once why transformers' own loop decodes, or raise where the run insists."""
        if self.insists and not fallback.quiet:
            raise ValueError(
                f"generation_loop='grouped' is not possible: {fallback}. Change that, or leave generation_loop unset."
            )
        if str(fallback) not in self._told:
            self._told.add(str(fallback))
            message = f"generation_loop: transformers' own loop. {fallback}."
            logger.info(message) if fallback.quiet else warnings.warn(message, stacklevel=3)

    def _decode(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **model_kwargs: Any,
    ) -> Tensor:
        reason = why_not_config(generation_config) or why_not_batch(model, generation_config, model_kwargs)
        if reason is not None:
            raise NotGroupedError(reason)
        prompts = Prompts.of(input_ids, model_kwargs.get("attention_mask"))
        passes = passes_of(prompts.tokens, model.device.type)
        if reason := why_not_worth(prompts.shared or bool(passes), input_ids, generation_config, stopping_criteria):
            raise NotGroupedError(reason, quiet=True)
        keeper = self._keeper(model, input_ids, prompts, generation_config, model_kwargs)
        room = generation_config.max_length - input_ids.shape[1]
        if passes and self._why_not_passes(model, passes, room, type(keeper), prompts, model_kwargs):
            passes = ()
        ids, statistics = decode(
            model,
            input_ids,
            logits_processor,
            stopping_criteria,
            generation_config,
            prompts=prompts,
            keeper=keeper,
            passes=passes,
            watch=self._watch,
            **model_kwargs,
        )
        self.statistics.append(statistics)
        if keeper.failure is not None:
            self._judge(type(keeper), model, keeper.failure)
        return ids

    def _keeper(
        self, model: PreTrainedModel, input_ids: Tensor, prompts: Prompts, config: Any, arguments: dict[str, Any]
    ) -> Keeper:
        """The best keeper that pays for this batch and is exact on this model."""
        cache = arguments["past_key_values"]
        reasons = []
        for kind in KEEPERS:
            if not kind.pays(model, prompts, input_ids.shape[1]):
                continue
            if (kind, model.training) not in self._verdicts:
                reason = kind.why_not(model, cache)
                if reason is None:
                    reason = why_not_exact(model, kind, arguments, _ends(prompts), config)
                self._judge(kind, model, reason)
                if reason is None:
                    line = (
                        f"generation: each prompt once ({prompts.factor:.3g}x fewer), finished rows leave, {kind.words}"
                    )
                    self._say(line, about=kind.words)
            if (reason := self._verdicts[kind, model.training]) is None:
                return kind(model, cache)
            reasons.append(reason)
        raise NotGroupedError("; ".join(reasons))

    def _why_not_passes(
        self,
        model: PreTrainedModel,
        passes: Sequence[Pass],
        new_tokens: int,
        kind: type[Keeper],
        prompts: Prompts,
        arguments: dict[str, Any],
    ) -> str | None:
        """Reason why these prompts go through the model in one pass. It is told once, as is that there is none."""
        reason, key = why_not_passes(model, passes, new_tokens, arguments), (kind, model.training)
        if reason is None:
            if key not in self._of_passes:
                self._of_passes[key] = why_not_exact_in_passes(model, kind, arguments, _ends(prompts))
            reason = self._of_passes[key]
        fewer = Pass(prompts.tokens).tokens / sum(one.tokens for one in passes)
        good = f"generation: what prompts begin with goes through once ({fewer:.3g}x fewer tokens)"
        bad = f"generation: each prompt in one pass. {reason}."
        self._say(bad if reason else good, about=reason or "passes")
        return reason

    def _judge(self, kind: type[Keeper], model: PreTrainedModel, reason: str | None) -> None:
        """Remember whether later batches may use a keeper. A reason why not is told."""
        self._verdicts[kind, model.training] = reason
        if reason is not None:
            line = f"generation: not with {kind.words}. {reason}."
            self._say(line, about=line)

    def _say(self, line: str, *, about: str) -> None:
        if about not in self._told:
            self._told.add(about)
            logger.info(line)


def _ends(prompts: Prompts) -> tuple[Tensor, Tensor]:
    """The longest prompt and the shortest, on the device."""
    longest, shortest = max(prompts.tokens, key=len), min(prompts.tokens, key=len)
    return longest.to(prompts.index.device), shortest.to(prompts.index.device)
