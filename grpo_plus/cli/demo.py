"""`grpo-plus demo`: GRPO from start to finish on a CPU, without a download."""

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

    from grpo_plus.demo.outputs import DemoResult

HELP = "Train a tiny model on the CPU in about a minute; downloads nothing."
EXAMPLE = "grpo-plus demo --advantage_estimator rloo"

NEXT = """Written to {output_dir}: the model and its tokenizer{merged}, log.jsonl, learning_curve.png, summary.json,
completions.

Try next:
  grpo-plus replay {output_dir:<29}what other estimators would have made of its completions
  grpo-plus demo --advantage_estimator {other:<9}the same run with other advantages
  {qlora}
  grpo-plus ls advantages                       all of them, with their papers
  grpo-plus train --help                        your own model, data and rewards"""

QLORA = "grpo-plus demo --qlora                        adapters on a 4-bit base, exported without bitsandbytes"
PLAN = "grpo-plus plan MODEL --gpu 12GB --qlora       what a QLoRA run of your model will need"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The choices that are worth comparing, under their names in GRPOPlusConfig."""
    parser.add_argument(
        "--advantage_estimator", help="a name that `grpo-plus ls advantages` prints; default: TRL's own"
    )
    parser.add_argument("--loss_type", default="dapo", help="a name that `grpo-plus ls losses` prints; default: dapo")
    parser.add_argument("--qlora", action="store_true", help="train adapters on the model in 4 bits, and export it")
    parser.add_argument("--seed", type=int, default=0, help="of the weights, the data and the sampling; default: 0")
    parser.add_argument("--max_steps", type=int, default=120, help="GRPO steps; default: 120")
    parser.add_argument("--output_dir", default="grpo_plus_demo", help="default: grpo_plus_demo")


def run(args: argparse.Namespace, rest: list[str]) -> int:
    """Run the demo, then print what it measured and what to try next."""
    import warnings

    from rich.console import Console

    from grpo_plus.demo.run import run_demo

    with warnings.catch_warnings():
        # Transformers deprecates fields that TRL itself sets; nothing that whoever runs the demo could change.
        warnings.simplefilter("ignore", FutureWarning)
        result = run_demo(
            args.output_dir,
            seed=args.seed,
            max_steps=args.max_steps,
            advantage_estimator=args.advantage_estimator,
            loss_type=args.loss_type,
            qlora=args.qlora,
        )
    console = Console(highlight=False)
    console.print()
    console.print(result_table(result))
    other = "rloo" if args.advantage_estimator == "dr_grpo" else "dr_grpo"
    console.print(
        NEXT.format(
            output_dir=args.output_dir,
            other=other,
            merged=" (merged/)" if args.qlora else "",
            qlora=PLAN if args.qlora else QLORA,
        ),
        markup=False,
        soft_wrap=True,
    )
    return 0


def result_table(result: "DemoResult") -> "Table":
    """Accuracy before and after, with the completions of a few held-out prompts below it."""
    from rich.markup import escape
    from rich.table import Table

    title = f"Held-out prompts, greedy: seed {result.seed}, {result.seconds:.0f} s"
    table = Table(title=title, title_justify="left", title_style="")
    table.add_column("")
    table.add_column("before GRPO", justify="right")
    table.add_column(f"after {result.steps} steps", justify="right")
    table.add_row("accuracy", f"{result.accuracy_before:.1%}", f"{result.accuracy_after:.1%}", style="bold")
    for example in result.examples:
        table.add_row(*(escape(example[name]) for name in ("prompt", "before", "after")))
    return table
