"""`grpo-plus compare`: train every named estimator over several seeds from the same start, and report."""

import argparse
import json
from typing import TYPE_CHECKING, Any

from grpo_plus.cli.own_modules import search_own_modules
from grpo_plus.cli.words import for_terminal, keywords_by_estimator, words

if TYPE_CHECKING:
    from rich.table import Table

    from grpo_plus.cli.next_command import NextCommand
    from grpo_plus.compare.comparison import Comparison
    from grpo_plus.compare.plan import Variant
    from grpo_plus.compare.task import Task
    from grpo_plus.compare.verdict import ScoreVerdict

HELP = "Train estimators over seeds from one start, and say which learned more."
EXAMPLE = "grpo-plus compare --estimators grpo,rloo --seeds 5"
USAGE = "grpo-plus compare [--estimators NAMES] [--FLAG VALUE ...]"
ABOUT = """Train every named estimator (and loss) over several seeds from the same
start, and write one report.

On the demo's task, which needs nothing:
  grpo-plus compare --estimators grpo,rloo --seeds 5
On yours:
  grpo-plus compare --estimators grpo,rloo --config run.yaml --max_steps 100

Every flag of `grpo-plus train` works here, TRL's among them:
`grpo-plus train --help` lists them."""
ESTIMATORS = "grpo,dr_grpo,rloo,gdpo"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What is compared; the rest is TRL's."""
    parser.usage, parser.description, parser.formatter_class = USAGE, ABOUT, argparse.RawDescriptionHelpFormatter
    compared = parser.add_argument_group("what is compared")
    compared.add_argument(
        "--estimators", metavar="NAMES", default=ESTIMATORS, help=f"names or dotted paths; default: {ESTIMATORS}"
    )
    compared.add_argument(
        "--losses", metavar="NAMES", help="each trained with each estimator; default: the task's one loss"
    )
    compared.add_argument(
        "--advantage_kwargs",
        type=json.loads,
        default={},
        metavar="JSON",
        help="""keywords by estimator: '{"passk": {"k": 4}}'""",
    )
    compared.add_argument(
        "--max_steps", type=int, metavar="N", help="GRPO steps of every arm; default: 120 on the demo's task"
    )
    judged = parser.add_argument_group("how it is judged")
    judged.add_argument(
        "--seeds", type=int, default=3, metavar="N", help="how many; 3 or more for intervals; default: 3"
    )
    judged.add_argument(
        "--num_held_out",
        type=int,
        metavar="N",
        help="prompts to judge each arm by; default: 500 on the demo's task, or 128",
    )
    judged.add_argument(
        "--baseline", metavar="NAME", help="an estimator to compare the others with; default: all pairs"
    )
    sweep = parser.add_argument_group("sweep", "Each variant at its own best setting.")
    sweep.add_argument(
        "--sweep",
        action="append",
        metavar="FIELD=VALUES",
        help="learning_rate=1e-5,3e-5,1e-4; several times for a grid. Other seeds and one half of the held-out prompts "
        "choose, the other half judges",
    )
    sweep.add_argument(
        "--sweep_seeds", type=int, metavar="N", help="how many other seeds choose the settings; default: 2"
    )
    parser.add_argument_group("output").add_argument(
        "--output_dir",
        default="grpo_plus_comparison",
        metavar="DIR",
        help="default: grpo_plus_comparison; what it holds of this comparison already is not trained again",
    )


def run(args: argparse.Namespace, rest: list[str]) -> int:
    """Train what is left to train, write the report, and print what it says; 1 where an arm has failed."""
    import warnings

    from grpo_plus.cli.next_command import NextCommand
    from grpo_plus.compare.report import write_comparison
    from grpo_plus.compare.train import compare
    from grpo_plus.compare.verdict import check_baseline
    from grpo_plus.demo.run import one_thread

    if args.num_held_out is not None and args.num_held_out < 1:
        raise ValueError(f"--num_held_out {args.num_held_out} judges no arm. Hold out 1 prompt or more.")
    search_own_modules([*(words(args.estimators) or ()), *(words(args.losses) or ())])
    variants = _variants(args)
    check_baseline(variants, args.baseline)
    given = {"seeds": range(args.seeds), "folder": args.output_dir, "progress": True} | _sweep(args)
    with warnings.catch_warnings():
        # Transformers deprecates fields that TRL itself sets; nothing that the user could change.
        warnings.simplefilter("ignore", FutureWarning)
        if rest:
            comparison = compare(_own_task(args, rest), variants, **given)
        else:
            with one_thread():
                comparison = compare(_demo_task(args), variants, **given)
    command = NextCommand(given_flags(args), rest, comparison.variants)
    written = write_comparison(comparison, args.output_dir, baseline=args.baseline, command=command)
    _print_result(comparison, args.baseline, command)
    print(f"Written: {', '.join(map(str, written))}")
    return 1 if comparison.failures else 0


