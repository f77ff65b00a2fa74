"""Five small tasks on three digits and six rewards that judge them: what `benchmarks.multitask` trains on.

    copy 482 =     [482]        reverse 482 =  [284]        sort 482 =     [248]
    max 482 =      [8]          even 482 =     [3]          how many of the digits are even

No held-out prompt has the digits of a prompt that is trained on, in any order or task. `REWARDS` in their order:

    correct   sparse    1 for the answer in brackets, to the letter; 0 otherwise
    position  dense     share of the answer's digits in place, brackets or not; digits too many count against it
    form      easy      1 for digits in brackets and nothing else, whichever digits
    length    penalty   0 at the answer's length, -1/4 per character off, at least -1
    plausible per task  1 for digits that the answer could have: the prompt's own, one of them, or a count from 0 to 3
    points    5 a piece `sort` alone: 5 for the answer, which `correct` pays with 1; elsewhere it abstains

They agree in the end, a right answer having the most of each, and disagree on the way: form and length are learned
first, and `points` makes one task in five worth about twice as much as all other rewards together.
"""

import random
import re
from collections.abc import Callable, Sequence
from typing import Any
from zlib import crc32

from datasets import Dataset

from grpo_plus.demo.task import COMPLETION, Split, exactly_right

NUM_DIGITS = 3
PROMPT = "{} {} = "
POINTS = 5.0
TASKS: dict[str, Callable[[str], str]] = {
    "copy": lambda number: number,
    "reverse": lambda number: number[::-1],
    "sort": lambda number: "".join(sorted(number)),
    "max": max,
    "even": lambda number: str(sum(int(digit) % 2 == 0 for digit in number)),
}
COUNTS = "0123"
_FORM = re.compile(COMPLETION.replace("[", r"\[").format("[0-9]+"))


def dataset(split: Split, seed: int = 0) -> Dataset:
    """Every number of the split in every task, shuffled: `prompt`, `answer`, `task` and `number`."""
    rows = [
        {"prompt": PROMPT.format(task, number), "answer": solve(number), "task": task, "number": number}
        for number in numbers(split)
        for task, solve in TASKS.items()
    ]
    random.Random(seed).shuffle(rows)
    return Dataset.from_list(rows)


def examples(size: int, seed: int, *, right: float, bare: float, miscounted: float) -> list[tuple[str, str]]:
    """Prompts of the training split with completions of which few are right, for the warm-up.

    Args:
        right: share of completions whose digits are the answer's; the others are plausible at most.
        bare: share without brackets.
        miscounted: share with a digit too many or too few.
    """
    rng = random.Random(seed)
    drawn = [(rng.choice(list(TASKS)), number) for number in rng.choices(numbers("train"), k=size)]
    return [
        (PROMPT.format(task, number), _attempt(task, number, rng, right, bare, miscounted)) for task, number in drawn
    ]


def correct(completions: list[str], answer: list[str], **kwargs: Any) -> list[float]:
    """1 for the answer in brackets, to the letter."""
    return exactly_right(completions, answer)


def position(completions: list[str], answer: list[str], **kwargs: Any) -> list[float]:
    """The share of digits in place, of the answer's or of those written, whichever are more."""
    return [_in_place(_digits(text), expected) for text, expected in zip(completions, answer, strict=True)]


def form(completions: list[str], **kwargs: Any) -> list[float]:
    """1 for digits in brackets and nothing else."""
    return [float(_FORM.fullmatch(text) is not None) for text in completions]


def length(completions: list[str], answer: list[str], **kwargs: Any) -> list[float]:
    """0 at the length of the right completion, less by a quarter per character, down to -1."""
    off = [abs(len(text) - len(COMPLETION.format(digits))) for text, digits in zip(completions, answer, strict=True)]
    return [-min(characters / 4, 1.0) for characters in off]


def plausible(completions: list[str], number: list[str], task: list[str], **kwargs: Any) -> list[float]:
    """1 for digits that the task allows: the prompt's own in any order, one of them, or a count."""
    judged = zip(completions, number, task, strict=True)
    return [float(_possible(_digits(text), prompt, name)) for text, prompt, name in judged]


def points(completions: list[str], answer: list[str], task: list[str], **kwargs: Any) -> list[float | None]:
    """5 for a right answer to `sort`; None, no opinion, on the other tasks."""
    right = zip(exactly_right(completions, answer), task, strict=True)
    return [POINTS * score if name == "sort" else None for score, name in right]


REWARDS: dict[str, Callable[..., Sequence[float | None]]] = {
    "correct": correct,
    "position": position,
    "form": form,
    "length": length,
    "plausible": plausible,
    "points": points,
}
SIX = dict.fromkeys(REWARDS, 1.0)
# Scenario -> reward -> weight.
SCENARIOS: dict[str, dict[str, float]] = {
    "six": SIX,
    "level": SIX | {"points": 0.2},
    "two": {"correct": 1.0, "form": 1.0},
    "one": {"correct": 1.0},
}


def numbers(split: Split) -> list[str]:
    """About one set of digits in ten is held out, in every order."""
    every = [f"{number:0{NUM_DIGITS}}" for number in range(10**NUM_DIGITS)]
    return [number for number in every if _is_held_out(number) == (split == "held_out")]


def _is_held_out(number: str) -> bool:
    return crc32("".join(sorted(number)).encode()) % 10 == 0


def _digits(text: str) -> str:
    return re.sub("[^0-9]", "", text)


def _in_place(digits: str, expected: str) -> float:
    matches = sum(digit == wanted for digit, wanted in zip(digits, expected, strict=False))
    return matches / max(len(digits), len(expected))


def _possible(digits: str, number: str, task: str) -> bool:
    if task == "even":
        return len(digits) == 1 and digits in COUNTS
    if task == "max":
        return len(digits) == 1 and digits in number
    return sorted(digits) == sorted(number)


def _attempt(task: str, number: str, rng: random.Random, right: float, bare: float, miscounted: float) -> str:
    digits = TASKS[task](number) if rng.random() < right else _guess(task, number, rng)
    if rng.random() < miscounted:
        digits = digits[:-1] if len(digits) > 1 and rng.random() < 0.5 else digits + rng.choice(number)
    return digits if rng.random() < bare else COMPLETION.format(digits)


def _guess(task: str, number: str, rng: random.Random) -> str:
    if task == "even":
        return rng.choice(COUNTS)
    if task == "max":
        return rng.choice(number)
    return "".join(rng.sample(number, NUM_DIGITS))
