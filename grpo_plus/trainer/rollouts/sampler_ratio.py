"""The ratio to the engine that samples, formed in the update, and whether that engine still holds the policy.

With vLLM TRL forwards the whole generation batch once more, to find how much likelier the policy makes each token than
the engine did. Where the update's own forward computes the same log-probabilities, the ratio is formed from them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from trl import GRPOTrainer

from grpo_plus.losses.sampler import SamplerGap, sampler_ratio
from grpo_plus.packing.transfer import on_device
from grpo_plus.trainer.names import SAMPLER_RATIO, trained_tokens
from grpo_plus.trainer.rollouts.gap_log import GapLog
from grpo_plus.trainer.rollouts.sampled import SampledLogps


class SamplerRatio:
    """Weighs the completions of one run by the ratio to what sampled them.

    Args:
        in_update: whether the ratio is formed in the update, in the place of TRL's own forward before it.
    """

    def __init__(self, trainer: GRPOTrainer, *, in_update: bool) -> None:
        self._trainer = trainer
        self._in_update = in_update
        self._log = GapLog(trainer)
        self._sampled = SampledLogps(trainer, self._log)
        sampled = self._sampled
        self.recorded, self.take, self.added_to = sampled.recorded, sampled.take, sampled.added_to

    def reset(self) -> None:
        """Begin a training: an earlier one may have ended within a step."""
        self._log.reset()

    def copy(self) -> SamplerGap:
        """What the micro-batches of the generation batch have added."""
        return self._log.gap.copy()

    def go_back_to(self, gap: SamplerGap) -> None:
        """Forget what has been added since the copy."""
        self._log.gap = gap.copy()

    @contextmanager
    def left_to_the_update(self) -> Iterator[None]:
        """TRL scores without its correction where the update makes up for it."""
        trainer = self._trainer
        correction = trainer.vllm_importance_sampling_correction
        if trainer.model.training and self._in_update:
            trainer.vllm_importance_sampling_correction = False
        try:
            yield
        finally:
            trainer.vllm_importance_sampling_correction = correction

    def compare(self, output: dict[str, Any]) -> None:
        """Warn where the sampler, vLLM or a rollout function, holds another policy than the trainer."""
        logps, sampler_logps = output.get("old_per_token_logps"), output.get("sampling_per_token_logps")
        if logps is not None and sampler_logps is not None:
            gap = SamplerGap()
            gap.add(logps, sampler_logps, trained_tokens(output).bool())
            self._log.warn(gap)

    def form(self, inputs: dict[str, Any] | None, logps: Tensor, live: tuple[int, ...] | None, *, last: bool) -> None:
        """Put the ratio into `inputs`, for the loss to read, where TRL's own forward was left out, and log the gap.

        Args:
            inputs: the micro-batch; None outside of a loss.
            logps: (B, T) of the policy, without gradient.
            live: the rows that were forwarded; None: all.
            last: whether this is the last micro-batch of the generation batch.
        """
        self._sampled.compare(inputs, logps, live, last=last)
        trainer = self._trainer
        if inputs is None or SAMPLER_RATIO in inputs or not (trainer.model.training and self._in_update):
            return
        rows = on_device(torch.tensor(live or range(len(logps))), logps.device)
        scored = logps[rows], inputs["sampling_per_token_logps"][rows], trained_tokens(inputs)[rows].bool()
        ratio = sampler_ratio(
            *scored,
            mode=trainer.vllm_importance_sampling_mode,
            low=trainer.vllm_importance_sampling_clip_min,
            high=trainer.vllm_importance_sampling_clip_max,
        )
        # A skipped row's ratio is 1: of its log-probs nothing is known, and infinity times an advantage of 0 is NaN.
        inputs[SAMPLER_RATIO] = ratio.new_ones(len(logps), ratio.shape[1]).index_copy(0, rows, ratio)
        self._log.gap.add(*scored, ratio)
        if last:
            self._log.write()
