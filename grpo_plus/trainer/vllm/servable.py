"""What vLLM can serve of a model with adapters, and refuse the rest before an engine starts.

vLLM reads the two matrices of each adapted linear layer, and of the configuration `r`, `lora_alpha` and `use_rslora`.
It ignores, or misreads, what else PEFT can express, and completions would come from another policy without a word.
"""

from dataclasses import fields
from typing import Any

from grpo_plus.models.adapters import adapter_parameters, bits_of, changed_by_init, has_adapters
from grpo_plus.qlora.checks import saved_quantization

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM takes as max_lora_rank

# What vLLM reads, what says which layers have an adapter, how it starts and what it is dropped with in training.
SERVED = {
    *("r", "lora_alpha", "use_rslora", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("lora_dropout", "init_lora_weights", "eva_config", "corda_config", "loftq_config", "lora_ga_config"),
    *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "runtime_config", "megatron_core", "qalora_group_size", "ensure_weight_tying"),
}
REASONS = {
    "rank_pattern": "vLLM scales every layer's adapter by one lora_alpha / r",
    "alpha_pattern": "vLLM scales every layer's adapter by one lora_alpha / r",
    "modules_to_save": "vLLM would keep its own weights for modules that are trained whole",
    "trainable_token_indices": "vLLM would keep its own embeddings for tokens that are trained",
    "use_dora": "vLLM has no place for DoRA's magnitudes",
    "bias": "vLLM has no place for an adapter's biases",
    "lora_bias": "vLLM has no place for an adapter's biases",
}


def served_rank(model: Any) -> int:
    """The least of vLLM's ranks that holds the adapter."""
    (active,) = model.active_adapters
    return next(rank for rank in RANKS if rank >= model.peft_config[active].r)


def check_servable(model: Any, backend: Any) -> None:
    """Refuse a model whose policy is not what vLLM makes of its base and its adapter's files.

    Args:
        backend: TRL's DistributedBackend, which knows where the weights are.

    Raises:
        ValueError: names what vLLM cannot serve, and the way out.
    """
    reason = _why_not_adapters(model) or _why_not_config(model) or _why_not_weights(model) or _why_not_base(model)
    if reason is None and (backend.is_zero3 or backend.fsdp_version == 1):
        reason = "DeepSpeed ZeRO-3 or FSDP1 spreads the adapter over the processes, and only FSDP2's is gathered"
    if reason is not None:
        otherwise = "set use_vllm=False" if bits_of(model) else "leave it unset: TRL then sends merged weights"
        raise ValueError(f"vllm_lora_sync=True is not possible: {reason}. Change that, or {otherwise}.")


def _why_not_adapters(model: Any) -> str | None:
    if not has_adapters(model):
        return "the model has no adapters (pass peft_config=LoraConfig(...))"
    if len(model.active_adapters) != 1:
        return f"vLLM serves one adapter at a time, and {', '.join(model.active_adapters)} are active"
    config = model.peft_config[model.active_adapters[0]]
    if config.peft_type != "LORA":
        return f"vLLM serves LoRA, and the adapter is {type(config).__name__}'s"
    return None


def _why_not_config(model: Any) -> str | None:
    config = model.peft_config[model.active_adapters[0]]
    if init := changed_by_init(config):
        return f"init_lora_weights={init!r} has changed the base, and vLLM loads the base as it was"
    if config.r > RANKS[-1]:
        return f"r={config.r} is above {RANKS[-1]}, vLLM's largest rank"
    plain = type(config)()
    for name in (field.name for field in fields(config) if field.name not in SERVED):
        value = getattr(config, name)
        if value != getattr(plain, name):
            return f"{name}={value!r} of the LoRA configuration: {REASONS.get(name, 'vLLM does not know it')}"
    return None


def _why_not_weights(model: Any) -> str | None:
    """Find a trained weight that is no matrix of an adapter on a linear layer of the language model."""
    inside = {id(weight) for weight in model.get_base_model().get_decoder().parameters()}
    for name, weight in adapter_parameters(model):
        if not (".lora_A." in name or ".lora_B." in name) or weight.dim() != 2:
            return f"{name} is trained and is no adapter of a linear layer"
        if id(weight) not in inside:
            return f"{name} is an adapter outside of the language model, where vLLM leaves adapters out"
    return None


def _why_not_base(model: Any) -> str | None:
    """Find a 4-bit base that vLLM, which quantizes as it loads, would not make of the same weights."""
    if bits_of(model) is None or saved_quantization(model.name_or_path, None) is not None:
        return None
    quantization = model.config.quantization_config
    if quantization.bnb_4bit_quant_type == "nf4" and quantization.bnb_4bit_use_double_quant:
        return None
    return (
        f"bnb_4bit_quant_type={quantization.bnb_4bit_quant_type!r} with "
        f"bnb_4bit_use_double_quant={quantization.bnb_4bit_use_double_quant}, and vLLM quantizes to nf4 with double "
        "quantization as it loads"
    )
