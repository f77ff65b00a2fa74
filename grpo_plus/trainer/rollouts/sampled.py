"""The probabilities that transformers' generation gave its tokens, from the rollout to the policy's own.

They are the policy's up to rounding, unless something rules tokens out or changes their odds, or the cache is
quantized. TRL would put `sampling_per_token_logps` into its off-policy mask. The column here has a name of its own, and
only the log reads it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.generation import GenerationMode
from trl import GRPOTrainer

from grpo_plus.config.speed import generates_in_batches
from grpo_plus.packing import base_model, why_not_packed
from grpo_plus.packing.transfer import on_device
from grpo_plus.rollout import why_not_model
from grpo_plus.rollout.recorder import recording
from grpo_plus.rollout.sampled import SampledRecorder
from grpo_plus.trainer.names import SAMPLED_LOGPS, trained_tokens
from grpo_plus.trainer.rollouts.gap_log import GapLog
from grpo_plus.trainer.rollouts.written import Rows, Written
from grpo_plus.trainer.update.spread import spreads_weights


class SampledLogps:
    """Compares the sampler of one run with its policy, wherever the policy's log-probabilities are at hand anyway."""

    def __init__(self, trainer: GRPOTrainer, log: GapLog) -> None:
        self._trainer = trainer
        self._log = log
        self._follows = _follows(trainer)
        self._logps: Tensor | None = None  # of the batch that is being scored

    @property
    def _acts(self) -> bool:
        return self._follows and self._trainer.model.training

    @contextmanager
    def recorded(self) -> Iterator[list[SampledRecorder]]:
        """Inside, what is generated is recorded."""
        if not self._acts:
            yield []
            return
        trainer = self._trainer
        with recording(trainer.accelerator.unwrap_model(trainer.model_wrapped), SampledRecorder) as recorders:
            yield recorders

    def take(self, recorders: list[SampledRecorder], written: Written | None) -> None:
        """Keep what the sampler gave the tokens of the completions, until they are scored."""
        tables = None if written is None or not self._acts else written.tables(recorders, _table)
        if written is None or tables is None:
            self._logps = None
        else:
            self._logps = tables[0] if written.in_one_piece else written.placed_logps(tables)

    def added_to(self, output: dict[str, Any]) -> dict[str, Any]:
        """TRL's dictionary with what the sampler gave its tokens, for the update to compare with.

        Where TRL has scored the rows with the policy that sampled, they are compared here.
        """
        if not self._acts:
            return output
        logps, old_logps = self._logps, output.get("old_per_token_logps")
        self._logps = None
        if old_logps is not None:
            if logps is not None:
                self._log.gap.add(old_logps, _widened(logps, old_logps.shape[1]), trained_tokens(output).bool())
            self._log.write()
            return output
        ids = output["completion_ids"]
        if logps is None:  # an empty column, so that batches can be joined
            return output | {SAMPLED_LOGPS: torch.empty(len(ids), 0, device=ids.device)}
        return output | {SAMPLED_LOGPS: _widened(logps, ids.shape[1])}

    def compare(
        self, inputs: dict[str, Any] | None, logps: Tensor, live: tuple[int, ...] | None, *, last: bool
    ) -> None:
        """Compare a micro-batch in its update.

        Args:
            inputs: the micro-batch; None outside of a loss.
            logps: (B, T) of the policy, without gradient.
            live: the rows that were forwarded; None: all.
            last: whether this is the last micro-batch of the generation batch.
        """
        if inputs is None or not self._acts or "old_per_token_logps" in inputs:
            return
        sampled = inputs.get(SAMPLED_LOGPS)  # None in a batch of a checkpoint of another version
        if sampled is not None and sampled.shape[1]:
            mask = trained_tokens(inputs).bool()
            if live is not None:
                rows = on_device(torch.tensor(live, dtype=torch.long), logps.device)
                logps, sampled, mask = (values.index_select(0, rows) for values in (logps, sampled, mask))
            self._log.gap.add(logps, sampled, mask)
        if last:
            self._log.write()


def _follows(trainer: Any) -> bool:
    """Whether transformers' sampling makes every completion of the run, as far as is known here."""
    args = trainer.args
    if trainer.plus.generation_loop == "trl" or not generates_in_batches(args) or args.torch_compile:
        return False
    if trainer.rollout_func is not None:
        return False
    if spreads_weights(trainer) or args.n_gpu > 1:
        return False
    model = trainer.accelerator.unwrap_model(trainer.model)
    if why_not_packed(model) is not None or why_not_model(base_model(model)) is not None:
        return False
    return trainer.generation_config.get_generation_mode() == GenerationMode.SAMPLE


def _table(parts: list[tuple[SampledRecorder, Rows]]) -> Tensor:
    """What has been recorded of one generation's rows (B, T)."""
    tables = [recorder.table(ids) for recorder, ids in parts]
    longest = max(table.shape[1] for table in tables)
    return torch.cat([_widened(table, longest) for table in tables])


def _widened(logps: Tensor, length: int) -> Tensor:
    """Fill up with NaN, which is unknown."""
    return F.pad(logps, (0, length - logps.shape[1]), value=torch.nan)
