"""The KL to the reference as a part of the reward, where GRPO has it in the loss."""

from dataclasses import replace

import torch

from grpo_plus.advantages.rewards import Rewards


def kl_in_reward(rewards: Rewards) -> Rewards:
    """Take the KL to the reference from each completion's reward, and none from the loss, as TRL's RLOOTrainer does.

        r'ᵢ = rᵢ − beta Σₜ (log π_old(oᵢₜ) − log π_ref(oᵢₜ))

    `beta` is the field of that name: it weighs one KL, here or in the loss. The sum is the unbiased estimate k1 of the
    completion's KL, under the policy that generated, and its gradient is the KL's. A term of the loss gives each token
    the gradient of its own KL alone: that a token leads to a KL in later tokens is left out there. The penalty is one
    more reward, called `kl_in_reward`, of weight −1.
    Shah et al., "A Comedy of Estimators" (https://huggingface.co/papers/2512.21852), known to us from its abstract and
    a review; the formula is that of Ziegler et al., "Fine-Tuning Language Models from Human Preferences"
    (https://huggingface.co/papers/1909.08593), Eq. 2.
    """
    if rewards.kl_penalty is None:
        raise ValueError(
            "kl_in_reward needs the KL of each completion to the reference model. Only a training with beta above 0 "
            "knows it, and a log of completions does not hold it. Leave kl_in_reward out, or set Rewards.kl_penalty."
        )
    # A completion that nobody judged stays without a reward.
    penalty = rewards.kl_penalty.where(rewards.judged, torch.nan).unsqueeze(-1)
    return replace(
        rewards,
        values=torch.cat([rewards.values, penalty], dim=-1),
        weights=torch.cat([rewards.weights, rewards.weights.new_full((1,), -1.0)]),
        names=(*rewards.names, "kl_in_reward"),
    )
