"""When a speed-up is exact: which settings of a run it can be combined with."""

from typing import TYPE_CHECKING, Any

from grpo_plus.config.kl import beta_of_loss, in_reward
from grpo_plus.kernels.linear_logprob import BACKENDS as SINGLE_PASS
from grpo_plus.kernels.linear_logprob import why_not_on
from grpo_plus.losses import LOSSES
from grpo_plus.models.adapters import ADAPTER_DTYPES
from grpo_plus.packing import PACKING
from grpo_plus.registry import suggestion

if TYPE_CHECKING:
    from grpo_plus.config.fields import GRPOPlusConfig

BACKENDS = ("auto", "trl", *SINGLE_PASS)
AUTO_CHUNKS = AUTO_PASSES = AUTO_TILES = "auto"
LEAST_TILE = 16  # tokens; far fewer than pay, and never one, which looks like a step of generation
LORA_BACKENDS = ("auto", "peft", "torch")
GENERATION_LOOPS = ("auto", "grouped", "trl")


def check_speed(config: "GRPOPlusConfig") -> None:
    """Refuse an unknown form, and an explicit request for a speed-up that would change the gradients."""
    for name, known in (
        ("packing", PACKING),
        ("logprob_backend", BACKENDS),
        ("lora_backend", LORA_BACKENDS),
        ("generation_loop", GENERATION_LOOPS),
    ):
        value = getattr(config, name)
        if value not in known:
            raise ValueError(f"Unknown {name} {value!r}.{suggestion(str(value), known)}")
    if config.logprob_backend in SINGLE_PASS:
        _check_single_pass(config)
    _check_chunks(config)
    _check_loop(config)
    _check_offload(config)
    _check_passes(config)
    _check_tiles(config)
    switched_on("skip_zero_advantage", config.skip_zero_advantage, why_not_skip(config))
    switched_on("skip_old_policy_pass", config.skip_old_policy_pass, why_not_skip_old_policy(config))


def check_adapter_dtype(config: "GRPOPlusConfig") -> None:
    """Refuse an unknown dtype, and bfloat16 in a float16 run, whose scaler takes no such gradients."""
    if config.adapter_dtype is not None and config.adapter_dtype not in ADAPTER_DTYPES:
        raise ValueError(
            f"Unknown adapter_dtype {config.adapter_dtype!r}.{suggestion(str(config.adapter_dtype), ADAPTER_DTYPES)}"
        )
    if config.adapter_dtype == "bfloat16" and config.fp16:
        raise ValueError(
            "adapter_dtype='bfloat16' with fp16=True: the scaler of float16 training cannot unscale gradients in "
            "bfloat16. Set adapter_dtype='float32'."
        )


def check_liger(config: Any) -> None:
    """Refuse Liger's kernels without a GPU: the run would die in step 0 and leave classes of transformers replaced.

    Args:
        config: the arguments of a trainer; None where it makes its own.
    """
    if config is None or not config.use_liger_kernel or config.device.type != "cpu":
        return
    if (reason := why_not_on("triton", "cpu")) is not None:
        raise ValueError(
            f"use_liger_kernel=True, but the run is on the CPU and Liger's kernels are written in Triton ({reason}). "
            "Set use_liger_kernel=False."
        )


def switched_on(name: str, wanted: bool | None, reason: str | None) -> bool:
    """Whether a speed-up acts: where it is exact, and not where it is switched off.

    Args:
        wanted: the field `name` of the configuration; None: wherever it is exact.
        reason: why it is not exact; None where it is.
    """
    if wanted and reason is not None:
        raise ValueError(
            f"{name}=True is not possible: {reason}. Change that, or leave {name} unset, which skips whenever it is "
            "exact."
        )
    return wanted is not False and reason is None


def _check_chunks(config: "GRPOPlusConfig") -> None:
    size = config.generation_chunk_size
    if size is None:
        return
    if isinstance(size, str) and size.isdecimal():  # as the command line gives it
        config.generation_chunk_size = size = int(size)
    if size != AUTO_CHUNKS and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
        raise ValueError(
            f"generation_chunk_size={size!r} must be a whole number of rows, 1 or more, {AUTO_CHUNKS!r} or unset."
        )
    if not generates_in_batches(config):
        raise ValueError(
            f"generation_chunk_size={size} is for transformers' plain generation; vLLM and continuous batching size "
            "their batches themselves. Leave it unset."
        )


def _check_loop(config: "GRPOPlusConfig") -> None:
    if config.generation_loop == "grouped" and not generates_in_batches(config):
        raise ValueError(
            "generation_loop='grouped' is for transformers' plain generation, but vLLM or continuous batching is on. "
            "Leave generation_loop unset."
        )


def generates_in_batches(config: Any) -> bool:
    """Whether transformers' plain `generate` makes the completions, by the configuration."""
    return not (config.use_vllm or config.use_transformers_continuous_batching or config.use_transformers_paged)


def _check_offload(config: "GRPOPlusConfig") -> None:
    if not isinstance(config.offload_activations, bool):
        raise ValueError(f"offload_activations={config.offload_activations!r} must be True or False.")
    if config.offload_activations and not config.gradient_checkpointing:
        raise ValueError(
            "offload_activations=True moves the inputs of checkpointed layers, but gradient_checkpointing=False. Set "
            "gradient_checkpointing=True, or leave offload_activations unset."
        )


