"""The sampler's own distribution: which tokens it could draw, from generation to the loss.

With top_p, top_k, min_p or suppressed tokens, the policy that samples is the policy renormalized over the tokens that
are left. `truncated_sampling="correct"` gives TRL the log-probabilities of that policy. DeepSeek-AI, "DeepSeek-V3.2"
(https://huggingface.co/papers/2512.02556), section 3.1, "Keep Sampling Mask".
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

from torch import Tensor
from transformers import PreTrainedModel
from trl import GRPOTrainer

from grpo_plus.config.sampling import truncates, why_not_correct
from grpo_plus.kernels.linear_logprob.kept import KeptRows
from grpo_plus.packing import PaddedRows, Truncated, why_not_packed, why_not_truncated
from grpo_plus.packing.check import PaddedLogps
from grpo_plus.rollout.kept import KeptRecorder
from grpo_plus.rollout.recorder import recording
from grpo_plus.trainer.names import KEPT_COUNTS, KEPT_LISTS, ONLY_LISTS
from grpo_plus.trainer.rollouts.written import Rows, Written
from grpo_plus.trainer.update.spread import why_not_whole_weights

logger = logging.getLogger("grpo_plus")


class KeptSets:
    """Follows what the sampler of one run could draw. Does nothing where `truncated_sampling` is unset."""

    def __init__(self, trainer: GRPOTrainer, truncated_sampling: str | None, *, tells: bool) -> None:
        self._trainer = trainer
        self._acts = truncated_sampling is not None
        self._checked: WeakSet[PreTrainedModel] = WeakSet()
        self.reset()
        reason = why_not_correct(trainer.args) or _why_not(trainer)
        if self._acts and reason:
            raise ValueError(
                f"truncated_sampling={truncated_sampling!r} is not possible: {reason}. Change that, or leave "
                "truncated_sampling unset."
            )
        if not tells or self._acts or reason is not None:
            return
        if active := truncates(trainer.args, trainer.accelerator.unwrap_model(trainer.model).generation_config):
            logger.info(
                f"{', '.join(active)}: the sampler draws from a part of the vocabulary, and log-probabilities are over "
                "all of it, as in TRL. truncated_sampling='correct' takes them over the part that was drawn from."
            )

    def reset(self) -> None:
        """Begin a training: an earlier one may have ended while a batch was being scored."""
        self._rows: KeptRows | None = None  # of the batch that is being scored

    @contextmanager
    def recorded(self) -> Iterator[list[KeptRecorder]]:
        """Inside, what is generated is recorded."""
        if not self._acts:
            yield []
            return
        trainer = self._trainer
        with recording(trainer.accelerator.unwrap_model(trainer.model_wrapped), KeptRecorder) as recorders:
            yield recorders

    def take(self, recorders: list[KeptRecorder], written: Written | None, images: list | None) -> None:
        """Keep what belongs to the completions, until they are scored."""
        if not self._acts:
            return
        if images is not None:
            raise ValueError(
                "truncated_sampling='correct' is for rows of text, and the dataset has images. Leave it unset."
            )
        tables = None if written is None else written.tables(recorders, _table)
        if written is None or tables is None:
            raise ValueError(
                f"truncated_sampling='correct' has seen model.generate make {sum(each.size for each in recorders)} "
                "rows, and these are not what TRL has made its completions of. Leave truncated_sampling unset."
            )
        self._rows = tables[0] if written.in_one_piece else written.placed_kept(tables)

    def added_to(self, output: dict[str, Any]) -> dict[str, Any]:
        """TRL's dictionary with the kept sets of its rows, which follow the rows from there."""
        if not self._acts:
            return output
        assert self._rows is not None
        rows, self._rows = self._rows.widened(output["completion_ids"].shape[1]), None
        return output | {KEPT_COUNTS: rows.counts, KEPT_LISTS: rows.ids}

    def summed_up(self, output: dict[str, Any]) -> dict[str, Any]:
        """The dictionary of a whole generation batch with what the host has to know of its lists."""
        if not self._acts:
            return output
        return output | {ONLY_LISTS: _only_lists(output[KEPT_COUNTS], output["completion_mask"])}

    def of(self, inputs: dict[str, Any] | None, attention_mask: Tensor, completion_length: int) -> Truncated | None:
        """What the sampler could draw in a micro-batch, for None in the batch that is being scored. None: anything."""
        if not self._acts or (inputs is None and self._rows is None):
            return None
        if inputs is None:
            assert self._rows is not None
            rows = self._rows.widened(completion_length)
            only_lists = _only_lists(rows.counts, attention_mask[:, -completion_length:])
        else:
            rows, only_lists = KeptRows(inputs[KEPT_COUNTS], inputs[KEPT_LISTS]), inputs[ONLY_LISTS]
        trains_entropy = bool(self._trainer.args.entropy_coef or self._trainer.args.use_adaptive_entropy)
        # Of the reference too: the k3 estimator is unbiased where both distributions sum to 1 over what is drawn.
        return Truncated(rows, bool(only_lists), self._trainer.temperature, trains_entropy)

    def check(self, base: PreTrainedModel, rows: PaddedRows, padded_logps: PaddedLogps) -> None:
        """Refuse, once per model, a head that is not ours."""
        if rows.truncated is None or base in self._checked:
            return
        if reason := why_not_truncated(base, rows, padded_logps):
            raise ValueError(
                f"truncated_sampling='correct' does not know the head of {type(base).__name__}: {reason}. Leave "
                "truncated_sampling unset."
            )
        self._checked.add(base)


def _why_not(trainer: GRPOTrainer) -> str | None:
    """Reason why the run's completions cannot be followed. None where they can."""
    columns = getattr(trainer.train_dataset, "column_names", None) or ()
    if trainer.rollout_func is not None:
        return "a rollout function samples, and does not say which tokens it could draw"
    if {"image", "images"} & set(columns):
        return "the dataset has images, and only rows of text are followed"
    if reason := why_not_whole_weights(trainer):
        return reason
    if trainer.args.n_gpu > 1:
        return "torch's DataParallel copies the model to other devices"
    if trainer.aux_loss_enabled:
        return "the model has a router loss, whose forward is TRL's"
    return why_not_packed(trainer.accelerator.unwrap_model(trainer.model))


def _table(parts: list[tuple[KeptRecorder, Rows]]) -> KeptRows:
    return KeptRows.joined([recorder.table([len(ids) for ids in rows]) for recorder, rows in parts])


def _only_lists(counts: Tensor, completion_mask: Tensor) -> Tensor:
    """Whether every token's list holds what is kept, () on the CPU, where reading it waits for no device."""
    return ((counts > 0) | (completion_mask == 0)).all().cpu()
