"""docs/troubleshooting.md quotes messages that the code has, and explains every warning of RewardHealthCallback."""

import ast
import re
from pathlib import Path

import pytest

import grpo_plus
from grpo_plus.callbacks import reward_health

PACKAGE = Path(grpo_plus.__file__).parent
PAGE = PACKAGE.parent / "docs" / "troubleshooting.md"
QUOTES = re.findall(r"^> (.+)$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
GAP = "…"


class Messages(ast.NodeVisitor):
    """The strings of a file, with a gap for each value that is put in."""

    def __init__(self) -> None:
        self.found: set[str] = set()

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        self.found.add("".join(part.value if isinstance(part, ast.Constant) else GAP for part in node.values))

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, str):
            self.found.add(node.value)


def messages_of(path: Path) -> set[str]:
    visitor = Messages()
    visitor.visit(ast.parse(path.read_text(encoding="utf-8")))
    return {message for message in visitor.found if " " in message}


@pytest.fixture(scope="module")
def messages() -> set[str]:
    return {message for path in PACKAGE.rglob("*.py") for message in messages_of(path)}


def is_quoted_from(quote: str, message: str) -> bool:
    """Whether the pieces of the quote stand in the message, in their order."""
    position = 0
    for piece in quote.split(GAP):
        position = message.find(piece.strip(" ."), position)
        if position < 0:
            return False
        position += len(piece.strip(" ."))
    return True


def test_every_quoted_message_is_in_the_code(messages):
    assert len(QUOTES) > 25
    assert [quote for quote in QUOTES if not any(is_quoted_from(quote, message) for message in messages)] == []


def test_every_warning_of_the_health_callback_is_quoted():
    advice = re.compile(r"\. (Try|Check|Raise|Sample|Set) ")
    warnings = [text for text in messages_of(Path(reward_health.__file__)) if advice.search(text)]
    assert len(warnings) > 7
    assert [text for text in warnings if not any(is_quoted_from(quote, text) for quote in QUOTES)] == []
