import json

import numpy as np
import pytest
import torch

from grpo_plus.replay import Rollouts
from tests.replay.logs import table, write, write_rewards


def values_of(batch):
    return batch.rewards.values[..., 0].tolist()


def read(run_dir, **arguments):
    rollouts = Rollouts(run_dir, **arguments)
    return rollouts, list(rollouts.batches())


def test_a_table_becomes_groups_of_equal_prompts(tmp_path):
    write_rewards(tmp_path, 3, {"correct": [1.0, 0.0, 0.5, 0.25]}, advantage=[0.7, -0.7, 0.1, -0.1])
    rollouts, [batch] = read(tmp_path)
    assert (rollouts.names, rollouts.size, batch.step) == (("correct",), 2, 3)
    assert values_of(batch) == [[1.0, 0.0], [0.5, 0.25]]
    assert batch.logged.tolist() == [[0.7, -0.7], [0.1, -0.1]]
    assert batch.rewards.lengths.tolist() == [[20, 20], [20, 20]]  # characters of "step 3, completion 0"
    assert rollouts.findings == {}


def test_files_come_in_the_order_of_their_steps(tmp_path):
    for step in (100000, 99999, 2):
        write_rewards(tmp_path, step, {"r": [step, 0.0, 1.0, 0.0]})
    assert [batch.step for batch in Rollouts(tmp_path).batches()] == [2, 99999, 100000]


def test_the_folder_of_the_files_itself_and_odd_names_will_do(tmp_path):
    run = tmp_path / "Läufe von heute 日本"
    write_rewards(run, 1, {"r": [1.0, 0.0, 1.0, 0.0]})
    assert len(read(run / "completions")[1]) == len(read(str(run))[1]) == 1


def test_conversations_are_compared_and_shown_as_text(tmp_path):
    prompts = [[{"role": "user", "content": f"é {p // 2}"}] for p in range(4)]
    completions = [[{"role": "assistant", "content": "ab"}, {"role": "user", "content": "c"}]] * 4
    path = write_rewards(tmp_path, 1, {"r": [1.0, 0.0, 1.0, 0.0]}, prompt=prompts, completion=completions)
    rollouts, [batch] = read(tmp_path)
    assert rollouts.size == 2
    assert rollouts.texts(path, [3]) == [("user: é 1", "assistant: ab\nuser: c")]
    assert batch.rewards.lengths[0, 0] == len("assistant: ab\nuser: c")


def test_messages_with_more_than_text_are_compared_too(tmp_path):
    prompts = [[{"role": "user", "content": [{"type": "text", "text": f"{p // 2}"}]}] for p in range(4)]
    write_rewards(tmp_path, 1, {"r": [1.0, 0.0, 1.0, 0.0]}, prompt=prompts)
    assert read(tmp_path)[0].size == 2


def test_pictures_and_calls_are_shown_for_a_reader(tmp_path):
    asked = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "How many?"}]}]
    calls = [
        {"function": {"name": "count", "arguments": {"what": "disks"}}},
        {"function": {"name": "add", "arguments": {"a": 1, "b": 2}}},  # the table adds what=None here, a=None above
    ]
    told = [
        {"role": "assistant", "content": "", "tool_calls": calls},
        {"role": "tool", "content": "3", "tool_calls": None},
    ]
    path = write_rewards(tmp_path, 1, {"r": [1.0, 0.0]}, prompt=[asked] * 2, completion=[told] * 2)
    rollouts, _ = read(tmp_path)
    assert rollouts.texts(path, [1]) == [
        ("user: [image] How many?", "assistant: count(what='disks') add(a=1, b=2)\ntool: 3")
    ]


def test_a_group_column_goes_before_the_prompts(tmp_path):
    # Two groups of one prompt: only the column tells them apart, and they are not in blocks.
    columns = table({"r": [1.0, 2.0, 3.0, 4.0]}, prompt=["p"] * 4, group=[0, 1, 0, 1], task=["a", "b", "a", "b"])
    write(tmp_path, 1, columns)
    _, [batch] = read(tmp_path)
    assert values_of(batch) == [[1.0, 3.0], [2.0, 4.0]]
    assert batch.rewards.tasks == ("a", "b")


def test_token_counts_of_the_log_are_used(tmp_path):
    write_rewards(tmp_path, 1, {"r": [1.0, 0.0, 1.0, 0.0]}, completion_length=[5, 6, 7, 8])
    rollouts, [batch] = read(tmp_path)
    assert rollouts.length_unit == "tokens"
    assert batch.rewards.lengths.tolist() == [[5, 6], [7, 8]]


