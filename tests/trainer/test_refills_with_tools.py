"""Dynamic sampling with tools and environments: what is trained on stays that of its own rollout."""

from itertools import groupby
from typing import Any

import pytest
import torch

from grpo_plus import GRPOPlusConfig, GRPOPlusTrainer
from grpo_plus.advantages import estimate
from grpo_plus.demo.tiny import tiny_model
from grpo_plus.trainer.names import logged_columns, trained_tokens
from tests.advantages.cases import rewards_of
from tests.calling import Counting, Growing, asking, calling_tokenizer, count
from tests.training import make_trainer

TOKENIZER = calling_tokenizer()
# Rows of "two" are dead: nobody judges them.
ROWS = asking(*"0123" * 3, environment=["one", "two"] * 6, level=list(range(12)))


class Recorder(GRPOPlusTrainer):
    """Keeps every generation batch as it leaves for the update, beside its rows of the table."""

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        table = {name[-1]: list(column) for name, column in logged_columns(self).items()}
        self.batches = [*getattr(self, "batches", []), (output, table, self.rewards)]
        return output


def of_the_rollout(environments: list[Any], log_extra: Any, **_: Any) -> list[None]:
    """Judges nothing, and writes down what the environment has seen of its rollout."""
    log_extra("calls", [list(environment.calls) for environment in environments])
    log_extra("reset with", [environment.row for environment in environments])
    return [None] * len(environments)


def refilled(output_dir: Any, **settings: Any) -> Any:
    arguments = {"environment_factory": {"one": Counting, "two": Growing}} | settings.pop("trainer_arguments", {})
    trainer = make_trainer(
        output_dir,
        trainer_class=Recorder,
        config_class=GRPOPlusConfig,
        model=tiny_model(TOKENIZER, hidden_size=16, num_heads=2),
        processing_class=TOKENIZER,
        trainer_arguments=arguments,
        max_completion_length=20,
        advantage_estimator="dr_grpo",
        max_refills=3,
        **{"reward_funcs": [of_the_rollout], "train_dataset": ROWS} | settings,
    )
    trainer.train()
    return trainer


def answers_of(messages: list[dict[str, Any]]) -> list[str]:
    """What the tools wrote between two turns of the model, and what the chat template adds."""
    turns = groupby(messages, key=lambda message: message["role"])
    return [
        "".join(f"<tool>{each['content']}" for each in turn) + "<assistant>" for role, turn in turns if role == "tool"
    ]


def test_rows_keep_the_rewards_masks_and_transcripts_of_their_own_environment(tmp_path):
    trainer = refilled(tmp_path)
    assert sum(entry.get("sampling/refills", 0) for entry in trainer.state.log_history) > 0
    replies = 0
    for output, table, rewards in trainer.batches:
        for row, messages in enumerate(table["completion"]):
            start, calls = table["reset with"][row], table["calls"][row]
            tool = "grow" if start["level"] % 2 else "count"
            asked = [call["function"] for message in messages for call in message.get("tool_calls") or []]
            assert calls == [call["arguments"]["digits"] for call in asked if call["name"] == tool]
            assert table["prompt"][row][0]["content"].startswith(start["prompt"][0]["content"])
            assert tool == "grow" or table["Counting"][row] == sum(map(count, calls))
            by_others = output["completion_mask"][row].bool() & ~trained_tokens(output)[row].bool()
            answers = answers_of(messages)
            assert output["completion_ids"][row][by_others].tolist() == TOKENIZER("".join(answers))["input_ids"]
            replies += len(answers)
        assert output["num_items_in_batch"] == trained_tokens(output).sum()
        expected = estimate("dr_grpo", rewards_of(torch.tensor(table["Counting"]).view(2, 4).tolist())).flatten()
        assert output["advantages"].tolist() == pytest.approx(expected.nan_to_num().tolist(), abs=1e-5)
        assert rewards.lengths.flatten().tolist() == trained_tokens(output).sum(-1).tolist()
        assert rewards.spans.flatten().tolist() == output["completion_mask"].sum(-1).tolist()
    assert replies > 3
