"""Dtype of the adapters. bf16 holds three digits, so a step of 1e-6 rounds to nothing on most weights.

TRL casts the trainable weights of a quantized base to bf16, and Adam's state follows the weights. A checkpoint comes
back in float32, whatever was saved. Here both end in the dtype that the run asks for, without a rounding in between.
"""

from typing import Any

import torch
from torch import Tensor, nn

from grpo_plus.models.adapters import ADAPTER_DTYPES, adapter_parameters, bits_of, has_adapters


def require_trainable(model: Any) -> None:
    """Refuse adapters of which none trains, because with `beta` the log of such a run looks normal."""
    if has_adapters(model) and not any(True for _ in adapter_parameters(model)):
        raise ValueError(
            f"None of the weights of the PeftModel (adapter {', '.join(model.peft_config)}) requires a gradient, so "
            "nothing would be trained. Load it with PeftModel.from_pretrained(..., is_trainable=True)."
        )


def chosen_dtype(adapter_dtype: str | None, model: nn.Module) -> torch.dtype | None:
    """Dtype that `adapter_dtype` means for this model. None leaves the adapters alone.

    An `adapter_dtype` of None means float32 above a base that bitsandbytes has quantized. TRL would leave bf16 there.
    """
    if adapter_dtype is None:
        return torch.float32 if bits_of(model) and has_adapters(model) else None
    if not has_adapters(model):
        raise ValueError(
            f"adapter_dtype={adapter_dtype!r}, but the model has no adapters: all of its weights train. Pass a "
            "peft_config, or leave adapter_dtype unset and choose the dtype of the model."
        )
    return ADAPTER_DTYPES[adapter_dtype]


def restore_adapters(model: nn.Module, dtype: torch.dtype, exact: dict[str, Tensor] | None = None) -> None:
    """Bring every trainable weight to `dtype`, in place. `exact` holds values from before a rounding, by name."""
    for name, weight in adapter_parameters(model):
        if weight.is_floating_point():
            weight.data = (exact or {}).get(name, weight.data).to(device=weight.device, dtype=dtype)


def keep_gradients_on_the_cpu(model: Any) -> None:
    """Keep bitsandbytes from repacking 4-bit weights on CPUs with AVX512-BF16.

    bitsandbytes repacks in the first forward in eval mode. The packed product has no gradient with respect to its
    input. A run that evaluates on the CPU would then train on wrong gradients, in every linear layer but the last,
    without a word.

    Raises:
        ValueError: the weights are packed already. Unpacking would not give the same weights.
    """
    for layer in model.modules():
        if getattr(layer, "support_avx512bf16_for_cpu", False):
            if getattr(getattr(layer.weight, "quant_state", None), "packing_format_for_cpu", False):
                raise ValueError(
                    "The 4-bit model was evaluated on the CPU, where bitsandbytes has packed its weights into a form "
                    "whose gradients are wrong. Load it again and create the trainer first, or call "
                    "grpo_plus.qlora.precision.keep_gradients_on_the_cpu(model) before evaluating."
                )
            layer.support_avx512bf16_for_cpu = False
