"""`grpo-plus watch`: a running training in the terminal, from the files that it writes."""

import argparse
import time
from pathlib import Path

HELP = "Show a running training: curves, speed, time left, last completions."
EXAMPLE = "grpo-plus watch out"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The run, and how often to look."""
    parser.add_argument("run_dir", metavar="RUN_DIR", help="output_dir of the run; it may begin later")
    parser.add_argument("--once", action="store_true", help="print one frame and leave")
    parser.add_argument("--every", type=float, default=2.0, metavar="SECONDS", help="between two looks; default: 2")


def run(args: argparse.Namespace, rest: list[str]) -> int:
    """Show frames until the run has ended, or until Ctrl-C."""
    from rich.console import Console
    from rich.live import Live

    from grpo_plus.cli.watch_frame import frame
    from grpo_plus.report.run_log import read_log

    folder, console = Path(args.run_dir), Console(highlight=False)
    if not 0 < args.every < float("inf"):
        raise ValueError(f"--every {args.every:g} is no time between two looks. Use a second or more.")
    if args.once:
        console.print(frame(folder, read_log(folder), width=console.width, now=time.time()))
        return 0
    try:
        with Live(console=console, auto_refresh=False) as live:
            while True:
                log = read_log(folder)
                size = {"width": console.width, "height": console.height}
                live.update(frame(folder, log, now=time.time(), **size), refresh=True)
                if log is not None and log.ended:
                    return 0
                time.sleep(args.every)
    except KeyboardInterrupt:
        return 0
