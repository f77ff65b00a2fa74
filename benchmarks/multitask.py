"""Does dividing by the group's std cost anything where a rollout collects several rewards? Tested by training.

python -m benchmarks.multitask FOLDER [--scenarios six two one level] [--seeds 8] [--tune]

"GRPO's Main Flaw" says that group-std normalization slightly underperforms normalization-free advantages once several
rewards are collected. Here a model of two layers and 64 units, on a CPU, learns five tasks (`multitask_task`) under
every estimator of `ESTIMATORS`, from one start and over eight seeds, in four scenarios:

    six     all six rewards, each of weight 1: one task is paid five times what the others are (`points`)
    level   the same rewards in one unit: `points` weighs a fifth
    two     a hard and an easy reward, the answer and its form: the case of GDPO (arXiv 2601.05242)
    one     the control: the answer alone, where there is nothing to collect

Fixed before the first of these runs:

- Primary outcome: share of the 500 held-out prompts that the trained model answers right, greedily and to the letter:
  the mean over the five tasks, whatever a task is paid. All estimators are compared with `grpo`, seed by seed, with
  intervals over seeds and prompts that hold together at 95 % (`grpo_plus.compare.intervals`). The claim is about
  `dr_grpo` minus `grpo` in `six` and in `level`: for it where the interval lies above 0, against it where it lies
  below 0, undecided otherwise.
- Secondary: the area under the learning curve (mean of ten points on 150 of the prompts), the worst task, and the
  held-out mean of every reward and of their weighted sum, which is what the training was asked for.
- Learning rate: estimators differ in the size of their advantages, and Adam takes a constant factor out of the
  gradient again, but for its epsilon and for clipping by norm. So gradients are not clipped here, and of three rates
  (`RATES`) each estimator was to have the one with the best mean accuracy in `six` over two seeds of its own. For all
  of them that was the one in the middle (`--tune`, results/multitask/tuning.json), and it serves in all scenarios.
  `rloo` is `dr_grpo` times 8/7, so that it was not tuned; what sets the two apart is rounding.

Changed on the way, when most arms of `six` were finished: `rloo` had answered every prompt as `dr_grpo` did, so the
other scenarios do without it, and `reinforce_pp_baseline` came in as the eighth that differs, without tuning. With one
reward `mo_grpo` is `grpo`, so `one` leaves it out.

The seeds decide the order of the prompts and what is sampled; the start is one. Interrupted, the command goes on where
it was; started twice on one folder it uses two cores. Data and a summary go to benchmarks/results/multitask/, a report
of each scenario to FOLDER.
"""

import argparse
import functools
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.multitask_results import BASELINE, write_rates, write_results, write_summary
from benchmarks.multitask_task import NUM_DIGITS, REWARDS, SCENARIOS, TASKS, dataset, examples
from grpo_plus import GRPOPlusConfig, GRPOPlusTrainer
from grpo_plus.compare.comparison import Comparison
from grpo_plus.compare.plan import Variant
from grpo_plus.compare.report import write_comparison
from grpo_plus.compare.task import Scores, Task
from grpo_plus.compare.train import compare
from grpo_plus.demo.progress import HeldOutAccuracy
from grpo_plus.demo.task import complete
from grpo_plus.demo.tiny import tiny_model, tiny_tokenizer
from grpo_plus.demo.warmup import warm_up

STEPS, WARM_UP_STEPS = 80, 600
WARM_UP = {"right": 0.3, "bare": 0.6, "miscounted": 0.2}
NUM_EXAMPLES, CURVE_ROWS = 8_000, 150
LEARNING_RATE = 1e-3  # the best of RATES for every estimator
RATES, TUNING_SEEDS = (5e-4, 1e-3, 2e-3), (1000, 1001)
ESTIMATORS = (
    "grpo",
    "dr_grpo",
    "rloo",
    "opo",
    "batch_std",
    "reinforce_pp_baseline",
    "ema_task",
    "gdpo",
    "mo_grpo",
)
TWINS = {"six": (), "level": ("rloo",), "two": ("rloo",), "one": ("rloo", "mo_grpo")}  # not trained again
UNTUNED = ("rloo", "reinforce_pp_baseline")
TOKENIZER = tiny_tokenizer()


