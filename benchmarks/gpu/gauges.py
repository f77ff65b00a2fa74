"""Time, memory, launches and waits of a call, and how far two results are apart."""

import gc
import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.record import Setting


def clean() -> None:
    """Let go of what nobody holds."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def sync(device: str) -> None:
    """Wait for the device."""
    if device == "cuda":
        torch.cuda.synchronize()


def relative(found: Tensor, truth: Tensor) -> float:
    """Norm of the difference, relative to the norm of the truth."""
    found, truth = (tensor.detach().double().flatten().cpu() for tensor in (found, truth))
    return float(f"{float((found - truth).norm() / truth.norm().clamp(min=1e-30)):.2e}")


def median_ms(setting: Setting, call: Callable[[], object], repeats: int = 10, warm: int = 3) -> float:
    """Milliseconds of a call, by the device's events where there is a device."""
    repeats, warm = (2, 1) if setting.tiny else (repeats, warm)
    for _ in range(warm):
        call()
    sync(setting.device)
    times = []
    for _ in range(repeats):
        if setting.device == "cuda":
            first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            first.record()
            call()
            last.record()
            torch.cuda.synchronize()
            times.append(first.elapsed_time(last))
        else:
            start = time.perf_counter()
            call()
            times.append(1e3 * (time.perf_counter() - start))
    return round(statistics.median(times), 4)


def median_s(setting: Setting, call: Callable[[], object]) -> float:
    """Seconds of a call that is warm, with its host's part."""
    times = []
    for _ in range(setting.repeats):
        sync(setting.device)
        start = time.perf_counter()
        call()
        sync(setting.device)
        times.append(time.perf_counter() - start)
    return round(statistics.median(times), 4)


def peak_gib(setting: Setting, call: Callable[[], object]) -> float | None:
    """GiB that a call holds at its peak above what was there before. None on a CPU."""
    if setting.device == "cpu":
        call()
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return round((torch.cuda.max_memory_allocated() - before) / 2**30, 3)


def profile(setting: Setting, call: Callable[[], object], top: int = 12) -> dict[str, Any]:
    """Kernels by their time on the device, launches, and the share of the wall time in which the device is busy."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as torch_profile

    cuda = setting.device == "cuda"
    call()
    sync(setting.device)
    # Without the host's operators: tens of thousands, which take seconds to collect.
    with torch_profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as recorded:
        start = time.perf_counter()
        call()
        host = time.perf_counter() - start
        sync(setting.device)
        wall = time.perf_counter() - start
    spent: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for event in recorded.events():
        on_device = str(getattr(event, "device_type", "")).endswith("CUDA")
        if on_device or not cuda:
            spent[event.name] += event.time_range.end - event.time_range.start
            counts[event.name] += 1
    return {
        "wall_ms": round(1e3 * wall, 2),
        "host_ms": round(1e3 * host, 2),
        "busy": round(spent.total() / 1e6 / wall, 3),
        "launches": counts.total(),
        "kernels": [[name[:100], round(us / 1e3, 3), counts[name]] for name, us in spent.most_common(top)],
    }


def host_waits(setting: Setting, call: Callable[[], object]) -> dict[str, Any]:
    """Where Python waits for the device, as torch sees it: file, line and how often."""
    call()
    if setting.device == "cpu":
        return {"waits": 0, "places": {}}
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    places = Counter(
        f"{'/'.join(seen.filename.split('/')[-2:])}:{seen.lineno}"
        for seen in caught
        if "synchron" in str(seen.message).lower()
    )
    return {"waits": places.total(), "places": dict(places.most_common(20))}
