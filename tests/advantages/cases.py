"""Worked examples: one row per estimator and input. Adding an estimator adds a row here.

Inputs come from the source articles and papers, or are small enough to check by hand. The expected values were
computed in float64 and agree with the frameworks that implement the estimator, where there is one; where we differ on
purpose, a comment holds our arithmetic.
"""

from dataclasses import dataclass, field
from typing import Any

import torch

from grpo_plus.advantages import Rewards
from tests.close import rewards_tensor


@dataclass(frozen=True)
class Case:
    estimator: str
    rewards: list  # (P, G) or (P, G, K)
    expected: list  # (P, G)
    keywords: dict[str, Any] = field(default_factory=dict)
    weights: list[float] | None = None
    lengths: list[int] | None = None  # (G,), alike in every group

    def __str__(self) -> str:
        return f"{self.estimator}-{len(self.rewards)}x{len(self.rewards[0])}-{self.keywords or 'defaults'}"


def rewards_of(values: list, weights: list[float] | None = None, lengths: list[int] | None = None) -> Rewards:
    tensor = rewards_tensor(values)
    prompts, generations, functions = tensor.shape
    weight = torch.tensor(weights or [1.0] * functions, dtype=torch.float64)
    tokens = torch.tensor(lengths or [1] * generations).expand(prompts, generations)
    return Rewards(tensor, weight, tuple(f"reward_{k}" for k in range(functions)), tokens)


ARTICLE = [[0.9, 0.7, 0.4]]
SIGNED = [-1, -1, -1, 0, 1, 1, 1]  # "GRPO's Main Flaw"
SIGNED_X5 = [5 * reward for reward in SIGNED]
NONE, ONE, TWO, THREE = [0, 0, 0, 0], [1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0]
SHORT_FIRST, SHORTER_FIRST = [10, 20, 30], [10, 20, 30, 40, 50, 60, 70]
# Two rewards. GDPO's own example (sums 0, 1 and 0, 2), then a binary reward beside a graded one.
SUMS = [[[0, 0], [0, 1]], [[0, 0], [1, 1]]]
MIXED = [[[1, 0.1], [1, 0.9], [0, 0.5], [0, 0.5]], [[1, 1], [0, 1], [1, 0], [0, 0]]]
EQUAL_SUMS = [[[1, 0], [0, 1], [1, 0], [0, 1]]]
HALF_EQUAL_SUMS = [[[1, 0], [0, 1], [1, 0], [1, 1]]]
EQUAL_SUMS_OF_THREE = [[[1, 0, 0], [0, 1, 0], [0, 1, 0], [0, 0, 1]]]
EQUAL_WEIGHTED_SUMS = [[[1, 0], [0, 2], [1, 0], [0, 2]]]
SATURATED = [[[0, 1], [0, 1], [1, 0], [0, 1]], [[0, 1], [1, 1], [0, 1], [0, 1]]]
LIVE, DEAD = [[1, 1], [0, 1], [1, 0], [0, 0]], [[1, 1]] * 4
ABSTAINING = [[[1, None], [0, None], [None, None], [1, 1]]]


def _thrice(low: float, high: float, middle: float = 0.0) -> list[float]:
    return [low] * 3 + [middle] + [high] * 3


def _binary(*pairs: tuple[float, float]) -> list[list[float]]:
    """Advantages of ONE, TWO and THREE from those of a success and of a failure."""
    return [[right] * solved + [wrong] * (4 - solved) for solved, (right, wrong) in enumerate(pairs, start=1)]