def test_steps_of_the_log_are_read(tmp_path):
    steps = {"step_rewards": [[1.0, 0.0], [0.5], [], [1.0]], "step_ends": [[1, 4], [2], [], [0]]}
    write_rewards(tmp_path, 1, {"r": [1.0, 0.5, 0.0, 1.0]}, **steps)
    _, [batch] = read(tmp_path)
    assert batch.rewards.lengths.tolist() == [[5, 3], [0, 1]]
    assert batch.rewards.steps.ends[0].tolist() == [[1, 4], [2, -1]]


def test_a_checkpoint_says_which_columns_are_rewards(tmp_path):
    write_rewards(tmp_path, 1, {"r": [1.0, 0.0, 1.0, 0.0], "temperature": [0.5] * 4})
    assert read(tmp_path)[0].names == ("r", "temperature")
    state = tmp_path / "checkpoint-1" / "trainer_state.json"
    state.parent.mkdir()
    state.write_text(json.dumps({"log_history": [{"rewards/r/mean": 1.0, "rewards/r/std": 0.0}]}))
    assert read(tmp_path)[0].names == ("r",)
    assert read(tmp_path, reward_names=["temperature"])[0].names == ("temperature",)


def test_the_same_completions_count_once(tmp_path):
    # Two logs of one generation batch: steps_per_generation or num_iterations above 1.
    for step in (1, 2):
        write(tmp_path, step, table({"r": [1.0, 0.0, 1.0, 0.0]}, step=1) | {"step": [step] * 4})
    write_rewards(tmp_path, 3, {"r": [1.0, 0.0, 1.0, 0.0]})
    rollouts, batches = read(tmp_path)
    assert [batch.step for batch in batches] == [1, 3]
    assert rollouts.findings["repeated"].count == 1


def test_a_folder_without_completions_is_named(tmp_path):
    with pytest.raises(ValueError, match="has no completions/completions_<step>.parquet.*log_completions=True"):
        Rollouts(tmp_path)
    with pytest.raises(ValueError, match="is no folder"):
        Rollouts(tmp_path / "missing")


def test_a_table_without_rewards_is_named(tmp_path):
    write(tmp_path, 1, table({"r": [1.0, 0.0]}) | {"r": ["a", "b"]})
    with pytest.raises(ValueError, match="no reward columns, only step, prompt, completion, r"):
        Rollouts(tmp_path)


def test_an_unknown_reward_is_an_error_with_a_suggestion(tmp_path):
    write_rewards(tmp_path, 1, {"correct": [1.0, 0.0, 1.0, 0.0]})
    with pytest.raises(ValueError, match="Did you mean 'correct'"):
        Rollouts(tmp_path, reward_names=["corect"])
    with pytest.raises(ValueError, match="2 reward weights were given for the rewards correct"):
        Rollouts(tmp_path, reward_weights=[1.0, 2.0])
    for weight in ("nan", float("inf"), "heavy"):
        with pytest.raises(ValueError, match=r"reward_weights\[0\]=.* is no weight. Use finite numbers"):
            Rollouts(tmp_path, reward_weights=[weight])


def test_truncated_files_are_left_out_and_counted(tmp_path):
    for step in (1, 2, 3, 4):
        path = write_rewards(tmp_path, step, {"r": [1.0, 0.0, 1.0, 0.0]})
        if step in (1, 3):
            path.write_bytes(path.read_bytes()[:200])
    rollouts, batches = read(tmp_path)
    assert [batch.step for batch in batches] == [2, 4]
    assert rollouts.findings["unreadable"].count == 2
    assert rollouts.findings["unreadable"].first.startswith("completions_00001.parquet")


def test_only_truncated_files_is_an_error(tmp_path):
    write_rewards(tmp_path, 1, {"r": [1.0, 0.0]}).write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="None of the 1 files .* is a readable table"):
        Rollouts(tmp_path)


@pytest.mark.parametrize("labelled", [False, True], ids=["prompts", "group column"])
def test_groups_of_another_size_are_left_out_and_counted(tmp_path, labelled):
    write_rewards(tmp_path, 1, {"r": [1.0, 0.0, 1.0, 0.0]})
    prompts = ["a", "a", "b", "b", "b", "c", "c"]
    extra = {"group": [0, 0, 1, 1, 1, 2, 2]} if labelled else {}
    write_rewards(tmp_path, 2, {"r": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]}, prompt=prompts, **extra)
    rollouts, batches = read(tmp_path)
    assert values_of(batches[1]) == [[1.0, 2.0], [6.0, 7.0]]
    assert "3 of 7 completions are in no group of 2" in rollouts.findings["not in groups"].first


