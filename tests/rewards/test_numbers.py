"""Numbers in text are read exactly, and whatever a model writes is read without an error."""

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_plus.rewards.numbers import LONGEST, last_number_in, whole_number_of


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("She pays $18.", 18),
        ("18.0 dollars", 18),
        ("**18**", 18),
        ("共18个", 18),
        ("the 18th", 18),
        ("a loss of -18", -18),
        ("−18", -18),  # the minus sign of Unicode
        ("-$18 or $-18", -18),
        ("20-2", 2),  # subtracts
        ("(20)-2", 2),
        ("3 - 2", 2),
        ("1,234,567.5", Fraction(2469135, 2)),
        ("1\u202f234", 1234),
        ("1{,}234", 1234),
        (r"1,\!234", 1234),
        ("1, 2, 3", 3),
        ("3/4", Fraction(3, 4)),
        (r"-\dfrac{3}{4}", Fraction(-3, 4)),
        (r"2\frac{1}{2}", Fraction(1, 2)),  # a mixed number is not read, and is not 21/2
        ("7 of 1/0", 7),
        (".5", Fraction(1, 2)),
        ("50%", 50),
        (r"50\%", 50),
        ("1.5e3", 1500),
        ("7 then 1e999999999", 7),
        ("x = y2 + b_12", None),
        ("٣٬٠٠٠", 3000),
        ("１８", 18),
        ("eighteen", None),
        ("", None),
    ],
)
def test_the_last_number_of_a_text(text, number):
    assert last_number_in(text) == number


def test_a_number_that_never_ends_is_passed_over():
    assert last_number_in("18, " + "9" * (LONGEST + 1)) == 18
    assert last_number_in("18, " + "9" * 100_000) == 18


@pytest.mark.parametrize(
    ("text", "number"),
    [
        (r" $18 \text{ dollars}$. ", 18),
        ("x = -3", -3),
        ("- 3", -3),
        (r"5\%", 5),
        (r"\frac{14}{3}", Fraction(14, 3)),
        (r"2\sqrt{3}", None),
        ("2x", None),
        ("3 or 5", None),
        ("18 apples", None),
        ("", None),
    ],
)
def test_a_text_that_is_one_number(text, number):
    assert whole_number_of(text) == number


@settings(max_examples=50, deadline=None)
@given(st.integers(-(10**9), 10**9), st.sampled_from(["{}", "{:,}", "{}.00", "so ${}$.", "#### {:,}", "\\({}\\)"]))
def test_a_whole_number_survives_every_common_spelling(number, spelling):
    assert last_number_in(spelling.format(number)) == number


@settings(max_examples=50, deadline=None)
@given(st.text(alphabet="0123456789-−.,/eE\\{}$%frac ٣１x", max_size=40))
def test_any_text_is_read_without_an_error(text):
    last = last_number_in(text)
    assert last is None or isinstance(last, Fraction)
    whole = whole_number_of(text)
    assert whole is None or isinstance(whole, Fraction)