def main() -> None:
    """Train what is missing, then write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="keeps every finished arm")
    parser.add_argument("--scenarios", nargs="+", choices=SCENARIOS, default=list(SCENARIOS))
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--tune", action="store_true", help="compare the learning rates, in `six` and on other seeds")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.tune:
        write_rates(tune(args.folder))
        return
    for scenario in args.scenarios:
        task, seeds, folder = scenario_task(scenario), range(args.seeds), args.folder / scenario
        comparison = compare(task, estimators(scenario), seeds, folder, progress=True)
        write_comparison(comparison, folder / "report", baseline=BASELINE)
        write_results(scenario, comparison)
    print(write_summary())


def estimators(scenario: str) -> list[str]:
    """All of them, but for those that are another one's twin there."""
    return [name for name in ESTIMATORS if name not in TWINS[scenario]]


def tune(folder: Path) -> Comparison:
    """The estimators under every learning rate, in `six`."""
    names = [name for name in ESTIMATORS if name not in UNTUNED]
    tried = [Variant(name, fields={"learning_rate": rate}) for name in names for rate in RATES]
    return compare(scenario_task("six"), tried, TUNING_SEEDS, folder / "tuning", progress=True)


def scenario_task(scenario: str, *, steps: int = STEPS, warm_up_steps: int = WARM_UP_STEPS) -> Task:
    """What all arms of a scenario share."""
    weights = SCENARIOS[scenario]
    return Task(
        name=f"five tasks, scenario {scenario}",
        config=functools.partial(
            GRPOPlusConfig,
            max_steps=steps,
            task_column="task",
            reward_weights=list(weights.values()),
            num_generations=8,
            per_device_train_batch_size=128,
            learning_rate=LEARNING_RATE,
            max_completion_length=NUM_DIGITS + 4,  # brackets, the end token, and one token too many
            lr_scheduler_type="linear",
            warmup_steps=5,
            max_grad_norm=0.0,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            dataloader_pin_memory=False,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
        ),
        start=functools.partial(warm_model, warm_up_steps),
        trainer=functools.partial(make_trainer, tuple(weights)),
        evaluate=functools.partial(examine, weights),
        facts={"weights": weights, "warm_up": {"steps": warm_up_steps, "examples": NUM_EXAMPLES, **WARM_UP}},
    )


def warm_model(steps: int) -> PreTrainedModel:
    """The start of every arm: it writes digits, in brackets more seldom than not, and few of them are right."""
    model = blank_model()
    model.load_state_dict(_warm_weights(steps))
    return model


def make_trainer(rewards: Iterable[str], model: PreTrainedModel, config: GRPOPlusConfig) -> GRPOPlusTrainer:
    """A trainer on these rewards that logs a learning curve."""
    trainer = GRPOPlusTrainer(
        model=model,
        reward_funcs=[REWARDS[name] for name in rewards],
        args=config,
        train_dataset=dataset("train"),
        processing_class=TOKENIZER,
    )
    trainer.add_callback(HeldOutAccuracy(TOKENIZER, dataset("held_out").select(range(CURVE_ROWS))))
    return trainer


def examine(weights: Mapping[str, float], trainer: GRPOPlusTrainer) -> Scores:
    """Greedy completions of all held-out prompts: right or wrong, also by task, and what every reward says of them."""
    rows = dataset("held_out")
    completions = complete(trainer.model, TOKENIZER, rows["prompt"])
    columns = {name: rows[name] for name in ("answer", "task", "number")}
    judged = {name: reward(completions=completions, **columns) for name, reward in REWARDS.items()}
    sums = [sum(weights[name] * (judged[name][row] or 0.0) for name in weights) for row in range(len(rows))]
    by_task = {
        f"accuracy/{task}": [score for score, name in zip(judged["correct"], rows["task"], strict=True) if name == task]
        for task in TASKS
    }
    by_reward = {f"reward/{name}": [score for score in scores if score is not None] for name, scores in judged.items()}
    return {"accuracy": judged["correct"], "reward": sums, **by_task, **by_reward}


def blank_model() -> PreTrainedModel:
    """Two layers, 64 wide, before any training."""
    return tiny_model(TOKENIZER, hidden_size=64, intermediate_size=128)


@functools.cache
def _warm_weights(steps: int) -> dict[str, Tensor]:
    model = blank_model()
    warm_up(model, TOKENIZER, examples(NUM_EXAMPLES, 0, **WARM_UP), steps=steps)
    return model.state_dict()


if __name__ == "__main__":
    main()
