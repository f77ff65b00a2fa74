import json
import sys
from pathlib import Path

import pytest

from grpo_plus.demo.tiny import tiny_model, tiny_tokenizer

REWARDS = "def vowels(completions, **_):\n    return [float(sum(c in 'aeiou' for c in text)) for text in completions]\n"


@pytest.fixture(autouse=True)
def _finders(monkeypatch):
    """A command lets modules of its working directory be found; the next test has another one."""
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))


def make_workplace(folder: Path) -> None:
    """A model, a dataset and a reward function, as a user would have them."""
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(folder / "model")
    tiny_model(tokenizer, hidden_size=32, num_heads=2).save_pretrained(folder / "model")
    (folder / "data").mkdir()
    lines = [json.dumps({"prompt": f"{number}+1="}) for number in range(16)]
    (folder / "data" / "train.jsonl").write_text("\n".join(lines))
    (folder / "my_rewards.py").write_text(REWARDS)


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """The working directory of a user."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    make_workplace(tmp_path)
    yield tmp_path
    for name in ("my_rewards", "my_estimators"):
        sys.modules.pop(name, None)
