"""Later turns of TRL's tool loop share what their prompts begin with, and train as with transformers' own loop."""

from typing import Any

import pytest
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from grpo_plus import GRPOPlusConfig, GRPOPlusTrainer
from grpo_plus.demo.tiny import tiny_tokenizer
from grpo_plus.rollout import Statistics
from tests.close import differing
from tests.rollout.test_in_the_trainer import without_sampler
from tests.training import logs_of, make_trainer, weights_of

TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] }}"
    "{% for call in message['tool_calls'] or [] %}{{ call['function'] | tojson }}{% endfor %}"
    "{{ eos_token if message['role'] == 'assistant' else '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
QUESTION = "How does the following sound when it is said in a loud voice, as on a market"
ASKED = Dataset.from_list([{"prompt": [{"role": "user", "content": f"{QUESTION}{mark}"}]} for mark in "?!.:"])


def shout(text: str) -> str:
    """Say something in a loud voice.

    Args:
        text: What to say.

    Returns:
        The text in capital letters.
    """
    return text.upper()


def calling_tokenizer() -> PreTrainedTokenizerFast:
    """Whatever the model writes is a call of the tool with that text."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE

    def parsed(ids: list[int], **_: Any) -> dict[str, Any]:
        text = tokenizer.decode(ids, skip_special_tokens=True)
        call = {"type": "function", "function": {"name": "shout", "arguments": {"text": text}}}
        return {"role": "assistant", "content": "", "tool_calls": [call]}

    tokenizer.response_template, tokenizer.parse_response = {}, parsed
    return tokenizer


def length(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [0.01 * sum(ids) for ids in completion_ids]


def trained(folder: Any, loop: str) -> tuple[GRPOPlusTrainer, list[Statistics]]:
    """A training of one step with two calls of a tool, and the statistics of its turns."""
    trainer = make_trainer(
        folder,
        trainer_class=GRPOPlusTrainer,
        config_class=GRPOPlusConfig,
        reward_funcs=[length],
        train_dataset=ASKED,
        processing_class=calling_tokenizer(),
        trainer_arguments={"tools": [shout]},
        generation_loop=loop,
        max_completion_length=200,
        max_tool_calling_iterations=2,
        generation_kwargs={"max_new_tokens": 12},
        max_steps=1,
    )
    turns: list[Statistics] = []
    rolled_out = trainer._step_figures.rolled_out

    def spy(done: Statistics) -> None:
        turns.append(done)
        rolled_out(done)

    trainer._step_figures.rolled_out = spy
    trainer.train()
    return trainer, turns


def test_a_training_with_a_tool_is_the_same_to_the_last_bit_and_sends_fewer_tokens(tmp_path):
    theirs, none = trained(tmp_path / "trl", "trl")
    ours, turns = trained(tmp_path / "ours", "grouped")
    assert not none
    assert without_sampler(logs_of(ours)) == logs_of(theirs)
    assert differing(weights_of(ours), weights_of(theirs)) == []
    first, *later = turns
    assert len(later) == 2
    # Prompts that differ in their last word: once, with the end of each.
    assert first.prompts == 2
    assert first.prompt_tokens > 7 * first.prefilled
    for turn in later:
        assert turn.prompts == turn.rows == 8
        assert turn.prompt_tokens > 1.5 * turn.prefilled
    sent, prefilled = (sum(getattr(turn, name) for turn in turns) for name in ("prompt_tokens", "prefilled"))
    assert ours.state.log_history[0]["rollout/prefill_ratio"] == pytest.approx(sent / prefilled)
