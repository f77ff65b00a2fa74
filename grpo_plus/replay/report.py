"""What a replay says, as a report: report.html, results.csv, results.parquet and summary.md."""

import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from grpo_plus.replay.in_words import COMMAND_NOTE, LIMIT, advice_lines, headline, summary_lines
from grpo_plus.replay.result import FACTOR, LOGGED, Replay, ShownGroup
from grpo_plus.report.figures import bars, heatmap, histograms, side_by_side, stacked
from grpo_plus.report.files import write_report
from grpo_plus.report.page import Block, Figure, Heading, Quote, Section, Table, Text, shown

PACKAGES = ("grpo_plus", "torch", "numpy", "pyarrow", "matplotlib")
WIDE = 4  # columns of numbers that fit a narrow screen
OPEN_COMPLETIONS = 8  # completions of a group that are shown without being asked for


def write_replay(replay: Replay, folder: str | Path) -> list[Path]:
    """Write the report and its data into `folder`, each file whole or not at all; returns their paths."""
    return write_report(folder, *document(replay), replay.rows())


def document(replay: Replay) -> tuple[str, str, list[Section]]:
    """Title, lead and sections."""
    lead = (
        "The same completions and rewards under every advantage estimator. It shows how the updates would have "
        "differed, not what a policy trained with another estimator would have written next."
    )
    sections = [
        Section("Advice", _advice(replay)),
        Section("What was read", _read(replay)),
        Section("How far the estimators agree", _agreement(replay)),
        Section("Who drives the update", _drivers(replay)),
        Section("How much of the batch trains", _waste(replay)),
        Section("If a reward came in another unit", _reactions(replay)),
        Section("Sizes of advantages", _histograms(replay)),
        Section("Groups side by side", _groups(replay)),
        Section("Configuration and versions", [_configuration(replay)]),
    ]
    return f"Replay of {Path(replay.rollouts.run_dir).resolve().name}", lead, sections


def _advice(replay: Replay) -> list[Block]:
    blocks: list[Block] = [Text(headline(replay.advice), (*advice_lines(replay), *summary_lines(replay)))]
    if replay.advice.candidates:
        blocks += [Text(LIMIT), Quote("Next", replay.next_command), Text(COMMAND_NOTE)]
    return blocks


def _read(replay: Replay) -> list[Block]:
    rollouts, s = replay.rollouts, replay.statistics
    facts: list[Sequence[str | float | None]] = [
        ("completions", s.completions),
        ("generation batches", s.batches),
        ("groups", f"{s.groups:,} of {rollouts.size}"),
        ("steps", f"{replay.steps[0]} to {replay.steps[1]}"),
        ("rewards", ", ".join(f"{n} (weight {w:g})" for n, w in zip(s.names, rollouts.weights.tolist(), strict=True))),
        ("tasks", ", ".join(s.task_share()) or "none in the log"),
    ]
    blocks: list[Block] = [Table("The log", ("", "read"), facts)]
    if rollouts.findings:
        found = [(f.kind, f"{f.count:,} {f.unit}", f.first) for f in rollouts.findings.values()]
        blocks.append(Table("What to know about the log", ("what", "how often", "the first"), found))
    if replay.refused:
        caption = "Estimators that cannot be applied to these rewards"
        blocks.append(Table(caption, ("estimator", "reason"), list(replay.refused.items()), folded=True))
    needy = [name for name in replay.names if name != LOGGED and replay.recipes[name].estimator.needs_lengths]
    if rollouts.length_unit == "characters" and needy:
        names = ", ".join(f"`{name}`" for name in needy)
        blocks.append(
            Text(
                f"Lengths are in characters, for TRL's log has no token counts: {names} are approximate. A column "
                "`completion_length` (`log_extra` in a reward function) would be used instead."
            )
        )
    return blocks


def _agreement(replay: Replay) -> list[Block]:
    correlation, flips = replay.statistics.correlation().numpy(), replay.statistics.flips().numpy()
    order = _by_likeness(correlation)
    names = [replay.names[e] for e in order]
    lowest = float(np.nanmin(correlation, initial=0.9))
    highest = float(np.nanmax(np.where(np.eye(len(names), dtype=bool), np.nan, flips), initial=0.0))
    low, high = np.floor(lowest * 10) / 10, max(0.1, np.ceil(highest * 10) / 10)
    matrices = [
        Figure(
            "Rank correlation (Spearman) of the advantages of a batch, the mean over the batches. Bright: the two rank "
            "the completions alike.",
            heatmap(names, correlation[np.ix_(order, order)], label="rank correlation", low=low, high=1.0),
        ),
        Figure(
            "Completions that two estimators push in opposite directions, of those that train under both. Dark: none.",
            heatmap(names, flips[np.ix_(order, order)], label="share of flipped signs", low=0.0, high=high),
        ),
    ]
    rows = []
    for e, name in enumerate(replay.names):
        others = [f for f in range(len(replay.names)) if f != e and correlation[e, f] == correlation[e, f]]
        if others:
            near, far = max(others, key=lambda f: correlation[e, f]), min(others, key=lambda f: correlation[e, f])
            rows.append((name, *(f"{replay.names[f]}, {correlation[e, f]:.3f}" for f in (near, far))))
    header = ("estimator", "most alike, correlation", "least alike, correlation")
    return [*matrices, Table("Nearest and farthest of each", header, rows, folded=True)]


def _by_likeness(correlation: np.ndarray) -> list[int]:
    """An order in which like stands beside like: along the direction in which the rows differ most."""
    filled = np.nan_to_num(correlation)
    centered = filled - filled.mean(0)
    return np.argsort(np.linalg.svd(centered)[0][:, 0], kind="stable").tolist()


