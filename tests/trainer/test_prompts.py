"""Prompts by their pass rates, in trainings: which are drawn, and what is told of them."""

import numpy as np
import pytest
from datasets import Dataset

from grpo_plus import GRPOPlusConfig, GRPOPlusTrainer
from tests.training import PROMPTS, brevity, make_trainer, vowels

# The prompt "3+0=" passes in three of its four completions, whatever they are.
GRADED = Dataset.from_list([{"prompt": f"{passes}+{n}=", "passes": passes} for n in range(2) for passes in range(5)])
OURS = {
    "trainer_class": GRPOPlusTrainer,
    "config_class": GRPOPlusConfig,
    "train_dataset": GRADED,
    "max_completion_length": 2,
    "advantage_estimator": "rloo",
    "prompt_sampler": '{"pass_rate": {"floor": 0.3, "decay": 0.0, "threshold": 0.9}}',
}


class Graded:
    """Keeps the row of the dataset that each group belongs to, batch by batch."""

    __name__ = "graded"

    def __init__(self):
        self.batches = []

    def __call__(self, prompts, passes, **_):
        self.batches.append([GRADED["prompt"].index(prompt) for prompt in prompts[::4]])
        return [0.9 * (i % 4 < number) for i, number in enumerate(passes)]


def expected(draws: list[tuple[int, int]], refills: int = 0, floor: float = 0.3) -> list[list[int]]:
    """The rows of two prompts for each draw, by its step and its number in the step."""
    weights = np.full(len(GRADED), 1 / 4)
    batches = []
    for step, number in draws:
        odds = (1 - floor) * weights / weights.sum() + floor / len(GRADED)
        if number % (1 + refills):
            odds[[row for batch in batches[-(number % (1 + refills)) :] for row in batch]] = 0
        rows = np.random.default_rng((7, step, number)).choice(len(GRADED), 2, replace=False, p=odds / odds.sum())
        batches.append(rows.tolist())
        for row in rows:
            rate = GRADED[int(row)]["passes"] / 4
            weights[row] = rate * (1 - rate)
    return batches


def test_each_batch_follows_the_rewards_of_the_last_one(tmp_path):
    judge = Graded()
    # The data loader looks ahead, and reads the rows of both batches of a step at once.
    trainer = make_trainer(
        tmp_path, reward_funcs=[judge], gradient_accumulation_steps=2, steps_per_generation=1, max_steps=2, **OURS
    )
    trainer.train()
    assert judge.batches == expected([(step, number) for step in range(2) for number in range(2)])
    logged = [entry for entry in trainer.state.log_history if "sampling/visited_prompts" in entry]
    seen = [{row for batch in judge.batches[: 2 * step] for row in batch} for step in (1, 2)]
    assert [entry["sampling/visited_prompts"] for entry in logged] == [len(rows) / len(GRADED) for rows in seen]
    rates = np.array([[GRADED[row]["passes"] / 4 for row in batch] for batch in judge.batches])
    variance = (rates * (1 - rates)).reshape(2, -1).mean(1)
    assert [entry["sampling/pass_variance"] for entry in logged] == pytest.approx(variance.tolist(), abs=1e-6)


def test_a_refill_draws_prompts_that_the_batch_has_not_had(tmp_path):
    judge = Graded()
    often_dead = {"prompt_sampler": {"pass_rate": {"floor": 0.9, "decay": 0.0, "threshold": 0.9}}}
    trainer = make_trainer(tmp_path, reward_funcs=[judge], max_refills=2, max_steps=6, **OURS | often_dead)
    trainer.train()
    refills = [int(entry["sampling/refills"]) for entry in trainer.state.log_history if "sampling/refills" in entry]
    assert 2 in refills
    draws = [(step, number) for step, count in enumerate(refills) for number in range(1 + count)]
    assert judge.batches == expected(draws, refills=2, floor=0.9)


def test_evaluations_neither_draw_nor_count(tmp_path):
    judge = Graded()
    trainer = make_trainer(
        tmp_path, reward_funcs=[judge], trainer_arguments={"eval_dataset": GRADED.select([4, 1])}, **OURS
    )
    trainer.evaluate()
    assert [sorted(batch) for batch in judge.batches] == [[1, 4]]
    assert trainer.prompt_sampler.state()["rows"] == []


def test_a_sampler_that_the_run_cannot_use_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"draws rows of train_dataset by index, but a IterableDataset has none"):
        make_trainer(tmp_path, reward_funcs=[vowels], **OURS | {"train_dataset": PROMPTS.to_iterable_dataset()})
    with pytest.raises(ValueError, match=r"needs one reward function .* Set its keyword reward='vowels'"):
        make_trainer(tmp_path, reward_funcs=[vowels, brevity], **OURS | {"train_dataset": PROMPTS})


def test_the_passes_of_another_dataset_or_reward_are_not_taken_up(tmp_path):
    trainer = make_trainer(tmp_path, reward_funcs=[Graded()], **OURS)
    state = trainer.running_state()
    for other, message in (
        ({"size": 11}, "holds passes of 11 prompts by .*, and this run counts passes of 10 prompts by"),
        (
            {"reward": "other"},
            "holds passes of 10 prompts by 'other' of at least .*, and this run counts .* by 'graded'",
        ),
        ({"threshold": 0.5}, "of at least 0.5, and this run counts .*: prompt_sampler starts without memory"),
    ):
        with pytest.warns(UserWarning, match=message):
            trainer.load_running_state(state | {"prompts": state["prompts"] | other})
    with pytest.raises(ValueError, match=r"grpo_plus_state.json of the checkpoint is damaged. prompts is 3"):
        trainer.load_running_state({"prompts": 3})
