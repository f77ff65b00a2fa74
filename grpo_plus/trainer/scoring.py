"""What of the seam computes log-probabilities: without padding, without rows of no gradient, in bounded passes."""

import warnings
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from grpo_plus.losses import LossInputs
from grpo_plus.packing import Logps, Packed, PaddedRows, base_model, forward_live, forward_padded, score_padded
from grpo_plus.trainer.batches.demonstrations import Demonstrations
from grpo_plus.trainer.names import SAMPLER_RATIO, multimodal, trained_tokens, whole_rows
from grpo_plus.trainer.rollouts.kept import KeptSets
from grpo_plus.trainer.safety.guarding import GuardedSeam
from grpo_plus.trainer.update.micro_batches import MicroBatches
from grpo_plus.trainer.update.pictures import knows_rows, pictures_of, with_images
from grpo_plus.trainer.update.spread import spreads_weights

UNKNOWN_ROWS = "packing: rows with images stay padded where the numbers of images do not tell which row has which."


class ScoringSeam(GuardedSeam):
    """A trainer whose log-probabilities come from the speed-ups wherever these are exact, and else from TRL."""

    _micro_batch: dict[str, Any] | None = None
    _known: MicroBatches
    _kept: KeptSets
    _demonstrations: Demonstrations

    def _alive(self, inputs: dict[str, Any]) -> Tensor | None:
        return self.speed.live_rows(inputs["advantages"]) if self.model.training else None

    def _padded_rows(
        self, input_ids: Tensor, attention_mask: Tensor, completion_length: int, shown: dict[str, Any]
    ) -> PaddedRows:
        """The rows as they are forwarded: in a loss, without those that have no gradient."""
        inputs = self._micro_batch
        rows = PaddedRows(input_ids, attention_mask, completion_length)
        rows = replace(rows, truncated=self._kept.of(inputs, attention_mask, completion_length))
        if not self.speed.reads_rows:
            return rows
        if not knows_rows(shown):
            warnings.warn(UNKNOWN_ROWS, stacklevel=2)
            return replace(rows, are_unsorted=True)
        if inputs is None:
            return replace(rows, pictures=with_images(pictures_of(shown)))
        known = self._known.of(inputs, self._alive)
        # A skipped row keeps the log-probs at which its ratio is 1.
        fill = None if known.live is None else inputs.get("old_per_token_logps")
        forwards = type(self)._get_per_token_logps_and_entropies is ScoringSeam._get_per_token_logps_and_entropies
        # A subclass that comes before our forward may hand it other tokens than those of the micro-batch.
        layout = known.layout if forwards and self.speed.packer is not None else None
        pictures = known.pictures if forwards else with_images(pictures_of(shown), known.live)
        return replace(rows, live=known.live, fill=fill, layout=layout, pictures=pictures)

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        **shown: Any,
    ) -> tuple[Tensor, Any, Tensor | None]:
        forward = super()._get_per_token_logps_and_entropies
        rows = self._padded_rows(input_ids, attention_mask, logits_to_keep, shown)
        is_text = not compute_aux_loss and not multimodal(shown)
        padded = partial(self._padded_logps, model, True, length=logits_to_keep)
        with self.speed.around_forward(model):
            packs = not compute_aux_loss
            packed = self._packed_logps(model, rows, batch_size) if packs else None
            if packed is None and packs and rows.live is not None:
                packed = forward_live(rows, padded)
            if packed is not None:
                scores = packed.logps, packed.entropies, None
            elif is_text and compute_entropy and batch_size is None:
                scores = *padded(input_ids, attention_mask), None
            else:
                at_once = self.speed.passes.rows(batch_size, input_ids.shape[1])
                arguments = (logits_to_keep, at_once, compute_entropy, compute_aux_loss)
                scores = forward(model, input_ids, attention_mask, *arguments, **shown)
        if self._micro_batch is not None:
            self._step_figures.forwarded(rows, packed, scores[1])
            self._step_figures.refilled(self._micro_batch, scores[0].detach())
        last = (self._step + 1) % (self.args.steps_per_generation * self.num_iterations) == 0
        self._sampler.form(self._micro_batch, scores[0].detach(), rows.live, last=last)
        self._demonstrations.weigh(self._micro_batch, scores[0].detach(), rows.live)
        return scores

    def _padded_logps(
        self, model: Any, entropy: bool, input_ids: Tensor, attention_mask: Tensor, length: int, **shown: Any
    ) -> Logps:
        """As TRL computes them, in passes of bounded size. Rows with images take one pass."""
        forward = super()._get_per_token_logps_and_entropies

        def trls(model: Any, ids: Tensor, mask: Tensor) -> Logps:
            return forward(model, ids, mask, length, None, entropy, **shown)[:2]

        if shown:
            return trls(model, input_ids, attention_mask)
        base = base_model(self.accelerator.unwrap_model(model))
        return forward_padded(model, base, input_ids, attention_mask, trls, self.speed.passes.tokens)

    def _packed_logps(self, model: Any, rows: PaddedRows, batch_size: int | None) -> Packed | None:
        if self.speed.packer is None and rows.truncated is None:
            return None
        base = base_model(self.accelerator.unwrap_model(model))
        max_tokens = None if batch_size is None else batch_size * rows.input_ids.shape[1]
        policy = self.model.training and model in (self.model, self.model_wrapped)

        # A wrapper such as DDP's would take the gradients of a check for those of an update.
        called = model if spreads_weights(self) else base

        def padded_logps(ids: Tensor, mask: Tensor, length: int, /, **shown: Any) -> Tensor:
            return self._padded_logps(called, policy, ids, mask, length, **shown)[0]

        bound = self.speed.passes.tokens
        with self.accelerator.autocast():
            self._kept.check(base, rows, padded_logps)
            packed = None
            if self.speed.packer is not None:
                limits = {"max_tokens": max_tokens, "bound": bound}
                packed = self.speed.packer.logps(model, base, rows, padded_logps, **limits, policy=policy)
            if packed is None and rows.truncated is not None:
                packed = score_padded(model, base, rows, self.speed.passes.rows(batch_size, rows.input_ids.shape[1]))
            return packed

    def _loss_inputs(self, model: Any, inputs: dict[str, Any]) -> tuple[LossInputs, Tensor]:
        """The policy's forward on one micro-batch, with TRL's names translated; and the entropies (B, T)."""
        logps, entropies, _ = self._get_per_token_logps_and_entropies(
            model, *whole_rows(inputs), compute_entropy=True, **multimodal(inputs)
        )
        advantages = inputs["advantages"]
        old_logps = inputs.get("old_per_token_logps")
        loss_inputs = LossInputs(
            logps=logps,
            old_logps=logps.detach() if old_logps is None else old_logps,
            advantages=advantages.unsqueeze(1) if advantages.dim() == 1 else advantages,
            mask=trained_tokens(inputs),
            ref_logps=inputs.get("ref_per_token_logps"),
            importance_sampling_ratio=inputs.get(SAMPLER_RATIO),
            sampling_logps=inputs.get("sampling_per_token_logps"),
        )
        return loss_inputs, entropies
