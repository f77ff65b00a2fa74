"""`grpo-plus train --help`: our flags first, then TRL's by what they are about, then transformers'."""

import argparse
from collections.abc import Sequence
from dataclasses import fields

from transformers import TrainingArguments
from trl import GRPOConfig

USAGE = "%(prog)s [--config run.yaml] [--FLAG VALUE ...]"
ABOUT = (
    "Train a model with GRPO. A --config file holds flags by name, one per line; the command line goes before "
    "it. `grpo-plus ls` lists the names that can be chosen."
)
RECIPES = {"qlora"}  # of our flags, what decides more than the data


def help_of(parser: argparse.ArgumentParser, inputs: Sequence[type], config: type) -> str:
    """The help of TRL's parser, in groups.

    Args:
        inputs: the dataclasses of model, data and rewards, ours among them.
        config: the dataclass of the training's settings.
    """
    trls, transformers = _names(GRPOConfig), _names(TrainingArguments)
    groups = {
        "grpo_plus: advantages, losses, speed, safety": RECIPES | (_names(config) - trls),
        "model, data and rewards": set().union(*map(_names, inputs)),
        "GRPO (TRL)": trls - transformers,
        "training (transformers)": transformers,
    }
    shown = argparse.ArgumentParser(
        prog=parser.prog, usage=USAGE, description=ABOUT, add_help=False, formatter_class=parser.formatter_class
    )
    left = [action for action in parser._actions if action.dest != "help"]
    for title, names in groups.items():
        group = shown.add_argument_group(title)
        for action in left:
            if action.dest in names:
                group._add_action(action)
        left = [action for action in left if action.dest not in names]
    for action in left:
        shown._add_action(action)
    return shown.format_help()


def _names(kind: type) -> set[str]:
    return {entry.name for entry in fields(kind)} | {f"no_{entry.name}" for entry in fields(kind)}
