"""What a trainer decides in a step, as methods to override. The defaults leave every decision to TRL."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from grpo_plus.advantages import Rewards
from grpo_plus.losses import LossInputs, PolicyLoss
from grpo_plus.packing import Packed, PaddedRows
from grpo_plus.trainer.generation import Chunks
from grpo_plus.trainer.refill_rows import without_spread


class Hooks:
    """The decisions, in the order in which a run meets them."""

    beta: float
    loss_type: str

    def check_run(self, model: Any, args: Any, quantization_config: Any, peft_config: Any) -> None:
        """Refuse the trainer's arguments, before anything is loaded."""

    def check_checkpoint(self, folder: str) -> None:
        """Refuse a checkpoint that the run cannot resume from, before anything is loaded."""

    def restore_adapters(self, exact: dict[str, Tensor]) -> None:
        """Set the dtype of the adapters: TRL has cast them at construction, and PEFT when it loaded a checkpoint.

        Args:
            exact: trainable weights by name as they were before TRL rounded them; empty for adapters that TRL created
                and after a checkpoint.
        """

    @property
    def max_refills(self) -> int:
        """Further generation batches that may replace the dead groups of one."""
        return 0

    def dead_groups(self, rewards: Rewards) -> Tensor:
        """The groups that teach nothing and give up their place under `max_refills`.

        Args:
            rewards: of all processes, alike on each of them; asked for every batch generated, and for what becomes of
                it. The answer must not depend on how often one asks.

        Returns:
            (P,) bool, here the groups of equal rewards. Override it together with `estimate_advantages`.
        """
        return without_spread(rewards)

    def generating(self) -> AbstractContextManager[None]:
        """What surrounds the generation of completions."""
        return nullcontext()

    @property
    def chunks(self) -> Chunks | None:
        """How many rows transformers generates for at a time; None: all of the generation batch."""
        return None

    def estimate_advantages(self, rewards: Rewards) -> Tensor | None:
        """Advantages of one generation batch.

        Args:
            rewards: of all processes, alike on each of them.

        Returns:
            (P, G) advantages; (P, G, T) for one per token, T at least the longest of `rewards.lengths`; or None to
            keep the ones that TRL computed. They are checked: another shape or a value that is not finite is an
            error. The completions table shows one number per completion: of advantages per token, their mean.
        """
        return None

    def task_of(self, example: dict[str, Any]) -> str | None:
        """Task of a row of the dataset, for estimators and metrics that keep tasks apart; None where there are none."""
        return None

    def prompt_key(self, prompt: Any) -> str | None:
        """What tells prompts apart across batches; None where nobody asks."""
        return None

    def advantage_metrics(self, rewards: Rewards, advantages: Tensor) -> dict[str, float]:
        """Numbers to log under `advantages/`.

        Args:
            advantages: (P, G) of all processes, as they reach the loss; of advantages per token, their mean.
        """
        return {}

    def next_beta(self, kl: float, completions: int) -> float:
        """Weight of the KL term after an optimizer step.

        Args:
            kl: the mean KL per token that the step's last micro-batch logged, over all processes.
            completions: completions that the step trained on, over all processes.
        """
        return self.beta

    def running_state(self) -> dict[str, Any]:
        """What must survive a checkpoint, as JSON; empty where nothing must."""
        return {}

    def load_running_state(self, state: dict[str, Any]) -> None:
        """Take up what `running_state` returned before the checkpoint, {} where it left nothing there."""

    def live_rows(self, advantages: Tensor) -> Tensor | None:
        """(B,) booleans: which rows of a micro-batch can have a gradient; None: all.

        Args:
            advantages: (B,) or (B, T).
        """
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
        """Log-probabilities and entropies of padded rows, where there is a better way than TRL's; None: TRL's.

        Args:
            model: what to call; `base` is the model inside, without wrappers.
            padded_logps: TRL's forward of `base`: input_ids, attention_mask, completion length -> (B, T).
            max_tokens: of one forward, as TRL chunks a scoring pass; None: all in one.
        """
        return None

    @property
    def drops_old_policy_pass(self) -> bool:
        """Whether a training step's own log-probabilities stand in for a forward of the old policy before it."""
        return False

    def keeps_prompts_together(self) -> bool:
        """Whether completions of one prompt should share a micro-batch."""
        return False

    def policy_loss(self, inputs: LossInputs, *, num_items: Tensor, accumulation_steps: int) -> PolicyLoss:
        """Loss of one micro-batch, for a `loss_type` that TRL does not know.

        It is the whole loss: TRL adds no entropy bonus, and neither its entropy quantile nor its off-policy mask acts.

        Args:
            num_items: tokens that share the optimizer step, per process.
            accumulation_steps: micro-batches that share it.
        """
        raise NotImplementedError(f"loss_type={self.loss_type!r} is none of TRL's. Override policy_loss.")
