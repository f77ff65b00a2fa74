"""`grpo-plus replay`: what every estimator would have made of the completions of a run that exists."""

import argparse
import json

from grpo_plus.cli.own_modules import search_own_modules
from grpo_plus.cli.words import for_terminal, keywords_by_estimator, words

HELP = "Compare estimators on the completions that a run logged."
EXAMPLE = "grpo-plus replay out"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The run, and what to make of it."""
    parser.add_argument("run_dir", metavar="RUN_DIR", help="output_dir of a TRL run with log_completions=True")
    parser.add_argument("--estimators", help="names or dotted paths, separated by commas; default: every one there is")
    parser.add_argument(
        "--num_generations",
        type=int,
        help="of the run; default: what the run recorded, or the log's groups and prompts say",
    )
    parser.add_argument(
        "--rewards", help="columns that are rewards, separated by commas; default: recorded or found in the log"
    )
    parser.add_argument(
        "--reward_weights", help="the run's, separated by commas; default: what the run recorded, or 1 each"
    )
    parser.add_argument(
        "--advantage_kwargs", type=json.loads, default={}, help="""by estimator: '{"passk": {"k": 4}}'"""
    )
    parser.add_argument(
        "--groups", help="STEP:GROUP,... to show side by side; default: those with the most disagreement"
    )
    # --output was this flag's name up to 0.2.0.
    parser.add_argument(
        "--output_dir", "--output", default="grpo_plus_replay", metavar="DIR", help="default: grpo_plus_replay"
    )


def run(args: argparse.Namespace, rest: list[str]) -> int:
    """Replay, write the report, and print the advice, its reasons, the next command and where the report is."""
    from grpo_plus.advantages import ESTIMATORS
    from grpo_plus.replay import Rollouts, replay, write_replay
    from grpo_plus.replay.in_words import in_short

    names = words(args.estimators) or list(ESTIMATORS)
    search_own_modules(names)
    rollouts = Rollouts(
        args.run_dir,
        num_generations=args.num_generations,
        reward_names=words(args.rewards),
        reward_weights=words(args.reward_weights),
    )
    estimators = keywords_by_estimator(args.advantage_kwargs, names)
    result = replay(rollouts, estimators, groups=[_group(word) for word in words(args.groups) or []], progress=True)
    written = write_replay(result, args.output_dir)
    for line in in_short(result):
        print(for_terminal(line))
    print(for_terminal(f"\nReport: {written[0]}. Beside it: {', '.join(path.name for path in written[1:])}"))
    return 0


def _group(word: str) -> tuple[int, int]:
    step, _, group = word.partition(":")
    if not (step.isdigit() and group.isdigit()):
        raise ValueError(f"--groups takes STEP:GROUP, such as 120:0, and not {word!r}.")
    return int(step), int(group)
