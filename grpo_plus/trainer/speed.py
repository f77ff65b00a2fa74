"""What goes through the model and how: the hooks of the seam that make an update cheaper without changing it.

`packing` forwards rows without padding and a shared prompt once, `skip_zero_advantage` leaves out completions that
have no gradient, `skip_old_policy_pass` a forward that the update repeats, `logprob_backend` says what turns hidden
states into log-probabilities, `lora_backend` what computes a layer with an adapter.
"""

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from functools import cached_property
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from grpo_plus.config import GRPOPlusConfig
from grpo_plus.config.speed import switched_on, why_not_regroup, why_not_skip, why_not_skip_old_policy
from grpo_plus.kernels.linear_logprob import BACKENDS, why_not_on
from grpo_plus.models.dropout import dropout_of
from grpo_plus.packing import (
    Head,
    Packed,
    Packer,
    PaddedRows,
    base_model,
    single_pass_head,
    why_not_packed,
    why_not_single_pass,
)
from grpo_plus.qlora.lora_layers import fits_any, fused_lora, has_lora, why_not_fused
from grpo_plus.trainer.seam import TRLSeam


class SpeedUps(TRLSeam):
    """TRL's trainer with the speed-ups that the configuration leaves on and that are exact on the model."""

    @cached_property
    def plus(self) -> GRPOPlusConfig | None:
        """`args` where they are ours; None for a plain GRPOConfig."""
        return self.args if isinstance(self.args, GRPOPlusConfig) else None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # They raise where something was asked for that cannot be exact.
        _ = self.packer, self.skips, self.drops_old_policy_pass, self.fuses_lora

    @cached_property
    def packer(self) -> Packer | None:
        """What forwards the rows without padding and shared prompts once; None where TRL's forward does it."""
        if self.plus is None or self.plus.packing == "none":
            return None
        reason = self._why_not_packed()
        if reason is not None and self.plus.packing != "auto":
            raise ValueError(f"packing={self.plus.packing!r} is not possible: {reason}. Set packing='none'.")
        if reason is not None and self.plus.logprob_backend in BACKENDS:
            raise ValueError(
                f"logprob_backend={self.plus.logprob_backend!r} is a part of the packed forward, but rows stay padded: "
                f"{reason}. Leave logprob_backend unset."
            )
        if reason is not None:
            warnings.warn(f"packing: none, rows stay padded. {reason}.", stacklevel=2)
            return None
        if self.plus.logprob_backend in BACKENDS:
            self._check_head(self.plus.logprob_backend)
        reentrant = (self.args.gradient_checkpointing_kwargs or {}).get("use_reentrant", False)
        return Packer(
            self.plus.packing,
            head=self._head(),
            insist_on_head=self.plus.logprob_backend in BACKENDS,
            gradient_check=not (self.args.gradient_checkpointing and reentrant),
            no_segments=self._why_not_segments(),
            note="skipping zero-advantage rows" if self.skips else None,
        )

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train, and leave the model with the attention and the layers that it came with."""
        try:
            with fused_lora(self.model) if self.fuses_lora else nullcontext():
                return super().train(*args, **kwargs)
        finally:
            if self.packer is not None:
                self.packer.release()

    def _why_not_segments(self) -> str | None:
        if self.args.use_transformers_continuous_batching or self.args.use_transformers_paged:
            return "transformers' continuous batching accepts no attention but its own"
        return None

    @cached_property
    def fuses_lora(self) -> bool:
        """Whether linear layers with plain adapters are computed without PEFT's buffers while training."""
        if self.plus is None or self.plus.lora_backend == "peft":
            return False
        asked = self.plus.lora_backend == "torch"
        if not asked and not has_lora(self.model):
            return False
        reasons = [reason] if (reason := self._why_not_own_layers()) else why_not_fused(self.model)
        fits = reason is None and fits_any(self.model)
        if asked and not fits:
            raise ValueError(
                f"lora_backend='torch' is not possible: {'; '.join(reasons)}. Change that, or leave lora_backend unset."
            )
        if reasons:
            share = "some layers" if fits else "all layers"
            warnings.warn(f"lora_backend: PEFT's own forward in {share}. {'; '.join(reasons)}.", stacklevel=2)
        return fits

    def _why_not_own_layers(self) -> str | None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return "the weights are spread over the processes by FSDP or DeepSpeed"
        return "torch_compile compiles PEFT's layers itself" if self.args.torch_compile else None

    def _why_not_packed(self) -> str | None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return "the weights are spread over the processes by FSDP or DeepSpeed, where packing is not tested"
        if self.args.torch_compile:
            return "torch_compile would compile every length of a packed row anew"
        return why_not_packed(self.accelerator.unwrap_model(self.model))

    def _head(self) -> Head | None:
        """The single-pass head where it is asked for, or where it is known to be faster and no entropy is trained."""
        backend = self.plus.logprob_backend if self.plus is not None else "trl"
        if backend == "auto" and not self.args.entropy_coef and not self.args.use_adaptive_entropy:
            backend = "torch" if self.accelerator.device.type == "cpu" else "trl"
        return single_pass_head(backend, temperature=self.temperature) if backend in BACKENDS else None

    def _check_head(self, backend: str) -> None:
        reason = why_not_on(backend, self.accelerator.device.type)
        if reason is not None:
            raise ValueError(f"logprob_backend={backend!r} cannot run here: {reason}. Leave logprob_backend unset.")
        reason = why_not_single_pass(base_model(self.accelerator.unwrap_model(self.model)))
        if reason is not None:
            raise ValueError(
                f"logprob_backend={backend!r} is for a frozen head, but {reason}. Train adapters (peft_config) that "
                "leave the head alone, or leave logprob_backend unset."
            )

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
        if self.plus is None:
            return False
        reason = why_not_skip(self.plus) or ("the model has a router loss" if self.aux_loss_enabled else None)
        return switched_on("skip_zero_advantage", self.plus.skip_zero_advantage, reason or dropout_of(self.model))

    @cached_property
    def drops_old_policy_pass(self) -> bool:
        """Whether the update forwards the rows as the policy that generated them would have."""
        if self.plus is None:
            return False
        reason = why_not_skip_old_policy(self.plus) or dropout_of(self.model)
        return switched_on("skip_old_policy_pass", self.plus.skip_old_policy_pass, reason)

    def live_rows(self, advantages: Tensor) -> Tensor | None:
        """(B,) booleans: rows with an advantage other than 0, where the others have no gradient."""
        return advantages.reshape(len(advantages), -1).ne(0).any(1) if self.skips else None

    def keeps_prompts_together(self) -> bool:
        """Whether a shared prompt needs its completions in one micro-batch."""
        if self.plus is None or self.packer is None or self.plus.packing == "padding_free":
            return False
        if self.aux_loss_enabled:  # a router loss looks at the whole micro-batch
            return False
        return why_not_regroup(self.plus) is None
