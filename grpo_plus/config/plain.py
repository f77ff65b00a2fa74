"""A plain GRPOConfig seen as a GRPOPlusConfig: every field of ours says "as TRL"."""

from typing import Any, cast

from trl import GRPOConfig

from grpo_plus.config.fields import GRPOPlusConfig

# What each field of ours has to be for a run that is TRL's to the last bit. The guard of a run without a NaN is.
OFF: dict[str, Any] = {
    "advantage_estimator": None,
    "advantage_kwargs": {},
    "advantage_modifiers": {},
    "deterministic": False,
    "max_nonfinite_steps": 5,
    "max_refills": 0,
    "prompt_sampler": None,
    "refill_buffer": 0,
    "task_column": None,
    "reward_weight_schedule": {},
    "demonstration_column": None,
    "demonstration_loss": None,
    "reward_timeout": None,
    "overlap_rewards": None,
    "health_warnings": True,
    "eval_pass_at_k": None,
    "eval_pass_reward": None,
    "eval_pass_threshold": 1.0,
    "loss_kwargs": {},
    "loss_reduction": None,
    "kl_estimator": "k3",
    "kl_target": None,
    "kl_horizon": 10_000,
    "packing": "none",
    "skip_zero_advantage": False,
    "skip_old_policy_pass": False,
    "vllm_lora_sync": False,
    "logprob_backend": "trl",
    "lora_backend": "peft",
    "generation_loop": "trl",
    "generation_chunk_size": None,
    "truncated_sampling": None,
    "offload_activations": False,
    "max_tokens_per_pass": None,
    "mlp_tile_tokens": None,
    "adapter_dtype": None,
}


class _AllOff:
    """Reads our fields from OFF and TRL's from the configuration, as they are at that moment."""

    def __init__(self, config: GRPOConfig) -> None:
        self._config = config

    def __getattr__(self, name: str) -> Any:
        return OFF[name] if name in OFF else getattr(self._config, name)


def own_fields(config: GRPOConfig) -> GRPOPlusConfig:
    """The configuration with our fields: itself where it has them, else a view in which they switch everything off."""
    return config if isinstance(config, GRPOPlusConfig) else cast("GRPOPlusConfig", _AllOff(config))
