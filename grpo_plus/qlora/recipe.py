"""Recipes: functions that return plain Hugging Face objects, to be inspected, changed and passed on.

recipe = qlora(r=16)
GRPOPlusTrainer(
    model="Qwen/Qwen3-4B",
    args=GRPOPlusConfig("out", **recipe.config),
    quantization_config=recipe.quantization_config,
    peft_config=recipe.peft_config,
    ...
)
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from grpo_plus.qlora.checks import require_bitsandbytes

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig

DTYPES = ("bfloat16", "float16")


@dataclass
class QLoRA:
    """What makes a run a QLoRA run.

    quantization_config: of the base, for the trainer's argument of the same name.
    peft_config:         of the adapters, likewise.
    config:              keyword arguments of GRPOPlusConfig.
    """

    quantization_config: "BitsAndBytesConfig"
    peft_config: "LoraConfig"
    config: dict[str, Any]


def qlora(
    r: int = 16,
    *,
    alpha: int | None = None,
    target_modules: str | list[str] = "all-linear",
    dtype: str = "bfloat16",
    double_quant: bool = True,
    optim: str = "adamw_8bit",
) -> QLoRA:
    """A 4-bit base (nf4) with LoRA on every linear layer.

    Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs" (https://huggingface.co/papers/2305.14314), with
    two changes for GRPO: no dropout, which would make the sampled and the trained policy differ, and adapters in
    float32, in which small steps are not rounded away. Unset, the weights that are not quantized, the computation and
    with them the cache of the generation are float32 in TRL: twice the memory.

    Args:
        r: rank of the adapters.
        alpha: their scale times r; None: 2 r.
        dtype: of computation and of the weights that stay unquantized; "float16" for cards before Ampere (T4, RTX 20).
        double_quant: quantize the scales too, which saves 0.37 bits per weight.
        optim: "adamw_8bit" keeps Adam's state in 8 bits; "adamw_torch_fused" is TRL's.

    Raises:
        ImportError: bitsandbytes is missing.
        ValueError: a rank below 1, or a dtype that 4-bit computation is slow in.
    """
    require_bitsandbytes("qlora()")
    import torch
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig

    if r < 1:
        raise ValueError(f"r={r} is no rank of an adapter. Use 8 to 64.")
    if dtype not in DTYPES:
        raise ValueError(
            f"dtype={dtype!r} is not one that 4-bit weights are computed in. Use 'bfloat16', or 'float16' on cards "
            "before Ampere."
        )
    half = dtype == "float16"
    return QLoRA(
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=double_quant,
            bnb_4bit_compute_dtype=getattr(torch, dtype),
        ),
        peft_config=LoraConfig(
            r=r,
            lora_alpha=alpha or 2 * r,
            lora_dropout=0.0,
            target_modules=target_modules,
            bias="none",
            task_type="CAUSAL_LM",
        ),
        config={
            "model_init_kwargs": {"dtype": dtype},
            "bf16": not half,
            "fp16": half,
            "optim": optim,
            "gradient_checkpointing": True,
            "adapter_dtype": "float32",
        },
    )


def qlora_flags() -> dict[str, Any]:
    """The same recipe in the flags of TRL's ModelConfig and of GRPOPlusConfig, for `grpo-plus train --qlora`."""
    return {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "use_bnb_nested_quant": True,
        "dtype": "bfloat16",
        "use_peft": True,
        "lora_r": 16,
        "lora_alpha": 32,
        "lora_dropout": 0.0,
        "lora_target_modules": ["all-linear"],
        "optim": "adamw_8bit",
        "gradient_checkpointing": True,
        "adapter_dtype": "float32",
    }