def _check_passes(config: "GRPOPlusConfig") -> None:
    size = config.max_tokens_per_pass
    if isinstance(size, str) and size.isdecimal():  # as the command line gives it
        config.max_tokens_per_pass = size = int(size)
    if isinstance(size, str) and size.lower() == "none":
        config.max_tokens_per_pass = size = None
    if size not in (None, AUTO_PASSES) and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
        raise ValueError(
            f"max_tokens_per_pass={size!r} must be a whole number of tokens, 1 or more, {AUTO_PASSES!r} or None."
        )


def _check_tiles(config: "GRPOPlusConfig") -> None:
    tokens = config.mlp_tile_tokens
    if isinstance(tokens, str) and tokens.isdecimal():  # as the command line gives it
        config.mlp_tile_tokens = tokens = int(tokens)
    if tokens == 0 and not isinstance(tokens, bool):  # None, for the command line
        config.mlp_tile_tokens = tokens = None
    if tokens in (None, AUTO_TILES):
        return
    if not isinstance(tokens, int) or isinstance(tokens, bool) or tokens < LEAST_TILE:
        raise ValueError(
            f"mlp_tile_tokens={tokens!r} must be a whole number of tokens, {LEAST_TILE} or more, {AUTO_TILES!r}, or "
            "None (0) for all at once."
        )


def is_reentrant(config: "GRPOPlusConfig") -> bool:
    """Whether gradient checkpointing runs whole layers anew. Autograd gives no single gradients through such layers."""
    arguments = config.gradient_checkpointing_kwargs or {}
    return config.gradient_checkpointing and bool(arguments.get("use_reentrant", False))


def _check_single_pass(config: "GRPOPlusConfig") -> None:
    if config.packing == "none":
        raise ValueError(
            f"logprob_backend={config.logprob_backend!r} is a part of the packed forward, but packing='none'. Set "
            "packing='auto', or leave logprob_backend unset."
        )
    if config.cast_lm_head_to_fp32:
        raise ValueError(
            f"logprob_backend={config.logprob_backend!r} does not know the head that cast_lm_head_to_fp32=True makes. "
            "Leave logprob_backend unset."
        )
    if config.entropy_coef != 0.0 or config.use_adaptive_entropy:
        raise ValueError(
            f"logprob_backend={config.logprob_backend!r} gives no gradient of the entropy, but entropy_coef="
            f"{config.entropy_coef} trains it. Leave logprob_backend unset."
        )


def why_not_skip(config: "GRPOPlusConfig") -> str | None:
    """Why a completion with zero advantage still has a gradient; None where it has none."""
    if beta_of_loss(config) != 0.0:
        return f"with beta={config.beta} every completion has a KL gradient"
    reason = _why_not_rows_alone(config)
    if reason is not None:
        return reason
    loss = LOSSES[config.loss_type]
    if not loss.zero_without_advantage or loss.scope != "row":
        return f"under loss_type={loss.name!r} a completion with zero advantage takes part in the update"
    return None


def why_not_skip_old_policy(config: "GRPOPlusConfig") -> str | None:
    """Why a forward of the old policy cannot be left to the update; None where both compute the same."""
    if config.refill_buffer:
        return f"refill_buffer={config.refill_buffer} keeps the log-probabilities of the policy that sampled"
    if not (config.use_vllm and config.vllm_importance_sampling_correction):
        return "TRL makes that pass for vLLM's importance sampling correction, which is off"
    if in_reward(config):
        return "kl_in_reward needs the old policy's log-probabilities before the update"
    steps = config.steps_per_generation * config.num_iterations
    if config.gradient_accumulation_steps % steps:
        return (
            f"steps_per_generation * num_iterations = {steps} does not divide gradient_accumulation_steps="
            f"{config.gradient_accumulation_steps}, so that a generation batch outlives the policy that it came from"
        )
    return None


def why_not_regroup(config: "GRPOPlusConfig") -> str | None:
    """Why the update depends on which rows meet in a micro-batch; None where only rounding does."""
    reason = _why_not_rows_alone(config)
    if reason is not None:
        return reason
    loss = LOSSES[config.loss_type]
    if loss.scope != "row":
        return f"loss_type={loss.name!r} looks at the whole micro-batch"
    if loss.origin == "trl":
        if loss.name == "bnpo" and beta_of_loss(config) != 0.0:
            return f"loss_type='bnpo' with beta={config.beta} divides by the tokens of the micro-batch"
    elif (config.loss_reduction or loss.reduction) == "token-mean":
        return f"loss_type={loss.name!r} divides by the tokens of the micro-batch"
    return None


def _why_not_rows_alone(config: "GRPOPlusConfig") -> str | None:
    if config.entropy_coef != 0.0 or config.use_adaptive_entropy:
        return "the entropy bonus is a mean over the micro-batch"
    if config.top_entropy_quantile < 1.0:
        return f"top_entropy_quantile={config.top_entropy_quantile} compares the tokens of a micro-batch"
    return None
