"""Sets TRL's reward weights before each batch is judged, where the configuration has them change over the run."""

from collections.abc import Mapping, Sequence

import torch
from trl import GRPOTrainer

from grpo_plus.advantages import UnknownRewardError
from grpo_plus.advantages.schedule import weight_at
from grpo_plus.registry import suggestion
from grpo_plus.trainer.names import log_value


class RewardWeights:
    """The reward weights of one trainer. Without a schedule they are TRL's, and nothing is touched.

    TRL's own advantages and its log read the weights where the estimators do. The step alone decides them, so that a
    resumed run goes on with the same.

    Args:
        trainer: whose reward functions are those of the training.
        schedule: reward -> weights over the run.
        in_evaluation: whether the training's functions judge the evaluations, too.

    Raises:
        UnknownRewardError: the schedule names a reward that the run does not have.
    """

    def __init__(self, trainer: GRPOTrainer, schedule: Mapping[str, Sequence[float]], *, in_evaluation: bool) -> None:
        self._trainer = trainer
        self._in_evaluation = in_evaluation
        self._schedule = schedule
        for name in schedule:
            if name not in trainer.reward_func_names:
                raise UnknownRewardError(
                    f"reward_weight_schedule: there is no reward {name!r}."
                    f"{suggestion(str(name), trainer.reward_func_names)}"
                )
        self.begin_run()

    @property
    def largest(self) -> list[float]:
        """The weight of each reward where it is farthest from 0. A reward with 0 here is only watched."""
        weights = zip(self._trainer.reward_func_names, self._trainer.reward_weights.tolist(), strict=True)
        return [max(self._schedule.get(name, [weight]), key=abs) for name, weight in weights]

    def begin_run(self) -> None:
        """Set the first weights, which the record of the run shows."""
        self._set(0.0)

    def begin_batch(self) -> None:
        """Set the weights of the training's next batch, and log them. Evaluations have the last weights of the run."""
        if not self._trainer.model.training:
            if self._in_evaluation:
                self._set(1.0)
            return
        self._set(self._trainer.state.global_step / max(self._trainer.state.max_steps, 1))
        for name in self._schedule:
            weight = self._trainer.reward_weights[self._trainer.reward_func_names.index(name)]
            log_value(self._trainer, f"reward_weights/{name}", weight.item())

    def _set(self, progress: float) -> None:
        if not self._schedule:
            return
        names, weights = self._trainer.reward_func_names, self._trainer.reward_weights
        moved = [
            weight_at(self._schedule[name], progress) if name in self._schedule else weight
            for name, weight in zip(names, weights.tolist(), strict=True)
        ]
        self._trainer.reward_weights = torch.tensor(moved, dtype=weights.dtype, device=weights.device)
