"""The ratio between policy and inference engine, by hand."""

import math

import pytest
import torch

from grpo_plus.losses.sampler import FIGURES, SamplerGap, joined, sampler_ratio
from tests.close import assert_close

nan = float("nan")
# Probabilities 0.8, 0.2, 0.5 against 0.4, 0.4, unknown; and a row whose last two tokens were not sampled.
LOGPS = torch.tensor([[0.8, 0.2, 0.5], [0.3, 0.9, 0.9]]).log()
SAMPLER = torch.tensor([[0.4, 0.4, nan], [0.1, 0.0, nan]]).log()
MASK = torch.tensor([[1, 1, 1], [1, 0, 0]]).bool()


@pytest.mark.parametrize(
    ("mode", "low", "high", "expected"),
    [
        ("token_truncate", None, None, [[2, 0.5, 1], [3, 1, 1]]),
        ("token_truncate", 0.75, 2.5, [[2, 0.75, 1], [2.5, 1, 1]]),
        ("token_mask", 0.75, 2.5, [[2, 0, 1], [0, 1, 1]]),
        ("token_mask", 0.4, None, [[2, 0.5, 1], [3, 1, 1]]),
        ("sequence_truncate", None, 2.5, [[1], [2.5]]),  # 2 * 0.5 and 3
        ("sequence_mask", 1.5, None, [[0], [3]]),
    ],
)
def test_the_ratio_is_bounded_as_its_mode_says(mode, low, high, expected):
    ratio = sampler_ratio(LOGPS, SAMPLER, MASK, mode=mode, low=low, high=high)
    assert_close("ratio", ratio, torch.tensor(expected, dtype=ratio.dtype), rtol=1e-6)


def test_figures_are_of_sampled_tokens_and_whole_sequences():
    gap = SamplerGap()
    for mode in ("token_mask", "sequence_mask"):
        gap.add(LOGPS, SAMPLER, MASK, sampler_ratio(LOGPS, SAMPLER, MASK, mode=mode, low=None, high=None))
    # Differences log 2, log 2 and log 3, twice; ratios 2, 0.5, 1, 3 of the tokens and 1, 3 of the sequences.
    expected = torch.tensor([(2 * math.log(2) + math.log(3)) / 3, math.log(3), 0.5, 10.5 / 6, 3])
    assert_close("figures", gap.figures(LOGPS.device), expected, rtol=1e-6)
    empty = SamplerGap()
    empty.add(LOGPS, SAMPLER, torch.zeros_like(MASK), torch.ones(2, 3))
    assert empty.figures(LOGPS.device).tolist() == [0] * 5


def test_processes_join_means_as_means_and_extremes_as_extremes():
    values = joined(torch.tensor([[1.0, 2, 3, 4, 5], [3, 4, 1, 8, 9]]))
    assert list(values) == list(FIGURES)
    assert list(values.values()) == [2, 4, 1, 6, 9]
