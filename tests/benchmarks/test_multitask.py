import json

import pytest
import torch

from benchmarks import multitask
from benchmarks.multitask_results import write_results
from benchmarks.multitask_task import REWARDS, TASKS, dataset, examples, numbers
from grpo_plus.advantages import Rewards, estimate
from grpo_plus.compare.train import compare


@pytest.mark.parametrize(("number", "answers"), [
    ("482", {"copy": "482", "reverse": "284", "sort": "248", "max": "8", "even": "3"}),
    ("730", {"copy": "730", "reverse": "037", "sort": "037", "max": "7", "even": "1"}),
])  # fmt: skip
def test_the_tasks(number, answers):
    assert {task: solve(number) for task, solve in TASKS.items()} == answers


@pytest.mark.parametrize(("task", "completion", "correct", "position", "form", "length", "plausible", "points"), [
    ("sort", "[248]",   1, 1,     1, 0,     1, 5),
    ("sort", "248",     0, 1,     0, -0.5,  1, 0),      # two characters off
    ("sort", "[284]",   0, 1 / 3, 1, 0,     1, 0),
    ("sort", "[2488]",  0, 3 / 4, 1, -0.25, 0, 0),      # three of four digits in place
    ("sort", "[24",     0, 2 / 3, 0, -0.5,  0, 0),
    ("sort", "",        0, 0,     0, -1,    0, 0),      # five characters off, at most four count
    ("sort", "[248] ",  0, 1,     0, -0.25, 1, 0),
    ("reverse", "[284]", 1, 1,    1, 0,     1, None),
    ("reverse", "[482]", 0, 1 / 3, 1, 0,    1, None),
    ("max", "[8]",      1, 1,     1, 0,     1, None),
    ("max", "[4]",      0, 0,     1, 0,     1, None),
    ("max", "[9]",      0, 0,     1, 0,     0, None),
    ("max", "[88]",     0, 1 / 2, 1, -0.25, 0, None),
    ("even", "[3]",     1, 1,     1, 0,     1, None),
    ("even", "[0]",     0, 0,     1, 0,     1, None),
    ("even", "[4]",     0, 0,     1, 0,     0, None),   # of three digits
    ("even", "[",       0, 0,     0, -0.5,  0, None),
])  # fmt: skip
def test_the_rewards_of_482(task, completion, correct, position, form, length, plausible, points):
    columns = {"answer": [TASKS[task]("482")], "task": [task], "number": ["482"]}
    given = {name: reward(completions=[completion], **columns) for name, reward in REWARDS.items()}
    expected = {"correct": correct, "position": position, "form": form, "length": length}
    assert given == {name: [value] for name, value in (expected | {"plausible": plausible, "points": points}).items()}


def test_the_rewards_have_the_names_they_are_logged_under():
    assert {reward.__name__: reward for reward in REWARDS.values()} == REWARDS


def test_digits_that_are_held_out_are_trained_on_in_no_order_and_no_task():
    train, held_out = dataset("train"), dataset("held_out")
    trained_on = {"".join(sorted(number)) for number in train["number"]}
    assert not trained_on & {"".join(sorted(number)) for number in held_out["number"]}
    assert sorted([*numbers("train"), *numbers("held_out")]) == [f"{number:03}" for number in range(1000)]
    assert {task: held_out["task"].count(task) for task in TASKS} == dict.fromkeys(TASKS, 100)


def judged(rows, reward):
    prompts = [prompt.split() for prompt, _ in rows]
    columns = {"task": [words[0] for words in prompts], "number": [words[1] for words in prompts]}
    answers = [TASKS[task](number) for task, number in zip(*columns.values(), strict=True)]
    return REWARDS[reward](completions=[text for _, text in rows], answer=answers, **columns)


def test_the_warm_ups_completions_are_what_was_asked_for():
    assert set(judged(examples(200, 0, right=1, bare=0, miscounted=0), "correct")) == {1.0}
    guesses = examples(200, 0, right=0, bare=0, miscounted=0)
    assert set(judged(guesses, "plausible")) == set(judged(guesses, "form")) == {1.0}
    assert 0 < sum(judged(guesses, "correct")) < 100  # a guess can be right
    assert set(judged(examples(200, 0, right=1, bare=1, miscounted=0), "length")) == {-0.5}
    assert set(judged(examples(200, 0, right=1, bare=0, miscounted=1), "length")) == {-0.25}


def test_twins_are_trained_once():
    assert multitask.estimators("six") == list(multitask.ESTIMATORS)
    assert set(multitask.ESTIMATORS) - set(multitask.estimators("two")) == {"rloo"}
    assert set(multitask.ESTIMATORS) - set(multitask.estimators("one")) == {"rloo", "mo_grpo"}


def test_twins_have_the_same_advantages_up_to_a_factor():
    rewards = Rewards(torch.rand(3, 8, 1), torch.ones(1), ("correct",))
    torch.testing.assert_close(estimate("rloo", rewards), 8 / 7 * estimate("dr_grpo", rewards))
    torch.testing.assert_close(estimate("mo_grpo", rewards), estimate("grpo", rewards))


def test_two_arms_of_two_steps(tmp_path):
    task = multitask.scenario_task("level", steps=2, warm_up_steps=2)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    comparison = compare(task, ["grpo", "ema_task"], [3], tmp_path / "arms")
    torch.set_num_threads(threads)
    assert not comparison.failures
    written = json.loads(write_results("level", comparison, tmp_path).read_text())
    assert [(arm["estimator"], arm["seed"], arm["curve"]["steps"]) for arm in written["arms"]] == [
        ("grpo", 3, [1, 2]),
        ("ema_task", 3, [1, 2]),
    ]
    for arm in written["arms"]:
        scores = arm["scores"]
        means = {name: scores[f"reward/{name}"] for name in REWARDS}
        means["points"] *= 0.2 * 0.2  # a fifth of the prompts, and of the weight
        assert scores["reward"] == pytest.approx(sum(means.values()), abs=5e-4)
        assert scores["worst_task"] == min(scores[f"accuracy/{task}"] for task in TASKS)
        assert scores["accuracy"] == scores["reward/correct"]
        assert sum(scores[f"share/{task}"] for task in TASKS) == pytest.approx(1, abs=1e-3)
        assert scores["curve"] == pytest.approx(sum(arm["curve"]["accuracy"]) / 2, abs=1e-4)
