"""The size of the groups, from the log's own evidence; where a question remains, the right question."""

import json

import numpy as np
import pandas as pd
import pytest

from grpo_plus import cli
from grpo_plus.replay import Rollouts, replay
from tests.replay.logs import table, write, write_rewards

# Eight completions in two groups of four, as dr_grpo and grpo see them.
TWO_OF_FOUR = [1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.0]
CENTERED = [0.75, -0.25, -0.25, -0.25, 0.25, 0.25, 0.25, -0.75]
ONE_OF_EIGHT = [0.5, -0.5, -0.5, -0.5, 0.5, 0.5, 0.5, -0.5]


def write_single(run_dir, step, rewards, prompt="p", **columns):
    return write_rewards(run_dir, step, {"r": rewards}, prompt=[prompt] * len(rewards), **columns)


def found(run_dir, **arguments):
    rollouts = Rollouts(run_dir, **arguments)
    return rollouts.size, rollouts.group_size.reason


def test_tables_of_one_group_each_with_different_prompts_are_groups(tmp_path):
    """TRL's default sizes: 8 completions per table, one prompt."""
    for step in range(1, 4):
        write_single(tmp_path, step, TWO_OF_FOUR, prompt=f"prompt {step}")
    assert found(tmp_path) == (8, "one prompt per table, and another one in the next")
    assert len(list(Rollouts(tmp_path).batches())) == 3


@pytest.mark.parametrize(("advantages", "size"), [(CENTERED, 4), (ONE_OF_EIGHT, 8)])
def test_advantages_tell_the_size_of_groups_of_one_prompt(tmp_path, advantages, size):
    write_single(tmp_path, 1, TWO_OF_FOUR, advantage=advantages)
    write_single(tmp_path, 2, TWO_OF_FOUR[::-1], advantage=advantages[::-1])
    assert found(tmp_path) == (size, "the advantages, which are those of its groups")
    assert "dr_grpo" in replay(Rollouts(tmp_path)).same


def test_a_group_with_equal_rewards_keeps_rounding_in_trls_log(tmp_path):
    """0.7 eight times has a std of 6e-8 in float32: TRL logs about 1e-4 in place of 0."""
    rewards = [0.7] * 4 + [0.3, 0.0, 0.0, 0.0]
    advantages = [5.96e-4] * 4 + [1.5, -0.5, -0.5, -0.5]
    write_single(tmp_path, 1, rewards, advantage=advantages)
    assert found(tmp_path)[0] == 4


def test_the_share_of_dead_groups_in_a_checkpoint_tells_the_size(tmp_path):
    write_single(tmp_path, 1, [1.0, 1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 1.0])  # in twos: dead, dead, live, live
    with pytest.raises(ValueError, match="2, 4, 8 are possible"):
        Rollouts(tmp_path)
    (tmp_path / "trainer_state.json").write_text(
        json.dumps({"log_history": [{"step": 1, "frac_reward_zero_std": 0.5, "reward_std": 0.5}]})
    )
    assert found(tmp_path) == (2, "frac_reward_zero_std in trainer_state.json")


def test_two_completions_per_table_are_a_group(tmp_path):
    write_single(tmp_path, 1, [1.0, 0.0])
    assert found(tmp_path)[0] == 2


def test_what_the_log_leaves_open_is_asked_for(tmp_path):
    """One prompt in the whole data set, and rewards that are centered in groups of two, four and eight alike."""
    for step in (1, 2):
        write_single(tmp_path, step, [1.0, 0.0] * 4, advantage=[0.5, -0.5] * 4)
    with pytest.raises(ValueError, match=r"holds one prompt only, 8 times. .*\(--num_generations\): 2, 4, 8 are possible, and 8 is a single group"):  # fmt: skip
        Rollouts(tmp_path)
    assert found(tmp_path, num_generations=4) == (4, "as given")


def test_a_later_table_with_several_prompts_tells_it(tmp_path):
    write_single(tmp_path, 1, [0.0] * 4)
    write_rewards(tmp_path, 2, {"r": [1.0, 0.0, 1.0, 0.0]}, size=2)
    assert found(tmp_path) == (2, "the runs of equal prompts")


def environment_log(run_dir, **columns):
    """Each rollout has an observation of its own; a few are alike by chance."""
    for step in (1, 2):
        prompts = [f"seed {(7 * row * row + step) % 11 if row else 3}" for row in range(8)]
        write_rewards(run_dir, step, {"r": TWO_OF_FOUR}, prompt=prompts, advantage=CENTERED, **columns)


def test_observations_of_their_own_are_cut_in_order_once_the_size_is_given(tmp_path, capsys, monkeypatch):
    environment_log(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["replay", "."]) == 1
    assert (
        "Give the run's num_generations (--num_generations): the completions are then cut in order"
        in capsys.readouterr().err
    )
    assert cli.main(["replay", ".", "--num_generations", "4"]) == 0
    assert "are those of `dr_grpo`" in capsys.readouterr().out
    summary = (tmp_path / "grpo_plus_replay" / "summary.md").read_text()
    assert "| cut in order | 2 tables | completions_00001.parquet: the prompts show no groups" in summary
    results = pd.read_parquet(tmp_path / "grpo_plus_replay" / "results.parquet")
    sizes = results[results["statistic"] == "mean_abs"].set_index("estimator")["value"]
    assert sizes["dr_grpo"] == pytest.approx(np.abs(CENTERED).mean())


def test_a_group_column_is_believed_where_observations_are_the_rollouts_own(tmp_path):
    environment_log(tmp_path, group=[0, 0, 0, 0, 1, 1, 1, 1])
    rollouts = Rollouts(tmp_path)
    assert rollouts.size == 4
    assert [batch.rewards.values.shape[:2] for batch in rollouts.batches()] == [(2, 4), (2, 4)]
    assert rollouts.findings["cut in order"].count == 2


def test_a_size_that_contradicts_the_prompts_is_not_cut_in_order(tmp_path):
    write_rewards(tmp_path, 1, {"r": [1.0, 0.0] * 3}, size=2)
    rollouts = Rollouts(tmp_path, num_generations=3)
    assert list(rollouts.batches()) == []
    assert rollouts.findings.keys() == {"not in groups"}


def test_the_folder_of_the_tables_finds_the_files_of_the_run_above(tmp_path):
    write_single(tmp_path, 1, [1.0, 1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 1.0])
    (tmp_path / "grpo_plus_run.json").write_text(json.dumps({"settings": {"num_generations": 4}}))
    assert found(tmp_path / "completions") == (4, "as the run recorded")
    assert found(tmp_path) == (4, "as the run recorded")


def test_a_table_of_an_evaluation_does_not_decide(tmp_path):
    write(tmp_path, 1, table({"r": [1.0, 0.0, 1.0]}, prompt=["a", "b", "c"]))
    with pytest.raises(ValueError, match="--num_generations"):
        Rollouts(tmp_path)
