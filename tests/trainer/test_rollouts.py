"""What a rollout brings beside text of the policy: tokens of a tool, columns, observations, pictures."""

from typing import Any

import pytest
import torch
from datasets import Dataset
from PIL import Image

from grpo_plus import GRPOPlusConfig, GRPOPlusTrainer, Rewards
from grpo_plus.advantages import Steps, checked, estimate
from grpo_plus.trainer.names import logged_columns
from tests.refilling import MIXED, Judge
from tests.training import PROMPTS, make_trainer, vowels

OURS: dict[str, Any] = {"trainer_class": GRPOPlusTrainer, "config_class": GRPOPlusConfig, "max_steps": 1}
# Tokens of each completion, and how many of these the environment wrote.
LENGTHS, WRITTEN_BY_OTHERS = [3, 6, 8, 65, 4, 4, 5, 7], [0, 0, 0, 31, 3, 0, 1, 0]
SCORES = [1.0, 0.0, 1.0, 0.0, 0.0, 1.0, 1.0, 0.5]


def rollout(prompts: list[str], trainer: Any) -> dict[str, list]:
    return {
        "prompt_ids": [trainer.processing_class(prompt)["input_ids"] for prompt in prompts],
        "completion_ids": [[5] * length for length in LENGTHS],
        "logprobs": [[-1.0] * length for length in LENGTHS],
        "env_mask": [[1] * (n - k) + [0] * k for n, k in zip(LENGTHS, WRITTEN_BY_OTHERS, strict=True)],
        "score": SCORES,
        "subject": ["sums"] * 4 + ["differences"] * 4,
    }


def scored(score: list[float], **_: Any) -> list[float]:
    return score


def rolled_out(output_dir: Any, **config: Any) -> Any:
    settings = OURS | {"reward_funcs": [scored], "trainer_arguments": {"rollout_func": rollout}} | config
    trainer = make_trainer(output_dir, **settings)
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    settings = {"advantage_estimator": "reinforce_pp", "task_column": "subject"}
    return rolled_out(tmp_path_factory.mktemp("run"), **settings)


def test_lengths_count_the_tokens_that_the_policy_wrote(trained):
    assert trained.rewards.lengths.tolist() == [[3, 6, 8, 34], [1, 4, 4, 7]]
    assert trained.rewards.full_lengths.tolist() == [[3, 6, 8, 65], [4, 4, 5, 7]]


def test_weights_over_tokens_leave_no_mean_over_the_trained_tokens(trained):
    for output, name in ((estimate("reinforce_pp", trained.rewards), "reinforce_pp"),):
        mean = (output * trained.rewards.lengths).sum() / trained.rewards.lengths.sum()
        assert mean.abs() < 1e-9, name


def test_opo_weighs_by_the_trained_tokens(trained):
    # (3 * 1 + 8 * 1) / (3 + 6 + 8 + 34) = 11 / 51
    assert estimate("opo", trained.rewards)[0, 1].item() == pytest.approx(-11 / 51)


def test_a_task_column_that_a_rollout_function_fills_is_accepted(trained):
    assert trained.rewards.tasks == ("sums", "differences")


def test_a_task_column_that_nobody_fills_is_an_error_that_lists_the_columns(tmp_path):
    with pytest.raises(ValueError, match="task_column='subjekt' is no column of the dataset. Known: .*subject"):
        rolled_out(tmp_path, task_column="subjekt")


def test_steps_end_anywhere_in_the_completion_and_its_mean_is_over_all_tokens():
    full, written = torch.tensor([[4, 2]]), torch.tensor([[2, 2]])
    rewards = Rewards.from_table(
        torch.tensor([[1.0], [0.0]]),
        num_generations=2,
        weights=torch.ones(1),
        names=("r",),
        lengths=written.flatten(),
        full_lengths=full.flatten(),
        steps=([[1.0], [0.0]], [[3], [1]]),
    )
    advantages = estimate("process", rewards, {"eps": 0.0})
    half = 0.5**0.5  # (1 - 1/2) / std of 1 and 0
    assert advantages[0, 0].tolist() == pytest.approx([half] * 4)
    assert rewards.per_completion(advantages)[0].tolist() == pytest.approx([half, -half])
    ends = Steps.from_rows([[1.0], [0.0]], [[3], [1]], lengths=full).ends
    assert ends.flatten().tolist() == [3, 1]
    with pytest.raises(ValueError, match="T of at least 4"):
        checked("hook", torch.zeros(1, 2, 3), rewards)