def given_flags(args: argparse.Namespace) -> dict[str, Any]:
    """Our flags that differ from their defaults, by name."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    defaults = vars(parser.parse_args([]))
    return {name: vars(args)[name] for name, default in defaults.items() if vars(args)[name] != default}


def _print_result(comparison: "Comparison", baseline: str | None, command: "NextCommand") -> None:
    """The verdict, the table, what the verdict rests on, and the next command, as in the report."""
    from rich.console import Console

    from grpo_plus.compare.conclusion import conclusion
    from grpo_plus.compare.verdict import first_verdict

    verdict = first_verdict(comparison, baseline)
    found = conclusion(verdict)
    print(for_terminal(f"\n{found.title}. {found.verdict}\n"))
    Console(highlight=False).print(result_table(verdict))
    for reason in found.reasons:
        print(for_terminal(f"- {reason}"))
    print(for_terminal(f"\n{found.step.action}"))
    if text := command(found.step):
        print(for_terminal(f"  {text}\n"))


def result_table(verdict: "ScoreVerdict") -> "Table":
    """What each variant reached and cost."""
    from rich.markup import escape
    from rich.table import Table

    from grpo_plus.compare.verdict import arms_of

    comparison, score = verdict.comparison, escape(verdict.score)
    table = Table(title=f"Held-out {score}: {verdict.start:.3f} at the start", title_justify="left", title_style="")
    table.add_column("variant")
    if comparison.choices is not None:
        table.add_column("chosen setting", no_wrap=True)
    for name in ("seeds", "mean", "95% interval", "seconds per arm"):
        table.add_column(name, justify="right")
    for label, interval in verdict.ranked.items():
        results = [comparison.results[arm] for arm in arms_of(comparison, label)]
        bounds = f"{interval.low:.3f} to {interval.high:.3f}" if interval.exists else "needs 3 seeds"
        seconds = sum(result.seconds for result in results) / len(results)
        seeds = str(len(comparison.paired_seeds))
        chosen = comparison.choices.chosen[label].setting if comparison.choices is not None else {}
        setting = ["\n".join(f"{name}={value}" for name, value in chosen.items())] if chosen else []
        table.add_row(escape(label), *setting, seeds, f"{interval.estimate:.3f}", bounds, f"{seconds:.0f}")
    return table


def _variants(args: argparse.Namespace) -> "list[Variant]":
    from grpo_plus.compare.plan import Variant

    estimators = keywords_by_estimator(args.advantage_kwargs, words(args.estimators) or [])
    losses: list[str | None] = [*(words(args.losses) or ())] or [None]
    return [
        Variant(name, loss, {"advantage_kwargs": dict(keywords)} if keywords else {})
        for name, keywords in estimators.items()
        for loss in losses
    ]


def _sweep(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `compare` that the flags of a sweep stand for."""
    from grpo_plus.compare.sweep import FIRST_SWEEP_SEED, SWEEP_SEEDS

    if not args.sweep:
        if args.sweep_seeds is not None:
            raise ValueError(f"--sweep_seeds {args.sweep_seeds} chooses nothing without --sweep FIELD=VALUE,VALUE.")
        return {}
    sweep: dict[str, list[Any]] = {}
    for text in args.sweep:
        name, _, values = text.partition("=")
        if not name or not values or name in sweep:
            raise ValueError(f"--sweep {text}: write --sweep FIELD=VALUE,VALUE, and every field once.")
        sweep[name] = [_number(word) for word in words(values) or ()]
    count = len(SWEEP_SEEDS) if args.sweep_seeds is None else args.sweep_seeds
    return {"sweep": sweep, "sweep_seeds": range(FIRST_SWEEP_SEED, FIRST_SWEEP_SEED + count)}


def _number(word: str) -> float | str:
    """The number; another word as it is, for the sweep to refuse by its field."""
    try:
        return float(word)
    except ValueError:
        return word


def _demo_task(args: argparse.Namespace) -> "Task":
    from grpo_plus.cli.demo_task import sorting_task

    given = {"max_steps": args.max_steps, "num_held_out": args.num_held_out}
    return sorting_task(**{name: value for name, value in given.items() if value is not None})


def _own_task(args: argparse.Namespace, rest: list[str]) -> "Task":
    from grpo_plus.cli.own_task import own_task

    steps = [] if args.max_steps is None else ["--max_steps", str(args.max_steps)]
    return own_task([*rest, *steps], 128 if args.num_held_out is None else args.num_held_out)
