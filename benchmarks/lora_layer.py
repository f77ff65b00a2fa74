"""One 4-bit layer with an adapter, by PEFT and by the kernel: what `benchmarks.kernels` times."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from grpo_plus.qlora.adapter_products import Products
from grpo_plus.qlora.lora_layers import fused_lora, unfit

# Qwen3-4B's: hidden size 2560, 32 and 8 heads of 128, intermediate size 9728. On a CPU a quarter of each.
LAYERS = {"q": (2560, 4096), "k, v": (2560, 1024), "gate, up": (2560, 9728), "down": (9728, 2560)}
SCALE = {"cuda": 1, "cpu": 4}
TOKENS = {"cuda": (512, 2048, 8192), "cpu": (512,)}
RANK = 16


@contextmanager
def layer_case(
    tokens: int, inputs: int, outputs: int, *, device: str, dtype: torch.dtype, autocast: bool
) -> Iterator[tuple[dict[str, Callable[[], object]], float]]:
    """Forward and backward of both sides, and the largest relative difference between what they give."""
    generator = torch.Generator().manual_seed(0)
    x, cotangent = (torch.randn(tokens, size, generator=generator).to(device, dtype) for size in (inputs, outputs))
    models = {side: _adapted(inputs, outputs, device, dtype) for side in ("peft", "fused")}
    calls: dict[str, Callable[[], Any]] = {
        side: partial(_once, model, x, cotangent, autocast) for side, model in models.items()
    }
    with fused_lora(models["fused"]) as products:
        calls["fused"] = partial(_held, products, calls["fused"])
        pairs = zip(calls["fused"](), calls["peft"](), strict=True)
        yield dict(calls), max(float((ours - pefts).norm() / pefts.norm()) for ours, pefts in pairs)


def _held(products: Products, call: Callable[[], Any]) -> Any:
    """As a training step calls: the adapters are copied once for forward and backward."""
    with products.held():
        return call()


def kept_mb(call: Callable[[], object]) -> float:
    """MB of activations that autograd keeps between forward and backward, each storage once, weights aside."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        call()
    return sum(kept.values()) / 2**20


def _adapted(inputs: int, outputs: int, device: str, dtype: torch.dtype) -> Any:
    import bitsandbytes as bnb
    from peft import LoraConfig, get_peft_model

    class Holder(nn.Module):
        is_loaded_in_4bit = True

        def __init__(self) -> None:
            super().__init__()
            self.layer = bnb.nn.Linear4bit(inputs, outputs, bias=False, compute_dtype=dtype, quant_type="nf4")
            weight = torch.randn(outputs, inputs, dtype=dtype) / inputs**0.5
            self.layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)

    torch.manual_seed(0)
    model = get_peft_model(Holder().to(device), LoraConfig(r=RANK, target_modules=["layer"]))
    for name, weight in model.named_parameters():
        if weight.requires_grad:  # float32, as the trainer keeps adapters above a quantized base
            weight.data = weight.data.float()
        if "lora_B" in name:
            weight.data.normal_(std=0.02)
    layer = model.base_model.model.layer
    assert unfit(layer) is None, unfit(layer)
    return model.train()


def _once(model: Any, x: Tensor, cotangent: Tensor, autocast: bool) -> tuple[Tensor, ...]:
    model.zero_grad()
    x = x.detach().requires_grad_()
    with torch.autocast(x.device.type, torch.bfloat16, enabled=autocast):
        y = model(x)
    y.backward(cotangent)
    return y.detach(), x.grad, *(weight.grad for weight in model.parameters() if weight.requires_grad)
