"""The decisions that a user may override, as methods of one class. The defaults leave every decision to TRL."""

from typing import Any

from torch import Tensor

from grpo_plus.advantages import Rewards
from grpo_plus.losses import LossInputs, PolicyLoss
from grpo_plus.trainer.batches.refill_rows import without_spread


class Hooks:
    """The decisions, in the order in which a run meets them."""

    beta: float
    loss_type: str

    def load_running_state(self, state: dict[str, Any]) -> None:
        """Take up the state that `running_state` returned before the checkpoint.

        Override both methods for an estimator of yours that remembers something between batches.

        Args:
            state: {} where the checkpoint holds none.
        """

    def task_of(self, example: dict[str, Any]) -> str | None:
        """Task of a row of the dataset, for estimators and metrics that keep tasks apart. None: there are no tasks.

        Override it where a task is more than the value of one column.
        """
        return None

    def prompt_key(self, prompt: Any) -> str | None:
        """Key of a prompt, by which a later batch recognizes the prompt. None: nobody asks.

        Override it where equal prompts are not written alike, or hold something else than text and images.
        """
        return None

    def dead_groups(self, rewards: Rewards) -> Tensor:
        """The groups that teach nothing, which `max_refills` replaces.

        Override it together with `estimate_advantages`, or to replace groups by another measure. It is called several
        times for a batch, and its answer must not depend on how often.

        Args:
            rewards: of all processes; every process sees the same.

        Returns:
            (P,) bool, here the groups of equal rewards.
        """
        return without_spread(rewards)

    def estimate_advantages(self, rewards: Rewards) -> Tensor | None:
        """Advantages of one generation batch.

        Override it for advantages that need more than the rewards; for others register an estimator.

        Args:
            rewards: of all processes; every process sees the same.

        Returns:
            (P, G) advantages, or (P, G, T) for one per token, with T at least the longest of `rewards.spans`. None
            keeps the advantages that TRL computed. Another shape, or a value that is not finite, is an error. The
            completions table shows one number per completion: the mean over its tokens.
        """
        return None

    def advantage_metrics(self, rewards: Rewards, advantages: Tensor) -> dict[str, float]:
        """Numbers to log under `advantages/`.

        Override it to log a figure of your own.

        Args:
            advantages: (P, G) of all processes, as they reach the loss. Advantages per token come as their mean.
        """
        return {}

    def policy_loss(self, inputs: LossInputs, *, num_items: Tensor, accumulation_steps: int) -> PolicyLoss:
        """Loss of one micro-batch, for a `loss_type` that TRL does not know.

        The result is the whole loss: TRL adds no entropy bonus, entropy quantile or off-policy mask to it. Override it
        for a loss that needs more than `LossInputs`; for others register a loss.

        Args:
            num_items: tokens that share the optimizer step, per process.
            accumulation_steps: micro-batches that share it.
        """
        raise NotImplementedError(f"loss_type={self.loss_type!r} is none of TRL's. Override policy_loss.")

    def next_beta(self, kl: float, completions: int) -> float:
        """Weight of the KL term after an optimizer step.

        Override it for a schedule of your own.

        Args:
            kl: the mean KL over the tokens of the step, over all processes. A step without a token asks nothing.
            completions: completions that the step trained on, over all processes.
        """
        return self.beta

    def running_state(self) -> dict[str, Any]:
        """State that must survive a checkpoint, as a dictionary for JSON. {}: there is none.

        Override it together with `load_running_state`.
        """
        return {}
