"""`grpo-plus doctor`: versions, what is active on this machine and why not, and whether TRL still fits."""

import argparse
import platform
import warnings
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, NamedTuple

from grpo_plus.version import __version__

if TYPE_CHECKING:
    from rich.table import Table

HELP = "Print versions and active parts, and check that the installed TRL fits."
EXAMPLE = "grpo-plus doctor"

PACKAGES = ("trl", "transformers", "torch", "accelerate", "datasets", "peft", "bitsandbytes", "triton", "vllm")
MISSING = "not installed"
STYLES = {"on": "green", "at your word": "cyan", "off": "yellow"}


class Part(NamedTuple):
    """A part of the package on this machine: its name, a key of `STYLES`, and what it does or why it is off."""

    name: str
    state: str
    text: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """No arguments."""


def run(args: argparse.Namespace, rest: list[str]) -> int:
    """Print the report; exit status 1 if the installed TRL is outside the tested window or has changed."""
    from rich.console import Console

    from grpo_plus.cli.words import for_terminal

    console, changes = Console(highlight=False), _seam()
    groups = {
        "Versions": _table(("grpo_plus", __version__), *((package, _version(package)) for package in PACKAGES)),
        "This machine": _table(
            ("Python", f"{platform.python_version()}, {platform.system()} {platform.machine()}"), ("device", _device())
        ),
        "What is active, with the defaults": _parts(_active()),
        "Log-probabilities of a frozen head (logprob_backend='auto')": _parts(_heads()),
        "LoRA layers (lora_backend='auto')": _parts(_lora()),
    }
    for title, table in groups.items():
        console.print(f"[bold]{title}[/]")
        console.print(table)
        console.print()
    console.print("[bold]Does TRL fit?[/]")
    for change in changes:
        console.print(f"  no: {for_terminal(change)}", style="red", markup=False)
    if not changes:
        console.print(f"  [green]yes[/]: as tested, trl {version('trl')}")
    return 1 if changes else 0


def _table(*rows: tuple[str, str]) -> "Table":
    """Names, and what is known of each; a package that is missing stands back."""
    from rich.table import Table

    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column()
    for name, text in rows:
        table.add_row(f"  {name}", text, style="dim" if text == MISSING else "")
    return table


def _parts(parts: Iterable[Part]) -> "Table":
    from rich.markup import escape
    from rich.table import Table

    table = Table.grid(padding=(0, 2, 0, 0))
    for _ in ("name", "state"):
        table.add_column(no_wrap=True)
    table.add_column()
    for name, state, text in parts:
        table.add_row(f"  {name}", f"[{STYLES[state]}]{state}[/]", escape(text))
    return table


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return MISSING


def _device() -> str:
    import torch

    if not torch.cuda.is_available():
        return "CPU: torch sees no CUDA device"
    name = torch.cuda.get_device_name()
    total = torch.cuda.get_device_properties(0).total_memory / 2**30
    return f"{name}, {total:.0f} GiB, compute capability {'.'.join(map(str, torch.cuda.get_device_capability()))}"


def _active() -> list[Part]:
    import torch

    from grpo_plus.advantages import ESTIMATORS
    from grpo_plus.losses import LOSSES, TRL_LOSSES

    others = len(LOSSES) - len(TRL_LOSSES)
    gpu = "on" if torch.cuda.is_available() else "off"
    no_gpu = "" if gpu == "on" else "No GPU here. On one: "
    return [
        Part("advantages", "on", f"TRL's; {len(ESTIMATORS)} more by name (grpo-plus ls advantages)"),
        Part("losses", "on", f"TRL's {len(TRL_LOSSES)}; {others} more by name (grpo-plus ls losses)"),
        Part("packing", "on", "Rows are packed where a check on the first rows finds it exact."),
        Part("skip_zero_advantage", "on", "Rows without a gradient are left out."),
        Part("generation_loop", "on", "By transformers: each prompt once, and finished rows leave."),
        Part("mlp_tile_tokens", "on", "Under gradient checkpointing, long rows go through MLPs in tiles."),
        Part("max_tokens_per_pass", gpu, f"{no_gpu}an update that does not fit takes several passes."),
        Part("timing of 'auto'", gpu, f"{no_gpu}the first update times forms, heads and LoRA layers."),
    ]


def _heads() -> list[Part]:
    """What 'auto' takes for a frozen head on this machine, and why not the others."""
    import torch

    from grpo_plus.kernels.linear_logprob import why_not_on

    device = "cuda" if torch.cuda.is_available() else "cpu"
    reason = why_not_on("triton", device)
    if device == "cpu":
        parts = [
            Part("torch", "on", "One pass over the head, measured on CPUs."),
            Part("trl", "on", "Where the head or an entropy bonus trains."),
        ]
    else:
        parts = [
            Part("trl", "on", "Where the head or an entropy bonus trains, or the first update finds it faster."),
            Part("torch", "at your word", "For a frozen head."),
        ]
    if reason:
        return [*parts, Part("triton", "off", f"{reason}.")]
    if device == "cpu":
        return [*parts, Part("triton", "at your word", "For a frozen head.")]
    return [*parts, Part("triton", "on", "Where the first update finds it faster.")]


def _lora() -> list[Part]:
    if _version("peft") == MISSING:
        return [Part("peft", "off", "It is not installed: pip install peft.")]
    return [
        Part("torch", "on", "Plain adapters without dropout, on 4-bit and unquantized layers."),
        Part("peft", "on", "The others, with a warning that names the reason."),
    ]


def _seam() -> list[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the version is reported below
        from grpo_plus.trainer.contract import check_seam
        from grpo_plus.trainer.names import untested_version

    outside = untested_version(version("trl"))
    return ([outside] if outside else []) + check_seam()
