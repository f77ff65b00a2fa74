"""The reports in a real browser: Playwright drives the system's Chromium."""

import re
import shutil

import pytest

from grpo_plus.compare.report import write_comparison
from grpo_plus.replay import Rollouts, replay, write_replay
from tests.compare.test_report import comparison_of, hostile_comparison, noisy
from tests.replay.logs import hostile_log, write_rewards
from tests.replay.test_advice import write_apart

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (the extra dev has it)")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine (apt-get install chromium)")


OPEN_ALL = "document.querySelectorAll('details').forEach(element => element.open = true)"
CLOSE_ALL = OPEN_ALL.replace("true", "false")


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module", params=["replay", "comparison"])
def report(request, tmp_path_factory):
    """Every estimator, long names, tasks, and completions, labels and tracebacks that try to be more than text."""
    folder = tmp_path_factory.mktemp("mit Leerzeichen 結果")
    if request.param == "comparison":
        return write_comparison(hostile_comparison(folder), folder)[0]
    hostile_log(folder)
    long = {"prompt": ["x" * 3000] * 2 + ["y"] * 2, "task": ["a" * 60] * 2 + ["b"] * 2}
    write_rewards(folder, 2, {"<i>$r$": [1.0, 0.5, 0.5, 0.0], "b": [0.0, 0.0, 0.25, 1.0]}, advantage=[0.0] * 4, **long)
    return write_replay(replay(Rollouts(folder)), folder)[0]


@pytest.fixture(scope="module")
def open_page(browser, report):
    """Opens the report and collects what the browser complains about, and what the page asks the network for.

    A page stays open for the tests that follow, with everything folded again.
    """
    pages = {}

    def open_it(width, scheme="light"):
        if (width, scheme) not in pages:
            pages[width, scheme] = opened(width, scheme)
        pages[width, scheme].evaluate(CLOSE_ALL)
        return pages[width, scheme]

    def opened(width, scheme):
        page = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme).new_page()
        page.complaints, page.requested = [], []
        page.on("console", lambda message: page.complaints.append(message.text))
        page.on("pageerror", lambda error: page.complaints.append(str(error)))
        page.on("dialog", lambda dialog: (page.complaints.append("dialog"), dialog.dismiss()))
        page.on("request", lambda request: page.requested.append(request.url))
        page.goto(report.as_uri())
        return page

    yield open_it
    for page in pages.values():
        page.context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
def test_it_opens_without_complaint_and_without_scrolling_sideways(open_page, report, width, scheme):
    page = open_page(width, scheme)
    page.evaluate(OPEN_ALL)
    assert page.complaints == []
    assert page.requested == [report.as_uri()]
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    ends = "[...document.querySelectorAll('main *')].map(e => e.getBoundingClientRect()).map(r => r.right)"
    assert page.evaluate(f"Math.max(...{ends})") <= width


def test_the_first_screen_has_the_answer_and_the_next_command(browser, tmp_path):
    scores = {label: noisy(mean, 3) for label, mean in {"grpo": 0.3, "dr_grpo": 0.5, "gdpo": 0.8}.items()}
    written = write_comparison(comparison_of(tmp_path, scores), tmp_path, command=lambda step: "grpo-plus train " * 9)
    for width in (1280, 400):
        page = browser.new_page(viewport={"width": width, "height": 800})
        page.goto(written[0].as_uri())
        boxes = [page.locator(name).first.bounding_box() for name in (".verdict", ".numbers", ".action", ".command")]
        page.close()
        assert max(box["y"] + box["height"] for box in boxes) <= 800
        assert boxes[0]["y"] + boxes[0]["height"] < 450


def test_every_figure_is_drawn(open_page):
    page = open_page(400)
    page.evaluate(OPEN_ALL)
    figures = page.locator("figure svg")
    assert figures.count() >= 8
    for figure in figures.all():
        box = figure.bounding_box()
        assert box["width"] > 300
        assert box["height"] > 60
        assert figure.locator("path, rect").count() > 3
        # The matrices' cells hold the smallest: 6 points of 3.8 inches, on a screen that shows the whole width.
        heights = figure.evaluate(
            "svg => [...svg.querySelectorAll('text')].map(t => parseFloat(getComputedStyle(t).fontSize))"
            ".map(size => size * svg.getBoundingClientRect().width / svg.viewBox.baseVal.width)"
        )
        assert min(heights) > 7