@pytest.mark.parametrize(
    ("rows", "distinct"),
    [
        ([{"prompt": [{"role": "user", "content": "count"}], "level": 1}] * 8, 1),
        ([{"level": level} for level in (1, 1, 1, 1, 2, 2, 2, 2)], 2),
        (
            [
                {"prompt": [{"role": "user", "content": "look"}], "image": Image.new("RGB", (2, 2), color)}
                for color in ["red"] * 4 + ["blue"] * 4
            ],
            2,
        ),
    ],
)
def test_spo_knows_a_prompt_by_the_datasets_row_and_not_by_an_observation(tmp_path, rows, distinct):
    trainer = make_trainer(tmp_path, reward_funcs=[vowels], advantage_estimator="spo", **OURS)
    trainer.environments = [object()] * 8
    keys = []
    for batch in range(2):
        seen = [[{"role": "user", "content": f"observation {batch} {rollout}"}] for rollout in range(8)]
        trainer._calculate_rewards(list(rows), seen, ["1"] * 8, [[1]] * 8)
        keys.append(trainer.rewards.prompts)
    assert keys[0] == keys[1]
    assert len(set(keys[0])) == distinct


PICTURED = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "count"}]}]


def test_refills_refuse_pictures_in_messages_at_construction(tmp_path):
    dataset = Dataset.from_list([{"prompt": PICTURED}] * 4)
    with pytest.raises(ValueError, match="max_refills=1 moves rows of text only, but the messages of train_dataset"):
        make_trainer(tmp_path, train_dataset=dataset, max_refills=1, **OURS)


@pytest.mark.parametrize("pictured_from", [0, 1])
def test_a_batch_with_pictures_of_a_tool_is_kept_with_one_warning(tmp_path, pictured_from):
    trainer = make_trainer(
        tmp_path, train_dataset=MIXED, reward_funcs=[Judge()], advantage_estimator="rloo", max_refills=2, **OURS
    )
    score, batches = super(GRPOPlusTrainer, trainer)._generate_and_score_completions, []

    def generate(rows: list[dict[str, Any]]) -> tuple[dict[str, Any], Rewards]:
        # TRL's own batch, with what it adds for a tool that answers with a picture.
        trainer.plus.max_refills, refills = 0, trainer.plus.max_refills
        output = score(rows)
        trainer.plus.max_refills = refills
        if len(batches) >= pictured_from:
            output |= {"pixel_values": torch.zeros(1, 3, 2, 2), "num_images": [1]}
        batches.append((output, trainer.rewards, {k: list(v) for k, v in logged_columns(trainer).items()}))
        return output, trainer.rewards

    rows = [MIXED[row] for row in (1, 1, 1, 1, 2, 2, 2, 2)]
    with pytest.warns(UserWarning, match="max_refills=2 replaces rows of text only, .* num_images, pixel_values") as w:
        output, rewards = trainer._refills.fill_up(rows, generate)
    assert len([each for each in w if "replaces rows of text" in str(each.message)]) == 1
    assert output is batches[0][0]
    assert rewards is batches[0][1]
    assert {name: list(column) for name, column in logged_columns(trainer).items() if column} == {
        name: column for name, column in batches[0][2].items() if column
    }
    assert len(batches) == 1 + pictured_from


def test_rows_of_text_have_their_lengths_alone(tmp_path):
    trainer = make_trainer(tmp_path, train_dataset=PROMPTS, **OURS)
    trainer.train()
    assert trainer.rewards.full_lengths is None
    assert trainer.rewards.spans is trainer.rewards.lengths
