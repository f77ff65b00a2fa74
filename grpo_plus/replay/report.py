"""What a replay says, as a report: report.html, results.csv, results.parquet and summary.md.

The first screen has the advice. Estimators that ask for the same update share a row, and details open on demand
(`details.py`).
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from grpo_plus.replay.alike import Family
from grpo_plus.replay.details import details, method
from grpo_plus.replay.in_words import (
    COMMAND_NOTE,
    LIMIT,
    advice_lines,
    apart_lines,
    headline,
    reference,
)
from grpo_plus.replay.result import Replay, ShownGroup
from grpo_plus.report.figures import heatmap, side_by_side, stacked
from grpo_plus.report.files import write_report
from grpo_plus.report.page import Answer, Beside, Block, Figure, Fold, Number, Quote, Section, Table, Text, shown

FOCUS = 6  # rows of estimators that are shown without being asked for


def write_replay(replay: Replay, folder: str | Path) -> list[Path]:
    """Write the report and its data into `folder`, each file whole or not at all; returns their paths."""
    return write_report(folder, *document(replay), replay.rows())


def document(replay: Replay) -> tuple[str, str, list[Section]]:
    """Title, lead and sections."""
    lead = "The completions and rewards of one run, under every advantage estimator. Nothing was trained."
    sections = [
        Section("Advice", _advice(replay)),
        Section("What sets the estimators apart", _apart(replay)),
        Section("Who agrees, and who drives the update", _figures(replay)),
        Section("Groups side by side", _groups(replay)),
        Section("Details, the log, and the method", [*details(replay), *method(replay)]),
    ]
    return f"Replay of {Path(replay.rollouts.run_dir).resolve().name}", lead, sections


def _advice(replay: Replay) -> list[Block]:
    advice, evidence = replay.advice, replay.evidence
    replayed = len(replay.recipes) - len(replay.refused)
    numbers = (
        Number(f"{replay.statistics.completions:,}", f"completions in groups of {evidence.size}"),
        Number(f"{evidence.dead:.0%}", "groups with equal rewards"),
        Number(
            str(len(evidence.rewards)), "reward that counts" if len(evidence.rewards) == 1 else "rewards that count"
        ),
        Number(str(len(replay.families)), f"different updates, of {replayed} estimators"),
    )
    answer = Answer(
        verdict=headline(advice),
        settled=not advice.too_small,
        title="Too few groups" if advice.too_small else "Worth comparing" if advice.candidates else "No change",
        numbers=numbers,
        reasons=tuple(advice_lines(replay)),
        action="Train them on several seeds:" if advice.candidates else "",
        command=replay.next_command if advice.candidates else "",
    )
    return [answer, Text(f"{LIMIT} {COMMAND_NOTE}" if advice.candidates else LIMIT)]


def _apart(replay: Replay) -> list[Block]:
    focus = _focus(replay)
    caption = "Updates that differ by a factor share a row: = to rounding, ≈ to a thousandth. Shares: 0 to 1."
    blocks: list[Block] = [Text("", tuple(apart_lines(replay))), _table(replay, focus, caption)]
    if len(focus) < len(replay.families):
        caption = f"All {len(replay.families)} updates"
        blocks.append(Fold(caption, [_table(replay, replay.families, caption)]))
    return blocks


def _table(replay: Replay, families: Sequence[Family], caption: str) -> Table:
    """A row per family: how its update differs from that of the run."""
    s, names = replay.statistics, replay.names
    base = names.index(reference(replay))
    columns = {
        f"ranks like `{names[base]}`": s.correlation()[base],
        "pushed the other way": s.flips()[base],
        "groups without update": s.dead(),
        "effective samples": s.effective(),
        "mean |A|": s.mean_size(),
    }
    if len(s.names) > 1:
        shares = s.reward_share()
        leading = int(shares[base].nan_to_num().argmax())
        columns[f"driven by `{s.names[leading]}`"] = shares[:, leading]
    rows = [
        (family.label, _word(replay, family), *(column[family.index].item() for column in columns.values()))
        for family in families
    ]
    return Table(caption, ("estimators", "advice", *columns), rows)


def _word(replay: Replay, family: Family) -> str:
    """What the advice says of a family."""
    advice, names = replay.advice, set(family.names)
    if {replay.own, advice.current} & names:
        return "the run's own" if not advice.assumed else "compare with it"
    if set(advice.candidates) & names:
        return "compare"
    return "spoken against" if set(advice.unsuited) & names else "none"


def _figures(replay: Replay) -> list[Block]:
    s, families = replay.statistics, replay.families
    correlation = _of_families(s.correlation().numpy(), families)
    order = _by_likeness(correlation)
    names = [families[number].short for number in order]
    low = np.floor(float(np.nanmin(correlation, initial=0.9)) * 10) / 10
    drawn: list[Block] = [
        Figure(
            "Rank correlation (Spearman) of the advantages of a batch. Bright: the two rank the completions alike.",
            heatmap(names, correlation[np.ix_(order, order)], label="rank correlation", low=low, high=1.0),
        )
    ]
    if len(s.names) > 1:
        shares = {family.short: line for family, line in replay.shares_of_rewards.items()}
        drawn.append(Figure("Share of Σ|A| that each reward accounts for.", stacked(shares, label="share of Σ|A|")))
    if by_task := {family.short: line for family, line in replay.shares_of_tasks.items()}:
        drawn.append(Figure("Share of Σ|A| by task.", stacked(by_task, label="share of Σ|A| by task")))
    return drawn


def _of_families(matrix: np.ndarray, families: list[Family]) -> np.ndarray:
    kept = [family.index for family in families]
    return matrix[np.ix_(kept, kept)]


def _by_likeness(correlation: np.ndarray) -> list[int]:
    """An order in which like stands beside like: along the direction in which the rows differ most."""
    filled = np.nan_to_num(correlation)
    centered = filled - filled.mean(0)
    return np.argsort(np.linalg.svd(centered)[0][:, 0], kind="stable").tolist()


def _groups(replay: Replay) -> list[Block]:
    """The first group open under the estimators in focus; its completions and the other groups on demand."""
    every, focus = replay.families, _focus(replay)
    first, *others = replay.groups
    drawn = [_side_by_side(first, every)] if len(focus) < len(every) else []
    return [
        _side_by_side(first, focus),
        Quote("Prompt", first.prompt),
        Fold("Its completions, and all estimators", [*drawn, *_completions(replay, first)]),
        *(
            Fold(
                f"Step {group.step}, group {group.group}",
                [_side_by_side(group, every), Quote("Prompt", group.prompt), *_completions(replay, group)],
            )
            for group in others
        ),
    ]


def _focus(replay: Replay) -> list[Family]:
    """The run's own estimator, the candidates, those spoken against, and those that rank least like the run's."""
    advice = replay.advice
    base = replay.names.index(reference(replay))
    alike = replay.statistics.correlation()[base].nan_to_num().tolist()
    asked: list[set[str | None]] = [
        {replay.own, advice.current, replay.names[base]},
        set(advice.candidates),
        set(advice.unsuited),
    ]

    def first(family: Family) -> tuple[int, float]:
        names = set(family.names)
        return next((k for k, wanted in enumerate(asked) if wanted & names), len(asked)), alike[family.index]

    return sorted(replay.families, key=first)[:FOCUS]


def _side_by_side(group: ShownGroup, families: Sequence[Family]) -> Figure:
    return Figure(
        f"Step {group.step}, group {group.group}: the advantage of each completion, in the color of its share of the "
        f"row's largest. Disagreement {group.disagreement:.2f}, in root mean squares.",
        side_by_side(
            [family.short for family in families], group.advantages[[family.index for family in families]].numpy()
        ),
    )


def _completions(replay: Replay, group: ShownGroup) -> list[Block]:
    quotes = []
    for number, text in enumerate(group.completions):
        values = zip(replay.statistics.names, group.rewards[number].tolist(), strict=True)
        rewards = ", ".join(f"{name} {shown(value)}" for name, value in values)
        quotes.append(Quote(f"{number + 1}: {rewards}", text))
    return [Beside("Completions", quotes)]
