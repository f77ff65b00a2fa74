"""`grpo-plus replay`: what every estimator would have made of the completions of a run that exists."""

import argparse
import json
import os
import sys
from typing import Any

HELP = "Compare advantage estimators on the completions that a run logged (log_completions=True)."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The run, and what to make of it."""
    parser.add_argument("run_dir", metavar="RUN_DIR", help="output_dir of a TRL run with log_completions=True")
    parser.add_argument("--estimators", help="names or dotted paths, separated by commas; default: every one there is")
    parser.add_argument(
        "--num_generations", type=int, help="of the run; default: what the log's groups or equal prompts say"
    )
    parser.add_argument("--rewards", help="columns that are rewards, separated by commas; default: found in the log")
    parser.add_argument("--reward_weights", help="the run's, separated by commas; default: 1 each")
    parser.add_argument(
        "--advantage_kwargs", type=json.loads, default={}, help="""by estimator: '{"passk": {"k": 4}}'"""
    )
    parser.add_argument(
        "--groups", help="STEP:GROUP,... to show side by side; default: those with the most disagreement"
    )
    parser.add_argument("--output", default="grpo_plus_replay", metavar="DIR", help="default: grpo_plus_replay")


def run(args: argparse.Namespace, rest: list[str]) -> int:
    """Replay, write the report, and print what it says in short."""
    from grpo_plus.compare import Rollouts, replay, write_replay
    from grpo_plus.compare.replay_report import in_short

    sys.path.insert(0, os.getcwd())  # dotted paths name the user's own modules
    rollouts = Rollouts(
        args.run_dir,
        num_generations=args.num_generations,
        reward_names=_words(args.rewards),
        reward_weights=None if args.reward_weights is None else [float(word) for word in _words(args.reward_weights)],
    )
    result = replay(
        rollouts, _estimators(args), groups=[_group(word) for word in _words(args.groups) or []], progress=True
    )
    written = write_replay(result, args.output)
    for line in in_short(result):
        print(f"- {line}")
    print(f"Written: {', '.join(map(str, written))}")
    return 0


def _words(text: str | None) -> Any:
    return None if text is None else [word.strip() for word in text.split(",") if word.strip()]


def _estimators(args: argparse.Namespace) -> Any:
    """Names with their hyper-parameters."""
    from grpo_plus.advantages import ESTIMATORS

    if not isinstance(args.advantage_kwargs, dict) or not all(map(_is_table, args.advantage_kwargs.values())):
        raise ValueError("""--advantage_kwargs takes a table by estimator: '{"passk": {"k": 4}}'.""")
    names = _words(args.estimators) or list(ESTIMATORS)
    for name in args.advantage_kwargs:
        if name not in names:
            raise ValueError(f"--advantage_kwargs is about {name!r}, which is not replayed. Add it to --estimators.")
    return {name: args.advantage_kwargs.get(name, {}) for name in names}


def _is_table(value: object) -> bool:
    return isinstance(value, dict)


def _group(word: str) -> tuple[int, int]:
    step, _, group = word.partition(":")
    if not (step.isdigit() and group.isdigit()):
        raise ValueError(f"--groups takes STEP:GROUP, such as 120:0, and not {word!r}.")
    return int(step), int(group)
