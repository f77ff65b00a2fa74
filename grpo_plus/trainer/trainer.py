"""GRPOPlusTrainer: TRL's GRPOTrainer with the advantages and the loss you choose.

The story of a step:

1. TRL generates the completions and calls the reward functions. Where `max_refills` allows it, it does so again in
   place of the groups that `dead_groups` names.
2. `estimate_advantages` turns the rewards of all processes into advantages. `advantage_metrics` describes them.
3. TRL computes its loss with the advantages. `policy_loss` computes a loss that TRL lacks.
4. TRL steps, and logs. The guard (`guard.py`) skips a step that is not finite, and ends the run on a signal.
"""

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cached_property
from typing import Any

from torch import Tensor
from transformers import TrainerCallback

from grpo_plus.advantages import ESTIMATORS, Rewards, State, apply_to_rewards, check_state, clip_limits, estimate
from grpo_plus.advantages.metrics import advantage_metrics
from grpo_plus.advantages.running import scales as running_scales
from grpo_plus.advantages.saved import check_saved_state, is_number
from grpo_plus.callbacks.reward_health import RewardHealthCallback
from grpo_plus.callbacks.run_log import RunLogCallback
from grpo_plus.config.overlap import check_overlapping
from grpo_plus.config.run import (
    check_estimator,
    check_plain_loss,
    check_refillable,
    check_router_loss,
    check_task_column,
)
from grpo_plus.losses import AdaptiveBeta, LossInputs, PolicyLoss, policy_loss
from grpo_plus.models.adapters import has_adapters
from grpo_plus.qlora.frozen import FrozenAdapterCallback
from grpo_plus.qlora.settings import log_setting_check
from grpo_plus.trainer.rollouts.digests import digest
from grpo_plus.trainer.safety.determinism import deterministic_algorithms
from grpo_plus.trainer.saving.checkpoints import STATE_FILE
from grpo_plus.trainer.saving.manifest import MANIFEST
from grpo_plus.trainer.saving.record import add_to_card, record_of, write_record
from grpo_plus.trainer.seam import TRLSeam


