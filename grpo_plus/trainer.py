"""GRPOPlusTrainer: TRL's GRPOTrainer with the advantages you choose.

One step: TRL generates the completions and calls the reward functions; `estimate_advantages` turns the rewards of all
processes into advantages; TRL computes its loss with them, logs and steps.
"""

from torch import Tensor

from grpo_plus._trl import TRLSeam
from grpo_plus.advantages import Rewards, estimate
from grpo_plus.config import GRPOPlusConfig


class GRPOPlusTrainer(TRLSeam):
    """TRL's GRPOTrainer with pluggable advantages. Takes GRPOTrainer's arguments, and a GRPOPlusConfig as `args`.

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
