"""PPO's clip: TRL's grpo, bnpo, dapo, dr_grpo and luspo are one function with five reductions.

The clip stops pushing a token once its ratio has left the trust region in the direction of its advantage. Take `dapo`
(TRL's default) or `dr_grpo` where completions differ much in length. Take `dual_clip` where old completions are reused
so often that the ratios of bad tokens explode.
"""

from functools import partial

import torch

from grpo_plus.losses.inputs import LossInputs, TokenLoss
from grpo_plus.losses.loss import register
from grpo_plus.losses.ratios import ImportanceSamplingLevel, clip, clip_range, importance_ratio, token_ratio

_promising = partial(
    register, scope="row", zero_without_advantage=True, reinforce_on_policy=True, reinforce_by_token=True
)

GRPO = """PPO's clip; mean over each sequence's tokens, then over the sequences.

Shao et al., "DeepSeekMath" (https://huggingface.co/papers/2402.03300), Eq. 3."""

BNPO = """PPO's clip; mean over the tokens of the micro-batch.

A token counts for more in a micro-batch with few tokens. BNPO is TRL's name for this reduction
(https://github.com/huggingface/trl/pull/3256). The BNPO paper is about advantages."""

DAPO = """PPO's clip; mean over all tokens of the optimizer step.

Yu et al., "DAPO" (https://huggingface.co/papers/2503.14476), Eq. 8. The paper advises epsilon_high=0.28."""

DR_GRPO = """PPO's clip; sum over the tokens, divided by the longest length that generation allows.

Liu et al., "Understanding R1-Zero-Like Training" (https://huggingface.co/papers/2503.20783), section 3.2."""

LUSPO = """PPO's clip; sum over each sequence's tokens, mean over the sequences.

For importance_sampling_level="sequence", where the sum undoes the 1/length that the sequence ratio brings.
"Length-Unbiased Sequence Policy Optimization" (https://huggingface.co/papers/2602.05261)."""


@_promising("grpo", reduction="seq-mean-token-mean", origin="trl", variant=GRPO)
@_promising("bnpo", reduction="token-mean", origin="trl", variant=BNPO)
@_promising("dapo", reduction="global-token-mean", origin="trl", variant=DAPO)
@_promising("dr_grpo", reduction="seq-mean-token-sum-norm", origin="trl", variant=DR_GRPO)
@_promising("luspo", reduction="seq-mean-token-sum", origin="trl", variant=LUSPO)
def ppo_clip(
    inputs: LossInputs,
    *,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    delta: float | None = None,
    importance_sampling_level: ImportanceSamplingLevel = "token",
) -> TokenLoss:
    """The more pessimistic of the ratio and the clipped ratio, times the advantage.

        loss = −min(min(ρ, delta) A, clip(ρ, 1 − epsilon, 1 + epsilon_high) A)

    With importance_sampling_level="sequence", ρ is the length-normalized ratio of the whole sequence. That is GSPO
    (https://huggingface.co/papers/2507.18071), with epsilon 3e-4 and epsilon_high 4e-4, as such ratios hardly move.

    Args:
        epsilon_high: None means the same as `epsilon`.
        delta: bound for the unclipped ratio, above 1 + epsilon_high. None sets no bound. The bound limits the push
            against a token with a negative advantage and a large ratio. INTELLECT-2
            (https://huggingface.co/papers/2505.07291).
    """
    ratio = importance_ratio(inputs, importance_sampling_level)
    return clip(ratio, inputs.advantages, clip_range(epsilon, epsilon_high), delta=delta)


@_promising("dual_clip", reduction="global-token-mean")
def dual_clip(
    inputs: LossInputs, *, epsilon: float = 0.2, epsilon_high: float | None = None, c: float = 3.0
) -> TokenLoss:
    """PPO's clip with a second clip: the loss of a token with a negative advantage is at most −c A.

        loss = −min(ρ A, clip(ρ) A)             where A ≥ 0
        loss = −max(min(ρ A, clip(ρ) A), c A)   where A < 0

    PPO leaves the ratio unbounded where A < 0, so that one stale token can dominate a step. Here a token beyond c gets
    no gradient. For c above 1 + epsilon_high this is `grpo` with delta=c, under the name in verl and OpenRLHF.
    Ye et al., "Mastering Complex Control in MOBA Games" (https://huggingface.co/papers/1912.09729).

    Args:
        c: above 1. verl's default is 3.
    """
    if not c > 1:
        raise ValueError(f"c={c!r} would clip tokens whose ratio has not changed. Use a number above 1, such as 3.0.")
    loss, metrics = clip(token_ratio(inputs), inputs.advantages, clip_range(epsilon, epsilon_high))
    most = -c * inputs.advantages
    beyond = (inputs.advantages < 0) & (loss > most)
    return TokenLoss(torch.where(beyond, most, loss), {**metrics, "clip_ratio/dual_mean": beyond.float()})
