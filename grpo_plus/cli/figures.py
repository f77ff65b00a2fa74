"""A run's figures for the terminal: which ones, in what words, as numbers, times and curves."""

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise

from grpo_plus.report.run_log import RunLog

BLOCKS = "▁▂▃▄▅▆▇█"
DEAD, EQUAL = "advantages/dead_groups", "frac_reward_zero_std"
# Figures in the order of their rows, each with its words. What a run does not log has no row.
SHOWN = {
    "reward": "reward",
    "rewards/{}/mean": "  {}",
    "eval_reward": "held-out reward",
    "eval_rewards/{}/mean": "  {}",
    "eval_pass@{}": "held-out pass@{}",
    "held_out_accuracy": "held-out accuracy",
    DEAD: "dead groups",
    EQUAL: "groups of equal rewards",
    "completions/mean_length": "tokens per completion",
    "completions/clipped_ratio": "cut off",
    "kl": "KL",
    "entropy": "entropy",
    "grad_norm": "gradient norm",
    "learning_rate": "learning rate",
    "rollout/tokens_per_second": "tokens/s generated",
    "guard/skipped_steps": "skipped steps",
}


def rows(log: RunLog, patterns: Iterable[str] = SHOWN) -> list[tuple[str, list[float]]]:
    """The words and the values of each figure that the run has logged.

    Args:
        patterns: keys of `SHOWN`, in the order of their rows.
    """
    names = list(dict.fromkeys(name for entry in log.entries for name in entry.figures))
    found = []
    for pattern in patterns:
        if pattern == EQUAL and DEAD in names:
            continue  # the same in other words
        start, blank, end = pattern.partition("{}")
        for name in names:
            fits = name.startswith(start) and name.endswith(end) if blank else name == pattern
            if fits and (series := log.series(name)):
                found.append(
                    (SHOWN[pattern].format(name[len(start) : len(name) - len(end)]), [value for _, value in series])
                )
    return found


def sparkline(values: Sequence[float], width: int) -> str:
    """The curve in at most `width` signs, each the mean of its share of the values; a line where nothing moves."""
    values = [value for value in values if math.isfinite(value)]
    if not values:
        return ""
    width = min(width, len(values))
    edges = [len(values) * index // width for index in range(width + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(means), max(means)
    if high == low:
        return "─" * width
    return "".join(BLOCKS[round((mean - low) / (high - low) * (len(BLOCKS) - 1))] for mean in means)


def duration(seconds: float | None) -> str:
    """Seconds in the words of somebody who waits."""
    if seconds is None:
        return "unknown"
    if seconds < 90:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


def figure(value: float) -> str:
    """A number in at most eight signs."""
    if value and (abs(value) < 1e-3 or abs(value) >= 1e6):
        return f"{value:.2e}"
    return f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.3f}"
