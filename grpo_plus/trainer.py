"""GRPOPlusTrainer: TRL's GRPOTrainer with the advantages and the loss you choose.

One step: TRL generates the completions and calls the reward functions, and does so again where `max_refills` allows it
for the groups that `dead_groups` names; `estimate_advantages` turns the rewards of all processes into advantages, and
`advantage_metrics` says what they are like; TRL computes its loss with them, or `policy_loss` one that TRL lacks; TRL
logs and steps.
"""

import copy
import hashlib
import json
import warnings
from collections.abc import Callable
from functools import cached_property
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from grpo_plus._trl import TRLSeam
from grpo_plus.advantages import ESTIMATORS, Rewards, State, estimate
from grpo_plus.config import GRPOPlusConfig
from grpo_plus.config_speed import why_not_regroup, why_not_skip
from grpo_plus.diagnostics.metrics import advantage_metrics
from grpo_plus.losses import AdaptiveBeta, LossInputs, PolicyLoss, policy_loss
from grpo_plus.packing import Packed, Packer, PaddedRows, dropout_of, why_not_packed
from grpo_plus.qlora.checks import check_adapter_folder, check_run
from grpo_plus.qlora.frozen import FrozenAdapterCallback
from grpo_plus.qlora.precision import chosen_dtype, has_adapters, keep_gradients_on_the_cpu, restore_adapters
from grpo_plus.qlora.settings import log_setting_check


class GRPOPlusTrainer(TRLSeam):
    """TRL's GRPOTrainer with pluggable advantages and losses. Takes its arguments, and a GRPOPlusConfig as `args`.

    With a plain GRPOConfig, or a GRPOPlusConfig whose own fields are unset, it trains what GRPOTrainer trains, to the
    last bit; only the adapters of a quantized base are float32 under a GRPOPlusConfig (`adapter_dtype`). Override
    `estimate_advantages` for advantages that need more than the rewards.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.plus is not None and has_adapters(self.model):
            self.add_callback(FrozenAdapterCallback())
            if self.accelerator.is_main_process:
                log_setting_check(self.model, self.plus)

    @cached_property
    def plus(self) -> GRPOPlusConfig | None:
        """`args` where they are ours; None for a plain GRPOConfig."""
        return self.args if isinstance(self.args, GRPOPlusConfig) else None

    @cached_property
    def estimator_state(self) -> State:
        """What a stateful estimator remembers; saved with every checkpoint."""
        return {}

    def check_run(self, model: Any, args: Any, quantization_config: Any, peft_config: Any) -> None:
        """Refuse what cannot work with a quantized base."""
        check_run(model, args, quantization_config, peft_config)

    def check_checkpoint(self, folder: str) -> None:
        """Refuse the adapter of another base."""
        check_adapter_folder(folder, self.model)

    def restore_adapters(self, exact: dict[str, Tensor]) -> None:
        """Bring the adapters to `adapter_dtype`, where they learn at small learning rates."""
        keep_gradients_on_the_cpu(self.model)
        dtype = chosen_dtype(self.plus.adapter_dtype, self.model) if self.plus is not None else None
        if dtype is not None:
            restore_adapters(self.model, dtype, exact)

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

    @cached_property
    def packer(self) -> Packer | None:
        """What forwards the rows without padding and shared prompts once; None where TRL's forward does it."""
        if self.plus is None or self.plus.packing == "none":
            return None
        reason = why_not_packed(self.accelerator.unwrap_model(self.model))
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            reason = "the weights are spread over the processes by FSDP or DeepSpeed, and packing was not tested there"
        if reason is None:
            reentrant = self.args.gradient_checkpointing and (self.args.gradient_checkpointing_kwargs or {}).get(
                "use_reentrant", False
            )
            return Packer(self.plus.packing, gradient_check=not reentrant)
        if self.plus.packing != "auto":
            raise ValueError(f"packing={self.plus.packing!r} is not possible: {reason}. Set packing='none'.")
        warnings.warn(f"packing: none, rows stay padded. {reason}.", stacklevel=2)
        return None

    def logps(
        self,
        model: Any,
        base: PreTrainedModel,
        rows: PaddedRows,
        padded_logps: Callable[[Tensor, Tensor, int], Tensor],
        *,
        max_tokens: int | None,
    ) -> Packed | None:
        """Log-probabilities through packed rows where `packing` allows, checked against TRL's forward once."""
        if self.packer is None:
            return None
        return self.packer.logps(model, base, rows, padded_logps, max_tokens=max_tokens)

    @cached_property
    def skips(self) -> bool:
        """Whether completions with zero advantage stay out of the forward."""
        if self.plus is None or self.plus.skip_zero_advantage is False:
            return False
        reason = why_not_skip(self.plus) or ("the model has a router loss" if self.aux_loss_enabled else None)
        reason = reason or dropout_of(self.model)
        if reason is not None and self.plus.skip_zero_advantage:
            raise ValueError(f"skip_zero_advantage=True would change the gradients: {reason}. Leave it unset.")
        return reason is None

    def live_rows(self, advantages: Tensor) -> Tensor | None:
        """(B,) booleans: rows with an advantage other than 0, where the others have no gradient."""
        return advantages.reshape(len(advantages), -1).ne(0).any(1) if self.skips else None

    def keeps_prompts_together(self) -> bool:
        """Whether a shared prompt needs its completions in one micro-batch."""
        if self.plus is None or self.packer is None or self.plus.packing == "padding_free":
            return False
        return why_not_regroup(self.plus) is None

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
