"""Which script a completion is written in. Of the language itself, only this can be told without a model.

A script is reliable and is not a language: English and German are both "latin". It does tell a model that falls from
English into Chinese or Russian. Japanese is ["hiragana", "katakana", "cjk"]. Letters of formulas count as well: π is
Greek.
"""

import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from grpo_plus.rewards.completions import Completion, text_of

# The first words of Unicode's names for the letters of the scripts that most languages are written in.
SCRIPTS = ("arabic", "armenian", "bengali", "cjk", "cyrillic", "devanagari", "ethiopic", "georgian", "greek",
           "gujarati", "hangul", "hebrew", "hiragana", "kannada", "katakana", "khmer", "lao", "latin", "malayalam",
           "myanmar", "sinhala", "tamil", "telugu", "thai")  # fmt: skip
LETTERS = ("Lu", "Ll", "Lt", "Lo")


def script_share(completions: Sequence[Completion], *, script: str | Sequence[str] = "latin", **_: Any) -> list[float]:
    """Share of the letters that belong to `script`. 1 without letters: nothing is in another script then.

    Examples:
        >>> script_share(["x = 18", "так 18", "18"])
        [1.0, 0.0, 1.0]

    Args:
        script: one of `SCRIPTS`, or several.
    """
    wanted = {script} if isinstance(script, str) else set(script)
    if unknown := sorted(wanted - set(SCRIPTS)):
        raise ValueError(f"script={unknown[0]!r} of script_share is no script. Known: {', '.join(SCRIPTS)}.")
    return [_share(text_of(completion), wanted) for completion in completions]


def _share(text: str, wanted: set[str]) -> float:
    scripts = [script for character in text if (script := _script_of(character))]
    return sum(script in wanted for script in scripts) / len(scripts) if scripts else 1.0


@lru_cache(maxsize=4096)
def _script_of(character: str) -> str:
    """The script of a letter, from Unicode's name for it; "" for what is no letter, such as a digit or an accent."""
    if unicodedata.category(character) not in LETTERS:
        return ""
    plain = unicodedata.normalize("NFKC", character)[0]  # fullwidth and mathematical letters are of their script
    return unicodedata.name(plain, "unknown").partition(" ")[0].lower()
