"""A data set's own columns as those that TRL and the reward functions read: `prompt` and `solution`."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from grpo_plus.registry import suggestion

PROMPT, SOLUTION = "prompt", "solution"
# A name in braces. {} and {1} stay, because prompts about mathematics are full of both: \boxed{}, \frac{1}{2}.
_NAMED = re.compile(r"\{([A-Za-z_]\w*)\}")


@dataclass(frozen=True)
class Columns:
    """Where rows have their question and answer, and how to ask. The fields are those of `OwnArguments`."""

    prompt_column: str | None = None
    answer_column: str | None = None
    prompt_template: str | None = None
    system_prompt: str | None = None

    @property
    def makes_prompts(self) -> bool:
        """Whether a prompt is other than the row's own."""
        return bool(self.prompt_column or self.prompt_template or self.system_prompt)

    def shape(self, rows: Any, *, chat: bool) -> Any:
        """The rows of one split with `prompt` and `solution`; every other column stays.

        Args:
            chat: whether the model has a chat template, so that text becomes a message of the user.

        Raises:
            ValueError: a name is no column, or the template asks nothing or gives the answer away.
        """
        if not (self.makes_prompts or self.answer_column):
            return rows
        self._check(_names(rows), chat)
        return rows.map(_shaped, fn_kwargs={"columns": self, "chat": chat})

    def _check(self, names: Sequence[str], chat: bool) -> None:
        for flag in ("prompt_column", "answer_column"):
            column = getattr(self, flag)
            if column and column not in names:
                raise ValueError(f"{flag}={column!r} is no column of the dataset.{suggestion(column, names)}")
        if self.prompt_template:
            _check_template(self.prompt_template, self, names)
        elif self.makes_prompts and not self.prompt_column and PROMPT not in names:
            raise ValueError(
                f"The dataset has no column {PROMPT!r}. Name another prompt_column.{suggestion('', names)}"
            )
        if self.system_prompt and not chat:
            raise ValueError("system_prompt needs a model with a chat template. Put the words into prompt_template.")


def _check_template(template: str, columns: Columns, names: Sequence[str]) -> None:
    named = _NAMED.findall(template)
    for column in named:
        if column not in names:
            raise ValueError(
                f"prompt_template names {{{column}}}, which is no column of the dataset.{suggestion(column, names)} "
                f"If these braces are text, put a space inside: {{ {column} }}."
            )
    if not named or (columns.prompt_column and columns.prompt_column not in named):
        wanted = columns.prompt_column or "question"
        raise ValueError(f"prompt_template={template!r} does not show the question. Put {{{wanted}}} into it.")
    if columns.answer_column in named:
        raise ValueError(f"prompt_template={template!r} shows the model its answer_column. Leave it out.")


def _shaped(row: dict[str, Any], columns: Columns, *, chat: bool) -> dict[str, Any]:
    """The columns that are new in a row."""
    new = {SOLUTION: row[columns.answer_column]} if columns.answer_column else {}
    return new | {PROMPT: _prompt(row, columns, chat)} if columns.makes_prompts else new


def _prompt(row: dict[str, Any], columns: Columns, chat: bool) -> Any:
    """Messages where the model has a chat template, or the column holds them; else text."""
    template = columns.prompt_template
    asked: Any = _filled(template, row) if template else _given(row, columns.prompt_column or PROMPT)
    if not isinstance(asked, list):
        asked = [{"role": "user", "content": str(asked)}] if chat else str(asked)
    if not columns.system_prompt:
        return asked
    others = [message for message in asked if message["role"] != "system"]
    return [{"role": "system", "content": columns.system_prompt}, *others]


def _filled(template: str, row: dict[str, Any]) -> str:
    def value(match: re.Match[str]) -> str:
        given = _given(row, match[1])
        if isinstance(given, list):
            raise ValueError(
                f"prompt_template takes text, but the column {match[1]!r} holds a list. For messages, give "
                "prompt_column, and system_prompt for instructions."
            )
        return str(given)

    return _NAMED.sub(value, template)


def _given(row: dict[str, Any], column: str) -> Any:
    if row[column] is None:
        raise ValueError(f"A row of the dataset has nothing in its column {column!r}. Remove such rows first.")
    return row[column]


def _names(rows: Any) -> list[str]:
    """The columns. A stream may not know them: then those of its first row."""
    return list(rows.column_names or next(iter(rows), {}))
