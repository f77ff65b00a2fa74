"""Lists and tables on the command line."""

from collections.abc import Mapping, Sequence
from typing import Any


def words(text: str | None) -> list[str] | None:
    """What commas separate; None where nothing was given."""
    return None if text is None else [word.strip() for word in text.split(",") if word.strip()]


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
