"""The machine and versions that every result file names, and what a call takes on it."""

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def describe(others: tuple[str, ...] = ()) -> dict[str, Any]:
    """Processor, cores, Python and the versions that matter, with those of `others`."""
    packages = ("grpo_plus", "trl", "transformers", "torch", *others)
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {package: installed(package) for package in packages},
    }


def installed(package: str) -> str:
    """Version of a package. "checkout" for one that runs from where its files lie."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "checkout"


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def device_name(device: str) -> str:
    """Name of the card, or "cpu"."""
    return torch.cuda.get_device_name() if device == "cuda" else "cpu"


def in_a_process(module: str, arguments: list[str], threads: int) -> dict[str, Any]:
    """What a module prints last, read as JSON. It runs in a process of its own, whose memory no other adds to."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "MALLOC_ARENA_MAX": "1"}
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"{module} {' '.join(arguments)} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def seconds(call: Callable[[], object], device: str) -> float:
    """What a call takes: seconds of the process on a CPU, which others share; on a GPU until it has finished."""
    if device == "cuda":
        torch.cuda.synchronize()
    clock = time.process_time if device == "cpu" else time.perf_counter
    start = clock()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def peak_mb(call: Callable[[], object], device: str) -> float:
    """MB that a call holds at its peak above what was there before."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    resident = _status("VmRSS")
    call()
    return (_status("VmHWM") - resident) / 1024


def _status(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith(field)))
