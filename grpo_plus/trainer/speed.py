"""What makes a run cheaper without changing it, decided once, when the trainer is built.

`packing` forwards rows without padding and a shared prompt once, `skip_zero_advantage` leaves out completions that
have no gradient, `skip_old_policy_pass` a forward that the update repeats. `logprob_backend` says what turns hidden
states into log-probabilities, `lora_backend` what computes a layer with an adapter, `generation_loop` what decodes,
`generation_chunk_size` how many rows at a time, and `max_tokens_per_pass` how many tokens an update sends through the
model at once.
"""

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from trl import GRPOTrainer

from grpo_plus.config import GRPOPlusConfig
from grpo_plus.config.determinism import fixes_choices
from grpo_plus.config.speed import (
    AUTO_CHUNKS,
    generates_in_batches,
    is_reentrant,
    switched_on,
    why_not_regroup,
    why_not_skip,
    why_not_skip_old_policy,
)
from grpo_plus.kernels.linear_logprob import BACKENDS, why_not_on
from grpo_plus.models.dropout import dropout_of
from grpo_plus.packing import (
    Head,
    JointPacker,
    Packer,
    SpreadPacker,
    base_model,
    single_pass_head,
    why_not_packed,
    why_not_single_pass,
)
from grpo_plus.packing.measure import Measure
from grpo_plus.qlora.adapter_products import Products
from grpo_plus.qlora.lora_layers import fits_any, fused_lora, has_lora, why_not_fused
from grpo_plus.rollout import ByRow, Rollouts, why_not_config, why_not_model
from grpo_plus.trainer.rollouts.generation import Chunks, rows_that_fit
from grpo_plus.trainer.update.long_rows import LongRows, long_rows_of
from grpo_plus.trainer.update.passes import Passes, passes_of
from grpo_plus.trainer.update.spread import (
    check_alike,
    gathered,
    spreads_weights,
    why_not_packed_when_spread,
    why_not_whole_weights,
)

MEASURED_ON = ("cuda",)  # kinds of device on which the fastest way depends on more than the kind


@dataclass(frozen=True)
class Speed:
    """The decisions about one run.

    Attributes:
        measure: finds the fastest way, on a GPU. None where the order of the ways is fixed.
        packer: forwards rows without padding and shared prompts once. None where TRL's forward does it.
        skips: completions with zero advantage stay out of the training forward.
        drops_old_policy_pass: the update's log-probabilities stand in for a forward of the old policy before it.
        fuses_lora: linear layers with plain adapters are computed without PEFT's buffers while training.
        keeps_prompts_together: the completions of a prompt meet in one micro-batch.
        rollouts: decodes each prompt once and lets finished rows leave. None where transformers' own loop decodes.
        chunks: how many rows transformers generates for at a time. None: the whole generation batch.
        long_rows: what lets the device hold longer rows.
        passes: how many tokens an update sends through the model at once.
        adapters: what fused layers keep while nothing about them can change. Empty outside of a training.
    """

    measure: Measure | None
    packer: Packer | None
    skips: bool
    drops_old_policy_pass: bool
    fuses_lora: bool
    keeps_prompts_together: bool
    rollouts: Rollouts | None
    chunks: Chunks | None
    long_rows: LongRows
    passes: Passes
    adapters: Products = field(default_factory=Products)

    @property
    def decisions(self) -> dict[str, Any]:
        """What all processes must have in common, in plain values."""
        return {
            "packing": None if self.packer is None else self.packer.packing,
            "logprob_backend": self.packer is not None and self.packer.head is not None,
            "skip_zero_advantage": self.skips,
            "skip_old_policy_pass": self.drops_old_policy_pass,
            "lora_backend": self.fuses_lora,
            "generation_loop": self.rollouts is not None,
            "max_tokens_per_pass": "auto" if self.passes.adapts else self.passes.tokens,
        }

    @property
    def reads_rows(self) -> bool:
        """Whether the host needs the tokens of a micro-batch, or which of its rows live."""
        return self.packer is not None or self.skips

    def live_rows(self, advantages: Tensor) -> Tensor | None:
        """(B,) booleans: rows that can have a gradient. None: all rows.

        Args:
            advantages: (B,) or (B, T).
        """
        return advantages.reshape(len(advantages), -1).ne(0).any(1) if self.skips else None

    def seeing(self, by_row: ByRow) -> AbstractContextManager[None]:
        """Generate for rows that may have images, which `by_row` sorts."""
        return nullcontext() if self.rollouts is None else self.rollouts.seeing(by_row)

    def agree(self) -> None:
        """Take up what other processes have found while they generated. All processes must call it."""
        if self.rollouts is not None:
            self.rollouts.join(gathered(self.rollouts.verdicts))

    @contextmanager
    def around_training(self, model: Any) -> Iterator[None]:
        """Train with the layers of `lora_backend`, and leave the model with its own attention and layers."""
        attention = nullcontext() if self.packer is None else self.packer.while_training()
        with attention, fused_lora(model, self.adapters) if self.fuses_lora else nullcontext():
            yield

    @contextmanager
    def around_update(self) -> Iterator[None]:
        """Compute forward and backward of one micro-batch, during which the adapters do not change."""
        with self.adapters.step(), self.long_rows.step():
            yield

    @contextmanager
    def around_forward(self, model: Any) -> Iterator[None]:
        """Compute log-probabilities, in an update or before it."""
        with self.adapters.forward(), self.long_rows.forward(model):
            yield


