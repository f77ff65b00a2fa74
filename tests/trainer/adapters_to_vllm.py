"""A tiny base on the disk, and trainers whose vLLM, the stand-in, is sent the adapters alone."""

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from grpo_plus import GRPOPlusConfig, GRPOPlusTrainer
from tests.training import logs_of, make_trainer
from tests.vllm_standin import environment_kept

LORA = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")


def load(base: Path, *, bits: int = 32, **quantization: Any) -> PreTrainedModel:
    """The base in float32, or in 4 bits that float32 is computed from."""
    given = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True} | quantization
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32, **given) if bits == 4 else None
    return AutoModelForCausalLM.from_pretrained(base, quantization_config=config, dtype=torch.float32)


def make(folder: Path, model: PreTrainedModel, *, peft_config: Any = LORA, **config: Any) -> GRPOPlusTrainer:
    defaults = {"use_vllm": True, "vllm_lora_sync": True, "learning_rate": 3e-2, "max_completion_length": 6}
    with environment_kept():
        return make_trainer(
            folder,
            model=model,
            trainer_class=GRPOPlusTrainer,
            config_class=GRPOPlusConfig,
            trainer_arguments={"peft_config": peft_config},
            **(defaults | config),
        )


def gaps(trainer: GRPOPlusTrainer) -> list[float]:
    """Of each step, the largest difference between the log-probabilities of policy and sampler, in nats."""
    name = "sampling/sampling_logp_difference/max"
    return [log[name] for log in logs_of(trainer) if name in log]
