"""Whether the completion keeps a form: tags for reasoning and answer, and a length.

TRL has the `<think>` tag alone (`think_format_reward`) and a soft upper limit of the length
(`get_soft_overlong_punishment`).
"""

import re
from collections.abc import Sequence
from typing import Any

from grpo_plus.rewards.completions import Completion, text_of

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
_FORM = re.compile(r"\s*<think>.*</think>\s*<answer>\s*+\S.*</answer>\s*", re.DOTALL)


def think_answer_format(completions: Sequence[Completion], *, opened: bool = False, **_: Any) -> list[float]:
    """1 for `<think>...</think><answer>...</answer>` and nothing else, 0 elsewhere.

    Every tag stands once, and the answer is not empty. Guo et al., "DeepSeek-R1"
    (https://huggingface.co/papers/2501.12948), section 2.2.2.

    Examples:
        >>> think_answer_format(["<think>6 * 3</think> <answer>18</answer>", "<think>6 * 3</think> 18"])
        [1.0, 0.0]

    Args:
        opened: whether the chat template writes `<think>` itself, at the end of the prompt.
    """
    texts = [_with_opening(text_of(completion), opened) for completion in completions]
    return [float(_share_of_tags(text) == 1 and _FORM.fullmatch(text) is not None) for text in texts]


def think_answer_tags(completions: Sequence[Completion], *, opened: bool = False, **_: Any) -> list[float]:
    """Share of the four tags of `think_answer_format` that stand exactly once, wherever.

    A model that never keeps the whole form gets a signal from the first tag on.

    Examples:
        >>> think_answer_tags(["<think>6 * 3</think> 18", "18"])
        [0.5, 0.0]
    """
    return [_share_of_tags(_with_opening(text_of(completion), opened)) for completion in completions]


def target_length(
    completion_ids: Sequence[Sequence[int]], *, target: int = 256, width: int = 256, **_: Any
) -> list[float]:
    """1 for a completion of `target` tokens, less in proportion to its distance, 0 from `width` tokens away.

        max(0, 1 - |tokens - target| / width)

    Examples:
        >>> target_length([[7] * 200, [7] * 400], target=200, width=100)
        [1.0, 0.0]
    """
    if target < 0 or width < 1:
        raise ValueError(
            f"target={target}, width={width} of target_length: write a target of 0 or more, a width above 0."
        )
    return [max(0.0, 1 - abs(len(ids) - target) / width) for ids in completion_ids]


def _with_opening(text: str, opened: bool) -> str:
    return TAGS[0] + text if opened else text


def _share_of_tags(text: str) -> float:
    return sum(text.count(tag) == 1 for tag in TAGS) / len(TAGS)