def speed_of(trainer: GRPOTrainer, config: GRPOPlusConfig) -> Speed:
    """What of the configuration is exact for this trainer and its model.

    Raises:
        ValueError: something that was asked for cannot be exact, or another process has decided differently.
    """
    skips = _skips(trainer, config)
    fuses_lora, adapters = _fuses_lora(trainer, config), Products()
    switched = adapters if fuses_lora and config.lora_backend == "auto" else None
    measure = Measure(switched) if _is_measured(trainer, config) else None
    packer = _packer(trainer, config, skips, measure)
    speed = Speed(
        measure=measure,
        packer=packer,
        skips=skips,
        drops_old_policy_pass=_drops_old_policy_pass(trainer, config),
        fuses_lora=fuses_lora,
        keeps_prompts_together=packer is not None and _keeps_prompts_together(trainer, config),
        rollouts=_rollouts(trainer, config),
        chunks=_chunks(trainer, config),
        long_rows=long_rows_of(trainer, config, _why_not_own_layers(trainer)),
        passes=passes_of(trainer, config, _why_not_passes(trainer)),
        adapters=adapters,
    )
    check_alike(speed.decisions)
    return speed


def _is_measured(trainer: GRPOTrainer, config: GRPOPlusConfig) -> bool:
    """Whether the run may take what is fastest. Processes must agree, and a deterministic run repeats itself."""
    if trainer.accelerator.device.type not in MEASURED_ON or trainer.accelerator.num_processes > 1:
        return False
    if config.packing == "none" or fixes_choices(config):
        return False
    return trainer.args.n_gpu <= 1 and not is_reentrant(config)


def _skips(trainer: GRPOTrainer, config: GRPOPlusConfig) -> bool:
    if config.skip_zero_advantage is False:
        return False
    reason = why_not_skip(config) or ("the model has a router loss" if trainer.aux_loss_enabled else None)
    return switched_on("skip_zero_advantage", config.skip_zero_advantage, reason or dropout_of(trainer.model))


def _drops_old_policy_pass(trainer: GRPOTrainer, config: GRPOPlusConfig) -> bool:
    if config.skip_old_policy_pass is False:
        return False
    reason = why_not_skip_old_policy(config) or dropout_of(trainer.model)
    return switched_on("skip_old_policy_pass", config.skip_old_policy_pass, reason)


def _keeps_prompts_together(trainer: GRPOTrainer, config: GRPOPlusConfig) -> bool:
    # Nothing is shared without padding alone, and a router loss looks at the whole micro-batch.
    if config.packing == "padding_free" or trainer.aux_loss_enabled:
        return False
    return why_not_regroup(config) is None


def _packer(trainer: GRPOTrainer, config: GRPOPlusConfig, skips: bool, measure: Measure | None) -> Packer | None:
    if config.packing == "none":
        return None
    reason, insists_on_head = _why_not_packed(trainer), config.logprob_backend in BACKENDS
    if reason is not None and config.packing != "auto":
        raise ValueError(f"packing={config.packing!r} is not possible: {reason}. Set packing='none'.")
    if reason is not None and insists_on_head:
        raise ValueError(
            f"logprob_backend={config.logprob_backend!r} is a part of the packed forward, but rows stay padded: "
            f"{reason}. Leave logprob_backend unset."
        )
    if reason is not None:
        warnings.warn(f"packing: none, rows stay padded. {reason}.", stacklevel=2)
        return None
    if insists_on_head:
        _check_head(trainer, config.logprob_backend)
    common: dict[str, Any] = {
        "gradient_check": not is_reentrant(config),
        "no_segments": _why_not_segments(config),
        "note": "skipping zero-advantage rows" if skips else None,
    }
    if spreads_weights(trainer):
        reference = trainer.ref_model and trainer.accelerator.unwrap_model(trainer.ref_model)
        return SpreadPacker(config.packing, gathered=gathered, reference=reference, **common)
    common |= {"head": _head(trainer, config, measured=measure is not None), "insist_on_head": insists_on_head}
    if trainer.accelerator.num_processes > 1:
        return JointPacker(config.packing, gathered=gathered, **common)
    return Packer(config.packing, measure=measure, **common)


