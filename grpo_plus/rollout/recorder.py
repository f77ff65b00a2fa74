"""The place behind the last of the processors, where a rollout's scores are those that tokens are drawn from.

`generate(logits_processor=...)` puts a processor of the caller's before temperature, top_k and top_p. Behind them comes
only what `generate(custom_generate=...)` calls with the list that transformers has prepared.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import accumulate
from typing import Any, TypeVar

from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from grpo_plus.rollout.installed import installed
from grpo_plus.rollout.reasons import LOST, MODES

Decode = Callable[..., Any]  # as transformers calls a `custom_generate`


class Recorder(LogitsProcessor):
    """Last of a rollout's processors, which changes nothing."""

    @property
    def size(self) -> int:
        """B, the rows that were generated."""
        raise NotImplementedError

    def begin(self, processors: LogitsProcessorList) -> None:
        """Learn which processors come before, when the rollout begins."""


class NotSampledError(Exception):
    """A decoding that is no loop of one draw after the other. Raised before anything is drawn."""


Kind = TypeVar("Kind", bound=Recorder)
Made = TypeVar("Made")  # a completion, or what is known of it


@contextmanager
def recording(model: Any, make: Callable[[], Kind]) -> Iterator[list[Kind]]:
    """Let a new recorder see the scores of every `model.generate`, whichever loop decodes.

    A loop of ours is installed inside, so that its calls come here. Nothing sees a search with beams, nor a call with
    arguments that transformers hands to no loop but its own.

    Args:
        model: on which `generate` is called, with wrappers like PEFT's.

    Returns:
        The recorders, one for each call that was seen and has come to its end.
    """
    generate = model.generate
    recorders: list[Kind] = []

    def recorded(*args: Any, custom_generate: Decode | str | None = None, **kwargs: Any) -> Any:
        call = partial(generate, *args, **kwargs)
        if isinstance(custom_generate, str) or LOST & kwargs.keys():
            return call(custom_generate=custom_generate)
        recorder = make()
        try:
            generated = call(custom_generate=_followed_by(recorder, custom_generate))
        except NotSampledError:
            return call(custom_generate=custom_generate)
        recorders.append(recorder)
        return generated

    with installed(model, recorded):
        yield recorders


def shares(recorders: Sequence[Kind], completions: Sequence[Made]) -> list[tuple[Kind, Sequence[Made]]] | None:
    """Each recorder with the completions of its rows, in order. None where somebody else has made some of them."""
    if sum(recorder.size for recorder in recorders) != len(completions):
        return None
    ends = list(accumulate(recorder.size for recorder in recorders))
    return [(recorder, completions[end - recorder.size : end]) for recorder, end in zip(recorders, ends, strict=True)]


def _followed_by(recorder: Recorder, decode: Decode | None) -> Decode:
    """The loop `decode`, transformers' own for None, with the recorder behind its processors."""

    def recorded(
        model: PreTrainedModel,
        input_ids: Any,
        logits_processor: LogitsProcessorList,
        generation_config: GenerationConfig,
        **kwargs: Any,
    ) -> Any:
        if decode is None and generation_config.get_generation_mode() not in MODES:
            raise NotSampledError
        recorder.begin(logits_processor)
        processors = LogitsProcessorList([*logits_processor, recorder])
        loop = decode or type(model)._sample
        return loop(model, input_ids, logits_processor=processors, generation_config=generation_config, **kwargs)

    return recorded