def test_a_group_column_that_mixes_prompts_is_not_believed(tmp_path):
    write_rewards(tmp_path, 1, {"r": [1.0, 0.0, 3.0, 4.0]}, group=[0, 0, 1, 1], prompt=["a", "b", "c", "c"])
    rollouts, [batch] = read(tmp_path)
    assert values_of(batch) == [[3.0, 4.0]]
    assert rollouts.findings["not in groups"].count == 1


def test_a_wrong_group_size_shows(tmp_path):
    write_rewards(tmp_path, 1, {"r": [1.0, 0.0, 1.0, 0.0, 1.0, 0.0]})
    rollouts, batches = read(tmp_path, num_generations=3)
    assert batches == []
    assert "6 of 6 completions are in no group of 3" in rollouts.findings["not in groups"].first
    with pytest.raises(ValueError, match="num_generations=1 leaves nothing to compare"):
        Rollouts(tmp_path, num_generations=1)


@pytest.mark.parametrize("prompts", [["same"] * 4, ["a", "b", "c", "d"]], ids=["one prompt", "no two alike"])
def test_prompts_that_do_not_show_the_groups_need_num_generations(tmp_path, prompts):
    write_rewards(tmp_path, 1, {"r": [1.0, 0.0, 1.0, 0.0]}, prompt=prompts)
    with pytest.raises(ValueError, match="--num_generations"):
        Rollouts(tmp_path)


def test_groups_of_one_prompt_are_cut_by_num_generations(tmp_path):
    write_rewards(tmp_path, 1, {"r": [1.0, 0.0, 3.0, 2.0]}, prompt=["same"] * 4)
    assert values_of(read(tmp_path, num_generations=2)[1][0]) == [[1.0, 0.0], [3.0, 2.0]]


def test_abstentions_are_kept_as_such_and_counted(tmp_path):
    nan = float("nan")
    write_rewards(tmp_path, 1, {"a": [1.0, nan, 0.0, nan], "b": [1.0, nan, 0.0, 0.5]})
    rollouts, [batch] = read(tmp_path)
    assert batch.rewards.judged.tolist() == [[True, False], [True, True]]
    counts = {kind: finding.count for kind, finding in rollouts.findings.items()}
    assert counts == {"abstentions of a": 2, "abstentions of b": 1, "not judged": 1}


def test_infinite_rewards_cost_their_group(tmp_path):
    write_rewards(tmp_path, 1, {"r": [1.0, np.inf, 0.5, 0.25]})
    rollouts, [batch] = read(tmp_path)
    assert values_of(batch) == [[0.5, 0.25]]
    assert rollouts.findings["infinite rewards"].count == 1


def test_the_tables_of_another_run_are_left_out(tmp_path):
    write_rewards(tmp_path, 1, {"a": [1.0, 0.0, 1.0, 0.0], "b": [1.0, 0.0, 1.0, 0.0]})
    write_rewards(tmp_path, 2, {"a": [1.0, 0.0, 1.0, 0.0]})
    rollouts, batches = read(tmp_path)
    assert [batch.step for batch in batches] == [1]
    assert "completions_00002.parquet lacks b" in rollouts.findings["another run"].first
    assert len(read(tmp_path, reward_names=["a"])[1]) == 2


def test_several_steps_in_a_file_are_batches_of_their_own(tmp_path):
    both = [table({"r": [1.0, 0.0, 1.0, 0.0]}, step=step) for step in (4, 5)]
    write(tmp_path, 5, {name: both[0][name] + both[1][name] for name in both[0]})
    rollouts, batches = read(tmp_path)
    assert [batch.step for batch in batches] == [4, 5]
    assert rollouts.findings["mixed steps"].count == 1


def test_reading_again_finds_the_same(tmp_path):
    write_rewards(tmp_path, 1, {"r": [1.0, 0.0, float("nan"), 0.0]})
    rollouts = Rollouts(tmp_path)
    first, second = [[values_of(batch) for batch in rollouts.batches()] for _ in range(2)]
    torch.testing.assert_close(torch.tensor(first), torch.tensor(second), equal_nan=True)
    assert rollouts.findings["abstentions of r"].count == 1
