"""Packed rows where weights are spread: layers run as often as in padded rows, and all processes take the same form."""

from dataclasses import dataclass, field

import pytest
import torch

from grpo_plus.packing import PaddedRows, SpreadPacker
from tests.close import assert_close
from tests.packing.models import tiny
from tests.packing.rows import COMPLETION, PROMPT, padded_batch, rows_alone

IDS, MASK = padded_batch()


@dataclass
class Others:
    """Another process, which gives the same as this one, but for some of the times that it is asked."""

    answers: dict[int, str] = field(default_factory=dict)
    asked: int = 0

    def gathered(self, value):
        self.asked += 1
        return [value, self.answers.get(self.asked, value)]


@dataclass
class Counted:
    """A model, and how often its first layer has run. It fails at one of the calls."""

    fails_at: int | None = None
    calls: int = 0

    def __post_init__(self):
        self.model = tiny("llama")
        self.model.model.layers[0].register_forward_pre_hook(self.count)

    def count(self, *_):
        self.calls += 1
        if self.calls == self.fails_at:
            raise ValueError("half-way")

    def padded(self, ids, mask, length):
        labels = ids.masked_fill(mask == 0, -100)
        labels[:, :-length] = -100
        output = self.model(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True)
        return output.log_probs[:, -length:]

    def logps(self, packer, ids=IDS, mask=MASK, **limits):
        return packer.logps(self.model, self.model, PaddedRows(ids, mask, COMPLETION), self.padded, **limits)


def test_layers_run_as_often_as_trls_forward_runs_them_whatever_the_rows_share():
    packer, counted = SpreadPacker("auto", gathered=Others().gathered), Counted()
    counted.logps(packer)
    assert packer.describe() == "shared_prompt (segment attention)"
    shown = MASK[:, PROMPT:].sum(1) > 0
    ids, mask = IDS[shown], MASK[shown]
    for rows in (2, 3, len(ids)):
        counted.calls = 0
        found = counted.logps(packer, ids, mask, max_tokens=rows * ids.shape[1])
        assert counted.calls == -(-len(ids) // rows)
        assert_close("log-probabilities", found.logps, rows_alone(counted.model, ids, mask), rtol=2e-6)


def test_a_process_with_nothing_to_check_keeps_all_from_checking():
    others = Others({1: None})
    packer, counted = SpreadPacker("auto", gathered=others.gathered), Counted()
    nothing = torch.cat([MASK[:, :PROMPT], torch.zeros_like(MASK[:, PROMPT:])], dim=1)
    assert counted.logps(packer) is None
    assert counted.logps(packer, IDS * nothing, nothing) is None
    assert counted.calls == 0
    assert others.asked == 2
    assert counted.logps(packer) is not None
    asked, calls = others.asked, counted.calls
    assert counted.logps(packer, IDS * nothing, nothing) is None  # and nobody waits for this process any more
    assert (others.asked, counted.calls) == (asked, calls)


def test_a_form_that_is_not_exact_on_one_process_is_taken_by_none():
    packer, counted = SpreadPacker("auto", gathered=Others({3: "elsewhere: not exact"}).gathered), Counted()
    counted.logps(packer)
    assert packer.describe() == "padding_free (segment attention)"
    packer = SpreadPacker("shared_prompt", gathered=Others({3: "elsewhere: not exact"}).gathered)
    with pytest.raises(ValueError, match="packing='shared_prompt' cannot be exact here: .*elsewhere: not exact"):
        counted.logps(packer)


@pytest.mark.parametrize("call", [2, 7], ids=["plain rows", "a form"])
def test_a_check_that_fails_half_way_ends_the_run(call):
    packer, counted = SpreadPacker("auto", gathered=Others().gathered), Counted(fails_at=call)
    with pytest.raises(RuntimeError, match=r"cannot go on from there: ValueError: half-way. Set packing='none'"):
        counted.logps(packer)