class GRPOPlusTrainer(TRLSeam):
    """TRL's GRPOTrainer with pluggable advantages and losses. Takes the same arguments, and a GRPOPlusConfig as `args`.

    One argument is ours: `eval_reward_funcs`, by keyword, judge the evaluations in place of `reward_funcs`. Each has
    weight 1. The log then has `eval_rewards/NAME/mean` of these alone, and `eval_reward` is their sum. Evaluations keep
    TRL's advantages, and leave the table of completions as the training wrote it.

    With a GRPOPlusConfig whose own fields are unset, it trains what GRPOTrainer trains: equal to rounding, and faster.
    With a plain GRPOConfig, or with the switches of docs/speed.md off, it is equal to the last bit. The one exception
    is a quantized base: a GRPOPlusConfig keeps its adapters in float32 (`adapter_dtype`).

    Override a method of `grpo_plus.trainer.hooks.Hooks` for a decision that the configuration cannot express.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        check_refillable(self.plus.max_refills, self.plus.refill_buffer, self.train_dataset)
        check_overlapping(self.plus, (*self._overlap.names, *self._eval_rewards.names))
        if self.aux_loss_enabled:
            check_router_loss(self.loss_type, self.router_aux_loss_coef)
        if not self.has_own_fields and type(self).policy_loss is GRPOPlusTrainer.policy_loss:
            check_plain_loss(self.loss_type)
        for dataset in (self.train_dataset, self.eval_dataset) if self.rollout_func is None else ():
            for part in dataset.values() if isinstance(dataset, dict) else [dataset]:
                check_task_column(self.plus.task_column, part)
        # An overridden hook may change the rewards before it calls ours.
        if type(self).estimate_advantages is GRPOPlusTrainer.estimate_advantages:
            names, weights = self.reward_func_names, self._reward_weights.largest
            check_estimator(self.plus, names, weights, num_generations=self.num_generations)
        if self.has_own_fields and has_adapters(self.model):
            self.add_callback(FrozenAdapterCallback())
            if self.accelerator.is_main_process:
                log_setting_check(self.model, self.plus)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train. `resume_from_checkpoint=True` resumes from the newest whole checkpoint."""
        self._reward_weights.begin_run()
        write_record(self)
        if not self._has(RunLogCallback):
            self.add_callback(RunLogCallback())
        if self.plus.health_warnings and not self._has(RewardHealthCallback):
            weights = dict(zip(self.reward_func_names, self._reward_weights.largest, strict=True))
            self.add_callback(RewardHealthCallback(weights=weights))
        algorithms = deterministic_algorithms() if self.plus.deterministic else nullcontext()
        with algorithms, self.speed.around_training(self.model):
            return super().train(resume_from_checkpoint, *args, **kwargs)

    def _has(self, kind: type[TrainerCallback]) -> bool:
        return any(isinstance(callback, kind) for callback in self.callback_handler.callbacks)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write TRL's model card, with the estimator, the loss, the other settings and the versions of this run."""
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            add_to_card(self.args.output_dir, record_of(self))

    @cached_property
    def estimator_state(self) -> State:
        """What a stateful estimator remembers; saved with every checkpoint."""
        return {}

    def estimate_advantages(self, rewards: Rewards) -> Tensor | None:
        """Advantages (P, G), or (P, G, T) per token, of all processes' rewards; None keeps TRL's own."""
        # Evaluation must leave no trace in the state that training goes on with.
        return self._estimate(rewards, self.estimator_state if self.model.training else self._copied_state())

    def dead_groups(self, rewards: Rewards) -> Tensor:
        """(P,) the groups whose advantages are all 0. Under TRL's own advantages: the groups of equal rewards."""
        # Only the batch that is trained on may move the state.
        advantages = self._estimate(rewards, self._copied_state())
        return super().dead_groups(rewards) if advantages is None else (advantages == 0).flatten(1).all(-1)

    def _copied_state(self) -> State:
        return copy.deepcopy(self.estimator_state)

    def _estimate(self, rewards: Rewards, state: State) -> Tensor | None:
        if self.plus.advantage_estimator is None:
            return None
        first = not state
        advantages = estimate(
            self.plus.advantage_estimator,
            rewards,
            self.plus.advantage_kwargs,  # type: ignore[arg-type]  # a dictionary after the configuration's checks
            modifiers=self.plus.advantage_modifiers,  # type: ignore[arg-type]  # likewise
            state=state,
        )
        if first:
            check_state(self.plus.advantage_estimator, state)
        return advantages

    def advantage_metrics(self, rewards: Rewards, advantages: Tensor) -> dict[str, float]:
        """Which rewards and tasks drive the update, and how much of the batch takes part in it."""
        name = self.plus.advantage_estimator
        estimator = None if name is None else ESTIMATORS[name]
        modifiers: Any = self.plus.advantage_modifiers  # a dictionary after the configuration's checks
        rewards = apply_to_rewards(rewards, modifiers)
        trls = estimator is None and type(self).estimate_advantages is GRPOPlusTrainer.estimate_advantages
        trl_normalizes_each = trls and self.args.multi_objective_aggregation == "normalize_then_sum"
        scales = running_scales(name or "", self.estimator_state if self.model.training else {})
        figures = {f"scale/{task}" if task else "scale": scale for task, scale in scales.items()}
        return figures | advantage_metrics(
            rewards,
            advantages,
            limit=clip_limits(rewards, modifiers),
            normalizes_each=trl_normalizes_each if estimator is None else estimator.normalizes_each,
            by_steps=estimator is not None and estimator.needs_steps and not estimator.needs_turns,
            rounded=trls,
        )

    def task_of(self, example: dict[str, Any]) -> str | None:
        """The row's value in `task_column`."""
        column = self.plus.task_column
        if column is None:
            return None
        if column not in example:
            raise ValueError(f"task_column={column!r} is no column of the dataset. Known: {', '.join(example)}.")
        return str(example[column])

    def prompt_key(self, prompt: Any) -> str | None:
        """A digest of the prompt, for the estimators that remember prompts."""
        name = self.plus.advantage_estimator
        if name is None or not ESTIMATORS[name].needs_prompts:
            return None
        try:
            return digest(prompt)
        except ValueError as error:
            raise ValueError(
                f"A prompt {error}, which cannot be recognized in a later batch. Use text and images, override "
                "prompt_key, or take an advantage_estimator that does not remember prompts."
            ) from error

    def running_state(self) -> dict[str, Any]:
        """What the estimator remembers, where beta has moved to, and which way of computing was the fastest."""
        state: dict[str, Any] = {}
        if self.estimator_state:
            state = {"estimator": self.plus.advantage_estimator, "estimator_state": self.estimator_state}
        if self.plus.kl_target is not None:
            state["beta"] = self.beta
        if self.prompt_sampler is not None:
            state["prompts"] = self.prompt_sampler.state()
        if self.speed.measure is not None and (found := self.speed.measure.state()) is not None:
            state["measured"] = found
        return state

    def load_running_state(self, state: dict[str, Any]) -> None:
        """Take all of it up again, where the run still has a use for it.

        Raises:
            ValueError: the state is damaged.
        """
        self.estimator_state.clear()  # a trainer that goes on from a checkpoint may remember what came later
        with _told_as_damaged():
            _check_saved(state)
            if self.prompt_sampler is not None:
                self.prompt_sampler.load(state.get("prompts"))
        if self.plus.kl_target is not None:
            self.beta = state.get("beta", self.beta)
        if self.speed.packer is not None:
            self.speed.packer.go_on_with(state.get("measured"))
        name, saved = self.plus.advantage_estimator, state.get("estimator")
        if "estimator_state" in state and saved == name:
            self.estimator_state.update(state["estimator_state"])
        elif name is not None and ESTIMATORS[name].stateful:
            found = "nothing that an estimator remembers" if saved is None else f"what {saved!r} remembers"
            warnings.warn(
                f"The checkpoint holds {found}: advantage_estimator={name!r} starts without memory, as in a new run.",
                stacklevel=2,
            )

    def next_beta(self, kl: float, completions: int) -> float:
        """Beta, moved towards `kl_target` where one is set."""
        if self.plus.kl_target is None:
            return self.beta
        return AdaptiveBeta(self.beta, self.plus.kl_target, self.plus.kl_horizon).update(kl, completions).beta

    def policy_loss(self, inputs: LossInputs, *, num_items: Tensor, accumulation_steps: int) -> PolicyLoss:
        """Loss of one micro-batch under `loss_type`, plus beta times the KL to the reference."""
        config: Any = self.plus
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


def _check_saved(state: dict[str, Any]) -> None:
    if not is_number(state.get("beta", 0.0)) or state.get("beta", 0.0) < 0:
        raise ValueError(f"beta is {state['beta']!r}, where a finite number of 0 or more belongs.")
    if not isinstance(state.get("measured", {}), dict):
        raise ValueError(f"measured is {state['measured']!r}, where a dictionary belongs.")
    if "estimator_state" in state:
        check_saved_state(str(state.get("estimator")), state["estimator_state"])


@contextmanager
def _told_as_damaged() -> Iterator[None]:
    """Tell a ValueError as one of the checkpoint's file."""
    try:
        yield
    except ValueError as error:
        raise ValueError(
            f"{STATE_FILE} of the checkpoint is damaged. {error} Resume from an older checkpoint, or delete the file "
            f"and {MANIFEST} to go on without it."
        ) from None
