"""The steps of a batch's completions, of all processes: what reward functions reported, and the turns of a rollout."""

from collections.abc import Mapping
from typing import Any

from accelerate.utils import gather_object
from trl import GRPOTrainer

from grpo_plus.advantages import ESTIMATORS
from grpo_plus.config.fields import GRPOPlusConfig
from grpo_plus.report.completions import STATES, STEP_COLUMNS
from grpo_plus.trainer.names import reported, set_reported
from grpo_plus.trainer.rollouts.digests import as_text, digest
from grpo_plus.trainer.rollouts.turns import PROMPT, Turns, turns_of

TURN_COLUMNS = (*STEP_COLUMNS, STATES)


def reads_turns(config: GRPOPlusConfig) -> bool:
    """Whether the estimator compares the turns of the completions."""
    name = config.advantage_estimator
    return name is not None and ESTIMATORS[name].needs_turns


def own_turns(
    trainer: GRPOTrainer, prompts: list, completions: list, ids: list[list[int]], masks: list[list[int]] | None
) -> list[Turns]:
    """Turns of this process's completions.

    Args:
        prompts: what the completions began from, with an environment's reply to its reset.
        ids: the completions' tokens.
        masks: 0 where a tool or an environment wrote. None where the policy wrote everything.
    """
    masks = [[1] * len(row) for row in ids] if masks is None else masks
    starts = [digest(prompt) for prompt in prompts] if trainer.environments else [PROMPT] * len(prompts)
    return [
        turns_of(row, mask, completion, start=start)
        for row, mask, completion, start in zip(ids, masks, completions, starts, strict=True)
    ]


def gathered_steps(trainer: GRPOTrainer, inputs: list[dict[str, Any]], turns: list[Turns] | None) -> tuple | None:
    """Steps of all processes, as `Steps.from_rows` takes them; None where no completion has any.

    Args:
        inputs: this process's rows of the dataset, with what `rollout_func` added.
        turns: of this process's completions. None where no estimator asks for turns: reward functions then report both
            the rewards and the ends of steps.
    """
    return _reported_steps(trainer, len(inputs)) if turns is None else _turns(trainer, inputs, turns)


def _reported_steps(trainer: GRPOTrainer, rows: int) -> tuple[list, list] | None:
    """What the reward functions of all processes passed to `log_extra` as step rewards and ends; None for none."""
    columns = {name: column for name in STEP_COLUMNS if (column := reported(trainer, name)) is not None}
    present = len(columns) == len(STEP_COLUMNS)
    problem = _unequal(columns, rows) if present else None
    usable = present and problem is None
    # Every process takes part, whether its own completions have steps or not: a gather waits for all.
    pairs = _of_everyone(list(zip(*columns.values(), strict=True)) if usable else [None] * rows, problem)
    if not any(pairs):
        return None
    return [pair and pair[0] for pair in pairs], [pair and pair[1] for pair in pairs]


def _turns(trainer: GRPOTrainer, inputs: list[dict[str, Any]], turns: list[Turns]) -> tuple:
    """Rewards, ends and states of the turns of all processes. The table of completions gets them, too.

    A reward function reports any of the three by `log_extra`, or a column of the rows holds it. Where neither does, the
    ends and the states are those of `turns`, and the rewards None.
    """
    given = {name: column for name in TURN_COLUMNS if (column := _given(trainer, inputs, name)) is not None}
    problem, own = _unequal(given, len(inputs)), []
    if problem is None:
        try:
            own = [
                _merged(row, found, {name: column[row] for name, column in given.items()})
                for row, found in enumerate(turns)
            ]
        except ValueError as error:
            problem = str(error)
    columns = tuple(list(column) for column in zip(*_of_everyone(own, problem), strict=True))
    first = trainer.accelerator.process_index * len(inputs)
    for name, column in zip(TURN_COLUMNS, columns, strict=True):
        if any(row is not None for row in column):
            set_reported(trainer, name, column[first : first + len(inputs)])
    return columns


def _given(trainer: GRPOTrainer, inputs: list[dict[str, Any]], name: str) -> list | None:
    """What a reward function reported under this name, or else a column of the rows; None for neither."""
    if (column := reported(trainer, name)) is not None:
        return column
    return [row.get(name) for row in inputs] if any(name in row for row in inputs) else None


def _merged(row: int, turns: Turns, given: Mapping[str, Any]) -> tuple[Any, Any, list[str]]:
    """Rewards, ends and states of one completion: what was given, and else what was found."""
    rewards, ends, states = (given.get(name) for name in TURN_COLUMNS)
    if states is None and ends is not None:
        raise ValueError(
            f"Completion {row} has step_ends {ends!r} and no step_states. Give the states that these turns start from, "
            "too, or leave out step_ends."
        )
    ends = turns.ends if ends is None else ends
    return rewards, ends, turns.states if states is None else _texts(row, states)


def _texts(row: int, states: Any) -> list[str]:
    """States as texts, which a table can hold and a log can give back: equal states have equal texts."""
    try:
        if isinstance(states, str):
            raise TypeError("is one text and no list")
        return [state if isinstance(state, str) else as_text(state) for state in states]
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"Completion {row} has step_states {states!r}, which cannot be compared ({error}). Give a list of one "
            "state per turn: a text, a number, an image, or lists and dictionaries of these."
        ) from error


def _unequal(columns: Mapping[str, list], rows: int) -> str | None:
    """What is wrong with columns of another length than the batch; None for nothing."""
    for name, column in columns.items():
        if len(column) != rows:
            return (
                f"log_extra({name!r}, ...) got {len(column)} lists for {rows} completions. Give one for each "
                "completion, from one reward function, and an empty one where there are no steps."
            )
    return None


def _of_everyone(rows: list, problem: str | None) -> list:
    """The rows of all processes, in order.

    Raises:
        ValueError: a process has a problem. All processes raise it.
    """
    everyone = gather_object([(rows, problem)])
    for rank, (_, found) in enumerate(everyone):
        if found:
            raise ValueError(problem or f"Process {rank}: {found}")
    return [row for process, _ in everyone for row in process]
