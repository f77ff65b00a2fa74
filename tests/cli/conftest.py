import json
import sys

import pytest

from grpo_plus.demo.tiny import tiny_model, tiny_tokenizer

REWARDS = "def vowels(completions, **_):\n    return [float(sum(c in 'aeiou' for c in text)) for text in completions]\n"


@pytest.fixture(autouse=True)
def _finders(monkeypatch):
    """A command lets modules of its working directory be found; the next test has another one."""
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder with a model, a dataset and a reward function, as a user would have."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path / "model")
    tiny_model(tokenizer, hidden_size=32, num_heads=2).save_pretrained(tmp_path / "model")
    (tmp_path / "data").mkdir()
    lines = [json.dumps({"prompt": f"{number}+1="}) for number in range(16)]
    (tmp_path / "data" / "train.jsonl").write_text("\n".join(lines))
    (tmp_path / "my_rewards.py").write_text(REWARDS)
    yield tmp_path
    for name in ("my_rewards", "my_estimators"):
        sys.modules.pop(name, None)