def _why_not_packed(trainer: GRPOTrainer) -> str | None:
    if trainer.args.torch_compile:
        return "torch_compile would compile every length of a packed row anew"
    if spreads_weights(trainer) and (reason := why_not_packed_when_spread(trainer)):
        return reason
    return why_not_packed(trainer.accelerator.unwrap_model(trainer.model))


def _why_not_segments(config: GRPOPlusConfig) -> str | None:
    if config.use_transformers_continuous_batching or config.use_transformers_paged:
        return "transformers' continuous batching accepts no attention but its own"
    return None


def _head(trainer: GRPOTrainer, config: GRPOPlusConfig, *, measured: bool) -> Head | None:
    """The single-pass head where it is asked for, or where it is or may be found faster and no entropy is trained."""
    backend = config.logprob_backend
    if backend == "auto" and not config.entropy_coef and not config.use_adaptive_entropy:
        device = trainer.accelerator.device.type
        fastest = "torch" if device == "cpu" else "triton"
        backend = fastest if device == "cpu" or (measured and why_not_on("triton", device) is None) else "trl"
    return single_pass_head(backend, temperature=trainer.temperature) if backend in BACKENDS else None


def _check_head(trainer: GRPOTrainer, backend: str) -> None:
    reason = why_not_on(backend, trainer.accelerator.device.type) or why_not_whole_weights(trainer)
    if reason is not None:
        raise ValueError(f"logprob_backend={backend!r} cannot run here: {reason}. Leave logprob_backend unset.")
    reason = why_not_single_pass(base_model(trainer.accelerator.unwrap_model(trainer.model)))
    if reason is not None:
        raise ValueError(
            f"logprob_backend={backend!r} is for a frozen head, but {reason}. Train adapters (peft_config) that "
            "leave the head alone, or leave logprob_backend unset."
        )


def _fuses_lora(trainer: GRPOTrainer, config: GRPOPlusConfig) -> bool:
    if config.lora_backend == "peft":
        return False
    asked = config.lora_backend == "torch"
    if not asked and not has_lora(trainer.model):
        return False
    reasons = [reason] if (reason := _why_not_own_layers(trainer)) else why_not_fused(trainer.model)
    fits = reason is None and fits_any(trainer.model)
    if asked and not fits:
        raise ValueError(
            f"lora_backend='torch' is not possible: {'; '.join(reasons)}. Change that, or leave lora_backend unset."
        )
    if reasons:
        share = "some layers" if fits else "all layers"
        warnings.warn(f"lora_backend: PEFT's own forward in {share}. {'; '.join(reasons)}.", stacklevel=2)
    return fits


def _why_not_own_layers(trainer: GRPOTrainer) -> str | None:
    if reason := why_not_whole_weights(trainer):
        return reason
    if trainer.args.n_gpu > 1:
        return "torch's DataParallel copies the layers to other devices"
    return "torch_compile compiles PEFT's layers itself" if trainer.args.torch_compile else None


def _rollouts(trainer: GRPOTrainer, config: GRPOPlusConfig) -> Rollouts | None:
    if config.generation_loop == "trl" or trainer.rollout_func is not None or not generates_in_batches(config):
        return None
    insists = config.generation_loop == "grouped"
    reason = _why_not_grouped(trainer)
    if reason is None:
        return Rollouts(insists=insists, may_time=not fixes_choices(config))
    if insists:
        raise ValueError(
            f"generation_loop='grouped' is not possible: {reason}. Change that, or leave generation_loop unset."
        )
    warnings.warn(f"generation_loop: transformers' own loop. {reason}.", stacklevel=2)
    return None


def _why_not_grouped(trainer: GRPOTrainer) -> str | None:
    if reason := why_not_whole_weights(trainer):
        return reason
    if trainer.args.torch_compile:
        return "torch_compile would compile every number of live rows anew"
    model = trainer.accelerator.unwrap_model(trainer.model)
    return why_not_packed(model) or why_not_model(base_model(model)) or why_not_config(trainer.generation_config)


def _chunks(trainer: GRPOTrainer, config: GRPOPlusConfig) -> Chunks | None:
    size = config.generation_chunk_size
    if size != AUTO_CHUNKS:
        return None if size is None else Chunks(int(size))
    if why_not_whole_weights(trainer):
        raise ValueError(
            "generation_chunk_size='auto' lets every process generate in parts of its own, but FSDP or DeepSpeed "
            "spreads the weights, so that all must generate together. Set a number of rows."
        )
    return Chunks(None, lambda prompt_ids: rows_that_fit(trainer.model, config, prompt_ids))


def _why_not_passes(trainer: GRPOTrainer) -> str | None:
    """Reason why the rows of a micro-batch must go through the model together. None where no reason is known."""
    if trainer.aux_loss_enabled:
        return "the model has a router loss, which looks at the whole micro-batch"
    if trainer.args.n_gpu > 1:
        return "torch's DataParallel splits the micro-batch itself"
    return why_not_whole_weights(trainer) or _why_not_packed(trainer)
