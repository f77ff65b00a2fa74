"""What a rollout says of itself while it goes on."""

from typing import Any

import pytest
from torch import Tensor

from grpo_plus.models.caches import CACHE
from grpo_plus.rollout import Progress, Statistics, decode
from grpo_plus.rollout.cache import Expanded
from grpo_plus.rollout.prompts import Prompts
from tests.packing.models import tiny
from tests.rollout.ending import COMPLETION, ENDS, PROMPT, ROW_PROMPTS, generated


@pytest.mark.parametrize("late", [False, True])
def test_a_rollout_is_watched_token_by_token(late):
    seen: list[Statistics] = []
    written: list[list[int]] = []

    def watch(so_far: Progress) -> None:
        seen.append(so_far.statistics)
        written.append(so_far.completion_ids(slice(1, 2))[0])

    def loop(model: Any, input_ids: Tensor, **kwargs: Any) -> Tensor:
        prompts = Prompts.of(input_ids, kwargs["attention_mask"])
        keeper = Expanded(model, kwargs[CACHE])
        ids, done = decode(model, input_ids, prompts=prompts, keeper=keeper, late=late, watch=watch, **kwargs)
        seen.append(done)
        return ids

    whole, _ = generated(tiny("qwen3"), padded=True, sampled=False, custom_generate=loop)
    tokens = range(1, COMPLETION + 1)
    # Nobody asks the device which rows the last token ends.
    ended = [sum(end <= min(token, COMPLETION - 1) for end in ENDS) for token in tokens]
    assert [so_far.finished for so_far in seen] == ended
    drawn = [sum(min(end, token) for end in ENDS) for token in tokens]
    assert [so_far.new_tokens for so_far in seen] == drawn
    assert written == [whole[1, PROMPT : PROMPT + token].tolist() for token in tokens[:-1]]
    assert [so_far.seconds for so_far in seen] == sorted(so_far.seconds for so_far in seen)
    assert {(so_far.rows, so_far.prompts) for so_far in seen} == {(len(ROW_PROMPTS), 3)}


def test_batches_that_follow_each_other_add_up():
    batches = [Statistics(4, 2, 3, 10, 12, 1, 0.5), Statistics(2, 1, 5, 8, 9, 2, 0.25)]
    assert Statistics.joined(batches) == Statistics(6, 3, 8, 18, 21, 3, 0.75)
    assert Statistics.joined([]) == Statistics()
