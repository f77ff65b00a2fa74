"""`grpo-plus ls`: the names that the configuration and the flags accept."""

import argparse
import inspect
from typing import Any

from grpo_plus.registry import first_link

HELP = "List estimators, modifiers, losses and rewards, or explain one of them."
EXAMPLE = "grpo-plus ls rloo"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the optional kind or name."""
    parser.add_argument(
        "name",
        nargs="?",
        metavar="NAME",
        help="advantages, modifiers, losses, demonstrations or rewards, or one name, such as rloo; default: all",
    )


def run(args: argparse.Namespace, rest: list[str]) -> int:
    """Print one table per kind, or explain one entry."""
    from rich.console import Console
    from rich.table import Table

    from grpo_plus.cli.ls_entry import described, explained

    tables = {
        "advantages": advantage_rows,
        "modifiers": modifier_rows,
        "losses": loss_rows,
        "demonstrations": demonstration_rows,
        "rewards": reward_rows,
    }
    if args.name not in (None, *tables):
        console = Console(highlight=False)
        for entry in explained(args.name):
            console.print(described(entry))
            console.print(*entry.lines, "", sep="\n", style="cyan", markup=False, soft_wrap=True)
        return 0
    for kind, rows in tables.items():
        if args.name in (None, kind):
            _, *body = rows()
            table = Table.grid("", "", padding=(0, 2, 1, 0))
            table.title, table.title_justify = kind, "left"
            for name, *details in body:
                table.add_row(f"[bold]{name}[/]", "\n".join(filter(None, details)))
            Console(highlight=False).print(table)
    print("`grpo-plus ls NAME` explains one of them, with a line to copy.")
    return 0


def advantage_rows() -> list[tuple[str, ...]]:
    """A header, then one row per estimator."""
    from grpo_plus.advantages import ESTIMATORS

    rows: list[tuple[str, ...]] = [("advantage_estimator", "what it does", "advantage_kwargs", "paper")]
    for name in ESTIMATORS:
        estimator = ESTIMATORS[name]
        rows.append((name, estimator.summary, _defaults(estimator.keywords), estimator.paper))
    return rows


def modifier_rows() -> list[tuple[str, ...]]:
    """A header, then one row per modifier of advantages."""
    from grpo_plus.advantages import MODIFIERS

    rows: list[tuple[str, ...]] = [("modifier", "what it does", "keywords", "paper")]
    for name, function in MODIFIERS.items():
        parameters = inspect.signature(function).parameters.values()
        keywords = [f"`{one.name}`" for one in parameters if one.kind is one.KEYWORD_ONLY]
        documentation = function.__doc__ or ""
        rows.append((name, documentation.partition("\n")[0], ", ".join(keywords), first_link(documentation)))
    return rows


def loss_rows() -> list[tuple[str, ...]]:
    """A header, then one row per loss."""
    from grpo_plus.losses import LOSSES, TRL_LOSSES

    rows: list[tuple[str, ...]] = [("loss_type", "what it does", "loss_kwargs", "paper")]
    for name in LOSSES:
        loss = LOSSES[name]
        keywords = "TRL's own fields" if name in TRL_LOSSES else _defaults(loss.keywords)
        rows.append((name, loss.summary, keywords, loss.paper))
    return rows


def demonstration_rows() -> list[tuple[str, ...]]:
    """A header, then one row per way to train demonstrations."""
    from grpo_plus.cli.ls_entry import keywords_of
    from grpo_plus.losses.demonstrations import DEMONSTRATION_LOSSES

    rows: list[tuple[str, ...]] = [("demonstration_loss", "what it does", "keywords", "paper")]
    for name, function in DEMONSTRATION_LOSSES.items():
        documentation = function.__doc__ or ""
        keywords = _defaults(keywords_of(function))
        rows.append((name, documentation.partition("\n")[0], keywords, first_link(documentation)))
    return rows


def reward_rows() -> list[tuple[str, ...]]:
    """A header, then one row per reward function, TRL's first."""
    from grpo_plus import rewards
    from grpo_plus.cli.reward_functions import REWARD_NAMES, named_function, own_keywords

    rows: list[tuple[str, ...]] = [("reward_funcs", "what it does", "reward_kwargs", "from")]
    for name in REWARD_NAMES:
        function = named_function(name)
        summary = " ".join((inspect.getdoc(function) or "").split()).partition(". ")[0]
        summary = summary.removeprefix("Reward function that ")
        origin = "grpo_plus.rewards" if name in rewards.__all__ else "trl.rewards"
        rows.append((name, f"{summary[0].upper()}{summary[1:]}.", _defaults(own_keywords(name, function)), origin))
    return rows


def _defaults(keywords: dict[str, Any]) -> str:
    return ", ".join(f"{name}={'?' if value is ... else value}" for name, value in keywords.items())
