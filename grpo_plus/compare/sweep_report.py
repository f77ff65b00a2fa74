"""What a report says of a sweep: which setting each variant is judged at, how it was chosen, and where to look next."""

from collections.abc import Sequence
from itertools import groupby

from grpo_plus.compare.choices import Choices, Edge, Trial
from grpo_plus.compare.comparison import Comparison
from grpo_plus.compare.sweep import shown
from grpo_plus.report.page import Block, Figure, Table, Text
from grpo_plus.report.sweeps import Tried, by_value
from grpo_plus.report.text import count

OPEN_ROWS = 12  # of a table that is shown without being asked for


def choice_lines(choices: Choices | None) -> list[str]:
    """The chosen settings, and what stands in the way of a better choice, as sentences. None without a sweep."""
    if choices is None:
        return []
    settings = len(choices.sweep.settings)
    at = "; ".join(f"`{label}` at {shown(candidate.setting)}" for label, candidate in choices.chosen.items())
    lines = [
        f"Each variant is judged at its own best of {settings} settings, chosen in other trainings: {at or 'none'}."
    ]
    failed = [f"`{t.candidate.label}` at {shown(t.candidate.setting)}" for t in choices.trials if not t.by_seed]
    if failed:
        lines.append(f"Not eligible, because a training is missing or nothing was judged: {'; '.join(failed)}.")
    return [*lines, *_edge_lines(choices)]


def wider_flags(choices: Choices) -> str:
    """The sweep with values beyond its edges, as flags of `grpo-plus compare`; empty without an edge."""
    if not choices.edges:
        return ""
    grid = {
        name: sorted([*values, *(edge.wider for edge in choices.edges if edge.field == name)])
        for name, values in choices.sweep.grid.items()
    }
    return " ".join(f"--sweep {name}={','.join(map(str, values))}" for name, values in grid.items())


def sweep_blocks(comparison: Comparison) -> list[Block]:
    """How the settings were chosen, drawn and in figures; nothing without a sweep."""
    choices = comparison.choices
    if choices is None:
        return []
    figures = [_figure(choices, name) for name in choices.sweep.grid]
    return [Text(_method(choices, comparison.seeds)), *figures, _table(choices)]


def _edge_lines(choices: Choices) -> list[str]:
    lines = [_edge_line(edge) for edge in choices.edges]
    if lines:
        lines.append(f"The best may lie beyond the sweep. Repeat the command with `{wider_flags(choices)}`.")
    return lines


def _edge_line(edge: Edge) -> str:
    names = ", ".join(f"`{label}`" for label in edge.labels)
    further = "larger" if edge.side == "largest" else "smaller"
    return f"The best {edge.field} of {names} is the {edge.side} that was tried, {edge.value}. Try {further} values."


def _method(choices: Choices, judging: Sequence[int]) -> str:
    choosing = choices.sweep.seeds
    return (
        f"Each variant was trained at every setting on {_seeds(choosing)}, and is judged at the setting with the "
        f"highest mean `{choices.score}` there; of equal means, at the first. The choice read one half of the held-out "
        "items, drawn at random once and for all. Everything outside this section is about other trainings, on "
        f"{_seeds(judging)}, and about the other half of the items. So neither a lucky training nor an item that "
        "happens to suit makes a chosen setting look better than it is. The price is half of the items. A choice rests "
        f"on {count(len(choosing), 'training')} per setting, and may miss the best one where several are close."
    )


def _seeds(seeds: Sequence[int]) -> str:
    return f"{'seed' if len(seeds) == 1 else 'seeds'} {', '.join(map(str, seeds))}"


def _table(choices: Choices) -> Table:
    fields = list(choices.sweep.grid)
    rows = [
        (
            trial.candidate.label,
            *(str(trial.candidate.setting[name]) for name in fields),
            trial.mean,
            "chosen" if trial.chosen else "",
        )
        for trial in choices.trials
    ]
    caption = f"Mean `{choices.score}` on the choosing half of the items, {_seeds(choices.sweep.seeds)}"
    return Table(caption, ("variant", *fields, "mean", "choice"), rows, folded=len(rows) > OPEN_ROWS)


def _figure(choices: Choices, field: str) -> Block:
    labels = groupby(choices.trials, key=lambda trial: trial.candidate.label)
    series = {label: _tried(list(trials), field) for label, trials in labels}
    others = ", the other fields at their best for it" if len(choices.sweep.grid) > 1 else ""
    caption = f"`{choices.score}` on the choosing half by {field}{others}. A dot for each seed, a ring for the choice."
    return Figure(caption, by_value(series, field=field, score=choices.score))


def _tried(trials: Sequence[Trial], field: str) -> Tried:
    """One variant's best trial at each value of the field."""
    best: dict[float, Trial] = {}
    for trial in sorted(trials, key=lambda trial: trial.candidate.setting[field]):
        value = trial.candidate.setting[field]
        if trial.by_seed and (value not in best or trial.mean > best[value].mean):
            best[value] = trial
    chosen = next((trial.candidate.setting[field] for trial in trials if trial.chosen), None)
    return Tried(list(best), [trial.by_seed for trial in best.values()], chosen)
