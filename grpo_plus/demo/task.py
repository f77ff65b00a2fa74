"""The demo's task: put four digits in ascending order and write them in brackets, `sort 6639 = ` -> `[3669]`.

Two rewards judge a completion, and they can disagree: `3669` is in order but not in brackets, `[6639]` is in brackets
but not in order. No held-out prompt has the digits of a prompt that is trained on, not even in another order.
"""

import random
import re
from collections.abc import Sequence
from typing import Any, Literal
from zlib import crc32

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

Split = Literal["train", "held_out"]

NUM_DIGITS = 4
PROMPT = "sort {} = "
COMPLETION = "[{}]"
MAX_COMPLETION_LENGTH = NUM_DIGITS + 4  # brackets, the end token, and one token too many
_FORMATTED = re.compile(rf"\[[0-9]{{{NUM_DIGITS}}}\]")


def dataset(split: Split, size: int, seed: int) -> Dataset:
    """Draw `size` different rows: `prompt`, and as `answer` the digits of the prompt in ascending order."""
    digits = _sample(split, size, random.Random(seed))
    return Dataset.from_dict(
        {"prompt": [PROMPT.format(number) for number in digits], "answer": [_in_order(number) for number in digits]}
    )


def format_examples(size: int, seed: int) -> list[tuple[str, str]]:
    """Prompts of the training split with completions that are right in form only: the digits are in random order."""
    rng = random.Random(seed)
    shuffled = [(number, "".join(rng.sample(number, NUM_DIGITS))) for number in _sample("train", size, rng)]
    return [(PROMPT.format(number), COMPLETION.format(digits)) for number, digits in shuffled]


def correctness_reward(completions: list[str], answer: list[str], **kwargs: Any) -> list[float]:
    """Judge the digits and nothing else: half for the share that is in place, half for all of them being so."""
    return [
        _correctness(re.sub("[^0-9]", "", text), expected) for text, expected in zip(completions, answer, strict=True)
    ]


def format_reward(completions: list[str], **kwargs: Any) -> list[float]:
    """1 for four digits in brackets and nothing else, 0 otherwise; which digits does not matter."""
    return [float(_FORMATTED.fullmatch(text) is not None) for text in completions]


def digits_reward(completions: list[str], **kwargs: Any) -> list[float]:
    """Share of the characters that are digits: an untrained model earns some of it, and learns it in a few steps."""
    return [sum(map(str.isdigit, text)) / max(len(text), 1) for text in completions]


def accuracy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Dataset) -> float:
    """Share of the rows whose greedy completion is right in both respects, to the letter."""
    completions = complete(model, tokenizer, rows["prompt"])
    right = exactly_right(completions, rows["answer"])
    return sum(right) / len(right)


def exactly_right(completions: Sequence[str], answer: Sequence[str]) -> list[float]:
    """1 for the digits in order and in brackets, to the letter; 0 for anything else."""
    return [float(text == COMPLETION.format(digits)) for text, digits in zip(completions, answer, strict=True)]


def complete(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> list[str]:
    """Greedy completions. Draws no random numbers and leaves the model in the mode it was in."""
    inputs = tokenizer(list(prompts), return_tensors="pt", padding=True).to(model.device)
    was_training = model.training
    model.eval()
    with torch.no_grad():
        output = model.generate(**inputs, do_sample=False, max_new_tokens=MAX_COMPLETION_LENGTH)
    model.train(was_training)
    return tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def _sample(split: Split, size: int, rng: random.Random) -> list[str]:
    numbers = [f"{number:0{NUM_DIGITS}}" for number in range(10**NUM_DIGITS)]
    numbers = [number for number in numbers if _is_held_out(number) == (split == "held_out")]
    if not 0 < size <= len(numbers):
        raise ValueError(f"size={size} rows cannot be drawn: the split {split!r} has {len(numbers)}.")
    return rng.sample(numbers, size)


def _is_held_out(number: str) -> bool:
    """About one set of digits in ten; every order of the same digits falls on the same side."""
    return crc32(_in_order(number).encode()) % 10 == 0


def _in_order(number: str) -> str:
    return "".join(sorted(number))


def _correctness(digits: str, expected: str) -> float:
    if len(digits) != len(expected):
        return 0.0
    in_place = sum(digit == wanted for digit, wanted in zip(digits, expected, strict=True)) / len(expected)
    return (in_place + (digits == expected)) / 2
