"""Turns of TRL's tool loop, of its environments and of a rollout function: where they end, and from which states."""

from itertools import count as counter
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from PIL import Image

from grpo_plus import GRPOPlusConfig, GRPOPlusTrainer
from grpo_plus.advantages import estimate
from grpo_plus.demo.tiny import tiny_model
from grpo_plus.replay import Rollouts, replay
from grpo_plus.trainer.rollouts.turns import PROMPT, Turns, turns_of
from tests.calling import asking, calling_tokenizer, count
from tests.close import assert_close
from tests.training import make_trainer, vowels

TOKENIZER = calling_tokenizer()
OURS: dict[str, Any] = {"config_class": GRPOPlusConfig, "max_steps": 1, "advantage_estimator": "turns"}

# What the policy writes, turn by turn. In the first group, the first digit is the completion's number, and a last message
# of 3 wins. The tool counts digits: it says 1 to the calls of completions 0 and 1, and 2 and then 1 to completion 2.
SCRIPT = [
    ["0<count>0</call>", "3"],
    ["1<count>0</call>", "2"],
    ["2<count>00</call>", "<count>0</call>", "3"],
    ["32"],
    *[["2"]] * 4,
]


class Scripted(GRPOPlusTrainer):
    """A policy that follows SCRIPT. All that goes on between its turns is TRL's."""

    def _generate_single_turn(self, prompt_ids, *_, **__):
        histories = [self.processing_class.decode(ids).split("<assistant>")[1:] for ids in prompt_ids]
        scripts = [SCRIPT[int(first[0]) if first else row] for row, (first, *_) in enumerate(histories)]
        texts = [script[len(history) - 1] + "<eos>" for script, history in zip(scripts, histories, strict=True)]
        return self.processing_class(texts)["input_ids"], None

    def compute_loss(self, model, inputs, *arguments, **keywords):
        self.seen = inputs
        return super().compute_loss(model, inputs, *arguments, **keywords)


def won(completions: list[Any], **_: Any) -> list[float]:
    return [float(messages[-1]["content"] == "3") for messages in completions]


def playing(output_dir: Any, **config: Any) -> Any:
    trainer = make_trainer(
        output_dir,
        trainer_class=Scripted,
        model=tiny_model(TOKENIZER, hidden_size=16, num_heads=2),
        train_dataset=asking("01", "10"),
        processing_class=TOKENIZER,
        max_completion_length=20,
        **OURS | {"reward_funcs": [won], "trainer_arguments": {"tools": [count]}} | config,
    )
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def played(tmp_path_factory) -> Any:
    folder = tmp_path_factory.mktemp("run")
    return playing(folder, advantage_kwargs={"gamma": 0.5, "scale": False}, log_completions=True)


def test_turns_end_where_the_policy_stops_and_start_from_what_the_tool_said(played):
    steps = played.rewards.steps
    # Each word and digit is a token, a turn ends with <eos>, and the tool's words are <tool>, a digit and <assistant>.
    assert steps.ends[0].tolist() == [[4, 9, -1], [4, 9, -1], [5, 12, 17], [2, -1, -1]]
    prompt, one, two, none = 0, 1, 2, -1
    expected = [[prompt, one, none], [prompt, one, none], [prompt, two, one], [prompt, none, none]]
    assert steps.states.tolist() == [expected, [[prompt, none, none]] * 4]


def test_each_turn_reaches_the_loss_with_its_advantage(played):
    # A_E of 1, 0, 1, 0: 1/2 and -1/2. Returns under gamma 1/2: .5, 1 and 0, 0 and .25, .5, 1 and 0.
    # From the prompt: mean .1875. From the tool's 1: 1, 0, 1, mean 2/3. Its 2 occurs once.
    by_turn = [
        [0.5 + 0.3125, 0.5 + 1 / 3],
        [-0.5 - 0.1875, -0.5 - 2 / 3],
        [0.5 + 0.0625, 0.5, 0.5 + 1 / 3],
        [-0.5 - 0.1875],
    ]
    reached = []
    trained = (played.seen["completion_mask"] * played.seen["tool_mask"]).bool()
    for advantages, of_policy in zip(played.seen["advantages"], trained, strict=True):
        reached.append(advantages[of_policy].unique_consecutive().tolist())
    expected = sorted([*by_turn, *[[0.0]] * 4])  # TRL shuffles the rows of a batch
    assert sorted(reached) == [pytest.approx(row, abs=1e-6) for row in expected]
    logged = played.state.log_history[0]
    assert logged["advantages/turns_shared"] == pytest.approx(11 / 12)
    assert logged["tools/call_frequency"] == 0.5


