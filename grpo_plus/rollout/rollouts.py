"""The generation of one run: which loop decodes, how transformers comes to call it, and what it has done."""

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from grpo_plus.models.caches import CACHE
from grpo_plus.models.pictures import PIXELS, Pictures
from grpo_plus.rollout.cache import Expanded
from grpo_plus.rollout.check import why_not_exact, why_not_exact_in_passes
from grpo_plus.rollout.given import Given
from grpo_plus.rollout.graphs import Graphed
from grpo_plus.rollout.images import ByRow, image_arguments
from grpo_plus.rollout.installed import installed
from grpo_plus.rollout.keeper import Keeper
from grpo_plus.rollout.loop import Watch, decode, nobody
from grpo_plus.rollout.passes import Pass, passes_of, why_not_passes
from grpo_plus.rollout.prefix import SharedPrompts
from grpo_plus.rollout.reasons import LOST, why_not_batch, why_not_config, why_not_images, why_not_worth
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


@dataclass(frozen=True)
class Use:
    """A way to decode, on which the self-check has one verdict.

    Attributes:
        training: whether the model trains.
        sees: whether the rows have images.
    """

    kind: type[Keeper]
    training: bool
    sees: bool

    @classmethod
    def of(cls, kind: type[Keeper], given: Given) -> "Use":
        """The use of a keeper for a batch."""
        return cls(kind, given.model.training, given.pictures is not None)

    @property
    def words(self) -> str:
        """What is done, for the log."""
        return f"{'images once, ' * self.sees}{self.kind.words}"


Verdicts = dict[Use, str | None]  # reason against a use. None where there is none


class Rollouts:
    """Decodes with prompts once and rows that leave, wherever that gives the same tokens.

    It is for models against which `why_not_model` has no reason.

    Args:
        insists: whether a batch that cannot be decoded so is an error.
        may_time: whether the clock may choose how a step is computed.

    Attributes:
        statistics: of each batch since the last call of `decoding`.
    """

    def __init__(self, *, insists: bool = False, may_time: bool = True) -> None:
        self.insists = insists
        self.may_time = may_time
        self.statistics: list[Statistics] = []
        self._watch: Watch = nobody
        self._by_row: ByRow | None = None
        self._told: set[str] = set()
        self._verdicts: Verdicts = {}
        self._of_passes: Verdicts = {}  # of prefills in passes

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

    @contextmanager
    def seeing(self, by_row: ByRow) -> Iterator[None]:
        """Inside, the rows of `model.generate` may have images, which `by_row` sorts."""
        self._by_row = by_row
        try:
            yield
        finally:
            self._by_row = None

    @property
    def verdicts(self) -> tuple[Verdicts, Verdicts]:
        """On ways to decode, and on their prefills in passes."""
        return self._verdicts, self._of_passes

    def join(self, processes: Sequence[tuple[Verdicts, Verdicts]]) -> None:
        """Refuse from here on what one of the processes has refused.

        Args:
            processes: `verdicts` of each of them.
        """
        for own, *others in zip(self.verdicts, *processes, strict=True):
            for use, reason in (entry for other in others for entry in other.items()):
                if reason is not None and own.get(use) is None:
                    own[use] = reason
                    self._say(f"generation: as another process has found, {reason}.", about=reason)

    def _grouped(self, generate: Callable[..., Any]) -> Callable[..., Any]:
        def grouped(*args: Any, **kwargs: Any) -> Any:
            try:
                if lost := sorted(LOST & kwargs.keys()):
                    raise NotGroupedError(f"generate is called with {', '.join(lost)}")
                pictures = self._pictures(image_arguments(kwargs))
                # With pixels among its arguments, `generate` encodes the images of all rows before it calls a loop.
                seen = {name: value for name, value in kwargs.items() if pictures is None or name != PIXELS}
                return generate(*args, custom_generate=partial(self._decode, pictures=pictures), **seen)
            except NotGroupedError as error:
                fallback = error
            self._tell(fallback)
            return generate(*args, **kwargs)

        return grouped

    def _pictures(self, images: dict[str, Tensor]) -> Pictures | None:
        """Images by row. None where there are none."""
        if not images:
            return None
        pictures = "nothing tells which row an image belongs to" if self._by_row is None else self._by_row(images)
        if isinstance(pictures, str):
            raise NotGroupedError(pictures)
        return pictures

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
        pictures: Pictures | None,
        **model_kwargs: Any,
    ) -> Tensor:
        given = Given.of(model, input_ids, model_kwargs, generation_config, pictures)
        reason = why_not_config(generation_config) or why_not_batch(model, generation_config, given.arguments)
        if reason := reason or why_not_images(pictures, len(input_ids)):
            raise NotGroupedError(reason)
        passes = passes_of(given.prompts.tokens, model.device.type) if pictures is None else ()
        pays = given.prompts.shared or bool(passes)
        if reason := why_not_worth(pays, input_ids, generation_config, stopping_criteria):
            raise NotGroupedError(reason, quiet=True)
        keeper = self._keeper(given)
        if passes and self._why_not_passes(given, passes, type(keeper)):
            passes = ()
        ids, statistics = decode(
            model,
            input_ids,
            logits_processor,
            stopping_criteria,
            generation_config,
            prompts=given.prompts,
            keeper=keeper,
            passes=passes,
            images=given.images,
            watch=self._watch,
            **given.arguments,
        )
        self.statistics.append(statistics)
        if keeper.failure is not None:
            self._judge(Use.of(type(keeper), given), keeper.failure)
        return ids

    def _keeper(self, given: Given) -> Keeper:
        """The best keeper that pays for this batch and is exact on this model."""
        model, cache, prompts = given.model, given.arguments[CACHE], given.prompts
        reasons = []
        for kind in KEEPERS:
            if (kind.is_timed and not self.may_time) or not kind.pays(model, prompts, given.input_ids.shape[1]):
                continue
            use = Use.of(kind, given)
            if use not in self._verdicts:
                self._judge(use, kind.why_not(model, cache) or why_not_exact(given, kind))
                if self._verdicts[use] is None:
                    fewer = f"{prompts.factor:.3g}x fewer"
                    line = f"generation: each prompt once ({fewer}), finished rows leave, {use.words}"
                    self._say(line, about=use.words)
            if (reason := self._verdicts[use]) is None:
                return kind(model, cache)
            reasons.append(reason)
        raise NotGroupedError("; ".join(reasons))

    def _why_not_passes(self, given: Given, passes: Sequence[Pass], kind: type[Keeper]) -> str | None:
        """Reason why these prompts go through the model in one pass. It is told once, as is that there is none."""
        reason, use = why_not_passes(given.model, passes, given.arguments), Use.of(kind, given)
        if reason is None:
            if use not in self._of_passes:
                self._of_passes[use] = why_not_exact_in_passes(given, kind)
            reason = self._of_passes[use]
        fewer = Pass(given.prompts.tokens).tokens / sum(one.tokens for one in passes)
        good = f"generation: what prompts begin with goes through once ({fewer:.3g}x fewer tokens)"
        bad = f"generation: each prompt in one pass. {reason}."
        self._say(bad if reason else good, about=reason or "passes")
        return reason

    def _judge(self, use: Use, reason: str | None) -> None:
        """Remember whether later batches may use a keeper. A reason why not is told."""
        self._verdicts[use] = reason
        if reason is not None:
            line = f"generation: not with {use.words}. {reason}."
            self._say(line, about=line)

    def _say(self, line: str, *, about: str) -> None:
        if about not in self._told:
            self._told.add(about)
            logger.info(line)
