"""The `grpo-plus` command: one verb per file, each with HELP, EXAMPLE, add_arguments(parser) and run(args, rest).

A verb imports its tools inside `run`, so that `grpo-plus --help` answers without loading torch. To add a verb, write
`cli/<verb>.py` and put its name into `GROUPS`.

The other files are no verbs. `arguments.py` turns TRL's flags into model, data and rewards. `own_task.py` makes a task
for `grpo-plus compare` of these, and `demo_task.py` of the demo. `words.py` reads lists and tables.
"""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from types import ModuleType

from grpo_plus.cli.tracebacks import users_part
from grpo_plus.cli.words import for_terminal
from grpo_plus.registry import suggestion
from grpo_plus.report.secrets import masked_text
from grpo_plus.version import __version__

GROUPS = {
    "Learn what there is": ("demo", "ls"),
    "Train": ("plan", "train", "watch", "merge"),
    "Look closer": ("replay", "compare"),
    "Check the machine": ("doctor",),
}
VERBS = tuple(verb for verbs in GROUPS.values() for verb in verbs)
FORWARDING = ("train", "compare")  # verbs that take TRL's flags, parsed by TRL
HELPED = ("train",)  # and of these, the ones without flags of their own: TRL's parser shows the help


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit status.

    An error prints one line, behind the traceback of the user's own code where that has raised it. With --debug it
    prints the whole traceback.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = _take_debug(arguments)
    verbs = {verb: import_module(f"grpo_plus.cli.{verb}") for verb in VERBS}
    parser = _parser(verbs)
    _check_verb(parser, arguments)
    args, rest = parser.parse_known_args(arguments)
    if rest and args.verb not in FORWARDING:
        parser.error(f"{args.verb} takes no {' '.join(rest)}. See grpo-plus {args.verb} --help.")
    try:
        return verbs[args.verb].run(args, rest)
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return 130
    except Exception as error:
        if debug:
            raise
        if users := users_part(error):
            print(for_terminal(masked_text(users)), file=sys.stderr)
        line = masked_text(f"grpo-plus {args.verb}: {type(error).__name__}: {error}")
        print(for_terminal(line), file=sys.stderr)
        print("Run it with --debug for the traceback.", file=sys.stderr)
        return 1


def _parser(verbs: dict[str, ModuleType]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="grpo-plus",
        usage="%(prog)s VERB [...]",
        description="GRPO with TRL on one GPU: advantages you can choose.\n" + _overview(verbs),
        epilog="`grpo-plus VERB --help` says more. --debug, anywhere, shows the traceback of an error.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"grpo-plus {__version__}")
    commands = parser.add_subparsers(
        dest="verb", required=True, metavar="VERB", help=argparse.SUPPRESS, prog="grpo-plus"
    )
    for verb, module in verbs.items():
        command = commands.add_parser(verb, description=module.HELP, add_help=verb not in HELPED, allow_abbrev=False)
        module.add_arguments(command)
    return parser


def _overview(verbs: dict[str, ModuleType]) -> str:
    """Every verb with what it does and a line to copy, in groups."""
    lines = []
    for title, names in GROUPS.items():
        lines += ["", f"{title}:"]
        for name in names:
            lines += [f"  {name:<9}{verbs[name].HELP}", f"{'':<11}{verbs[name].EXAMPLE}"]
    return "\n".join(lines)


def _check_verb(parser: argparse.ArgumentParser, arguments: list[str]) -> None:
    """Refuse a word that is no verb, and say which verb is meant."""
    first = next((argument for argument in arguments if not argument.startswith("-")), None)
    if first is not None and first not in VERBS:
        parser.error(f"there is no verb {first!r}.{suggestion(first, VERBS)}")


def _take_debug(arguments: list[str]) -> bool:
    """Remove a bare --debug. TRL's own --debug takes a value, so one that is followed by a value stays TRL's."""
    for index, argument in enumerate(arguments):
        bare = index + 1 == len(arguments) or index == 0 or arguments[index + 1].startswith("-")
        if argument == "--debug" and bare:
            del arguments[index]
            return True
    return False
