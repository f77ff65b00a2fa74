"""Which settings of a run rule tokens out at sampling, and which of them log-probabilities can be corrected for."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from grpo_plus.registry import suggestion

if TYPE_CHECKING:
    from grpo_plus.config.fields import GRPOPlusConfig

TRUNCATED_SAMPLING = ("correct",)
# What rules tokens out, with the values at which it rules out none. None always is one.
RULES_OUT: dict[str, tuple[Any, ...]] = {
    "top_p": (1.0,),
    "top_k": (0, -1),
    "top_h": (),
    "min_p": (0.0,),
    "typical_p": (1.0,),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "bad_words_ids": ([],),
    "no_repeat_ngram_size": (0,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
}
# What changes the odds between the tokens that are left, or draws otherwise, with the values at which it does not.
MOVES: dict[str, tuple[Any, ...]] = {
    "repetition_penalty": (1.0,),
    "encoder_repetition_penalty": (1.0,),
    "exponential_decay_length_penalty": (),
    "guidance_scale": (1.0,),
    "sequence_bias": ({},),
    "watermarking_config": (),
    "do_sample": (True,),
    "num_beams": (1,),
}


def truncates(config: Any, of_model: Any = None) -> list[str]:
    """The settings that rule tokens out, as `name=value`.

    Args:
        of_model: the model's own generation config, which holds for what the run leaves unset.
    """
    return _active(config, RULES_OUT, of_model)


def check_truncated_sampling(config: "GRPOPlusConfig") -> None:
    """Refuse an unknown correction, and a sampler whose distribution the correction does not give."""
    value = config.truncated_sampling
    if value is None:
        return
    if value not in TRUNCATED_SAMPLING:
        raise ValueError(f"Unknown truncated_sampling {value!r}.{suggestion(str(value), TRUNCATED_SAMPLING)}")
    if reason := why_not_correct(config):
        raise ValueError(
            f"truncated_sampling={value!r} is not possible: {reason}. Change that, or leave truncated_sampling unset."
        )


def check_vllm(config: "GRPOPlusConfig") -> None:
    """Refuse a way to send vLLM the adapters where there is no vLLM."""
    if not isinstance(config.vllm_lora_sync, bool):
        raise ValueError(f"vllm_lora_sync={config.vllm_lora_sync!r} must be True or False.")
    if config.vllm_lora_sync and not config.use_vllm:
        raise ValueError("vllm_lora_sync=True has no effect without vLLM. Set use_vllm=True, or drop vllm_lora_sync.")


def why_not_correct(config: Any) -> str | None:
    """Reason why log-probabilities cannot be corrected for the sampler's settings. None where they can."""
    if config.use_vllm:
        return "use_vllm=True, and vLLM does not say which tokens it could draw"
    if config.use_transformers_continuous_batching or config.use_transformers_paged:
        return "transformers' continuous batching does not say which tokens it could draw"
    if moving := _active(config, MOVES | {"temperature": (config.temperature,)}):
        return f"{', '.join(moving)} changes the odds between the tokens that are left, and the policy does not know it"
    if config.cast_lm_head_to_fp32:
        return "the correction does not know the head that cast_lm_head_to_fp32=True makes"
    return "torch_compile=True compiles the forward that it replaces" if config.torch_compile else None


def _active(config: Any, neutral: Mapping[str, tuple[Any, ...]], of_model: Any = None) -> list[str]:
    extra = config.generation_kwargs if isinstance(config.generation_kwargs, dict) else {}
    given = {name: extra.get(name, getattr(config, name, None)) for name in neutral}
    given |= {name: getattr(of_model, name, None) for name, value in given.items() if value is None}
    return [f"{name}={value!r}" for name, value in given.items() if value is not None and value not in neutral[name]]
