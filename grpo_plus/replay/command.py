"""The command that trains what a replay advises to compare, as far as the log knows it."""

import json
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from grpo_plus.replay.advice import Advice
from grpo_plus.replay.recipes import Recipe
from grpo_plus.replay.rollouts import Rollouts

SEEDS = 5  # with 3, only large differences can be shown
PLACEHOLDERS = "MODEL, DATA and MODULE"
NEEDS_TASKS = ("ema_task", "popart")
# What a record of a run says of its training, and a comparison has to know.
TRAINED_WITH = (
    "loss_type",
    "beta",
    "learning_rate",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "max_completion_length",
    "temperature",
)
NEXT_LINE, WIDTH = " \\\n    ", 100


def compare_command(advice: Advice, rollouts: Rollouts, own: Recipe | None) -> str:
    """`grpo-plus compare` with the run's own estimator and the candidates, line by line.

    Args:
        own: what the run trained with; None where the log does not say.
    """
    keywords = {advice.current: dict(own.keywords) if own else {}, **advice.candidates}
    given = {name: dict(kwargs) for name, kwargs in keywords.items() if kwargs}
    what = ["grpo-plus", "compare", "--estimators", ",".join(keywords), "--seeds", str(SEEDS)]
    if advice.current not in given:  # else the variant has another label
        what += ["--baseline", advice.current]
    if given:
        what += ["--advantage_kwargs", json.dumps(given)]
    if own is not None and own.modifiers:
        what += ["--advantage_modifiers", json.dumps(dict(own.modifiers))]
    return NEXT_LINE.join(_in_lines([*what, *_task(advice, rollouts), *_training(rollouts)]))


def _in_lines(words: Sequence[str]) -> list[str]:
    """The words, quoted, in lines that begin with a flag."""
    lines, line = [], ""
    for flag in _flags(words):
        if line and len(line) + len(flag) >= WIDTH:
            lines.append(line)
            line = ""
        line = f"{line} {flag}".strip()
    return [*lines, line]


def _flags(words: Sequence[str]) -> list[str]:
    """Each flag with its values."""
    starts = [number for number, word in enumerate(words) if word.startswith("--") or number == 0]
    return [shlex.join(words[start:end]) for start, end in zip(starts, [*starts[1:], len(words)], strict=True)]


def _task(advice: Advice, rollouts: Rollouts) -> list[str]:
    """Model, data and rewards, of which a log knows the rewards' names."""
    words = ["--model_name_or_path", "MODEL", "--dataset_name", "DATA"]
    words += ["--reward_funcs", *(f"MODULE.{name}" for name in rollouts.names)]
    weights = rollouts.weights.tolist()
    if set(weights) != {1.0}:
        words += ["--reward_weights", *(f"{weight:g}" for weight in weights)]
    if set(NEEDS_TASKS) & set(advice.candidates):
        words += ["--task_column", str(_settings(rollouts).get("task_column") or "task")]
    return words


def _training(rollouts: Rollouts) -> list[str]:
    settings = _settings(rollouts)
    words = ["--num_generations", str(rollouts.size)]
    for name in TRAINED_WITH:
        value = settings.get(name)
        known = isinstance(value, int | float | str) and not isinstance(value, bool)
        if known and not (name == "max_steps" and value == -1):
            words += [f"--{name}", str(value)]
    return words


def _settings(rollouts: Rollouts) -> Mapping[str, Any]:
    return {} if rollouts.record is None else rollouts.record.settings
