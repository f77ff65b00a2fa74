"""pass@k, its place among the metrics, and reward functions of the evaluations alone."""

import re
from itertools import combinations
from typing import Any

import pandas as pd
import pytest
import torch
from datasets import Dataset

from grpo_plus import GRPOPlusConfig, GRPOPlusTrainer
from grpo_plus.trainer.rewards.pass_at_k import pass_at_k
from tests.training import PROMPTS, make_trainer, vowels, weights_of

EVALUATES = {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 8}
HELD_OUT = Dataset.from_list([{"prompt": f"{number}=", "right": number} for number in range(5)])


def made(output_dir, *, eval_dataset: Any = HELD_OUT, eval_reward_funcs: Any = None, **config: Any) -> GRPOPlusTrainer:
    arguments = {"eval_dataset": eval_dataset, "eval_reward_funcs": eval_reward_funcs}
    classes = {"trainer_class": GRPOPlusTrainer, "config_class": GRPOPlusConfig}
    return make_trainer(output_dir, trainer_arguments=arguments, **classes, **(EVALUATES | config))


def first_ones(completions: list[str], right: list[int], **_: Any) -> list[float | None]:
    """Of a prompt's four completions, as many are right as the column says; of prompt 4 only the first is judged."""
    return [
        None if number == 4 and row % 4 else 0.9 * float(row % 4 < number)
        for row, number in zip(range(len(completions)), right, strict=True)
    ]


def right_at_first(completions: list[str], trainer_state: Any, **_: Any) -> list[float]:
    return [float(trainer_state.global_step == 1)] * len(completions)


def test_pass_at_k_is_the_mean_over_all_choices_of_k():
    for n in range(1, 6):
        for right in range(n + 1):
            row = [1] * right + [0] * (n - right)
            for k in range(1, n + 1):
                tries = [max(choice) for choice in combinations(row, k)]
                (found,) = pass_at_k(torch.tensor([right]), torch.tensor([n]), k).tolist()
                assert found == pytest.approx(sum(tries) / len(tries)), (n, right, k)
    assert pass_at_k(torch.tensor([3]), torch.tensor([3]), 4).isnan().all()


def test_the_mean_is_over_prompts_of_batches_that_are_not_full(tmp_path):
    # A batch holds two of the five prompts. 0 to 3 of 4 completions are right, and the one of prompt 4 that is judged.
    trainer = made(
        tmp_path,
        eval_reward_funcs=first_ones,
        eval_pass_at_k=[1, 2, 4],
        eval_pass_threshold=0.9,  # float32 rounds the reward below it
    )
    metrics = trainer.evaluate()
    assert metrics["eval_pass@1"] == pytest.approx((0 + 1 / 4 + 2 / 4 + 3 / 4 + 1) / 5)
    # A choice of two holds a right one with 1/2, 5/6 and 1; prompt 4 has too few.
    assert metrics["eval_pass@2"] == pytest.approx((0 + 1 / 2 + 5 / 6 + 1) / 4)
    assert metrics["eval_pass@4"] == pytest.approx(3 / 4)
    assert trainer.state.log_history[-1]["eval_pass@2"] == metrics["eval_pass@2"]


def test_each_of_several_datasets_has_its_own(tmp_path):
    parts = {"hard": HELD_OUT.select([0]), "easy": HELD_OUT.select([3]), "unjudged": HELD_OUT.select([4])}
    trainer = made(
        tmp_path, eval_dataset=parts, eval_reward_funcs=first_ones, eval_pass_at_k=4, eval_pass_threshold=0.5
    )
    metrics = trainer.evaluate()
    assert [metrics[f"eval_{name}_pass@4"] for name in parts] == [0.0, 1.0, None]


