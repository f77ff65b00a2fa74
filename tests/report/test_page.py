import re

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
