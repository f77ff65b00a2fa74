"""Frozen linear layer plus a LoRA adapter: `reference` in a line, `fused` without the buffers in between."""

from grpo_plus.kernels.lora_linear.fused import Adapted, Copies, Sharing, lora_linear, lora_linears
from grpo_plus.kernels.lora_linear.reference import Base

__all__ = ["Adapted", "Base", "Copies", "Sharing", "lora_linear", "lora_linears"]
