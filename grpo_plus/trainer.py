"""GRPOPlusTrainer: TRL's GRPOTrainer with the advantages and the loss you choose.

One step: TRL generates the completions and calls the reward functions, and does so again where `max_refills` allows it
for the groups that `dead_groups` names; `estimate_advantages` turns the rewards of all processes into advantages, and
`advantage_metrics` says what they are like; TRL computes its loss with them, or `policy_loss` one that TRL lacks; TRL
logs and steps.
"""

import copy
import hashlib
import json
from functools import cached_property
from typing import Any

from torch import Tensor

from grpo_plus._trl import TRLSeam
from grpo_plus.advantages import ESTIMATORS, Rewards, State, estimate
from grpo_plus.config import GRPOPlusConfig
from grpo_plus.diagnostics.metrics import advantage_metrics
from grpo_plus.losses import AdaptiveBeta, LossInputs, PolicyLoss, policy_loss


class GRPOPlusTrainer(TRLSeam):
    """TRL's GRPOTrainer with pluggable advantages and losses. Takes its arguments, and a GRPOPlusConfig as `args`.

    With a plain GRPOConfig, or a GRPOPlusConfig whose own fields are unset, it trains what GRPOTrainer trains, to the
    last bit. Override `estimate_advantages` for advantages that need more than the rewards.
    """

    @cached_property
    def plus(self) -> GRPOPlusConfig | None:
        """`args` where they are ours; None for a plain GRPOConfig."""
        return self.args if isinstance(self.args, GRPOPlusConfig) else None

    @cached_property
    def estimator_state(self) -> State:
        """What a stateful estimator remembers; saved with every checkpoint."""
        return {}

    def estimate_advantages(self, rewards: Rewards) -> Tensor | None:
        """Advantages (P, G), or (P, G, T) per token, of all processes' rewards; None keeps TRL's own."""
        # Evaluation must leave no trace in the state that training goes on with.
        return self._estimate(rewards, self.estimator_state if self.model.training else self._copied_state())

    @property
    def max_refills(self) -> int:
        """The configuration's `max_refills`."""
        return self.plus.max_refills if self.plus is not None else 0

    def dead_groups(self, rewards: Rewards) -> Tensor:
        """The groups whose advantages are all 0; those of equal rewards where TRL's own hold rounding instead of 0."""
        # Only the batch that is trained on may move the state.
        advantages = self._estimate(rewards, self._copied_state())
        return super().dead_groups(rewards) if advantages is None else (advantages == 0).flatten(1).all(-1)

    def _copied_state(self) -> State:
        return copy.deepcopy(self.estimator_state)

    def _estimate(self, rewards: Rewards, state: State) -> Tensor | None:
        if self.plus is None or self.plus.advantage_estimator is None:
            return None
        return estimate(
            self.plus.advantage_estimator,
            rewards,
            self.plus.advantage_kwargs,  # type: ignore[arg-type]  # a dictionary after the configuration's checks
            modifiers=self.plus.advantage_modifiers,  # type: ignore[arg-type]  # likewise
            state=state,
        )

    def advantage_metrics(self, rewards: Rewards, advantages: Tensor) -> dict[str, float]:
        """Which rewards and tasks drive the update, and how much of the batch takes part in it."""
        modifiers: Any = self.plus.advantage_modifiers if self.plus is not None else {}
        return advantage_metrics(rewards, advantages, limit=modifiers.get("clip", {}).get("max"))

    def task_of(self, example: dict[str, Any]) -> str | None:
        """The row's value in `task_column`."""
        column = self.plus.task_column if self.plus is not None else None
        if column is None:
            return None
        if column not in example:
            raise ValueError(f"task_column={column!r} is no column of the dataset. Known: {', '.join(example)}.")
        return str(example[column])

    def prompt_key(self, prompt: Any) -> str | None:
        """A digest of the prompt, for the estimators that remember prompts."""
        name = self.plus.advantage_estimator if self.plus is not None else None
        if name is None or not ESTIMATORS[name].needs_prompts:
            return None
        return hashlib.sha256(json.dumps(prompt, sort_keys=True, default=str).encode()).hexdigest()[:16]

    def running_state(self) -> dict[str, Any]:
        """What the estimator remembers, and where beta has moved to."""
        state: dict[str, Any] = {"estimator": self.estimator_state} if self.estimator_state else {}
        if self.plus is not None and self.plus.kl_target is not None:
            state["beta"] = self.beta
        return state

    def load_running_state(self, state: dict[str, Any]) -> None:
        """Take both up again."""
        self.estimator_state.update(state.get("estimator", {}))
        self.beta = state.get("beta", self.beta)

    def next_beta(self, kl: float, completions: int) -> float:
        """Beta, moved towards `kl_target` where one is set."""
        if self.plus is None or self.plus.kl_target is None:
            return self.beta
        return AdaptiveBeta(self.beta, self.plus.kl_target, self.plus.kl_horizon).update(kl, completions).beta

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
