"""`grpo-plus doctor`: versions, what is active on this machine and why not, and whether TRL still fits."""

import argparse
import platform
import warnings
from importlib.metadata import PackageNotFoundError, version

from grpo_plus.version import __version__

HELP = "Print versions and active parts, and check that the installed TRL fits."
EXAMPLE = "grpo-plus doctor"

PACKAGES = ("trl", "transformers", "torch", "accelerate", "datasets", "peft", "bitsandbytes", "triton", "vllm")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """No arguments."""


def run(args: argparse.Namespace, rest: list[str]) -> int:
    """Print the report; exit status 1 if the installed TRL is outside the tested window or has changed."""
    print(f"grpo_plus {__version__}, Python {platform.python_version()}, {platform.system()} {platform.machine()}")
    print("\nVersions")
    for package in PACKAGES:
        print(f"  {package:13} {_version(package)}")
    print("\nDevice")
    print(f"  {_device()}")
    print("\nActive")
    for line in _active():
        print(f"  {line}")
    print("\nSeam to TRL")
    changes = _seam()
    for line in changes or [f"as tested: trl {version('trl')}"]:
        print(f"  {line}")
    return 1 if changes else 0


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _device() -> str:
    import torch

    if not torch.cuda.is_available():
        return "CPU: torch sees no CUDA device"
    name = torch.cuda.get_device_name()
    total = torch.cuda.get_device_properties(0).total_memory / 2**30
    return f"{name}, {total:.0f} GiB, compute capability {'.'.join(map(str, torch.cuda.get_device_capability()))}"


def _active() -> list[str]:
    from grpo_plus.advantages import ESTIMATORS
    from grpo_plus.losses import LOSSES, TRL_LOSSES

    return [
        f"advantages: TRL's by default; {len(ESTIMATORS)} more by name (grpo-plus ls advantages)",
        f"losses: TRL's {len(TRL_LOSSES)}, and {len(LOSSES) - len(TRL_LOSSES)} that it lacks (grpo-plus ls losses)",
        "forward: packed where a check on the first rows finds it exact (packing), without zero-advantage rows",
        "generation by transformers: each prompt once, and finished rows leave (generation_loop)",
        "memory: on a GPU, an update that does not fit takes several passes (max_tokens_per_pass); under gradient",
        "  checkpointing, long rows go through MLPs in tiles (mlp_tile_tokens)",
        "on a GPU, forms, heads and LoRA layers that are 'auto' are timed in the first update; the fastest is taken",
        "log-probabilities (logprob_backend='auto'):",
        *(f"  {line}" for line in _heads()),
        "LoRA layers (lora_backend='auto'):",
        "  torch   chosen for plain adapters without dropout, on 4-bit and unquantized layers",
        "  peft    for the others, with a warning that names the reason",
    ]


def _heads() -> list[str]:
    """What 'auto' takes for a frozen head on this machine, and why not the others."""
    import torch

    from grpo_plus.kernels.linear_logprob import why_not_on

    device = "cuda" if torch.cuda.is_available() else "cpu"
    reason = why_not_on("triton", device)
    if device == "cpu":
        lines = ["torch   chosen for a frozen head: a single pass over it, measured on CPUs"]
        lines.append("trl     where the head or an entropy bonus trains")
    else:
        lines = ["trl     where the head or an entropy bonus trains, and where the first update finds it the faster"]
        lines.append("torch   at your word, for a frozen head")
    at_your_word = "at your word" if device == "cpu" else "where the first update finds it the faster"
    return [*lines, f"triton  not here: {reason}" if reason else f"triton  {at_your_word}, for a frozen head"]


def _seam() -> list[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the version is reported below
        from grpo_plus.trainer.contract import check_seam
        from grpo_plus.trainer.names import untested_version

    outside = untested_version(version("trl"))
    return ([outside] if outside else []) + check_seam()
