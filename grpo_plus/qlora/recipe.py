"""Recipes as plain Hugging Face objects: inspect them, change them, pass them on.

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

from transformers import BitsAndBytesConfig

from grpo_plus.qlora.checks import require_bitsandbytes

if TYPE_CHECKING:
    from peft import LoraConfig

DTYPES = ("bfloat16", "float16")
# Fields of GRPOPlusConfig that nobody changes in this recipe.
FIXED: dict[str, Any] = {"gradient_checkpointing": True, "adapter_dtype": "float32"}


@dataclass
class QLoRA:
    """What makes a run a QLoRA run.

    Attributes:
        quantization_config: how the base is quantized, for the trainer's argument of the same name.
        peft_config: the adapters, for the trainer's argument of the same name.
        config: keyword arguments of GRPOPlusConfig.
    """

    quantization_config: BitsAndBytesConfig
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
    two changes for GRPO. There is no dropout, because dropout makes the sampled policy and the trained policy differ.
    The adapters are float32, so that small steps are not rounded away.

    The recipe sets `dtype` because TRL's default is float32. That default holds for the weights that are not quantized
    and for the computation. The cache of the generation follows, and takes twice the memory.

    Args:
        r: rank of the adapters.
        alpha: scale of the adapters times r. None means 2 r.
        dtype: dtype of the computation and of all weights that stay unquantized. Cards before Ampere (T4, RTX 20) need
            "float16".
        double_quant: quantize the scales too, which saves 0.37 bits per weight.
        optim: "adamw_8bit" keeps Adam's state in 8 bits. TRL's default is "adamw_torch_fused".

    Raises:
        ImportError: bitsandbytes is missing.
        ValueError: a rank below 1, or a dtype in which 4-bit computation is slow.
    """
    require_bitsandbytes("qlora()")
    from peft import LoraConfig

    if r < 1:
        raise ValueError(f"r={r} is no rank of an adapter. Use 8 to 64.")
    if dtype not in DTYPES:
        raise ValueError(
            f"dtype={dtype!r} is not one that 4-bit weights are computed in. Use 'bfloat16', or 'float16' on cards "
            "before Ampere."
        )
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=dtype,
    )
    adapters = LoraConfig(
        r=r, lora_alpha=alpha or 2 * r, lora_dropout=0.0, target_modules=target_modules, task_type="CAUSAL_LM"
    )
    precision = {"model_init_kwargs": {"dtype": dtype}, "bf16": dtype == "bfloat16", "fp16": dtype == "float16"}
    return QLoRA(quantization, adapters, {**precision, "optim": optim, **FIXED})


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
        **FIXED,
    }
