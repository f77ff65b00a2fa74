"""Plan a run whose model is loaded: its shape and settings, read off the model and the configuration."""

from dataclasses import fields
from typing import Any

import torch

from grpo_plus.models.adapters import adapter_parameters, bits_of, has_adapters
from grpo_plus.planner import ModelShape, Run, shape_of

PROMPT_LENGTH = Run.prompt_length


def shape_and_run(model: Any, args: Any, prompt_length: int = PROMPT_LENGTH) -> tuple[ModelShape, Run]:
    """Get the arguments of `plan` for this model under this configuration, on one GPU.

    Args:
        args: the trainer's configuration, TRL's or ours.
        prompt_length: tokens of the longest prompt.

    Raises:
        ValueError: the planner does not know the architecture or a setting; the message says which.
    """
    if bits_of(model) == 8:
        raise ValueError("the planner does not know a base in 8 bits")
    config = model.config
    return shape_of(config.to_dict(), name=config.name_or_path or config.model_type), _run(model, args, prompt_length)


def _run(model: Any, args: Any, prompt_length: int) -> Run:
    theirs = {entry.name: getattr(args, entry.name) for entry in fields(Run) if hasattr(args, entry.name)}
    quantization = getattr(model.config, "quantization_config", None)
    settings = theirs | {
        "prompt_length": prompt_length,
        "packing": getattr(args, "packing", "none"),
        # "auto" generates for fewer rows where they do not fit, down to one.
        "generation_chunk_size": 1 if isinstance(size := theirs.get("generation_chunk_size"), str) else size,
        "optim": str(getattr(args.optim, "value", args.optim)),
        "dtype": _name(model.get_input_embeddings().weight.dtype),
        "load_in_4bit": bits_of(model) == 4,
        "use_bnb_nested_quant": bool(getattr(quantization, "bnb_4bit_use_double_quant", False)),
        "adapter_dtype": None,
    }
    if has_adapters(model):
        adapter = model.peft_config[model.active_adapters[0]]
        if not hasattr(adapter, "r"):
            raise ValueError(f"the planner does not know {adapter.peft_type.value} adapters")
        dtypes = [weight.dtype for _, weight in adapter_parameters(model)]
        settings |= {
            "lora_r": adapter.r,
            "lora_dropout": getattr(adapter, "lora_dropout", 0.0),
            "adapter_dtype": _name(dtypes[0]) if dtypes else None,
        }
    return Run(**settings)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