def test_the_log_holds_the_turns_so_that_a_replay_judges_them_as_the_training_did(played):
    folder = Path(played.args.output_dir)
    table = pd.read_parquet(next((folder / "completions").glob("*.parquet")))
    assert [len(states) for states in table["step_states"]] == [2, 2, 3, 1, 1, 1, 1, 1]
    assert "step_rewards" not in table  # nobody reported any
    assert table["step_states"][2][2] == table["step_states"][0][1] != table["step_states"][2][1]
    found = replay(Rollouts(folder), {"turns": {"gamma": 0.5, "scale": False}, "process": {}})
    assert found.difference["turns"] == pytest.approx(0.0, abs=1e-6)
    assert not found.refused


class House:
    """An environment whose first two games of eight begin elsewhere than the others."""

    resets = counter()

    def reset(self, **_: Any) -> str:
        return "0" if next(self.resets) % 8 < 2 else "1"

    def count(self, digits: str) -> int:
        """Count digits.

        Args:
            digits: Digits.
        """
        return count(digits)


def test_an_environments_first_words_are_the_state_of_the_first_turn(tmp_path):
    trainer = playing(tmp_path, trainer_arguments={"environment_factory": House})
    here, one, there, two, none = 0, 1, 2, 3, -1
    expected = [[here, one, none], [here, one, none], [there, two, one], [there, none, none]]
    assert trainer.rewards.steps.states[0].tolist() == expected


def test_a_prompt_is_known_by_its_row_whatever_an_environment_says(tmp_path):
    trainer = playing(tmp_path, trainer_arguments={"environment_factory": House}, advantage_estimator="spo")
    known = {trainer.prompt_key(row["prompt"]) for row in trainer.train_dataset}
    assert set(trainer.rewards.prompts) == known


def reporting(completions: list[Any], log_extra: Any, **_: Any) -> list[float]:
    """A point for the turn to which the tool says 2. The state is all that the tool has said."""
    states, points = [], []
    for messages in completions:
        heard: list[str] = []
        its_states, its_points = [], []
        for message in messages:
            if message["role"] == "assistant":
                its_states.append(list(heard))
                its_points.append(0.0)
            else:
                heard.append(message["content"])
                its_points[-1] += message["content"] == "2"
        states.append(its_states)
        points.append(its_points)
    log_extra("step_states", states)
    log_extra("step_rewards", points)
    return won(completions)


def test_a_reward_function_says_what_the_turns_earn_and_where_they_start(tmp_path):
    trainer = playing(tmp_path, reward_funcs=[reporting])
    steps = trainer.rewards.steps
    start, one, two, both, none = 0, 1, 2, 3, -1
    expected = [[start, one, none], [start, one, none], [start, two, both], [start, none, none]]
    assert steps.states[0].tolist() == expected
    assert steps.rewards[0].nan_to_num(-1.0).tolist() == [[0, 0, -1], [0, 0, -1], [1, 0, 0], [0, -1, -1]]
    assert not steps.at_end.any()


def rollout(prompts: list[str], trainer: Any) -> dict[str, list]:
    """Six tokens of which an environment writes the third, from the fourth completion on in other words."""
    return {
        "prompt_ids": [trainer.processing_class(prompt)["input_ids"] for prompt in prompts],
        "completion_ids": [[5, 6, 7 if row < 3 else 8, 9, 10, 11] for row in range(len(prompts))],
        "logprobs": [[-1.0] * 6] * len(prompts),
        "env_mask": [[1, 1, 0, 1, 1, 1]] * len(prompts),
        "step_rewards": [[0.5, float(row)] for row in range(len(prompts))],
    }


def constant(completions: list[str], **_: Any) -> list[float]:
    return [1.0] * len(completions)


