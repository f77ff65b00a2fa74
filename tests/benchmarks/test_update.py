"""The update's benchmark on a model that takes no time: what a variant's name promises is what runs."""

import json

import pytest

from benchmarks import machine, update, vision

SHAPE = (12, 8, 4)
TINY = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 8000, "head_dim": 8}
TINY_LANGUAGE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1]},
}
TINY_TOWER = {"depth": 2, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32}
TINY_TOWER |= {"fullatt_block_indexes": [1]}


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setattr(update, "CPU_MODEL", update.CPU_MODEL | TINY)
    language, tower = vision.MODEL["text_config"] | TINY_LANGUAGE, vision.MODEL["vision_config"] | TINY_TOWER
    monkeypatch.setattr(vision, "MODEL", vision.MODEL | {"text_config": language, "vision_config": tower})


@pytest.mark.parametrize("side", ["trl", "plus"])
@pytest.mark.parametrize(("variant", "forwards"), [("full", 1), ("checkpointing", 2), ("lora-checkpointing", 2)])
def test_a_checkpointed_layer_is_computed_twice(side, variant, forwards):
    trainer = update.trainer_of(side, SHAPE, variant, "cpu")
    batches = [update.rows_of(SHAPE, "cpu", 0, dead=False)]
    calls = []
    update.run(trainer, batches)  # our check of the first rows
    layers = (trainer.model.get_base_model() if "lora" in variant else trainer.model).model.layers
    layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    update.run(trainer, batches)
    assert len(calls) == forwards


@pytest.mark.parametrize("variant", update.CHOICES)
def test_both_sides_of_every_variant_agree(variant):
    row = update.measure(SHAPE, variant, "both", "cpu", 1)
    assert row["gradient_error"] < 2e-5
    assert len(row["seconds"]["plus"]) == len(row["seconds"]["trl"]) == 1
    assert "shared_prompt" in row["packing"]


def test_kept_rows_are_those_that_are_not_measured_again(tmp_path, monkeypatch):
    monkeypatch.setattr(update, "RESULTS", tmp_path)
    monkeypatch.setattr(update, "_row", lambda shape, variant, args: {"shape": shape, "variant": variant, "new": True})
    old = [{"shape": [12, 8, 4], "variant": variant} for variant in ("full", "lora")]
    (tmp_path / "update_cpu.json").write_text(json.dumps({"rows": old}))
    monkeypatch.setattr("sys.argv", ["update", "--shapes", "12,8,4", "--variants", "lora", "nf4", "--keep"])
    update.main()
    rows = json.loads((tmp_path / "update_cpu.json").read_text())["rows"]
    assert [(row["variant"], "new" in row) for row in rows] == [("full", False), ("lora", True), ("nf4", True)]


def test_a_checkout_that_is_not_installed_has_a_version():
    assert machine.installed("torch")[0].isdigit()
    assert machine.installed("no such package") == "checkout"
