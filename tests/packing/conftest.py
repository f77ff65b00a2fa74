import pytest

from grpo_plus.packing import tree


@pytest.fixture
def everything_is_shared(monkeypatch):
    """Let the least beginning that completions have in common go through the model once."""
    monkeypatch.setattr(tree, "LEAST_SAVED", 1)