def test_a_rollout_function_gives_rewards_of_turns_in_a_column(tmp_path):
    arguments = {"trainer_class": GRPOPlusTrainer, "reward_funcs": [constant], "log_completions": True}
    trainer = make_trainer(tmp_path, trainer_arguments={"rollout_func": rollout}, **arguments, **OURS)
    trainer.train()
    steps = trainer.rewards.steps
    assert steps.ends.tolist() == [[[1, 5]] * 4] * 2
    assert steps.rewards.flatten(0, 1).tolist() == [[0.5, row] for row in range(8)]
    assert steps.states.tolist() == [[[0, 1]] * 3 + [[0, 2]], [[0, 2]] * 4]
    table = pd.read_parquet(next((tmp_path / "completions").glob("*.parquet")))
    assert table["step_rewards"][3].tolist() == [0.5, 3.0]
    [batch] = Rollouts(tmp_path).batches()
    replayed = batch.rewards.per_completion(estimate("turns", batch.rewards))
    assert_close("replayed", replayed, batch.logged, rtol=1e-6)
    # The completions are judged alike, and only their turns are not.
    logged = trainer.state.log_history[0]
    assert (logged["advantages/zero_spread/constant"], logged["advantages/dead_groups"]) == (1.0, 0.0)


def test_turns_are_runs_of_what_the_policy_wrote():
    ids = [5, 6, 7, 8, 9, 7, 8, 4]
    turns = turns_of(ids, [1, 1, 0, 0, 1, 0, 0, 1], "text")
    assert turns.ends == [1, 4, 7]
    assert turns.states[0] == PROMPT
    assert turns.states[1] == turns.states[2]  # 7, 8 before both
    assert turns_of([], [], "") == Turns([], [])
    assert turns_of([7, 8], [0, 0], "") == Turns([], [])
    # What an environment says before the first turn belongs to the prompt.
    first = [turns_of(ids, [0, 0, 1], "", start=start).states for start in ("a", "b") for ids in ([7, 8, 5], [7, 9, 5])]
    assert len({state for (state,) in first}) == 4


def test_pictures_that_a_tool_shows_tell_states_apart():
    def seen(color: str) -> list[str]:
        shown = {"role": "tool", "content": [{"type": "image", "image": Image.new("RGB", (2, 2), color)}]}
        messages = [{"role": "assistant", "content": "look"}, shown, {"role": "assistant", "content": "done"}]
        return turns_of([5, 6, 7], [1, 0, 1], messages).states

    assert seen("red") == seen("red")
    assert seen("red")[0] == seen("blue")[0]
    assert seen("red")[1] != seen("blue")[1]


@pytest.fixture(scope="module")
def judging(tmp_path_factory) -> Any:
    arguments = {"trainer_class": GRPOPlusTrainer, "reward_funcs": [vowels]}
    return make_trainer(tmp_path_factory.mktemp("run"), **arguments, **OURS)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"step_rewards": [1.0, 2.0]}, "Completion 0 has 1 turns, .* but 2 step_rewards and 1 step_states. Give one"),
        ({"step_states": []}, "Completion 0 has 1 turns, .* but 1 step_rewards and 0 step_states. Give one"),
        ({"step_states": "room"}, "Completion 0 has step_states 'room', .*is one text and no list"),
        (
            {"step_states": [object()]},
            r"Completion 0 has step_states \[<object .*cannot be compared \(holds a object\)",
        ),
        ({"step_ends": [0]}, r"Completion 0 has step_ends \[0\] and no step_states. Give the states"),
        ({"step_ends": [7], "step_states": ["a"]}, r"Completion 0 has 3 tokens and step_ends \[7.0\]"),
    ],
)
def test_columns_that_do_not_fit_the_turns_stop_the_run(judging, columns, message):
    rows = [{"prompt": "1+1=", **columns}] * 8
    judging._pending_extra_logs.clear()  # of the case before, which has ended in the middle of a batch
    with pytest.raises(ValueError, match=message):
        judging._calculate_rewards(rows, ["1+1="] * 8, ["abc"] * 8, [[5, 6, 7]] * 8)


def test_a_run_of_another_estimator_looks_at_no_turns(tmp_path):
    trainer = make_trainer(tmp_path, trainer_class=GRPOPlusTrainer, **OURS | {"advantage_estimator": "grpo"})
    trainer._calculate_rewards([{"step_states": 0}] * 8, ["1+1="] * 8, ["abc"] * 8, [[5, 6, 7]] * 8)
    assert trainer.rewards.steps is None
    assert not trainer._pending_extra_logs