CASES = [
    # mean 2/3, sample std .25166, population std .20548
    Case("grpo", ARTICLE, [[0.9268043752, 0.1324006250, -1.0592050003]]),
    Case("grpo", ARTICLE, [[0.9271689657, 0.1324527094, -1.0596216751]], {"eps": 1e-6}),
    Case("grpo", ARTICLE, [[1.1355499479, 0.1622214211, -1.2977713690]], {"ddof": 0, "eps": 0.0}),
    Case("grpo", [SIGNED, SIGNED_X5], [_thrice(-0.9999000100, 0.9999000100), _thrice(-0.9999800004, 0.9999800004)]),
    Case("grpo", ARTICLE, [[0.9271726463, 0.1324532352, -1.0596258814]], {"eps": 1e-9}),
    Case("grpo", [ONE, TWO, THREE], _binary(
        (1.4997000600, -0.4999000200), (0.8658754298, -0.8658754298), (0.4999000200, -1.4997000600)
    )),
    Case("grpo", SUMS, [[-0.7070067953, 0.7070067953], [-0.7070567847, 0.7070567847]]),
    Case("grpo", MIXED, [
        [0.1507329484, 1.3565965360, -0.7536647422, -0.7536647422], [1.2245948898, 0, 0, -1.2245948898]
    ]),
    Case("grpo", MIXED, [
        [0.4999166806, 1.1664722546, -0.8331944676, -0.8331944676],
        [1.1617150317, -0.3872383439, 0.3872383439, -1.1617150317],
    ], weights=[1.0, 0.5]),
    # totals 1, 0, NaN, 2: mean 1, sample std 1
    Case("grpo", ABSTAINING, [[0, -0.9999000100, 0, 0.9999000100]]),
    Case("grpo_pop", ARTICLE, [[1.1355499479, 0.1622214211, -1.2977713690]]),
    Case("grpo_pop", ARTICLE, [[1.1355498927, 0.1622214132, -1.2977713059]], {"eps": 1e-8}),
    Case("grpo_pop", [SIGNED, SIGNED_X5], [_thrice(-1.0801234497, 1.0801234497)] * 2),
    Case("dr_grpo", ARTICLE, [[7 / 30, 1 / 30, -8 / 30]]),
    Case("dr_grpo", [SIGNED, SIGNED_X5], [_thrice(-1, 1), _thrice(-5, 5)]),
    Case("dr_grpo", [ONE, TWO, THREE], _binary((0.75, -0.25), (0.5, -0.5), (0.25, -0.75))),
    Case("dr_grpo", ABSTAINING, [[0, -1, 0, 1]]),
    # others' means: .55, .65, .8
    Case("rloo", ARTICLE, [[0.35, 0.05, -0.4]]),
    Case("rloo", [SIGNED, SIGNED_X5], [_thrice(-7 / 6, 7 / 6), _thrice(-35 / 6, 35 / 6)]),
    Case("rloo", [ONE, TWO, THREE], _binary((1, -1 / 3), (2 / 3, -2 / 3), (1 / 3, -1))),
    # three judged completions, totals 1, 0, 2: others' means 1, 1.5, .5
    Case("rloo", ABSTAINING, [[0, -1.5, 0, 1.5]]),
    Case("batch_std", ARTICLE, [[0.9268043752, 0.1324006250, -1.0592050003]]),
    Case("batch_std", [SIGNED, SIGNED_X5], [
        _thrice(-0.2886668015, 0.2886668015), _thrice(-1.4433340075, 1.4433340075)
    ]),
    Case("gdpo", SUMS, [[-0.5476801284, 0.5476801284], [-1.0953602568, 1.0953602568]]),
    Case("gdpo", MIXED, [
        [-0.2738403467, 1.5966589146, -0.6614092840, -0.6614092840], [1.3228185679, 0, 0, -1.3228185679]
    ]),
    Case("gdpo", MIXED, [
        [0.2451102712, 1.4280703513, -0.8365903112, -0.8365903112],
        [1.2548854669, -0.4182951556, 0.4182951556, -1.2548854669],
    ], weights=[1.0, 0.5]),
    Case("gdpo", EQUAL_SUMS, [[0, 0, 0, 0]]),
    Case("gdpo", EQUAL_SUMS_OF_THREE, [[0.8654657491, -0.8654657491, -0.8654657491, 0.8654657491]]),
    Case("gdpo", EQUAL_WEIGHTED_SUMS, [[0.8658521884, -0.8658521884] * 2], weights=[1.0, 0.5]),
    Case("gdpo", HALF_EQUAL_SUMS, [[-0.3980892035, -0.6894417916, -0.3980892035, 1.4856201986]]),
    Case("gdpo", MIXED, [
        [-0.2739765053, 1.5968521551, -0.6614378249, -0.6614378249], [1.3228756498, 0, 0, -1.3228756498]
    ], {"eps": 1e-8}),
    Case("gdpo", SATURATED, [[0, 0, 0, 0], [-0.7636459437, 2.2909378310, -0.7636459437, -0.7636459437]]),
    # A dead group adds zeros to the batch's std, so the live one grows: by sqrt((N - 1) / (N_live - 1)).
    Case("gdpo", [LIVE], [[1.2246582600, 0, 0, -1.2246582600]]),
    Case("gdpo", [LIVE, DEAD], [[1.8706266076, 0, 0, -1.8706266076], [0] * 4]),
    Case("gdpo", [LIVE] + [DEAD] * 7, [[3.9361090925, 0, 0, -3.9361090925]] + [[0] * 4] * 7),
    Case("gdpo", [LIVE] + [DEAD] * 7, [[1.2246582600, 0, 0, -1.2246582600]] + [[0] * 4] * 7, {"batch_over": "live"}),
]  # fmt: skip
