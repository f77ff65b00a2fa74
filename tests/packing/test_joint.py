"""Packers of two processes, here two threads: they take the same form, and none of them waits for the other."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import pytest
import torch

from grpo_plus.packing import JointPacker, Packed, PaddedRows
from tests.close import assert_close
from tests.packing.models import tiny
from tests.packing.pictured import padded, pictured_batch, pictured_model
from tests.packing.rows import COMPLETION, PROMPT, padded_batch, rows_alone

IDS, MASK = padded_batch()
NOTHING = torch.cat([MASK[:, :PROMPT], torch.zeros_like(MASK[:, PROMPT:])], dim=1)
PATIENCE = 30  # seconds after which a process that waits for the other fails


class Process:
    """One of the processes, with a model of its own."""

    def __init__(self, rank: int, values: list[Any], barrier: Barrier, packing: str = "auto") -> None:
        self.rank, self.values, self.barrier = rank, values, barrier
        self.packer = JointPacker(packing, gathered=self.gathered)
        self.model = tiny("llama")
        self.asked = 0

    def gathered(self, value: Any) -> list[Any]:
        self.asked += 1
        self.values[self.rank] = value
        self.barrier.wait(PATIENCE)
        found = list(self.values)
        self.barrier.wait(PATIENCE)  # nobody writes again before all have read
        return found

    def refuse_packed_rows(self) -> None:
        def refuse(_: Any, inputs: tuple, named: dict[str, Any]) -> None:
            positions = named.get("position_ids")
            if positions is not None and positions.shape[0] == 1 and bool((positions.diff() < 0).any()):
                raise ValueError("no packed rows here")

        self.model.model.register_forward_pre_hook(refuse, with_kwargs=True)

    def logps(self, mask: torch.Tensor = MASK, **limits: Any) -> torch.Tensor | None:
        def padded(ids: torch.Tensor, mask: torch.Tensor, length: int) -> torch.Tensor:
            labels = ids.masked_fill(mask == 0, -100)
            labels[:, :-length] = -100
            output = self.model(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True)
            return output.log_probs[:, -length:]

        rows = PaddedRows(IDS * mask, mask, COMPLETION)
        found = self.packer.logps(self.model, self.model, rows, padded, **limits)
        return None if found is None else found.logps


def processes(*packings: str) -> list[Process]:
    values, barrier = [None, None], Barrier(2)
    return [Process(rank, values, barrier, *packings) for rank in range(2)]


def at_once(*calls: Any) -> list[Any]:
    with ThreadPoolExecutor(2) as pool:
        return [future.result() for future in [pool.submit(call) for call in calls]]


def test_a_form_that_fails_on_one_process_is_taken_by_none():
    both = processes()
    both[1].refuse_packed_rows()
    found = at_once(*(each.logps for each in both))
    assert [each.packer.describe() for each in both] == ["shared_prompt (two passes through the model's cache)"] * 2
    for each, logps in zip(both, found, strict=True):
        assert_close("log-probabilities", logps, rows_alone(each.model, IDS, MASK), rtol=2e-6)


def test_a_form_that_was_asked_for_and_fails_on_one_process_ends_both():
    both = processes("padding_free")
    both[1].refuse_packed_rows()

    def error(process: Process) -> str:
        with pytest.raises(ValueError, match="cannot be exact") as raised:
            process.logps()
        return str(raised.value)

    first, second = at_once(*(lambda each=each: error(each) for each in both))
    assert first == second
    assert "no packed rows here" in first


def test_a_process_without_rows_to_check_with_keeps_both_padded_until_it_has_some():
    first, second = processes()
    assert at_once(first.logps, lambda: second.logps(NOTHING)) == [None, None]
    assert [first.packer.describe(), second.packer.describe()] == ["none", "none"]
    assert all(logps is not None for logps in at_once(first.logps, second.logps))
    assert first.asked == second.asked
    # All is decided, and nobody waits for anybody.
    assert first.logps() is not None
    assert second.logps(NOTHING) is None


def test_a_process_whose_prompts_fit_into_a_pass_decides_with_the_others_how_to_cut_longer_ones():
    short = MASK.clone()
    short[:, : PROMPT - 5] = 0
    first, second = processes("shared_prompt")
    at_once(lambda: first.logps(bound=10), lambda: second.logps(short, bound=10))
    assert first.asked == second.asked
    assert first.packer._cut[first.model] is second.packer._cut[second.model] is True


def test_rows_with_images_are_checked_once_both_processes_have_some():
    first, second = processes()
    for each in (first, second):
        each.model, processor = pictured_model("qwen2_5_vl")
        each.rows = pictured_batch(each.model, processor).rows
    text = [row for row, count in enumerate(second.rows.pictures.counts["num_images"]) if count == 0]
    words = PaddedRows(second.rows.input_ids[text], second.rows.attention_mask[text], COMPLETION)

    def logps(process: Process, rows: PaddedRows) -> Packed | None:
        return process.packer.logps(process.model, process.model, rows, padded(process.model))

    assert at_once(lambda: logps(first, first.rows), lambda: logps(second, words)) == [None, None]
    assert None not in at_once(*(lambda each=each: logps(each, each.rows) for each in (first, second)))
    assert None not in at_once(lambda: logps(first, words), lambda: logps(second, words))
    asked = first.asked
    assert logps(first, words) is not None  # all is decided, and nobody waits
    assert first.asked == second.asked == asked
