import re

import pytest
from jinja2 import UndefinedError

from grpo_plus.report.page import (
    Answer,
    Beside,
    Command,
    Figure,
    Fold,
    Heading,
    Number,
    Quote,
    Section,
    Table,
    Text,
    to_html,
    to_markdown,
)
from tests.report.hostile import HOSTILE


def page(*blocks):
    return to_html("A title", "A lead", [Section("One", blocks)])


def test_what_a_model_wrote_stays_text():
    html = page(
        Quote(HOSTILE, HOSTILE),
        Text(HOSTILE, (HOSTILE,)),
        Table(HOSTILE, (HOSTILE,), [(HOSTILE,)]),
        Heading(HOSTILE),
        Answer(HOSTILE, True, HOSTILE, (Number(HOSTILE, HOSTILE),), (HOSTILE,), HOSTILE, HOSTILE),
        Beside(HOSTILE, [Quote(HOSTILE, HOSTILE)]),
        Fold(HOSTILE, [Command(HOSTILE)]),
        Table("t", ("a", HOSTILE, "c", "d", "e"), [("f", 1, 2, 3, 4)]),
    )
    assert "<script" not in html
    assert "<img" not in html
    assert html.count("&lt;script&gt;alert(1)&lt;/script&gt;") == 8 + 7 + 3 + 2 + 2
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
    assert '<summary>q</summary><div class="inside"><pre>text</pre></div></details>' in html
    assert "<h4>open</h4><pre>text</pre>" in html


def test_an_answer_is_in_both_forms_with_the_command_as_it_is_typed():
    answer = Answer(
        "`a` is ahead.", reasons=("One.", "Two."), action="Next:", command="grpo-plus compare --x 'a|b' `c`"
    )
    html = page(answer)
    assert '<p class="verdict"><code>a</code> is ahead.</p>' in html
    assert "<code>grpo-plus compare --x &#39;a|b&#39; `c`</code>" in html
    assert 'class="answer settled"' in html
    assert 'class="answer"' in page(Answer("Nothing is known.", settled=False))
    text = to_markdown("T", "L", [Section("S", [answer, Fold("More", [Text("inside")])])])
    assert "**`a` is ahead.**\n\n- One.\n- Two.\n\nNext:\n\n    grpo-plus compare --x 'a|b' `c`\n" in text
    assert "### More\n\ninside" in text


def test_a_box_that_may_scroll_is_reachable_by_keyboard_and_a_short_one_is_no_stop():
    html = page(Beside("b", [Quote("long", "x " * 150), Quote("many lines", "x\n" * 9), Quote("short", "x" * 90)]))
    assert html.count('<pre tabindex="0">') == 2
    assert f"<pre>{'x' * 90}</pre>" in html


def test_figures_inside_a_fold_share_a_grid_too():
    html = page(Fold("f", [Figure("a", "<svg/>"), Figure("b", "<svg/>")]))
    assert html.count('<div class="figures">') == 1
    assert html.count("<figure>") == 2


@pytest.mark.parametrize("row", [("a",), ("a", 1.0, 2.0)], ids=["short", "long"])
def test_a_row_that_does_not_fit_the_header_is_an_error(row):
    with pytest.raises((IndexError, UndefinedError)):
        page(Table("t", ("name", "x"), [row]))
