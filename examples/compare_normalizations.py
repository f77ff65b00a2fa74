"""Which advantages for your rewards, by experiment: every estimator trained over several seeds from the same start.

python examples/compare_normalizations.py            on the CPU, offline, a few minutes
python examples/compare_normalizations.py --offline  two of them, from an untrained model that learns to write digits

A comparison is a `Task`: four functions. This one has rewards of different sizes, the case in which normalizations
differ: correctness counts 0 or 1, and brevity a few hundredths per character. Run it again after an interruption, or
with more seeds, and it goes on from what is finished.
"""

import functools
import sys
import warnings
from typing import Any

from grpo_plus import GRPOPlusConfig, GRPOPlusTrainer
from grpo_plus.compare.conclusion import conclusion
from grpo_plus.compare.report import write_comparison
from grpo_plus.compare.task import Task
from grpo_plus.compare.train import Variant, compare
from grpo_plus.compare.verdict import first_verdict
from grpo_plus.demo import task
from grpo_plus.demo.run import SETTINGS, warmed_up_model
from grpo_plus.demo.tiny import tiny_tokenizer

SHORT = "--offline" in sys.argv
STEPS, WARM_UP, SEEDS = (12, 1, 1) if SHORT else (60, 160, 3)
SHORTER = {"learning_rate": 1e-2, "per_device_train_batch_size": 32} if SHORT else {}
VARIANTS = ["grpo", Variant("dr_grpo", "dr_grpo", label="dr_grpo with its loss"), "dr_grpo", "gdpo"]

REWARD = task.digits_reward if SHORT else task.correctness_reward

tokenizer = tiny_tokenizer()
held_out = task.dataset("held_out", 200, seed=0)


def brevity(completions: list[str], **_: Any) -> list[float]:
    return [-0.05 * len(text) for text in completions]


def trainer(model: Any, config: GRPOPlusConfig) -> GRPOPlusTrainer:
    return GRPOPlusTrainer(
        model=model,
        reward_funcs=[REWARD, brevity],
        args=config,
        train_dataset=task.dataset("train", 2000, seed=0),
        processing_class=tokenizer,
    )


def evaluate(trainer: GRPOPlusTrainer) -> dict[str, list[float]]:
    """One number per held-out prompt and score; the verdict is about the first score."""
    completions = task.complete(trainer.model, tokenizer, held_out["prompt"])
    right = REWARD(completions=completions, answer=list(held_out["answer"]))
    return {REWARD.__name__: right, "brevity": brevity(completions)}


def main() -> None:
    warnings.simplefilter("ignore", FutureWarning)
    sorting = Task(
        name="sorting, short answers preferred",
        config=functools.partial(GRPOPlusConfig, **(SETTINGS | SHORTER), max_steps=STEPS),
        start=lambda: warmed_up_model(tokenizer, seed=0, steps=WARM_UP),
        trainer=trainer,
        evaluate=evaluate,
    )
    comparison = compare(sorting, VARIANTS[::2] if SHORT else VARIANTS, range(SEEDS), "comparison", progress=True)
    found = conclusion(first_verdict(comparison))
    print(found.verdict, *found.reasons, found.step.action, sep="\n")
    print("Written:", *write_comparison(comparison, "comparison"))


if __name__ == "__main__":
    main()
