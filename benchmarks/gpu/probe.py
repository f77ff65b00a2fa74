"""The card and its host: versions, matrix products, copies, launches, and torch's attention."""

import os
import subprocess
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.gpu.gauges import median_ms, profile, sync
from benchmarks.gpu.record import Setting, Stage
from benchmarks.machine import device_name, installed

PACKAGES = (
    *("grpo_plus", "torch", "triton", "transformers", "trl", "peft", "accelerate", "bitsandbytes", "liger-kernel"),
    *("datasets", "flash_attn", "kernels"),
)


def probe(stage: Stage, setting: Setting) -> None:
    """Look at the machine."""
    stage.item("versions", lambda: {package: installed(package) for package in PACKAGES})
    stage.item("card", _card, setting)
    stage.item("product of matrices", _product, setting)
    stage.item("copy", _copy, setting)
    stage.item("launch", _launch, setting)
    for length, past, masked in ((512, 0, False), (256, 512, True), (768, 0, True), (768, 0, False)):
        stage.item(f"sdpa T={length} past={past} mask={masked}", _sdpa, setting, length, past, masked)


def _card(setting: Setting) -> dict[str, Any]:
    if setting.device == "cpu":
        return {"name": "cpu", "cores": os.cpu_count()}
    asked = "name,driver_version,memory.total,clocks.max.sm,power.limit"
    command = ["nvidia-smi", f"--query-gpu={asked}", "--format=csv,noheader"]
    said = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    free, total = torch.cuda.mem_get_info()
    context = total - free - torch.cuda.memory_reserved()
    return {
        "name": device_name(setting.device),
        "smi": said,
        "total_gib": round(total / 2**30, 2),
        "context_gib": round(context / 2**30, 3),
        "cores": os.cpu_count(),
    }


def _product(setting: Setting) -> dict[str, Any]:
    size = 64 if setting.tiny else 8192
    a, b = (torch.randn(size, size, device=setting.device, dtype=torch.bfloat16) for _ in range(2))
    took = median_ms(setting, lambda: a @ b)
    return {"size": size, "ms": took, "tflops": round(2 * size**3 / took / 1e9, 1)}


def _copy(setting: Setting) -> dict[str, Any]:
    a = torch.randn(2**16 if setting.tiny else 2**30, device=setting.device)
    b = torch.empty_like(a)
    took = median_ms(setting, lambda: b.copy_(a))
    return {"tb_s": round(2 * a.numel() * 4 / took / 1e9, 3)}


def _launch(setting: Setting) -> dict[str, float]:
    """Host time of a small kernel, of a copy of a small tensor to the device, and of an item()."""
    x, small = torch.zeros(8, device=setting.device), torch.zeros(64)

    def us(call: Callable[[], object], count: int = 300) -> float:
        call()
        sync(setting.device)
        start = time.perf_counter()
        for _ in range(count):
            call()
        sync(setting.device)
        return round(1e6 * (time.perf_counter() - start) / count, 2)

    return {
        "add_us": us(lambda: x.add_(1)),
        "to_device_us": us(lambda: small.to(setting.device)),
        "item_us": us(x[0].item),
    }


def states(setting: Setting, rows: int, length: int, keys: int, *, grouped: bool = True) -> tuple[Tensor, ...]:
    """Query, key and value (rows, heads, tokens, D) of Qwen3-4B's heads, with or without grouped keys."""
    heads, kv, size = (4, 2, 8) if setting.tiny else (32, 8, 128)
    shapes = ((heads, length), (kv if grouped else heads, keys), (kv if grouped else heads, keys))
    made = (torch.randn(rows, h, n, size, device=setting.device, dtype=torch.bfloat16) for h, n in shapes)
    return tuple(state.requires_grad_() for state in made)


def _sdpa(setting: Setting, length: int, past: int, masked: bool) -> dict[str, Any]:
    if setting.tiny:
        length, past = length // 16, past // 16
    q, k, v = states(setting, 2 if setting.tiny else 8, length, past + length, grouped=not masked)
    keywords: dict[str, Any] = {"is_causal": True, "enable_gqa": True}
    if masked:
        allowed = torch.ones(length, past + length, device=setting.device, dtype=torch.bool).tril(past)
        mask = torch.zeros(1, 1, length, past + length, device=setting.device, dtype=q.dtype)
        keywords = {"attn_mask": mask.masked_fill_(~allowed, torch.finfo(q.dtype).min)}

    def call() -> None:
        out = scaled_dot_product_attention(q, k, v, **keywords)
        torch.autograd.grad(out.sum(), (q, k, v))

    start = time.perf_counter()
    call()
    sync(setting.device)
    first = time.perf_counter() - start
    return {"first_ms": round(1e3 * first, 1), "ms": median_ms(setting, call, 5)} | {
        "kernels": profile(setting, call, top=4)["kernels"]
    }
