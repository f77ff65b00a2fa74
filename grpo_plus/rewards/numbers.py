"""Numbers in text, exactly: 1,234.50 is the fraction 2469/2.

Read are a sign, thousands separators, decimals, simple fractions (3/4, LaTeX's too), powers of ten (1.5e3), and the
digits of every script. A percent sign is dropped, as data sets write 50 for 50%. Not read are mixed numbers, roots,
powers, words ("eighteen"), decimal commas, and digits that belong to a name, as in x2.
"""

import re
from collections.abc import Iterator
from fractions import Fraction

# Python refuses to read more than 4,300 digits, and a model may well repeat one forever.
LONGEST = 100

_NUMBER = re.compile(
    r"""
    (?:(?<![\w)\]}%])(?P<minus>-)[$€£¥]?)?        # in 10-8, it subtracts
    (?<![A-Za-z_\d])
    (?:
        (?P<top>\d++)/(?P<bottom>\d++)
      | (?P<decimal>
            (?:\d{1,3}(?:[,\u00a0\u202f\u2009]\d{3})++(?!\d) | \d++)(?:\.\d++)?+
          | \.\d++
        )
        (?:[eE](?P<power>[+-]?\d{1,2})(?!\w))?+
        (?![eE][+-]?\d)                           # a power too large to be meant
    )
    """,
    re.VERBOSE,
)
_SPELLINGS = str.maketrans({"−": "-", "－": "-", "٬": ",", "٫": ".", "．": "."})  # noqa: RUF001
_LATEX = (
    (re.compile(r"\\[!,]|\{\\,\}"), ""),  # 1,\!234 and 1\,234
    (re.compile(r"\{,\}"), ","),  # 1{,}234
    (re.compile(r"\\([$%])"), r"\1"),
    (re.compile(r"(?<=\d)(?=\\[dt]?frac)"), " "),  # 2\frac{1}{2} is not 21/2
    (re.compile(r"\\[dt]?frac\s*\{\s*(-?\d+)\s*\}\s*\{\s*(\d+)\s*\}"), r"\1/\2"),
)
WRAPPED = re.compile(r"\\(?:text|mathrm|textbf)\{([^{}]*)\}")  # words inside a formula
# Behind another such sign none begins: a model that writes dots for ever would cost the square of their number.
_AROUND = re.compile(r"^(?:[A-Za-z]\w*\s*=)?[\s$€£¥]*|(?<![\s$€£¥%.])[\s$€£¥%.]+$")


def last_number_in(text: str) -> Fraction | None:
    """The last number of the text; None where it has none.

    Examples:
        >>> last_number_in("5 * 3 = 15, so she pays $1,234.50.")
        Fraction(2469, 2)
    """
    last = None
    for last in _numbers(_plain(text)):  # noqa: B007
        pass
    return last


def whole_number_of(text: str) -> Fraction | None:
    r"""The number that the whole text is, but for a name before and a unit behind it; None for any other text.

    Examples:
        >>> whole_number_of(r"x = 18 \text{ dollars}"), whole_number_of(r"2\sqrt{3}")
        (Fraction(18, 1), None)
    """
    bare = _AROUND.sub("", _plain(WRAPPED.sub("", text)))
    bare = re.sub(r"^-[$€£¥\s]+", "-", bare)
    match = _NUMBER.fullmatch(bare)
    return None if match is None else _value(match)


def _plain(text: str) -> str:
    """The text with one spelling for minus, separators and LaTeX's fractions."""
    text = text.translate(_SPELLINGS)
    for pattern, replacement in _LATEX:
        text = pattern.sub(replacement, text)
    return text


def _numbers(text: str) -> Iterator[Fraction]:
    for match in _NUMBER.finditer(text):
        value = _value(match)
        if value is not None:
            yield value


def _value(match: re.Match[str]) -> Fraction | None:
    """None for a number that is too long, or divided by zero."""
    if len(match[0]) > LONGEST:
        return None
    if match["top"] is not None:
        bottom = int(match["bottom"])
        value = Fraction(int(match["top"]), bottom) if bottom else None
    else:
        digits = re.sub(r"[^\d.]", "", match["decimal"])
        value = Fraction(f"{digits if digits[0] != '.' else '0' + digits}e{match['power'] or 0}")
    return -value if value is not None and match["minus"] else value
