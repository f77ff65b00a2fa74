"""The parts of an update by themselves: attention of packed rows, heads, and layers with adapters."""

from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from benchmarks import kernels as bench
from benchmarks import lora_layer
from benchmarks.gpu.gauges import clean, median_ms, peak_gib, profile
from benchmarks.gpu.probe import states
from benchmarks.gpu.record import Setting, Stage
from grpo_plus.packing.attention import Segments, segment_attention
from grpo_plus.packing.cascade import cascade_attention, cascade_of
from grpo_plus.packing.layout import Group, pack
from grpo_plus.packing.prompts_first import pack_prompts_first, prompts_first
from grpo_plus.packing.rows import pairs_per_call
from grpo_plus.packing.transfer import on_device

SHAPES = ((512, 256, 8, 1), (512, 256, 8, 8), (2048, 256, 8, 1), (16384, 64, 8, 1))  # prompt, completion, G, prompts
TINY_SHAPES = ((24, 12, 4, 1), (24, 12, 4, 2))


def attention(stage: Stage, setting: Setting) -> None:
    """One layer's attention, forward and backward, at Qwen3-4B's heads."""
    for shape in TINY_SHAPES if setting.tiny else SHAPES:
        for name in ("padded", "segments", "cascade"):
            stage.item(f"{name} {shape}", _attention, setting, name, shape)
            clean()


def _groups(prompt: int, completion: int, generations: int, groups: int) -> list[Group]:
    lengths = (torch.linspace(0.05, 1.0, generations) * completion).long().clamp(min=1).tolist()
    rows = tuple(range(generations))
    return [Group(torch.arange(prompt), rows, tuple(torch.arange(n) for n in lengths)) for _ in range(groups)]


def _attention(setting: Setting, name: str, shape: tuple[int, int, int, int]) -> dict[str, Any]:
    rows = shape[2] * shape[3]
    length = shape[0] + shape[1]
    if name == "padded" and rows * length**2 > 3e9:
        return {"skipped": "a mask of more than 3 GB"}
    if name == "padded":  # TRL's rows, with a boolean mask as transformers makes it where a row is padded
        query, key, value = states(setting, rows, length, length)
        mask = (
            torch.ones(length, length, dtype=torch.bool, device=setting.device).tril().expand(rows, 1, -1, -1).clone()
        )
        mask[0, :, :, -1] = False
        mask[0, :, -1, -1] = True
        module = _layer(query, key)

        def forward() -> Tensor:
            return sdpa_attention_forward(module, query, key, value, mask, scaling=query.shape[-1] ** -0.5)[0]  # type: ignore[no-any-return]
    else:
        forward, (query, key, value) = _packed(setting, name, _groups(*shape))

    def both() -> None:
        out = forward()
        torch.autograd.grad(out, (query, key, value), torch.ones_like(out))

    repeats, warm = (1, 1) if shape[0] > 4096 else (5, 2)
    row: dict[str, Any] = {"both_ms": median_ms(setting, both, repeats, warm), "peak_gib": peak_gib(setting, both)}
    seen = profile(setting, both, top=6)
    return row | {key: seen[key] for key in ("launches", "host_ms", "kernels")}


def _layer(query: Tensor, key: Tensor) -> Any:
    config = SimpleNamespace(layer_types=None, sliding_window=None)
    repeats = query.shape[1] // key.shape[1]
    return SimpleNamespace(config=config, num_key_value_groups=repeats, layer_idx=0, is_causal=True, training=True)


def _packed(setting: Setting, name: str, groups: list[Group]) -> tuple[Callable[[], Tensor], tuple[Tensor, ...]]:
    device = torch.device(setting.device)
    groups = prompts_first(groups) if name == "cascade" else groups
    row: Any = pack_prompts_first(groups) if name == "cascade" else pack(groups)
    count = row.input_ids.shape[1]
    query, key, value = states(setting, 1, count, count)
    module, scaling = _layer(query, key), query.shape[-1] ** -0.5
    if name == "cascade":
        cascade = on_device(cascade_of(row.blocks), device)
        return lambda: cascade_attention(module, query, key, value, cascade, scaling=scaling), (query, key, value)
    segments = Segments(on_device(row.spans, device), pairs_per_call=pairs_per_call(device))

    def forward() -> Tensor:
        return segment_attention(
            sdpa_attention_forward, module, query, key, value, segments, needs_mask=False, scaling=scaling
        )

    return forward, (query, key, value)


def kernels(stage: Stage, setting: Setting) -> None:
    """Heads beside TRL's, and nf4 layers with adapters beside PEFT's."""
    for shape in ((40, 32, 900),) if setting.tiny else bench.SHAPES["cuda"]:
        clean()
        row = stage.item(f"head {shape}", _quietly, bench.heads_at, shape, setting.device, 5, quiet=True)
        for entry in row.get("raw", []):
            figure = entry.get("failure") or f"{1e3 * entry['median_s']:.2f} ms, {entry['times_as_fast_as_trl']}x TRL's"
            stage.record.say(f"  head {shape} {entry['head']}: {figure[:160]}")
    if setting.tiny:
        lora_layer.SCALE["cpu"] = bench.SCALE["cpu"] = 16
    for name, tokens in (
        (("q", 64),) if setting.tiny else ((n, t) for n in ("q", "gate, up", "down") for t in (2048, 8192))
    ):
        clean()
        label = f"layer {name} {tokens}"
        row = stage.item(
            label, _quietly, bench.layer_row, name, tokens, not setting.tiny, setting.device, 5, quiet=True
        )
        if "raw" in row:
            stage.record.say(f"  {label}: {row['raw']['times_as_fast']}x PEFT's, kept {row['raw']['kept_mb']} MB")


def _quietly(call: Callable[..., Any], *arguments: Any) -> dict[str, Any]:
    with redirect_stdout(StringIO()):
        return {"raw": call(*arguments)}
