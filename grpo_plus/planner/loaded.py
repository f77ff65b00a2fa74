"""Plan a run whose model is loaded: its shape and settings, read off the model and the configuration."""

import json
from dataclasses import fields, replace
from functools import lru_cache
from typing import Any

import torch

from grpo_plus.models.adapters import adapter_parameters, bits_of, has_adapters
from grpo_plus.planner import ModelShape, Run, shape_of
from grpo_plus.planner.shapes import Counted

PROMPT_LENGTH = Run.prompt_length


def shape_and_run(model: Any, args: Any, prompt_length: int = PROMPT_LENGTH) -> tuple[ModelShape, Run]:
    """Get the arguments of `plan` for this model under this configuration, on one GPU.

    Args:
        args: the trainer's configuration, TRL's or ours.
        prompt_length: tokens of the longest prompt.

    Raises:
        ValueError: the planner does not know the architecture or a setting; the message says which.
    """
    config = model.config
    # Without the quantization that it may have been saved with: what the model holds is counted.
    plain = {key: value for key, value in config.to_dict().items() if key != "quantization_config"}
    shape = _shape(json.dumps(plain, default=str, sort_keys=True), config.name_or_path or config.model_type)
    run = _run(model, args, prompt_length)
    return replace(shape, counted=_counted(model, run)), run


@lru_cache(maxsize=8)
def _shape(config: str, name: str) -> ModelShape:
    """Shape of a config in JSON, remembered: generation asks before each batch, and building a model takes seconds."""
    return shape_of(json.loads(config), name=name)


def _counted(model: Any, run: Run) -> Counted:
    weights = list(model.parameters())
    trained = [weight for weight in weights if weight.requires_grad]
    head = model.get_output_embeddings()
    settings = ("dtype", "load_in_4bit", "load_in_8bit", "use_bnb_nested_quant", "lora_r", "adapter_dtype")
    return Counted(
        settings=tuple((name, getattr(run, name)) for name in settings),
        frozen_bytes=sum(_bytes(weight) for weight in weights if not weight.requires_grad),
        trained=sum(weight.numel() for weight in trained),
        trained_bytes=sum(_bytes(weight) for weight in trained),
        head_trains=head is not None and any(weight.requires_grad for weight in head.parameters()),
    )


def _bytes(weight: Any) -> int:
    """Bytes of a weight. A quantized one has scales, which are tensors of their own."""
    scales = [getattr(weight, "SCB", None)]
    state = getattr(weight, "quant_state", None)
    while state is not None:
        scales += [state.absmax, state.code, getattr(state, "offset", None)]
        state = getattr(state, "state2", None)
    return sum(part.numel() * part.element_size() for part in (weight, *scales) if isinstance(part, torch.Tensor))


def _run(model: Any, args: Any, prompt_length: int) -> Run:
    theirs = {entry.name: getattr(args, entry.name) for entry in fields(Run) if hasattr(args, entry.name)}
    quantization = getattr(model.config, "quantization_config", None)
    settings = theirs | {
        "prompt_length": prompt_length,
        "packing": getattr(args, "packing", "none"),
        "max_tokens_per_pass": getattr(args, "max_tokens_per_pass", None),
        "cache_bits": _cache_bits(getattr(args, "generation_kwargs", None)),
        "optim": str(getattr(args.optim, "value", args.optim)),
        "dtype": _name(model.get_input_embeddings().weight.dtype),
        "load_in_4bit": bits_of(model) == 4,
        "load_in_8bit": bits_of(model) == 8,
        "use_bnb_nested_quant": bool(getattr(quantization, "bnb_4bit_use_double_quant", False)),
        "adapter_dtype": None,
    }
    if has_adapters(model):
        adapter = model.peft_config[model.active_adapters[0]]
        rank = getattr(adapter, "r", None)
        dtypes = [weight.dtype for name, weight in adapter_parameters(model) if ".modules_to_save." not in name]
        settings |= {
            # Of other adapters than LoRA only the weights are known, which are counted.
            "lora_r": rank if isinstance(rank, int) and rank > 0 else 1,
            "lora_dropout": getattr(adapter, "lora_dropout", 0.0),
            "adapter_dtype": _name(dtypes[0]) if dtypes else None,
        }
    return Run(**settings)


def _cache_bits(generation_kwargs: Any) -> int | None:
    if not isinstance(generation_kwargs, dict) or generation_kwargs.get("cache_implementation") != "quantized":
        return None
    settings = generation_kwargs.get("cache_config") or {}
    return 8 if settings.get("backend") == "fp8" else settings.get("nbits", 4)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
