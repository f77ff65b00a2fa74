"""The parts of a replay's report that open on demand: further figures and tables, what was read, and how."""

import math
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

from grpo_plus.replay.result import FACTOR, LOGGED, Replay
from grpo_plus.report.figures import bars, heatmap, histograms
from grpo_plus.report.page import Block, Figure, Fold, Table, Text, shown

PACKAGES = ("grpo_plus", "torch", "numpy", "pyarrow", "matplotlib")
WIDE = 4  # columns of numbers that fit a narrow screen
METHOD = (
    "Every estimator computed its advantages from the rewards of the log, batch by batch in the order of the steps. "
    "Ranks are compared inside a batch. A completion pushed the other way has advantages of opposite signs under two "
    "estimators. Effective samples are (Σ|A|)² / (B ΣA²) of a batch of B completions that trains: 1 if all weigh the "
    "same. A reward drives the update by its part in each completion's |A|, in proportion to its centered, weighted "
    "values, which are divided by their std for estimators that do so. Rules and limits of the advice are judgments; "
    "docs/replay.md lists them."
)


def details(replay: Replay) -> list[Block]:
    """Figures and tables beyond the first ones, each in a fold."""
    return [
        Fold("Completions that two estimators push in opposite directions", [_flips(replay)]),
        Fold("How much of a batch trains", _waste(replay)),
        Fold("If a reward came in another unit", _reactions(replay)),
        Fold("Sizes of advantages", [_histograms(replay)]),
        *_shares_of(replay),
        _nearest(replay),
    ]


def method(replay: Replay) -> list[Block]:
    """What was read, what is odd about it, and how the figures were made."""
    rollouts = replay.rollouts
    blocks: list[Block] = []
    if rollouts.findings:
        found = [(f.kind, f"{f.count:,} {f.unit}", f.first) for f in rollouts.findings.values()]
        blocks.append(Table("What to know about the log", ("what", "how often", "the first"), found))
    blocks.append(Fold("How the figures are computed", [Text(METHOD), *_lengths(replay)]))
    if replay.refused:
        caption = "Estimators that cannot be applied to these rewards"
        blocks.append(Table(caption, ("estimator", "reason"), list(replay.refused.items()), folded=True))
    return [*blocks, _read(replay), _configuration(replay)]


def _lengths(replay: Replay) -> list[Block]:
    needy = [name for name in replay.names if name != LOGGED and replay.recipes[name].needs_lengths]
    if replay.rollouts.length_unit != "characters" or not needy:
        return []
    names = ", ".join(f"`{name}`" for name in needy)
    return [
        Text(
            f"Lengths are in characters, for TRL's log has no token counts: {names} are approximate. A column "
            "`completion_length` (`log_extra` in a reward function) would be used instead."
        )
    ]


def _read(replay: Replay) -> Table:
    rollouts, s = replay.rollouts, replay.statistics
    weights = dict(zip(s.names, rollouts.weights.tolist(), strict=True))
    facts: list[Sequence[str | float | None]] = [
        ("completions", f"{s.completions:,}"),
        ("generation batches", f"{s.batches:,}"),
        ("groups", f"{s.groups:,} of {rollouts.size}"),
        ("steps", f"{replay.steps[0]} to {replay.steps[1]}"),
        ("tasks", ", ".join(s.task_share()) or "none in the log"),
    ]
    for name, share in s.flat_share().items():
        known = f", weight {weights[name]:g}" if name in weights else ""
        facts.append((f"reward {name}{known}", f"the same for all completions in {share:.1%} of the groups"))
    return Table("The log", ("", "read"), facts, folded=True)


def _flips(replay: Replay) -> Figure:
    kept = [family.index for family in replay.families]
    flips = replay.statistics.flips()[kept][:, kept].fill_diagonal_(float("nan"))
    high = max(0.1, math.ceil(float(flips.nan_to_num().max()) * 10) / 10)
    return Figure(
        "Of the completions that train under both. Dark: none.",
        heatmap([f.short for f in replay.families], flips.numpy(), label="share of flipped signs", low=0.0, high=high),
    )


def _waste(replay: Replay) -> list[Block]:
    s = replay.statistics
    mark = next((family.short for family in replay.families if LOGGED in family.names), None)
    effective, dead = (
        {family.short: values[family.index].item() for family in replay.families}
        for values in (s.effective(), s.dead())
    )
    return [
        Figure("Effective samples of a batch.", bars(effective, label="effective samples", limit=1.12, mark=mark)),
        Figure("Groups in which every advantage is 0.", bars(dead, label="share of groups", limit=1.12, mark=mark)),
    ]


