"""GRPOPlusTrainer: TRL's GRPOTrainer with the advantages and the loss you choose.

One step: TRL generates the completions and calls the reward functions; `estimate_advantages` turns the rewards of all
processes into advantages; TRL computes its loss with them, or `policy_loss` one that TRL lacks; TRL logs and steps.
"""

from torch import Tensor

from grpo_plus._trl import TRLSeam
from grpo_plus.advantages import Rewards, estimate
from grpo_plus.config import GRPOPlusConfig
from grpo_plus.losses import LossInputs, PolicyLoss, policy_loss


class GRPOPlusTrainer(TRLSeam):
    """TRL's GRPOTrainer with pluggable advantages and losses. Takes its arguments, and a GRPOPlusConfig as `args`.

    With a plain GRPOConfig, or a GRPOPlusConfig whose own fields are unset, it trains what GRPOTrainer trains, to the
    last bit. Override `estimate_advantages` for advantages that need more than the rewards.
    """

    def estimate_advantages(self, rewards: Rewards) -> Tensor | None:
        """Advantages (P, G) of all processes' rewards; None keeps TRL's own."""
        config = self.args
        if not isinstance(config, GRPOPlusConfig) or config.advantage_estimator is None:
            return None
        return estimate(
            config.advantage_estimator,
            rewards,
            config.advantage_kwargs,  # type: ignore[arg-type]  # a dictionary after the configuration's checks
            modifiers=config.advantage_modifiers,  # type: ignore[arg-type]  # likewise
        )

    def policy_loss(self, inputs: LossInputs, *, num_items: Tensor, accumulation_steps: int) -> PolicyLoss:
        """Loss of one micro-batch under `loss_type`, plus beta times the KL to the reference."""
        config = self.args
        return policy_loss(
            config.loss_type,
            inputs,
            config.loss_kwargs,
            beta=self.beta,
            kl_estimator=config.kl_estimator,
            kl_ratio="token" if config.use_bias_correction_kl else None,
            loss_reduction=config.loss_reduction,
            num_items=num_items,
            max_length=self.max_completion_length,
            accumulation_steps=accumulation_steps,
        )