def _drivers(replay: Replay) -> list[Block]:
    s = replay.statistics
    weights = dict(zip(s.names, replay.rollouts.weights.tolist(), strict=True))
    flat = [(name, weights.get(name), share) for name, share in s.flat_share().items()]
    blocks: list[Block] = [
        Table(
            "Groups in which a reward is the same for every completion", ("reward", "weight", "share of groups"), flat
        )
    ]
    drawn: list[Block] = []
    tables: list[Block] = []
    if len(s.names) > 1:
        shares = {
            name: dict(zip(s.names, line, strict=True))
            for name, line in zip(replay.names, s.reward_share().tolist(), strict=True)
        }
        drawn.append(
            Figure(
                "Share of Σ|A| by reward: each completion's |A| split in proportion to its centered, weighted rewards "
                "(divided by their std for estimators that do so).",
                stacked(shares, label="share of Σ|A| by reward"),
            )
        )
        tables += [_shares("Share of Σ|A| by reward", "reward", shares)]
    if tasks := s.task_share():
        by_task = {
            name: {task: share[e].item() for task, share in tasks.items()} for e, name in enumerate(replay.names)
        }
        drawn.append(Figure("Share of Σ|A| by task.", stacked(by_task, label="share of Σ|A| by task")))
        tables += [_shares("Share of Σ|A| by task", "task", by_task)]
    return [*blocks, *drawn, *tables]


def _shares(caption: str, what: str, shares: Mapping[str, Mapping[str, float]]) -> Table:
    parts = list(dict.fromkeys(part for line in shares.values() for part in line))
    rows: list[tuple[str | float, ...]]
    if len(parts) <= WIDE:
        rows = [(name, *line.values()) for name, line in shares.items()]
        return Table(caption, ("estimator", *parts), rows, folded=True)
    rows = [(name, part, share) for name, line in shares.items() for part, share in line.items()]
    return Table(caption, ("estimator", what, "share"), rows, folded=True)


def _waste(replay: Replay) -> list[Block]:
    s, names = replay.statistics, replay.names
    effective, dead = (dict(zip(names, values.tolist(), strict=True)) for values in (s.effective(), s.dead()))
    columns = [values.tolist() for values in (s.mean_size(), s.dead(), s.zero(), s.effective())]
    return [
        Figure(
            "Effective sample size, (Σ|A|)² / (B ΣA²) over a batch's B completions, of the batches that train: 1 if "
            "all completions weigh the same.",
            bars(effective, label="effective sample size", limit=1.12, mark=LOGGED),
        ),
        Figure(
            "Dead groups, in which every advantage is exactly 0."
            + (f" `{LOGGED}` can show fewer than its estimator: TRL leaves rounding there." if LOGGED in names else ""),
            bars(dead, label="share of dead groups", limit=1.12, mark=LOGGED),
        ),
        Table(
            "Size and waste in figures",
            ("estimator", "mean |A|", "dead groups", "A = 0", "effective"),
            list(zip(names, *columns, strict=True)),
            folded=True,
        ),
    ]


def _reactions(replay: Replay) -> list[Block]:
    rewards = list(dict.fromkeys(reaction.reward for reaction in replay.reactions))
    cells = {(r.estimator, r.reward): f"x {shown(r.size)}, {shown(round(r.cosine, 2))}" for r in replay.reactions}
    names = list(dict.fromkeys(reaction.estimator for reaction in replay.reactions))
    text = Text(
        f"One reward at a time is multiplied by {FACTOR:.0f}, on at most 64 batches spread over the run. Each cell: by "
        "how much the mean |A| grows, and the cosine between the advantages before and after. x 1, 1: the unit of the "
        f"reward does not matter. x {FACTOR:.0f}, 1: the update grows and keeps its direction. A cosine far below 1: "
        "the reward takes over."
    )
    if len(rewards) <= WIDE - 1:
        rows = [(name, *(cells.get((name, reward), "n/a") for reward in rewards)) for name in names]
        return [text, Table("Reaction to another unit", ("estimator", *rewards), rows)]
    longer = [(r.estimator, r.reward, cells[r.estimator, r.reward]) for r in replay.reactions]
    return [text, Table("Reaction to another unit", ("estimator", "reward", "reaction"), longer, folded=True)]


def _histograms(replay: Replay) -> list[Block]:
    samples = dict(zip(replay.names, replay.sample.numpy(), strict=True))
    caption = (
        f"{replay.sample.shape[1]:,} completions of batches spread over the run; what is beyond ±4 is at the edge."
    )
    return [Figure(caption, histograms(samples))]


def _groups(replay: Replay) -> list[Block]:
    blocks: list[Block] = []
    for group in replay.groups:
        blocks += [
            Heading(f"Step {group.step}, group {group.group}"),
            Figure(
                f"Advantages under each estimator; the colour is in units of the row's largest. Disagreement "
                f"{group.disagreement:.2f}.",
                side_by_side(replay.names, group.advantages.numpy()),
            ),
            Quote("Prompt", group.prompt),
            *_completions(replay, group),
        ]
    return blocks


def _completions(replay: Replay, group: ShownGroup) -> list[Quote]:
    quotes = []
    for number, text in enumerate(group.completions):
        values = zip(replay.statistics.names, group.rewards[number].tolist(), strict=True)
        rewards = ", ".join(f"{name} {shown(value)}" for name, value in values)
        quotes.append(
            Quote(f"Completion {number + 1}: {rewards}", text, folded=len(group.completions) > OPEN_COMPLETIONS)
        )
    return quotes


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
    return Table("What was asked for, and what computed it", ("", "value"), [*given, *versions])
