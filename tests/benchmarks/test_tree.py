"""The benchmark of sharing beyond the prompt on a model that takes no time: all ways agree, and trees are what differs."""

from benchmarks import tree, update

TINY = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 8000, "head_dim": 8}


def test_a_tree_forwards_fewer_tokens_and_gives_the_same_gradient(monkeypatch):
    monkeypatch.setattr(update, "CPU_MODEL", update.CPU_MODEL | TINY)
    monkeypatch.setattr(tree, "PROMPT", 12)
    monkeypatch.setattr(tree, "FIRST", 4)
    monkeypatch.setattr(tree, "REPLY", 6)
    monkeypatch.setattr(tree, "LAST", 3)
    monkeypatch.setattr(tree, "CASES", {"half": (4, 10)})
    assert len(tree.rows_of(1, 10)["completion_ids"].unique(dim=0)) == 8
    row = tree.measure("half", "full", 1)
    assert row["gradient_error"] < 2e-6
    # The prompt without its last token once. Four completions have ten of thirteen tokens in common.
    assert row["tokens"] == {"trl": 8 * 25, "prompts": 11 + 8 * 13, "tree": 11 + 8 * 13 - 3 * 10}
