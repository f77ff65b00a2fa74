r"""Whether the completion's answer is the solution's: its last number, its \boxed{...}, or its `<answer>` tag.

All read the column `solution`, as TRL's `accuracy_reward` does. A solution may be the bare answer, or a derivation that
ends in "#### 18" (GSM8K) or in \boxed{18} (MATH). For `last_number`, any text that ends with the number will do.

Which to take: `last_number` where answers are numbers and the model is free in how it writes them. `boxed_answer` and
`tagged_answer` pay only for the answer in its place, which may also be a choice such as "B" or a word. They compare
numbers and text. Where equal mathematics has many spellings (\sqrt{8}, 2\sqrt{2}), take TRL's `accuracy_reward`.
"""

import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

from grpo_plus.rewards.completions import Completion, answering_part, text_of
from grpo_plus.rewards.numbers import WRAPPED, last_number_in, whole_number_of

_TAGGED = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.DOTALL)
_IDLE = re.compile(r"\\left|\\right|\\[!,;]|[$\s]|\.\s*$")


def last_number(
    completions: Sequence[Completion], solution: Sequence[Any], *, tolerance: float = 0.0, **_: Any
) -> list[float | None]:
    """1 where the last number is the solution's, 0 elsewhere.

    Numbers are exact: 18, 18.0 and 36/2 are one. Numbers before `</think>` do not count.

    Examples:
        >>> last_number(["So it is 18.", "18 - 2 = 16"], solution=["6 * 3 = 18. #### 18", "18"])
        [1.0, 0.0]

    Args:
        tolerance: how far the number may be from the solution's, as a share of it.
    """
    if not 0 <= tolerance < 1:
        raise ValueError(f"tolerance={tolerance} of last_number is no share. Write 0 or more, below 1, such as 0.01.")
    return [
        _close(last_number_in(answering_part(text_of(completion))), last_number_in(_stated(given)), tolerance)
        for completion, given in zip(completions, solution, strict=True)
    ]


def boxed_answer(completions: Sequence[Completion], solution: Sequence[Any], **_: Any) -> list[float | None]:
    r"""1 where the last `\boxed{...}` holds the solution's answer, 0 elsewhere.

    Examples:
        >>> boxed_answer([r"So \boxed{1{,}000}.", "So 1000."], solution=["1000", "1000"])
        [1.0, 0.0]
    """
    return _judged(completions, solution, _boxed)


def tagged_answer(completions: Sequence[Completion], solution: Sequence[Any], **_: Any) -> list[float | None]:
    """1 where the last `<answer>...</answer>` holds the solution's answer, 0 elsewhere.

    Examples:
        >>> tagged_answer(["<answer>(b)</answer>", "B"], solution=["B", "B"])
        [1.0, 0.0]
    """
    return _judged(completions, solution, _tagged)


def _judged(
    completions: Sequence[Completion], solution: Sequence[Any], answer_in: Callable[[str], str | None]
) -> list[float | None]:
    return [
        _same(answer_in(answering_part(text_of(completion))), _stated(given))
        for completion, given in zip(completions, solution, strict=True)
    ]


def _stated(solution: Any) -> str:
    """The part of a solution that states the answer; "" for a row without one."""
    text = "" if solution is None else str(solution)
    _, marked, answer = text.rpartition("####")
    if marked:
        return answer
    boxed = _boxed(text)
    return text if boxed is None else boxed


def _close(found: Fraction | None, expected: Fraction | None, tolerance: float) -> float | None:
    if expected is None:
        return None
    return float(found is not None and abs(found - expected) <= Fraction(tolerance) * abs(expected))


def _same(found: str | None, expected: str) -> float | None:
    """Whether two answers are one number, or one text but for letter case, spaces and what LaTeX puts around it."""
    wanted = _bare(expected)
    if not wanted:
        return None
    if found is None:
        return 0.0
    numbers = whole_number_of(found), whole_number_of(expected)
    return float(_bare(found) == wanted if None in numbers else numbers[0] == numbers[1])


def _bare(text: str) -> str:
    text = _IDLE.sub("", WRAPPED.sub(r"\1", text)).replace("dfrac", "frac").casefold()
    return text[1:-1] if len(text) == 3 and text[0] + text[-1] == "()" else text


def _tagged(text: str) -> str | None:
    tags = _TAGGED.findall(text)
    return tags[-1] if tags else None


def _boxed(text: str) -> str | None:
    r"""What stands in the last \boxed{...}; None where there is none, or where it does not end."""
    _, found, rest = text.rpartition(r"\boxed{")
    depth = 1 if found else 0
    for place, character in enumerate(rest):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return rest[:place] if found else None
    return None
