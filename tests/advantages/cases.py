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
    # Of the others of .9 the mean is .55 and the sample std .2121; of .7: .65, .3536; of .4: .8, .1414.
    Case("loo_std", ARTICLE, [[1.6499080450, 0.1414209562, -2.8284071249]]),
    Case("loo_std", [SIGNED, SIGNED_X5], [_thrice(-1.1866099244, 1.1866099244), _thrice(-1.1866108900, 1.1866108900)]),
    # The one success has three equal others: nothing is divided.
    Case("loo_std", [ONE, TWO, THREE], _binary(
        (1, -0.5773492692), (1.1546985384, -1.1546985384), (0.5773492692, -1)
    )),
    # totals 1, 0, NaN, 2: others' means 1, 1.5, .5 and stds √2, √.5, √.5
    Case("loo_std", ABSTAINING, [[0, -2.1213203436, 0, 2.1213203436]], {"eps": 0.0}),
    # With the virtual 1 the mean is .75 and the sample std .2646.
    Case("ngrpo", ARTICLE, [[0.5669445667, -0.1889815222, -1.3228706556]]),
    Case("ngrpo", [SIGNED, SIGNED_X5], [
        _thrice(-1.1351800575, 0.8829178225, -0.1261311175), _thrice(-1.1039112382, 1.0500619095, -0.0269246643)
    ]),
    Case("ngrpo", [ONE, TWO, THREE], _binary(
        (1.0954431150, -0.7302954100), (0.7302954100, -1.0954431150), (0.4472125955, -1.7888503820)
    )),
    # 0, 0, 0, 0 and the virtual 1: mean .2, sample std √.2. A group of r_max has no spread.
    Case("ngrpo", [NONE, [1, 1, 1, 1]], [[-0.4472125955] * 4, [0] * 4]),
    Case("ngrpo", [NONE], [[-0.4472135055] * 4], {"r_max": 5.0}),
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
    # baseline (9 + 14 + 12)/60 = 7/12
    Case("opo", ARTICLE, [[0.9 - 7 / 12, 0.7 - 7 / 12, 0.4 - 7 / 12]], lengths=SHORT_FIRST),
    # baseline (180 - 60)/280 = 3/7
    Case("opo", [SIGNED, SIGNED_X5], [_thrice(-10 / 7, 4 / 7, -3 / 7), _thrice(-50 / 7, 20 / 7, -15 / 7)],
         lengths=SHORTER_FIRST),
    # totals 1, 0, NaN, 2; lengths 10, 20, -, 40: baseline 90/70
    Case("opo", ABSTAINING, [[-2 / 7, -9 / 7, 0, 5 / 7]], lengths=[10, 20, 30, 40]),
    Case("rank", ARTICLE, [[2, 0, -2]]),
    # Three of seven are worse than 1, none is better, but the other two are its equals: 2 * 4/6.
    Case("rank", [SIGNED, SIGNED_X5, [0.7] * 7], [_thrice(-4 / 3, 4 / 3), _thrice(-4 / 3, 4 / 3), [0] * 7]),
    Case("rank", ABSTAINING, [[0, -2, 0, 2]]),
    # median .7, deviations .2, 0, .3
    Case("median_mad", ARTICLE, [[0.2 / 0.201, 0, -0.3 / 0.201]]),
    Case("median_mad", [SIGNED, SIGNED_X5], [
        _thrice(-0.9990009990, 0.9990009990), _thrice(-0.9998000400, 0.9998000400)
    ]),
    # MAD 0: divided by the sample std .5, .57735, .5. The lower median of 1, 1, 0, 0 is 0.
    Case("median_mad", [ONE, TWO, THREE], _binary((1 / 0.501, 0), (1 / 0.5783502692, 0), (0, -1 / 0.501))),
    # The .4-quantile is the second of four, so 0, 0 and 1; population stds .4330, .5, .4330.
    Case("quantile", [ONE, TWO, THREE], _binary((2.3094010234, 0), (2, 0), (0, -2.3094010234))),
    # the .4-quantile of three is the second, 0.7
    Case("quantile", ARTICLE, [[0.2 / 0.2054804668, 0, -0.3 / 0.2054804668]]),
    # .28 * 25 is the seventh, although it is more than 7 in floating point; population std √52
    Case("quantile", [list(range(25))], [[(r - 6) / 52**0.5 for r in range(25)]], {"level": 0.28}),
    # level .75 takes the third of four
    Case("quantile", [ONE, TWO], [[2.3094010234, 0, 0, 0], [0, 0, -2, -2]], {"level": 0.75}),
    # Three totals of .3 that differ by float32 rounding: the MAD counts as 0, and the sample std is .35.
    Case("median_mad", [[[0.05, 0.25], [0.1, 0.2], [0.3, 0], [1, 0]]], [[0, 0, 0, 0.7 / 0.351]]),
    # lead .2, sample std .25166
    Case("best_minus_second", ARTICLE, [[0.7947162564, 0, 0]]),
    Case("best_minus_second", ARTICLE, [[0.2, 0, 0]], {"scale": False}),
    Case("best_minus_second", [[1]], [[0]], {"scale": False}),
    Case("best_minus_second", [SIGNED, SIGNED_X5], [[0] * 7] * 2),
    Case("best_minus_second", [ONE, TWO, THREE], _binary((1.9999960000, 0), (0, 0), (0, 0))),
    Case("maxrl", ARTICLE, [[0.35, 0.05, -0.4]]),
    Case("maxrl", ARTICLE, [[0.3499994750, 0.0499999250, -0.3999994000]], {"eps": 1e-6}),
    Case("maxrl", [ONE, TWO, THREE], _binary((3, -1), (1, -1), (1 / 3, -1))),
    # No positive mean: -2, 0 and 0, the last one up to float32 rounding, which leaves 2e-9.
    Case("maxrl", [[-3, -1, -2], [-1, 0, 1], [-0.1, -0.2, 0.3]], [[0] * 3] * 3),
    Case("passk", [ONE, TWO, THREE], _binary((0.9999980000, -0.3333326667), (0.4472123955, -0.4472123955), (0, 0))),
    # All four are drawn: one success is always among them.
    Case("passk", [ONE, NONE], [[0] * 4] * 2, {"k": 4}),
    # k = 3 of ONE: rho = 3/4, with a failure C(2,2)/C(3,2) of the draws fail, 2/3 hold the success
    Case("passk", [ONE], [[3**-0.5, *[-(27**-0.5)] * 3]], {"k": 3, "eps": 0.0}),
    Case("pkpo", [ONE, TWO, THREE], _binary((1, -1 / 3), (4 / 9, -4 / 9), (1 / 9, -1 / 3))),
    Case("pkpo", [ONE, TWO], [[1, *[-1 / 3] * 3], [2 / 9, 2 / 9, -2 / 9, -2 / 9]], {"k": 3}),
    # Two judged completions: both are drawn, and the success is alone with a failure.
    Case("pkpo", [[1, 0, None, None]], [[1, -1, 0, 0]], {"k": 3}),
    # p of 0 and 3/4: mean 3/8, variance 9/32, strength -1/6: alpha and beta of less than 1 become 1.
    Case("bnpo_advantage", [NONE, THREE], [[0] * 4, [0.25, 0.25, 0.25, -0.75]]),
    # p of 1/4 and 3/4: mean 1/2, variance 1/8, so alpha = beta = 7/6
    Case("bnpo_advantage", [ONE, THREE], [[0.7166064315, *[-0.2388688105] * 3], [*[0.2388688105] * 3, -0.7166064315]]),
    # alpha = beta = 3/2: Beta(p) = 8/pi * sqrt(p(1 - p)), so for p = 1/2 A = pi/4 * (r - p)
    Case("bnpo_advantage", [ONE, TWO, THREE], _binary(
        (0.6801747616, -0.2267249205), (0.3926990817, -0.3926990817), (0.2267249205, -0.6801747616)
    )),
    Case("bnpo_advantage", [SIGNED], [_thrice(-0.5, 0.5)], {"low": -1.0, "high": 1.0}),
    Case("batch_std", ARTICLE, [[0.9268043752, 0.1324006250, -1.0592050003]]),
    Case("batch_std", [SIGNED, SIGNED_X5], [
        _thrice(-0.2886668015, 0.2886668015), _thrice(-1.4433340075, 1.4433340075)
    ]),
    Case("rloo_norm", ARTICLE, [[0.9269271010, 0.1324181573, -1.0593452582]]),
    Case("rloo_norm", [SIGNED, SIGNED_X5], [
        _thrice(-0.2886679919, 0.2886679919), _thrice(-1.4433399596, 1.4433399596)
    ]),
    Case("gpg", ARTICLE, [[7 / 30, 1 / 30, -8 / 30]]),
    # Half of the batch trains nothing: alpha = 8/4.
    Case("gpg", [ONE, NONE], [[1.5, -0.5, -0.5, -0.5], [0] * 4]),
    # 7 judged completions, 3 of them in the live group: alpha = 7/3
    Case("gpg", [[1, None, 0, 0], [1] * 4], [[14 / 9, 0, -7 / 9, -7 / 9], [0] * 4]),
    # Over 60 tokens the mean is 35/60; OpenRLHF and NeMo RL use ddof 0.
    Case("reinforce_pp", ARTICLE, [[1.6096951736, 0.5930455903, -0.9319287847]], lengths=SHORT_FIRST),
    Case("reinforce_pp", ARTICLE, [[1.6232795497, 0.5980503604, -0.9397934235]], {"ddof": 0}, lengths=SHORT_FIRST),
    Case("reinforce_pp", [SIGNED], [_thrice(-1.7376652367, 0.6950660947, -0.5212995710)], lengths=SHORTER_FIRST),
    # Two groups without spread: mean 1/2, population std 1/2. Both train.
    Case("reinforce_pp", [[0, 0], [1, 1]], [[-1, -1], [1, 1]], {"ddof": 0, "eps": 0.0}),
    Case("reinforce_pp_baseline", ARTICLE, [[1.6096951736, 0.5930455903, -0.9319287847]], lengths=SHORT_FIRST),
    Case("reinforce_pp_baseline", [SIGNED, SIGNED_X5], [
        _thrice(-0.7413194527, -0.0926649316, -0.4169921921), _thrice(-2.0386284949, 1.2046441106, -0.4169921921)
    ], lengths=SHORTER_FIRST),
    Case("reinforce_pp_baseline", [SIGNED, SIGNED_X5], [
        _thrice(-0.7419822332, -0.0927477792, -0.4173650062), _thrice(-2.0404511413, 1.2057211290, -0.4173650062)
    ], {"ddof": 0}, lengths=SHORTER_FIRST),
    # x is -.5, .5 and -1.5, 1.5; over 8 tokens its mean is (-.5 + 1.5 - 1.5 + 4.5)/8 = .5 and its variance 1.
    Case("reinforce_pp_baseline", [[0, 1], [2, 5]], [[-1, 0], [-2, 1]], {"ddof": 0, "eps": 0.0}, lengths=[1, 3]),
    Case("reinforce_pp_baseline", [SIGNED, SIGNED_X5], [
        _thrice(-0.2886668015, 0.2886668015), _thrice(-1.4433340075, 1.4433340075)
    ], {"weight": "sequence", "eps": 1e-4}, lengths=SHORTER_FIRST),
    # In groups of 2 the variance of the mean is (r1 - r2)^2/4: 1/4, 0, 0. The means are 1/2, 1, 0.
    # First: others' means 1 and 0, noise 0, so lambda is 0. Second: others' mean 1/4, noise 1/8, distance 1/16, so
    # lambda is 2/3 * 2/3, times 1 - 1/4. The third mirrors it.
    Case("shrinkage", [[1, 0], [1, 1], [0, 0]], [[1, -1], [1 / 3, 1 / 3], [-1 / 3, -1 / 3]]),
    # A single other prompt has no distance. Without noise in it lambda is 0; with its noise of 1/12 it is 1/2 * 1.
    Case("shrinkage", [TWO, NONE], [[2 / 3, 2 / 3, -2 / 3, -2 / 3], [-1 / 4] * 4]),
    # A mean of one completion says nothing of the noise: for the third group it is 1/4, the distance 1/16, lambda 8/15,
    # and the baseline 8/15 of 3/4. The single completion has other prompts alone: lambda 4/9, times 1 - 1/4.
    Case("shrinkage", [[1, None], [1, 0], [0, 0]], [[1 / 3, 0], [1, -1], [-0.4, -0.4]]),
    # A group of one judged completion has a mean, 1, and no noise. Third: its others' noise is 1/4, their means are at
    # 1/16 from 3/4, so lambda is 2/3 * 4/5, times 0 - 3/4. Second: noise 1/8, distance 1/16 from 1/4, 4/9 * (1 - 1/4).
    Case("shrinkage", [[1, 0], [1, None], [0, 0]], [[1, -1], [1 / 3, 0], [-2 / 5, -2 / 5]]),
    # One prompt alone is rloo's.
    Case("shrinkage", ARTICLE, [[0.35, 0.05, -0.4]]),
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
    # Both z are .866 or -.866. Two of four agree, so x is half of 1.732; with std 1.2247, and .5477 beside four zeros.
    Case("gd2po", [LIVE], [[0.5**0.5, 0, 0, -(0.5**0.5)]], {"eps": 0.0}),
    # Weighed 1 and 3 the middle two agree by |3 - 1|/4.
    Case("gd2po", [LIVE], [[0.5**0.5, 0, 0, -(0.5**0.5)]], {"eps": 0.0}, weights=[1.0, 3.0]),
    Case("gd2po", [LIVE, DEAD], [[2.5**0.5, 0, 0, -(2.5**0.5)], [0] * 4], {"eps": 0.0}),
    # z is .5 or -1.5, so the middle two agree by |-1|/2 and are left out: x is .5 twice, and .866 and -.866 as above.
    # Mean .25, sum of squares 2 - 4/16, std sqrt(1.75/3) = .763763.
    Case("gd2po", [[[1, 1], [0, 1], [1, 0], [1, 1]], LIVE], [
        [0.25 / 0.7637626158, 0, 0, 0.25 / 0.7637626158],
        [(0.75**0.5 - 0.25) / 0.7637626158, 0, 0, (-(0.75**0.5) - 0.25) / 0.7637626158],
    ], {"eps": 0.0}),
    # Agreement of 1/2 is enough: x is 1 or -1 in the first group, .866, -.866 in the second; variance (4 + 1.5)/5.
    Case("gd2po", [[[1, 1], [0, 1], [1, 0], [1, 1]], LIVE], [
        [1.1**-0.5, -(1.1**-0.5), -(1.1**-0.5), 1.1**-0.5], [(0.75 / 1.1) ** 0.5, 0, 0, -((0.75 / 1.1) ** 0.5)]
    ], {"eps": 0.0, "tau": 0.5}),
    Case("mo_grpo", SUMS, [[-0.7070067953, 0.7070067953], [-1.4140135907, 1.4140135907]]),
    Case("mo_grpo", MIXED, [
        [-0.3584945564, 2.0902454159, -0.8658754298, -0.8658754298], [1.7317508595, 0, 0, -1.7317508595]
    ]),
    Case("mo_grpo", MIXED, [
        [0.2536904367, 1.4780604228, -0.8658754298, -0.8658754298],
        [1.2988131446, -0.4329377149, 0.4329377149, -1.2988131446],
    ], weights=[1.0, 0.5]),
    Case("mo_grpo", EQUAL_SUMS_OF_THREE, [[0.1339246102, -0.1339246102, -0.1339246102, 0.1339246102]]),
    # Stds 0 and .7071, then .7071 and .7071: twice the reward, twice the divisor.
    Case("dvao", SUMS, [[-0.7070067953, 0.7070067953], [-0.7070567847, 0.7070567847]]),
    Case("dvao", MIXED, [
        [0.1106134854, 0.9955213689, -0.5530674271, -0.5530674271], [0.8659504103, 0, 0, -0.8659504103]
    ]),
    Case("dvao", MIXED, [
        [0.4049951643, 0.9449887166, -0.6749919404, -0.6749919404],
        [0.8659254153, -0.2886418051, 0.2886418051, -0.8659254153],
    ], weights=[1.0, 0.5]),
    Case("dvao", HALF_EQUAL_SUMS, [[-0.2320292705, -0.2320292705, -0.2320292705, 0.6960878116]]),
    Case("dvao", EQUAL_SUMS_OF_THREE, [[0] * 4]),
    # A penalty: totals 0, 2 are 1 above and below their mean, both stds √.5, so 1/(2√.5).
    Case("dvao", [[[1, 1], [2, 0]]], [[-(0.5**0.5), 0.5**0.5]], {"eps": 0.0}, weights=[1.0, -1.0]),
    # Correctness earned by 2 of 8, format by 7 of 8: weights (3/4)^.5 and (1/8)^.5
    Case("sa_mrpo", SATURATED, [
        [-0.3888998222, -0.3888998222, 1.1666994667, -0.3888998222],
        [-0.6572010118, 1.9716030353, -0.6572010118, -0.6572010118],
    ]),
    Case("sa_mrpo", SATURATED, [[0] * 4, [-0.7636459437, 2.2909378310, -0.7636459437, -0.7636459437]], {"gamma": 0.0}),
    # Format is earned more often than its bound allows, so only correctness counts, with weight √.75: x is √.75 * .75
    # and -√.75 * .25 over .5001, its std over the batch √.75 * √(1.5/7)/.5001.
    Case("sa_mrpo", SATURATED, [
        [-0.5399943623, -0.5399943623, 1.6199830868, -0.5399943623],
        [-0.5399943623, 1.6199830868, -0.5399943623, -0.5399943623],
    ], {"bounds": {"reward_1": [0, 0.5]}}),
    # Correctness is below its bounds: weights 1 and √(1/8).
    Case("sa_mrpo", SATURATED, [
        [-0.4145849900, -0.4145849900, 1.2437549800, -0.4145849900],
        [-0.6413290500, 1.9239871600, -0.6413290500, -0.6413290500],
    ], {"bounds": {"reward_0": [0.5, 1]}}),
    # Both rewards 15/16 saturated, weights 1/4: x = 2/4 * .5/.57745, in the live group with a sample std of √(2/3) x.
    Case("sa_mrpo", [LIVE] + [DEAD] * 7, [[1.2243984992, 0, 0, -1.2243984992]] + [[0] * 4] * 7,
         {"batch_over": "live"}),
    # With these bounds neither reward is at all saturated, and at gamma 0 the weights would be the same.
    Case("sa_mrpo", SATURATED, [[0] * 4, [-0.7636459437, 2.2909378310, -0.7636459437, -0.7636459437]],
         {"bounds": {"reward_0": [0.25, 9], "reward_1": [0.875, 9]}}),
    # The first batch sets the running moments: mean 2/3, variance .0422222 as in grpo_pop, eps 1e-6.
    Case("ema_task", ARTICLE, [[7 / 30 / 0.2054814668, 1 / 30 / 0.2054814668, -8 / 30 / 0.2054814668]]),
    # mean .75, mean of squares .75: std sqrt(.1875) = .4330127; the group that is all right stays above the task's mean
    Case("popart", [[0, 1], [1, 1]], [[-0.75 / 0.4330137, 0.25 / 0.4330137], [0.25 / 0.4330137, 0.25 / 0.4330137]]),
    # every prompt starts at .5: differences .5 -.5 .5 .5, mean .25, sample std .5
    Case("spo", [[1, 0], [1, 1]], [[0.5, -1.5], [0.5, 0.5]]),
]  # fmt: skip