def test_markup_in_completions_stays_text(open_page):
    page = open_page(1280)
    shown = page.locator("pre").all_inner_texts()
    shown += page.locator("details pre").all_text_contents()
    assert any("</pre><script>alert(1)</script><img src=x onerror=alert(2)>" in text for text in shown)
    assert page.locator("script, img, i, b").count() == 0


def test_dark_is_dark(open_page):
    brightness = {}
    for scheme in ("light", "dark"):
        page = open_page(1280, scheme)
        colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
        ink = page.evaluate("getComputedStyle(document.querySelector('figure text')).fill")
        brightness[scheme] = [sum(map(int, text[4:-1].split(","))) for text in (colour, ink)]
    assert brightness["light"][0] > 700 > 200 > brightness["light"][1]
    assert brightness["dark"][0] < 200 < 600 < brightness["dark"][1]


# Of every element with text of its own: the contrast of its ink with what is painted behind it (WCAG 2, 1.4.3).
CONTRASTS = """() => {
  const light = ([r, g, b]) => [r, g, b].map(v => v / 255)
    .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, k) => sum + v * [0.2126, 0.7152, 0.0722][k], 0);
  const color = text => (text.match(/[\\d.]+/g) || [0, 0, 0, 0]).map(Number);
  const behind = e => { const c = color(getComputedStyle(e).backgroundColor);
    return c.length < 4 || c[3] > 0 ? c : behind(e.parentElement); };
  return [...document.body.querySelectorAll('*')].filter(e => !e.closest('defs')
      && [...e.childNodes].some(n => n.nodeType == 3 && n.data.trim()))
    .map(e => { const style = getComputedStyle(e), ink = color(e.closest('svg') ? style.fill : style.color);
      const [a, b] = [light(ink), light(behind(e.closest('figure') || e))].sort((x, y) => y - x);
      return [(a + 0.05) / (b + 0.05), e.tagName + ': ' + e.textContent.slice(0, 40)]; });
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_stands_out_from_what_is_behind_it(open_page, scheme):
    page = open_page(1280, scheme)
    page.evaluate(OPEN_ALL)
    contrasts = page.evaluate(CONTRASTS)
    assert len(contrasts) > 100
    # Figures within the cells of a matrix take their ink from the cell.
    weak = [text for contrast, text in contrasts if contrast < 4.5 and not re.fullmatch(r"text: -?\d\.\d\d", text)]
    assert weak == []


def test_the_keyboard_reaches_everything_that_does_something(open_page):
    page = open_page(1280)
    summary = page.locator("summary").first
    summary.focus()
    page.keyboard.press("Enter")
    assert summary.evaluate("element => element.parentElement.open")
    page.evaluate(OPEN_ALL)
    wanted = page.locator("a[href], summary, [tabindex='0']").count()
    page.evaluate("reached = new Set(); addEventListener('focusin', event => reached.add(event.target))")
    page.evaluate("document.activeElement.blur()")
    for _ in range(wanted + 5):
        page.keyboard.press("Tab")
    assert page.evaluate("reached.size") >= wanted


def test_it_takes_few_screens_while_nothing_is_opened(open_page, request):
    screens = {"replay": 5, "comparison": 8}[request.node.callspec.params["report"]]
    assert open_page(1280).evaluate("document.documentElement.scrollHeight") <= screens * 800


def test_a_replays_first_screen_has_the_advice_and_the_command(browser, tmp_path):
    page = browser.new_page(viewport={"width": 1280, "height": 800})
    page.goto(write_replay(replay(Rollouts(write_apart(tmp_path)), ["grpo", "gdpo"]), tmp_path)[0].as_uri())
    boxes = [page.locator(name).first.bounding_box() for name in (".verdict", ".answer li", ".command")]
    page.close()
    assert max(box["y"] + box["height"] for box in boxes) <= 800
