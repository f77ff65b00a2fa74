import re

import pytest
from jinja2 import UndefinedError

from grpo_plus.report.page import Figure, Heading, Quote, Section, Table, Text, to_html, to_markdown
from tests.report.hostile import HOSTILE


def page(*blocks):
    return to_html("A title", "A lead", [Section("One", blocks)])


def test_what_a_model_wrote_stays_text():
    html = page(
        Quote(HOSTILE, HOSTILE), Text(HOSTILE, (HOSTILE,)), Table(HOSTILE, (HOSTILE,), [(HOSTILE,)]), Heading(HOSTILE)
    )
    assert "<script" not in html
    assert "<img" not in html
    assert html.count("&lt;script&gt;alert(1)&lt;/script&gt;") == 8
    assert "\x00" not in html
    assert "\x1b" not in html


def test_numbers_that_do_not_exist_are_a_dash():
    html = page(Table("t", ("name", "x"), [("a", float("nan")), ("b", None), ("c", 0.12345), ("d", 12345)]))
    assert re.findall(r'<td class="n">(.*?)</td>', html) == ["n/a", "n/a", "0.123", "12,345"]


def test_markdown_has_the_tables_and_no_text_of_the_model():
    table = Table("Shares", ("name", "x"), [("a|b", 0.5)])
    text = to_markdown(
        "T", "L", [Section("S", [Text("t", ("one", "two")), table, Figure("f", "<svg/>"), Quote("q", "secret")])]
    )
    assert "| name | x |\n| --- | --- |\n| a\\|b | 0.500 |" in text
    assert "t\n\n- one\n- two" in text
    assert "secret" not in text


def test_words_between_backticks_are_names():
    html = page(Text("`a & b` is `c`, and ` alone is a sign"))
    assert "<p><code>a &amp; b</code> is <code>c</code>, and ` alone is a sign</p>" in html


def test_figures_that_follow_each_other_share_a_grid():
    first, second, third = (Figure(name, "<svg/>") for name in "abc")
    html = page(first, second, Heading("between"), third)
    each = [f"<figure><svg/><figcaption>{name}</figcaption></figure>" for name in "abc"]
    grids = [f'<div class="figures">{"".join(shown)}</div>' for shown in (each[:2], each[2:])]
    assert "<h3>between</h3>".join(grids) in html


def test_what_is_folded_opens_on_demand():
    html = page(Quote("q", "text", folded=True), Table("t", ("name",), [("a",)], folded=True), Quote("open", "text"))
    assert html.count("<details>") == 2
    assert "<summary>q</summary><pre>text</pre></details>" in html
    assert "<h4>open</h4><pre>text</pre>" in html


@pytest.mark.parametrize("row", [("a",), ("a", 1.0, 2.0)], ids=["short", "long"])
def test_a_row_that_does_not_fit_the_header_is_an_error(row):
    with pytest.raises((IndexError, UndefinedError)):
        page(Table("t", ("name", "x"), [row]))
