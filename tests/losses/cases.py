"""Worked examples: one row per loss and setting. Adding a loss adds a row here.

All share two completions of two and three tokens. Old and new log-probabilities give the ratios

    e^.3 = 1.3499   e^-.1 = .9048   (masked)
    e^-.3 = .7408   e^.3 = 1.3499   e^-.05 = .9512

The values and gradients of TRL's losses are those of TRL's own code in float64; the others' arithmetic is beside them.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from grpo_plus.losses import LossInputs, Reduction

NEW = [[-0.7, -0.6, 0.0], [-1.1, -0.9, -0.35]]
OLD = [[-1.0, -0.5, 0.0], [-0.8, -1.2, -0.3]]
REF = [[-0.9, -0.55, 0.0], [-0.9, -1.1, -0.3]]
MASK = [[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]]
PER_ROW = [[1.0], [-0.5]]
PER_TOKEN = [[1.0, 2.0, 0.0], [-0.5, 0.5, -1.0]]
NUM_ITEMS, MAX_LENGTH = 5.0, 4


@dataclass(frozen=True)
class Case:
    loss: str
    expected: float
    gradient: list[list[float]]  # (B, T), with respect to the new log-probabilities
    keywords: dict[str, Any] = field(default_factory=dict)
    reduction: Reduction | None = None
    advantages: list[list[float]] = field(default_factory=lambda: PER_ROW)
    kl: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        parts = [self.loss, *(f"{k}={v}" for k, v in {**self.keywords, **self.kl}.items()), self.reduction or ""]
        return "-".join(filter(None, parts)) + ("-per_token" if self.advantages is PER_TOKEN else "")


def double(values: list | float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def inputs_of(case: Case, logps: Tensor) -> LossInputs:
    return LossInputs(logps, double(OLD), double(case.advantages), double(MASK), double(REF))


SEQUENCE = {"importance_sampling_level": "sequence"}

CASES = [
    # Terms -min(r A, clip(r) A): -1.2, -.9048 | .4, .6749, .4756. The first and third ratio are clipped: no gradient.
    # Row means -1.0524, .5169; their mean.
    Case("grpo", -0.26778533516926345, [
        [0, -0.2262093545089899, 0], [0, 0.11248823396466691, 0.07926911870839283]
    ]),
    # Two thirds of the second row's tokens; sum / 5.
    Case("bnpo", -0.11085866039952022, [
        [0, -0.18096748360719195, 0], [0, 0.1349858807576003, 0.09512294245007141]
    ]),
    Case("dapo", -0.11085866039952022, [
        [0, -0.18096748360719195, 0], [0, 0.1349858807576003, 0.09512294245007141]
    ]),
    # Sum / (2 rows * 4).
    Case("dr_grpo", -0.06928666274970013, [
        [0, -0.11310467725449495, 0], [0, 0.08436617547350019, 0.059451839031294626]
    ]),
    # Sum / 2 rows.
    Case("luspo", -0.27714665099880054, [
        [0, -0.4524187090179798, 0], [0, 0.33746470189400074, 0.2378073561251785]
    ]),
    # Sequence ratios e^((.3 - .1)/2) = 1.1052 and e^((-.3 + .3 - .05)/3) = .9835: neither is clipped.
    Case("grpo", -0.3067175955824195, [
        [-0.27629272951891193, -0.27629272951891193, 0],
        [0.08195595448513479, 0.08195595448513479, 0.08195595448513479],
    ], SEQUENCE),
    # Each row counts once per token: (-1.1052 * 2 + .4917 * 3) / 5.
    Case("dapo", -0.14702693108377388, [
        [-0.22103418361512955, -0.22103418361512955, 0],
        [0.09834714538216177, 0.09834714538216177, 0.09834714538216177],
    ], SEQUENCE),
    Case("luspo", -0.36756732770943457, [
        [-0.5525854590378239, -0.5525854590378239, 0],
        [0.24586786345540437, 0.24586786345540437, 0.24586786345540437],
    ], SEQUENCE),
    # The fourth ratio, 1.3499 with A < 0, is held at max(1.1, 1.2): its gradient goes.
    Case("grpo", -0.2552735691339304, [[0, -0.2262093545089899, 0], [0, 0, 0.07926911870839283]], {"delta": 1.1}),
    Case("grpo", -0.6272138049345275, [
        [0, -0.4524187090179798, 0], [0, 0, 0.15853823741678566]
    ], advantages=PER_TOKEN),
    Case("grpo", -0.26641867615470194, [
        [0.006749294037880018, -0.22734040128153485, 0],
        [-0.002469394068939059, 0.11698776332325359, 0.0784764275213089],
    ], kl={"beta": 0.1}),
    Case("grpo", -0.26659521213934373, [
        [0.004531731173050453, -0.22749113191839052, 0],
        [-0.003690045969336163, 0.11550938808003387, 0.07841460043545909],
    ], kl={"beta": 0.1, "kl_ratio": None}),
    # Weights 1.2, .9048 | .7408, 1.2, .9512; gradient -w A / 5.
    Case("cispo", 0.05379745603180118, [
        [-0.24, -0.18096748360719195, 0], [0.0740818220681718, 0.12, 0.09512294245007141]
    ], {"epsilon_high": 1.2}),
    # The same with .8 for .7408.
    Case("cispo_two_sided", 0.04728746030679014, [
        [-0.24, -0.18096748360719195, 0], [0.08, 0.12, 0.09512294245007141]
    ]),
    Case("sapo", -0.5833182215064618, [
        [-0.32734524950345856, -0.22569799320614214, 0],
        [0.06060578329946959, 0.10877698877441463, 0.079217173131553],
    ]),
    # Row ratios e^.2 and e^-.05: phi = e^(3 + .4 - 3 e^.2) = .7678 and e^(2 - .15 - 2 e^-.05) = .9489;
    # gradient -phi A / 5.
    Case("vespo", -0.023358403692300002, [
        [-0.1535627214044421, -0.1535627214044421, 0],
        [0.09488933681620201, 0.09488933681620201, 0.09488933681620201],
    ]),
    # (.7 + .6 - .55 - .45 - .175) / 5 = .025; gradient -A / 5.
    Case("reinforce", 0.025, [[-0.2, -0.2, 0], [0.1, 0.1, 0.1]]),
    # Probabilities moved by .1287, -.0577 | -.1165, .1054, -.0361: none beyond .15, so the weights are the ratios.
    # (1.3499 * .7 + .9048 * .6 - .5 (.7408 * 1.1 + 1.3499 * .9 + .9512 * .35)) / 5; gradient -w A / 5.
    Case("dppo_tv", 0.061290396410601355, [
        [-0.26997176151520064, -0.1809674836071919, 0],
        [0.0740818220681718, 0.1349858807576003, 0.0951229424500714],
    ]),
    # Beyond .1 are the first, third and fourth. The fourth has A < 0 and rose: it comes back, held at 1.2.
    Case("dppo_tv", -0.03271253969320985, [
        [0, -0.1809674836071919, 0], [0, 0.12, 0.0951229424500714]
    ], {"delta": 0.1, "c": 1.2}),
    # The third falls by more than .1, the first rises by less than .2.
    Case("dppo_tv", 0.14278040068559034, [
        [-0.26997176151520064, -0.1809674836071919, 0], [0, 0.1349858807576003, 0.0951229424500714]
    ], {"delta": 0.1, "delta_high": 0.2}),
    # With a sign per token the fourth rises in the direction of its advantage, by less than .11.
    Case("dppo_tv", 0.2720622132954206, [
        [0, -0.3619349672143838, 0], [0, -0.1349858807576003, 0.1902458849001428]
    ], {"delta": 0.05, "delta_high": 0.11}, advantages=PER_TOKEN),
    # Binary KLs .0335, .0068 | .0292, .0239, .0032, such as .3679 ln(.3679/.4966) + .6321 ln(.6321/.5034) = .0335.
    Case("dppo_kl", 0.061290396410601355, [
        [-0.26997176151520064, -0.1809674836071919, 0],
        [0.0740818220681718, 0.1349858807576003, 0.0951229424500714],
    ]),
    # Beyond .03 is the first alone.
    Case("dppo_kl", -0.12768983665003908, [
        [0, -0.1809674836071919, 0], [0.0740818220681718, 0.1349858807576003, 0.0951229424500714]
    ], {"delta": 0.03}),
    # Beyond .02 are the third and the fourth, which comes back; beyond .04 is none.
    Case("dppo_kl", 0.14278040068559034, [
        [-0.26997176151520064, -0.1809674836071919, 0], [0, 0.1349858807576003, 0.0951229424500714]
    ], {"delta": 0.02, "delta_high": 0.04}),
    # bnpo's terms, but .6749 is held at 1.05 * .5 = .525: (-2.1048 + .4 + .525 + .4756) / 5. .4 and .4756 are below.
    Case("dual_clip", -0.14084454115712053, [[0, -0.18096748360719195, 0], [0, 0, 0.09512294245007141]], {"c": 1.05}),
    # The largest term with A < 0 is .6749, far below 3 * .5: as dapo.
    Case("dual_clip", -0.11085866039952022, [
        [0, -0.18096748360719195, 0], [0, 0.1349858807576003, 0.09512294245007141]
    ]),
    # Weights 1 | e^-.05 = .9512: (1.3 - .5 * .9512 * 2.35) / 5; gradient -w A / 5.
    Case("topr", 0.03646108524233217, [
        [-0.2, -0.2, 0], [0.09512294245007141, 0.09512294245007141, 0.09512294245007141]
    ], reduction="token-mean"),
    # Weights 1 | e^(-.05/3) = .9835.
    Case("topr", 0.02888420835191983, [
        [-0.2, -0.2, 0], [0.09834714538216177, 0.09834714538216177, 0.09834714538216177]
    ], {"length_normalised": True}, "token-mean"),
    # A row with A < 0 that has become more probable, e^.2: held at 1, so this is reinforce. (-1.3 + .5 * 2.35) / 5.
    Case("topr", -0.025, [[0.2, 0.2, 0], [-0.1, -0.1, -0.1]], reduction="token-mean", advantages=[[-1.0], [0.5]]),
    # The first times 5 tokens over 2 rows.
    Case("topr", 0.09115271310583043, [[-0.5, -0.5, 0], [0.23780735612517853] * 3]),
    # No log-ratio beyond .4: GSPO's numbers.
    Case("gmpo", -0.3067175955824195, [
        [-0.27629272951891193, -0.27629272951891193, 0],
        [0.08195595448513479, 0.08195595448513479, 0.08195595448513479],
    ]),
    # Log-ratios .2, -.1 | -.2, .3, -.05: means .05 and .05/3; only where a bound is not in force is there a gradient.
    # (-e^.05 + .5 e^.016667) / 2, gradients -e^.05 / 4 and .5 e^.016667 / 6.
    Case("gmpo", -0.2714339656775474, [
        [0, -0.2628177740940057, 0], [0, 0.0847338608333333, 0.0847338608333333]
    ], {"epsilon": 0.2}),
    # 1.1052 and .9835 are beyond 1.0004 and .9997, each in its advantage's direction: (-1.0004 + .5 * .9997) / 2.
    Case("gspo_token", -0.250275, [[0, 0, 0], [0, 0, 0]]),
    # Wide bounds: GSPO's numbers.
    Case("gspo_token", -0.3067175955824195, [
        [-0.27629272951891193, -0.27629272951891193, 0],
        [0.08195595448513479, 0.08195595448513479, 0.08195595448513479],
    ], {"epsilon": 0.2, "epsilon_high": 0.2}),
    # Halves of the article's sums over the two rows, -.74578805 and -.74027056. Row ratios e^.2 and e^-.05:
    # (-e^.2 + .5 e^-.05) / 2.
    Case("kl_to_old", -0.3728940229549065, [
        [-0.6107013790800849, -0.6107013790800849, 0], [0.2378073561251785] * 3
    ], {"beta_old": 0.0}),
    # k3 of log-ratio x is e^-x + x - 1, with gradient 1 - e^-x; times .04 / 2.
    Case("kl_to_old", -0.37013527768708425, [
        [-0.6055177434937192, -0.6128047974414374, 0], [0.2308101799736585, 0.2429909917115442, 0.2367819342076575]
    ]),
    # Means over 5 tokens: A .1, log-prob -.73. Covariances (.027), .117 | (.222), .102, -.228, of which PPO's clip has
    # already stopped those in brackets. The band holds .102 alone: bnpo without .6749 / 5.
    Case("clip_cov", -0.2458445411571205, [
        [0, -0.18096748360719195, 0], [0, 0, 0.09512294245007141]
    ], {"clip_cov_lb": 0.1, "clip_cov_ub": 0.11}),
    # This band holds .222 alone, which is not drawn: its value stays in the loss.
    Case("clip_cov", -0.11085866039952022, [
        [0, -0.18096748360719195, 0], [0, 0.1349858807576003, 0.09512294245007141]
    ], {"clip_cov_lb": 0.2, "clip_cov_ub": 0.25}),
    # No covariance reaches the default band of 1 to 5.
    Case("clip_cov", -0.11085866039952022, [
        [0, -0.18096748360719195, 0], [0, 0.1349858807576003, 0.09512294245007141]
    ]),
]  # fmt: skip
