"""A second round of `benchmarks.multitask`: two estimators that came later, `shrinkage` and `gd2po`.

python -m benchmarks.multitask_second FOLDER [--scenarios six level two one] [--tune]
python -m benchmarks.multitask_second                   writes the summary again, from the JSON files

Fixed before the first of these runs:

- Arms: the two estimators at their defaults, over the eight seeds, the start, the steps and the scenarios of the first
  round. They are compared, seed by seed, with the arms of the first round as they stand. In every scenario the arm of
  `grpo` and seed 0 is trained once more and must give the very answers of the first round; where it does not, nothing
  is written. With one reward `gd2po` is `gdpo`, so `one` leaves it out.
- Primary outcome: the accuracy on the held-out prompts, as in the first round. In each scenario these differences have
  intervals that hold together at 95 %, in a family of their own, so that the first round's intervals stay as they are:

      shrinkage minus grpo, gd2po minus grpo      the question of the articles
      shrinkage minus dr_grpo                     what shrinkage adds: dr_grpo is its like without it, as rloo's twin
      gd2po minus gdpo                            what the filter adds

  An estimator is said to be more accurate than another where its interval lies above 0, and less accurate where it lies
  below 0. Elsewhere nothing is shown.
- Secondary: area under the learning curve, worst task, weighted reward, with intervals of the same kind.
- Learning rate: the rule of the first round. The best of `RATES` by the mean accuracy in `six` over the two tuning
  seeds serves in all scenarios (`--tune`).
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from benchmarks.multitask import LEARNING_RATE, RATES, TUNING_SEEDS, scenario_task
from benchmarks.multitask_results import (
    BASELINE,
    FOLDER,
    OUTCOMES,
    arm_of,
    by_estimator,
    paired,
    table,
    write_rates,
    write_results,
)
from benchmarks.multitask_task import SCENARIOS
from grpo_plus.compare.intervals import differences, means
from grpo_plus.compare.plan import Variant
from grpo_plus.compare.train import compare

SECOND = FOLDER / "second"
CHANGED = {"shrinkage": "dr_grpo", "gd2po": "gdpo"}  # the estimator of the first round that each of the two changes
LEARNING_RATES = {
    "shrinkage": 2e-3
}  # by the rule, where it is not the first round's: results/multitask/second/tuning.json
SEEDS = 8


def main() -> None:
    """Train what is missing, then write the results and their summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="keeps every finished arm")
    parser.add_argument("--scenarios", nargs="+", choices=SCENARIOS, default=list(SCENARIOS))
    parser.add_argument("--tune", action="store_true", help="compare the learning rates, in `six` and on other seeds")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.folder is None:
        print(write_summary())
    elif args.tune:
        tried = [Variant(name, fields={"learning_rate": rate}) for name in CHANGED for rate in RATES]
        write_rates(
            compare(scenario_task("six"), tried, TUNING_SEEDS, args.folder / "tuning", progress=True), folder=SECOND
        )
    else:
        for scenario in args.scenarios:
            train(scenario, args.folder)
        print(write_summary())


def train(scenario: str, folder: Path) -> None:
    """Train the scenario's arms, and `grpo` on one seed again, and write what they measured."""
    task = scenario_task(scenario)
    again = compare(task, [BASELINE], [0], folder / f"{scenario}-again", progress=True)
    check_repeats(scenario, [arm_of(arm, result, again.log(arm)) for arm, result in again.results.items()])
    comparison = compare(task, variants(scenario), range(SEEDS), folder / scenario, progress=True)
    command = f"python -m benchmarks.multitask_second FOLDER --scenarios {scenario}"
    write_results(scenario, comparison, SECOND, command=command, load="one process of one thread, beside other jobs")


def variants(scenario: str) -> list[Variant]:
    """The new estimators at their own learning rates, but for those that are another one's twin there."""
    names = [name for name in CHANGED if (scenario, name) != ("one", "gd2po")]
    rates = {name: {"learning_rate": LEARNING_RATES.get(name, LEARNING_RATE)} for name in names}
    return [Variant(name, fields=rates[name], label=name) for name in names]


def check_repeats(scenario: str, again: list[dict[str, Any]], folder: Path = FOLDER) -> None:
    """Refuse, with a RuntimeError, arms that answer other prompts right than the same arms of the first round did."""
    first = {(arm["estimator"], arm["seed"]): arm["right"] for arm in arms_of(folder / f"{scenario}.json")}
    for arm in again:
        if first[arm["estimator"], arm["seed"]] != arm["right"]:
            raise RuntimeError(
                f"{arm['estimator']}, seed {arm['seed']} does not repeat the first round in {scenario!r}. Train the "
                "first round's arms again, with these versions, and compare with them."
            )


def arms_of(path: Path) -> list[dict[str, Any]]:
    """The arms of a results file."""
    return json.loads(path.read_text(encoding="utf-8"))["arms"]


def write_summary(folder: Path = FOLDER) -> str:
    """Write second/summary.md from both rounds; returns the text."""
    done = [scenario for scenario in SCENARIOS if (folder / "second" / f"{scenario}.json").exists()]
    sections = [line for scenario in done for line in section(scenario, folder)]
    text = "\n".join(["# Five tasks, several rewards: the second round", "", *sections]).rstrip() + "\n"
    (folder / "second" / "summary.md").write_text(text, encoding="utf-8")
    return text


def section(scenario: str, folder: Path) -> list[str]:
    """The lines of a scenario: means of the two estimators, then what they differ by."""
    new = arms_of(folder / "second" / f"{scenario}.json")
    arms = paired([*arms_of(folder / f"{scenario}.json"), *new])
    names = list(dict.fromkeys(arm["estimator"] for arm in new))
    scores = {outcome: by_estimator(arms, outcome) for outcome in OUTCOMES}
    average = {outcome: means({name: found[name] for name in names}) for outcome, found in scores.items()}
    compared = [(name, other) for name in names for other in (BASELINE, CHANGED[name])]
    # `table` puts the name of a row between backticks.
    against = {
        outcome: {f"{one.first}` minus `{one.second}": one.interval for one in differences(found, compared)}
        for outcome, found in scores.items()
    }
    return [f"## {scenario}", "", *table("mean", average), "", *table("difference", against, sign="+"), ""]


if __name__ == "__main__":
    main()