def test_the_best_model_by_pass_at_k_is_loaded(tmp_path):
    trainer = made(
        tmp_path,
        eval_reward_funcs=[right_at_first],
        eval_pass_at_k=[4],
        metric_for_best_model="pass@4",
        load_best_model_at_end=True,
        save_strategy="steps",
        save_steps=1,
        max_steps=2,
    )
    trainer.train()
    assert (trainer.state.best_global_step, trainer.state.best_metric) == (1, 1.0)
    saved = type(trainer.model).from_pretrained(tmp_path / "checkpoint-1").state_dict()
    last = type(trainer.model).from_pretrained(tmp_path / "checkpoint-2").state_dict()
    weights = weights_of(trainer)
    assert all(torch.equal(weight, saved[name]) for name, weight in weights.items())
    assert not all(torch.equal(weight, last[name]) for name, weight in weights.items())


def test_the_evaluations_functions_leave_the_training_alone(tmp_path, capsys):
    settings = {
        "advantage_estimator": "ema_task",
        "max_steps": 2,
        "log_completions": True,
        "reward_weights": [1.0, 2.0],
    }
    plain = made(tmp_path / "plain", **settings)
    plain.train()
    apart = made(tmp_path / "apart", eval_reward_funcs=[first_ones], **settings)
    apart.train()
    assert all(torch.equal(weight, weights_of(plain)[name]) for name, weight in weights_of(apart).items())
    assert apart.estimator_state == plain.estimator_state
    assert apart.args.reward_weights == [1.0, 2.0]
    training, evaluation, *_ = apart.state.log_history
    assert training["rewards/vowels/mean"] == plain.state.log_history[0]["rewards/vowels/mean"]
    judges = {re.sub("eval_rewards/(.*)/.*", r"\1", name) for name in evaluation if name.startswith("eval_rewards/")}
    assert judges == {"first_ones"}
    assert evaluation["eval_reward"] == pytest.approx(evaluation["eval_rewards/first_ones/mean"])
    tables = [pd.read_parquet(path) for path in sorted((tmp_path / "apart" / "completions").glob("*.parquet"))]
    assert [list(table["prompt"].str[1]) for table in tables] == [["+"] * 8] * 2  # the training's
    assert [{"vowels", "brevity", "first_ones"} & set(table) for table in tables] == [{"vowels", "brevity"}] * 2


def test_the_trainings_functions_are_back_after_an_error(tmp_path):
    def broken(completions: list[str], **_: Any) -> list[float]:
        raise KeyError("answer")

    trainer = made(tmp_path, eval_reward_funcs=broken)
    before = (trainer.reward_funcs, trainer._logs)
    with pytest.raises(RuntimeError, match="'broken' raised KeyError"):
        trainer.evaluate()
    assert (trainer.reward_funcs, trainer._logs) == before
    assert (trainer.reward_func_names, len(trainer.reward_weights)) == (["vowels", "brevity"], 2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eval_pass_at_k": [1, 8]}, r"takes 8 completions.*samples 4. Set num_generations_eval=8"),
        ({"eval_pass_at_k": [0]}, r"eval_pass_at_k=\[0\] is not a list of different numbers of tries"),
        ({"eval_pass_at_k": [2, 2]}, "is not a list of different numbers of tries"),
        ({"eval_pass_at_k": "4"}, r"eval_pass_at_k='4' .* Write eval_pass_at_k=\[1, 4, 8\]"),
        ({"eval_pass_at_k": [1]}, "but there are vowels, brevity. Set eval_pass_reward='vowels'"),
        ({"eval_pass_at_k": [1], "eval_pass_reward": "vowel"}, "Did you mean 'vowels'"),
        ({"eval_pass_at_k": [1], "eval_pass_threshold": float("nan")}, "eval_pass_threshold=nan must be a finite"),
        ({"eval_pass_threshold": 0.5}, "eval_pass_threshold=0.5 has no effect without eval_pass_at_k"),
        ({"metric_for_best_model": "eval_pass@8", "eval_pass_at_k": [1]}, r"Set eval_pass_at_k=\[1, 8\]"),
        ({"reward_funcs": [], "eval_reward_funcs": [vowels]}, "Set reward_funcs too"),
        ({"eval_reward_funcs": [first_ones], "eval_dataset": PROMPTS}, "eval_dataset has no column 'right'"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_at_construction(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        made(tmp_path, **settings)
