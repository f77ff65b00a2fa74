"""`grpo-plus plan`: how much GPU memory a run needs, what fits, and what to change, from config.json alone."""

import argparse
from dataclasses import MISSING, fields
from typing import TYPE_CHECKING, Any

from grpo_plus.cli.words import for_terminal

if TYPE_CHECKING:
    from grpo_plus.cli.plan_config import Asked
    from grpo_plus.planner import MemoryPlan, Run

HELP = "Say what GPU memory a run needs, what fits, and what to change."
USAGE = "grpo-plus plan [MODEL] [--config run.yaml] [--gpu CARD] [--FLAG VALUE ...]"
EXAMPLE = "grpo-plus plan Qwen/Qwen3-4B --gpu 12GB --qlora"

EPILOG = """Examples:
  grpo-plus plan Qwen/Qwen3-4B --gpu 12GB --qlora --max_completion_length 1024
  grpo-plus plan Qwen/Qwen3-4B --gpu 8GB,12GB,16GB,24GB --qlora
  grpo-plus plan --config run.yaml --gpu 12GB

The settings have the names and defaults of `grpo-plus train`, but that --lora_r stands for --use_peft with adapters on
all linear layers, and --prompt_length for the dataset's longest prompt. Sizes are for full-length completions. What
arithmetic cannot know is assumed (grpo_plus/planner/constants.py); --calibrate takes what benchmarks/memory.py
measured. The exit status is 1 where the run does not fit on --gpu."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model, the card and the settings of `Run`."""
    from grpo_plus.planner.run import Run

    parser.usage, parser.epilog, parser.formatter_class = USAGE, EPILOG, argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "model",
        metavar="MODEL",
        nargs="?",
        help="a local folder, a config.json, or a name on the hub; default: the file's",
    )
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="YAML of `grpo-plus train`, planned as it is; the command line goes before it. What takes memory and is "
        "not planned is said",
    )
    parser.add_argument(
        "--gpu",
        metavar="CARD",
        help="a card's name or memory, such as 4090, 'rtx 3060', 12GB: what fits, and advice. Several with commas: the "
        "longest completion on each, beside TRL's",
    )
    parser.add_argument("--calibrate", metavar="FILE", help="JSON object of measured constants")
    parser.add_argument("--revision", help="of the model on the hub")
    parser.add_argument("--qlora", action="store_true", help="the settings of `grpo-plus train --qlora`")
    for entry in fields(Run):
        default = f"default: {entry.default}" if entry.default not in (None, MISSING) else "default: unset"
        kind, metavar = _kind(str(entry.type))
        switch: Any = {"nargs": "?", "const": True} if kind is _boolean else {}
        parser.add_argument(f"--{entry.name}", type=kind, metavar=metavar, help=default, **switch)


def _kind(annotation: str) -> tuple[Any, str]:
    if "bool" in annotation:
        return _boolean, "BOOL"
    if annotation.startswith("int | str"):
        return _whole_or_auto, "N|auto"
    for kind in (int, float):
        if kind.__name__ in annotation:
            return kind, "N"
    return str, "NAME"


def _whole_or_auto(text: str) -> int | str:
    """What is neither is refused by `Run`, by name."""
    return int(text) if text.isdecimal() else text


def _boolean(text: str) -> bool:
    """As TRL's parser reads it."""
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() == "true"


def run(args: argparse.Namespace, rest: list[str]) -> int:
    """Print the table; with --gpu, what fits and what to change. Exit status 1 where the run does not fit."""
    from grpo_plus.planner import Constants, card, load_constants, load_shape, plan

    cards = [card(name) for name in args.gpu.split(",")] if args.gpu is not None else []
    constants = load_constants(args.calibrate) if args.calibrate is not None else Constants()
    asked = _asked(args)
    planned = plan(load_shape(asked.model, revision=asked.revision), asked.run, constants=constants)
    for note in (*planned.shape.notes, *asked.notes):
        print(for_terminal(note))
    print(_header(planned))
    notes = [gpu.note for gpu in cards if gpu.note]
    if len(cards) > 1:
        print("\n".join([*notes, _longest(planned, [gpu.size for gpu in cards])]))
        return 0
    print(planned.table())
    if not cards:
        return 0
    print("".join(f"{note}\n" for note in notes), end="")
    print(_verdict(planned, cards[0].size))
    return 0 if planned.fits(cards[0].size) else 1


def _asked(args: argparse.Namespace) -> "Asked":
    """The command line before the file, and the file before the settings of --qlora."""
    from grpo_plus.cli.plan_config import asked
    from grpo_plus.planner import Run

    given = {entry.name: value for entry in fields(Run) if (value := getattr(args, entry.name)) is not None}
    return asked(args.config, given, model=args.model, revision=args.revision, qlora=args.qlora)


def _header(planned: "MemoryPlan") -> str:
    shape, settings = planned.shape, planned.run
    trains = f"LoRA r={settings.lora_r}" if settings.lora_r else "all weights"
    base = "nf4" if settings.load_in_4bit else "8 bits" if settings.load_in_8bit else settings.dtype
    return (
        f"{shape.name}: {shape.model_type}, {shape.parameters / 1e9:.2f} B parameters in {base}; trains {trains}\n"
        f"{settings.generation_rows} completions per generation batch, {settings.generated_at_once} at once, "
        f"{settings.rows_per_pass} per pass; {settings.prompt_length} + {settings.max_completion_length} "
        f"tokens; rows: {settings.rows}\n"
    )


def _longest(planned: "MemoryPlan", cards: list[int]) -> str:
    from grpo_plus.planner import longest, longest_table

    found = longest(planned.shape, planned.run, cards, constants=planned.constants)
    lines = [longest_table(found, cards)]
    positions = planned.shape.positions
    if positions is not None and planned.run.prompt_length + max(found[-1].tokens) > positions:
        lines.append(f"The model knows {positions:,} positions. Longer rows need its rope_scaling.")
    return "\n".join(lines)


def _verdict(planned: "MemoryPlan", gpu_bytes: int) -> str:
    from grpo_plus.planner import advise, largest
    from grpo_plus.planner.constants import GIB

    usable = (gpu_bytes - planned.constants.unusable_bytes) / GIB
    fits = "fits" if planned.fits(gpu_bytes) else "does not fit"
    lines = [f"{usable:.2f} GiB of the card's {gpu_bytes / GIB:g} are usable: the run {fits}.\n"]
    lines.append("largest that fits, each on its own and with as many prompts")
    for name in ("max_completion_length", "num_generations", "per_device_train_batch_size"):
        size = largest(planned.shape, planned.run, gpu_bytes, name, constants=planned.constants)
        lines.append(f"  {name:<28} {size or 'none'}{_companions(planned.run, name, size)}")
    if not planned.fits(gpu_bytes):
        advice = advise(planned.shape, gpu_bytes, planned.run, constants=planned.constants)
        lines += ["\nto make it fit, cheapest first", advice.text()]
    return "\n".join(lines)


def _companions(run: "Run", field: str, size: int) -> str:
    """The other settings that a size needs."""
    from grpo_plus.planner import resized

    changed = resized(run, field, size) if size else run
    names = ("per_device_train_batch_size", "gradient_accumulation_steps", "steps_per_generation")
    others = [
        f"--{name} {getattr(changed, name)}"
        for name in names
        if name != field and getattr(changed, name) != getattr(run, name)
    ]
    return f"  with {' '.join(others)}" if others else ""