def _reactions(replay: Replay) -> list[Block]:
    rewards = list(dict.fromkeys(reaction.reward for reaction in replay.reactions))
    cells = {(r.estimator, r.reward): f"x {shown(r.size)}, {shown(round(r.cosine, 2))}" for r in replay.reactions}
    labels = {family.name: family.label for family in replay.families if family.name != LOGGED}
    text = Text(
        f"One reward at a time is multiplied by {FACTOR:.0f}, on at most 64 batches spread over the run. Each cell: by "
        "how much the mean |A| grows, and the cosine between the advantages before and after. x 1, 1: the unit of the "
        f"reward does not matter. x {FACTOR:.0f}, 1: the update grows and keeps its direction. A cosine far below 1: "
        "the reward takes over."
    )
    caption = "Reaction to another unit"
    if len(rewards) <= WIDE - 1:
        rows = [(labels[n], *(cells.get((n, reward), "n/a") for reward in rewards)) for n in labels]
        return [text, Table(caption, ("estimators", *rewards), rows)]
    longer = [(labels[n], reward, cells[n, reward]) for n, reward in cells if n in labels]
    return [text, Table(caption, ("estimators", "reward", "reaction"), longer)]


def _histograms(replay: Replay) -> Figure:
    samples = {family.short: replay.sample[family.index].numpy() for family in replay.families}
    caption = (
        f"{replay.sample.shape[1]:,} completions of batches spread over the run; what is beyond ±4 is at the edge."
    )
    return Figure(caption, histograms(samples))


def _shares_of(replay: Replay) -> list[Block]:
    """Tables of the shares of rewards and tasks."""
    tables: list[Block] = []
    if len(replay.statistics.names) > 1:
        by_reward = {family.label: line for family, line in replay.shares_of_rewards.items()}
        tables.append(_shares("Share of Σ|A| by reward", "reward", by_reward))
    if by_task := {family.label: line for family, line in replay.shares_of_tasks.items()}:
        tables.append(_shares("Share of Σ|A| by task", "task", by_task))
    return tables


def _shares(caption: str, what: str, shares: Mapping[str, Mapping[str, float]]) -> Table:
    parts = list(dict.fromkeys(part for line in shares.values() for part in line))
    rows: list[tuple[str | float, ...]]
    if len(parts) <= WIDE:
        rows = [(name, *line.values()) for name, line in shares.items()]
        return Table(caption, ("estimators", *parts), rows, folded=True)
    rows = [(name, part, share) for name, line in shares.items() for part, share in line.items()]
    return Table(caption, ("estimators", what, "share"), rows, folded=True)


def _nearest(replay: Replay) -> Table:
    correlation = replay.statistics.correlation()
    rows = []
    for family in replay.families:
        line = {other: correlation[family.index, other.index].item() for other in replay.families if other != family}
        line = {other: value for other, value in line.items() if value == value}
        if line:
            ends = (max(line, key=line.__getitem__), min(line, key=line.__getitem__))
            rows.append((family.label, *(f"{end.name}, {line[end]:.3f}" for end in ends)))
    header = ("estimators", "most alike, correlation", "least alike, correlation")
    return Table("Nearest and farthest of each", header, rows, folded=True)


def _configuration(replay: Replay) -> Table:
    rollouts = replay.rollouts
    given: list[tuple[str, Any]] = [
        ("run_dir", str(rollouts.run_dir)),
        ("num_generations", f"{rollouts.size}, {rollouts.group_size.reason}"),
        ("rewards", ", ".join(rollouts.names)),
        ("reward_weights", ", ".join(f"{weight:g}" for weight in rollouts.weights.tolist())),
        ("lengths", rollouts.length_unit),
    ]
    given += [
        (f"hyper-parameters of {name}", str(dict(r.keywords))) for name, r in replay.recipes.items() if r.keywords
    ]
    if rollouts.record is not None:
        given += [(f"version of the run: {name}", str(found)) for name, found in rollouts.record.versions.items()]
    versions = [("Python", platform.python_version()), *((name, version(name)) for name in PACKAGES)]
    return Table("What was asked for, and what computed it", ("", "value"), [*given, *versions], folded=True)
