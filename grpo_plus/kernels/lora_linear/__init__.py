"""Frozen linear layer plus a LoRA adapter: `reference` in a line, `fused` without the buffers in between."""

from grpo_plus.kernels.lora_linear.fused import lora_linear
from grpo_plus.kernels.lora_linear.reference import Base

__all__ = ["Base", "lora_linear"]
