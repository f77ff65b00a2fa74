"""The KL to the reference, taken from the rewards in place of a term of the loss.

`beta` stays what it is in TRL, the weight of the KL, and makes TRL score each batch with the reference model. The old
policy is scored by the same forward, once more where TRL has not done so. The probabilities that the sampler recorded
would cost nothing, but they are rounded otherwise: over a completion that adds up, and groups of equal rewards would be
told apart by it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from grpo_plus.config.kl import in_reward
from grpo_plus.trainer.names import REFERENCE_KL, scored, trained_tokens
from grpo_plus.trainer.update.step_figures import KL

if TYPE_CHECKING:
    from grpo_plus.trainer.seam import TRLSeam


class KLInReward:
    """Prices the completions of one run by their KL. Does nothing without the modifier `kl_in_reward`."""

    def __init__(self, trainer: "TRLSeam") -> None:
        self._trainer = trainer
        self._acts = in_reward(trainer.plus)

    def added_to(self, output: dict[str, Any]) -> dict[str, Any]:
        """TRL's dictionary of a generation batch with the KL of each token. The batch's rewards get its price."""
        if not self._acts:
            return output
        trainer = self._trainer
        kl = self._old_logps(output) - output["ref_per_token_logps"]
        kl = kl.where(trained_tokens(output).bool(), 0.0)
        of_all = trainer.accelerator.gather(kl.sum(1)).cpu().double()
        groups = trainer.rewards.values.shape[:2]
        trainer.rewards = replace(trainer.rewards, kl_penalty=trainer.beta * of_all.view(groups))
        return output | {REFERENCE_KL: kl}

    @contextmanager
    def left_out_of_the_loss(self, inputs: dict[str, Any]) -> Iterator[None]:
        """Compute the loss of a micro-batch without a KL term, and take its KL to the log and to the next beta."""
        if not self._acts:
            yield
            return
        trainer = self._trainer
        beta, trainer.beta = trainer.beta, 0.0
        try:
            yield
        finally:
            trainer.beta = beta
        trainer._step_figures.add(KL, inputs[REFERENCE_KL], trained_tokens(inputs))

    def _old_logps(self, output: dict[str, Any]) -> Tensor:
        """(B, T) of the policy that generated."""
        old_logps = output.get("old_per_token_logps")
        if old_logps is not None:
            return old_logps
        with torch.no_grad():
            return scored(self._trainer, output)
