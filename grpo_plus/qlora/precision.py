"""Dtype of the adapters. bf16 holds three digits, so a step of 1e-6 rounds to nothing on most weights.

TRL casts the trainable weights of a quantized base to bf16, and Adam's state follows the weights. A checkpoint comes
back in float32, whatever was saved. Here both end in the dtype that the run asks for, without a rounding in between.
"""

from typing import Any

import torch
from torch import Tensor, nn

from grpo_plus.models.adapters import ADAPTER_DTYPES, adapter_parameters, bits_of, has_adapters
from grpo_plus.qlora.unwrapped import dtype_of, unwrapped


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
    """Bring the adapters to `dtype`, in place, and other weights that train to the dtype of the base.

    An adapter casts its input and its output. A module that is saved whole (`modules_to_save`) and a bias do not: in
    float32 above a half-precision base, the next layer would refuse what they compute.

    Args:
        exact: values from before a rounding, by name.
    """
    for name, weight in adapter_parameters(model):
        if weight.is_floating_point():
            value = (exact or {}).get(name, weight.data)
            weight.data = value.to(device=weight.device, dtype=_dtype_of_base(model, name) or dtype)


def check_saved_modules(model: Any, fp16: bool) -> None:
    """Refuse weights of the base that would train in float16, whose gradients no scaler takes."""
    for name, _ in adapter_parameters(model) if fp16 and has_adapters(model) else ():
        if _dtype_of_base(model, name) == torch.float16:
            raise ValueError(
                f"{name} trains in the dtype of the base, which is float16, and fp16=True cannot unscale gradients in "
                "float16. Load the base with dtype='float32' (--dtype float32), or drop modules_to_save and bias."
            )


def _dtype_of_base(model: Any, name: str) -> torch.dtype | None:
    """Dtype of the base where a trained weight takes the place of one of the base. None for an adapter's weight."""
    saved = ".modules_to_save."
    if saved in name:
        wrapper, _, rest = name.partition(saved)
        original = model.get_submodule(wrapper).original_module
        return original.get_parameter(rest.partition(".")[2]).dtype
    return dtype_of(model.get_base_model()) if name.endswith(".bias") and ".lora_" not in name else None


def let_the_head_be_read(model: Any) -> None:
    """Give a head with trained tokens the bias that TRL reads. PEFT's wrapper has the weight only.

    The wrapper stands before the head where head and embedding are one weight (`trainable_token_indices`, tied).
    """
    head = model.get_output_embeddings() if has_adapters(model) else None
    if head is not None and not hasattr(head, "bias"):
        head.bias = getattr(unwrapped(head), "bias", None)


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
