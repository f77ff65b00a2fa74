"""A real nf4 model on the CPU, tiny, and short trainings of it."""

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from grpo_plus import GRPOPlusConfig, GRPOPlusTrainer
from grpo_plus.demo.tiny import tiny_model, tiny_tokenizer
from tests.training import make_trainer

NF4 = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.bfloat16,
)


def lora(**changes: Any) -> LoraConfig:
    return LoraConfig(**({"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | changes))


def save_base(folder: Path, **shape: Any) -> Path:
    """A float32 base with its tokenizer."""
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(folder)
    tiny_model(tokenizer, **({"hidden_size": 64, "num_heads": 2} | shape)).save_pretrained(folder)
    return folder


def load_nf4(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=NF4, dtype=torch.bfloat16)


def make_qlora_trainer(output_dir: Path, base: Any, *, config_class: Any = GRPOPlusConfig, **config: Any) -> Any:
    """A trainer of adapters on the nf4 base in the folder `base`, or on the model `base` as it is."""
    arguments = {"peft_config": lora()} if not hasattr(base, "peft_config") else {}
    return make_trainer(
        output_dir,
        trainer_class=config.pop("trainer_class", GRPOPlusTrainer),
        config_class=config_class,
        model=load_nf4(base) if isinstance(base, Path) else base,
        trainer_arguments=arguments | config.pop("trainer_arguments", {}),
        **({"learning_rate": 1e-3} | config),
    )


def trained_weights(trainer: Any) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in trainer.model.named_parameters() if weight.requires_grad}
