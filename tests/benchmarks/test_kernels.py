"""The kernels' benchmark: what fails is a row, and every row is written when it is there."""

import argparse
import json

import pytest

from benchmarks import kernels, lora_layer

SHAPE = (24, 8, 40)


def test_a_head_that_fails_is_a_row_and_the_others_are_measured(monkeypatch):
    heads = kernels.available_heads("cpu")

    def broken(*_):
        raise RuntimeError("no kernel for this card")

    monkeypatch.setattr(kernels, "available_heads", lambda device: {**heads, "liger": broken})
    rows = {row["head"]: row for row in kernels.heads_at(SHAPE, "cpu", 1)}
    assert rows["liger"]["failure"] == "RuntimeError: no kernel for this card"
    assert "median_s" not in rows["liger"]
    assert rows["trl"]["median_s"] > 0
    assert rows["torch"]["times_as_fast_as_trl"] > 0


def test_rows_are_written_one_by_one(tmp_path, monkeypatch):
    monkeypatch.setattr(kernels, "RESULTS", tmp_path)

    def two_rows(device, repeats):
        yield {"row": 1}
        raise KeyboardInterrupt

    args = argparse.Namespace(device="cpu", parts=["head"], repeats=5, threads=1)
    with pytest.raises(KeyboardInterrupt):
        kernels.write_parts({"head": two_rows}, args)
    written = json.loads((tmp_path / "kernels_cpu.json").read_text())
    assert written["head"] == [{"row": 1}]
    assert str(tmp_path) not in json.dumps(written)


def test_a_layer_is_pefts_within_rounding(monkeypatch):
    monkeypatch.setitem(lora_layer.SCALE, "cpu", 40)
    row = kernels.layer_row("q", 16, False, "cpu", 1)
    assert row["error"] < 1e-5
    assert row["kept_mb"]["fused"] < row["kept_mb"]["peft"]
