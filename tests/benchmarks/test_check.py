"""The baseline of numbers: the counts are what it holds, and a figure that is worse, new or gone is found."""

import json
import re
from pathlib import Path

import pytest

from benchmarks import check, update

ROOT = Path(__file__).parents[2]
PACKED = "plus"


@pytest.fixture
def baseline():
    return json.loads(check.BASELINE.read_text())


def failures(baseline, found):
    return [line.name for line in check.compare(baseline, found) if not line.holds]


def test_launches_and_kept_bytes_are_those_of_the_baseline(baseline):
    if notes := check.other_versions(baseline):
        pytest.skip(f"the counts are those of other versions: {'; '.join(notes)}")
    lines = check.compare(baseline, {"counts": check.counts()})
    assert [str(line) for line in lines if not line.holds] == []


def test_the_baseline_is_of_the_pinned_versions(baseline):
    pins = dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE))
    for kind in check.ALLOWED:
        versions = baseline[kind]["machine"]["versions"]
        assert {name: versions[name].partition("+")[0] for name in check.PINNED} == {
            name: pins[name] for name in check.PINNED
        }


def test_other_versions_are_named(baseline):
    baseline["counts"]["machine"]["versions"]["trl"] = "0.1"
    (note,) = check.other_versions(baseline)
    assert re.fullmatch(r"trl [\d.]+, not 0\.1", note)


@pytest.mark.parametrize(
    ("kind", "now", "holds"),
    [
        ("counts", 100, True),
        ("counts", 101, False),
        ("counts", 99, False),  # a gain is written down, or nothing guards it
        ("memory", 97.1, True),
        ("memory", 96.9, False),
        ("speed", 80.1, True),
        ("speed", 79.9, False),
        ("speed", 300, True),
    ],
)
def test_a_figure_may_be_as_much_worse_as_its_kind_allows(kind, now, holds):
    earlier = {kind: {"allowed": check.ALLOWED[kind], "figures": {"one": 100}}}
    assert failures(earlier, {kind: {"one": now}}) == ([] if holds else ["one"])


def test_a_figure_that_is_new_or_gone_fails():
    earlier = {"counts": {"allowed": 0.0, "figures": {"one": 1, "gone": 2}}, "speed": {"figures": {"not asked for": 3}}}
    assert failures(earlier, {"counts": {"one": 1, "new": 2}}) == ["gone", "new"]


def test_a_launch_and_bytes_that_a_layer_adds_are_seen(monkeypatch):
    def heavier(side, *args):
        trainer = trainer_of(side, *args)
        if side == PACKED:
            for layer in trainer.model.model.layers:
                layer.mlp.register_forward_hook(lambda module, inputs, output: output.sigmoid())
        return trainer

    trainer_of, shape = update.trainer_of, (8, 8, 4)
    before = dict(check.of_an_update(shape, "full"))
    monkeypatch.setattr(update, "trainer_of", heavier)
    after = dict(check.of_an_update(shape, "full"))
    added = {name: after[name] - before[name] for name in before if after[name] != before[name]}
    # Forward and backward of a sigmoid, in each of two layers. It keeps its output: tokens x 32 of 4 bytes.
    assert added.pop("launches per layer, ours") == 2
    assert added.pop("launches of an update, ours") == 4
    kept = added.pop("bytes kept for the backward, ours")
    assert kept > 0
    assert kept % (2 * 32 * 4) == 0
    assert added == {}


def test_a_check_that_fails_says_what_to_do(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(check, "BASELINE", tmp_path / "baseline.json")
    monkeypatch.setattr(check, "counts", lambda: {"one": 1})
    monkeypatch.setattr("sys.argv", ["check", "--counts", "--write"])
    check.main()
    monkeypatch.setattr("sys.argv", ["check", "--counts"])
    check.main()
    assert "ok   one" in capsys.readouterr().out
    monkeypatch.setattr(check, "counts", lambda: {"one": 2})
    with pytest.raises(SystemExit, match=r"(?s)1 of 1 figures do not hold.*benchmarks.check --counts --write"):
        check.main()
    assert re.search(r"FAIL one +was +1  is +2  allowed: the same", capsys.readouterr().out)
