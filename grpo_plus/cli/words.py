"""Lists and tables on the command line, and texts for the terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

from grpo_plus.report.text import printable


def words(text: str | None) -> list[str] | None:
    """What commas separate; None where nothing was given."""
    return None if text is None else [word.strip() for word in text.split(",") if word.strip()]


def for_terminal(text: str) -> str:
    """The text without what a terminal would obey: names and messages may come from a file that somebody sent."""
    return printable(text).replace("\r", " ")


def keywords_by_estimator(given: Any, names: Sequence[str]) -> dict[str, Mapping[str, Any]]:
    """The hyper-parameters of each of `names`, {} where none are given.

    Raises:
        ValueError: `given` is not a table of tables, or is about another estimator.
    """
    if not isinstance(given, dict) or not all(isinstance(value, dict) for value in given.values()):
        raise ValueError("""--advantage_kwargs takes a table by estimator: '{"passk": {"k": 4}}'.""")
    for name in given:
        if name not in names:
            raise ValueError(f"--advantage_kwargs is about {name!r}, which is not in use. Add it to --estimators.")
    return {name: given.get(name, {}) for name in names}
