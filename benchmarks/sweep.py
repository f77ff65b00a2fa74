"""How honest is it to judge the best of several settings? Simulated scores, where the truth is known.

python -m benchmarks.sweep [--comparisons 1000]

Two variants have several settings each, and 500 held-out items. A score is the sum of what the setting is worth, of the
luck of the training (standard deviation 0.1), of how the setting suits the item (0.1), and of noise (0.3). Four ways
to choose a setting and to judge it:

    all with all     every seed and every item chooses and judges
    other items      every seed chooses on one half of the items, and judges on the other half
    other folds      as before, but each seed is judged at the setting that the other seeds chose
    other seeds      two more seeds choose on one half of the items, the seeds judge on the other half: `compare`'s way

In `alike` no setting and no variant differs. In `one sided` the first variant's settings are alike, and the second
has one that is 0.3 better than its others, so that luck can help the first alone. Each way reports

    too high    the first variant's judged mean, minus the true mean of what was chosen for it
    missed      the share of comparisons whose 95 % interval of the difference leaves out the true difference
    lost        the true mean of the second variant's best setting, minus that of the chosen one
    width       of the interval, in the median

Prints a table and writes benchmarks/results/sweep.json.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.machine import RESULTS, describe
from grpo_plus.compare import intervals
from grpo_plus.compare.intervals import differences
from grpo_plus.compare.sweep import SWEEP_SEEDS, halves

RUN, SUITS, NOISE, ITEMS = 0.1, 0.1, 0.3, 500
BETTER = 0.3
CHOOSING = len(SWEEP_SEEDS)
RESAMPLES = 300  # of the bootstrap; the package draws 10,000
SHAPES = ((3, 3), (3, 8), (9, 8))  # settings, judging seeds

Judged = tuple[Tensor, Tensor]  # (2, S, I) scores of what was chosen, and the (2, S) true means


def main() -> None:
    """Simulate every way and shape."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comparisons", type=int, default=1000)
    comparisons = parser.parse_args().comparisons
    torch.set_num_threads(1)
    intervals.RESAMPLES = RESAMPLES
    print(f"{'truth':<10} settings seeds  {'way':<14} too high  missed   lost  width")
    rows = []
    for truth in ("alike", "one sided"):
        for settings, seeds in SHAPES:
            for row in simulated(truth, settings, seeds, comparisons):
                rows.append(row)
                print(
                    f"{truth:<10} {settings:>8} {seeds:>5}  {row['way']:<14} {row['too_high']:>8.4f} "
                    f"{row['missed']:>7.1%} {row['lost']:>6.3f} {row['width']:>6.3f}",
                    flush=True,
                )
    summary = {
        "command": f"python -m benchmarks.sweep --comparisons {comparisons}",
        "machine": describe(),
        "deviations": {"run": RUN, "suits": SUITS, "noise": NOISE},
        "items": ITEMS,
        "choosing_seeds": CHOOSING,
        "rows": rows,
    }
    (RESULTS / "sweep.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")


def simulated(truth: str, settings: int, seeds: int, comparisons: int) -> list[dict[str, Any]]:
    """Every way on the same scores."""
    worth = torch.zeros(2, settings)
    if truth == "one sided":
        worth[1, 1:] = -BETTER
    found: dict[str, list[tuple[float, float, float, float]]] = {way: [] for way in WAYS}
    generator = torch.Generator().manual_seed(settings * 100 + seeds)
    for _ in range(comparisons):
        scores = draw(worth, seeds + CHOOSING, generator)
        for way, choose in WAYS.items():
            found[way].append(outcome(*choose(scores, worth, seeds), worth))
    return [
        {
            "truth": truth,
            "settings": settings,
            "seeds": seeds,
            "way": way,
            "too_high": round(statistics.fmean(high for high, *_ in each), 4),
            "missed": round(statistics.fmean(missed for _, missed, *_ in each), 4),
            "lost": round(statistics.fmean(lost for _, _, lost, _ in each), 4),
            "width": round(statistics.median(width for *_, width in each), 4),
        }
        for way, each in found.items()
    ]


def draw(worth: Tensor, seeds: int, generator: torch.Generator) -> Tensor:
    """(2, settings, S, I) scores."""
    variants, settings = worth.shape
    run = RUN * torch.randn(variants, settings, seeds, 1, generator=generator)
    suits = SUITS * torch.randn(variants, settings, 1, ITEMS, generator=generator)
    noise = NOISE * torch.randn(variants, settings, seeds, ITEMS, generator=generator)
    return worth[..., None, None] + run + suits + noise


def all_with_all(scores: Tensor, worth: Tensor, seeds: int) -> Judged:
    """One pile of seeds and items."""
    used = scores[:, :, :seeds]
    return _at(_best(used.mean((2, 3)), seeds), used, worth)


def other_items(scores: Tensor, worth: Tensor, seeds: int) -> Judged:
    """The same seeds on two halves of the items."""
    choosing, judging = _halved(scores[:, :, :seeds])
    return _at(_best(choosing.mean((2, 3)), seeds), judging, worth)


def other_folds(scores: Tensor, worth: Tensor, seeds: int) -> Judged:
    """Each seed at the choice of the others."""
    choosing, judging = _halved(scores[:, :, :seeds])
    by_seed = choosing.mean(3)
    others = by_seed.sum(2, keepdim=True) - by_seed
    return _at(others.argmax(1), judging, worth)


def other_seeds(scores: Tensor, worth: Tensor, seeds: int) -> Judged:
    """Seeds of their own choose."""
    choosing, judging = _halved(scores)
    return _at(_best(choosing[:, :, seeds:].mean((2, 3)), seeds), judging[:, :, :seeds], worth)


WAYS: dict[str, Callable[[Tensor, Tensor, int], Judged]] = {
    "all with all": all_with_all,
    "other items": other_items,
    "other folds": other_folds,
    "other seeds": other_seeds,
}


def outcome(scores: Tensor, true: Tensor, worth: Tensor) -> tuple[float, float, float, float]:
    """What one comparison found, against the truth: too high, missed, lost, width."""
    [found] = differences({"first": scores[0], "second": scores[1]}, [("first", "second")])
    difference = (true[0].mean() - true[1].mean()).item()
    missed = not found.interval.low <= difference <= found.interval.high
    too_high = (scores[0].mean() - true[0].mean()).item()
    lost = (worth[1].max() - true[1].mean()).item()
    return too_high, float(missed), lost, found.interval.high - found.interval.low


def _halved(scores: Tensor) -> tuple[Tensor, Tensor]:
    half = halves(scores.shape[-1])
    return scores[..., half.choosing], scores[..., half.judging]


def _best(means: Tensor, seeds: int) -> Tensor:
    """(2, settings) -> (2, S): the best setting, the same for every seed."""
    return means.argmax(1, keepdim=True).expand(-1, seeds)


def _at(chosen: Tensor, scores: Tensor, worth: Tensor) -> Judged:
    """The scores and true means at the (2, S) chosen settings."""
    index = chosen[:, None, :, None].expand(-1, 1, -1, scores.shape[-1])
    return scores.gather(1, index).squeeze(1), worth.gather(1, chosen)


if __name__ == "__main__":
    main()
