import json
import subprocess
import sys
import time
from dataclasses import fields
from typing import Any

import pytest
from trl import GRPOConfig, ModelConfig

from grpo_plus import GRPOPlusConfig
from grpo_plus.planner import QLORA, Constants, Run, load_constants, parse_bytes

# Settings that are the data's, or that grpo_plus.qlora brings.
OWN = {"prompt_length", "adapter_dtype", "cache_bits"}
# Depend on the machine; TRL's flags alone ask for dropout.
OTHER_DEFAULT = {"optim", "bf16", "lora_dropout"}


def test_the_names_and_defaults_are_those_of_training():
    theirs = {entry.name: entry.default for config in (ModelConfig, GRPOPlusConfig) for entry in fields(config)}
    mine = {entry.name: entry.default for entry in fields(Run)} | {"lora_r": ModelConfig.lora_r}
    assert set(mine) - OWN <= set(theirs)
    same = set(mine) - OWN - OTHER_DEFAULT
    assert {name: mine[name] for name in same} == {name: theirs[name] for name in same}
    assert mine["optim"] == GRPOConfig("out", use_cpu=True, bf16=False).optim


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt_length": -5}, "prompt_length=-5 is not a positive whole number"),
        ({"max_completion_length": 0}, "max_completion_length=0"),
        ({"per_device_train_batch_size": 2.5}, "per_device_train_batch_size=2.5"),
        ({"num_generations": True}, "num_generations=True"),
        ({"lora_r": -1}, "lora_r=-1"),
        ({"generation_chunk_size": 0}, "generation_chunk_size=0"),
        (
            {"max_tokens_per_pass": "all"},
            "max_tokens_per_pass='all' is not a positive whole number. Write 1 or more, or a",
        ),
        ({"mlp_tile_tokens": 0.5}, "mlp_tile_tokens=0.5 is not a positive whole number"),
        ({"steps_per_generation": -2}, "steps_per_generation=-2"),
        ({"beta": -0.1}, "beta=-0.1 is out of range"),
        ({"lora_dropout": 1.0, "lora_r": 8}, "lora_dropout=1.0 is out of range"),
        ({"lora_dropout": 0.05, "lora_r": 8, "packing": "shared_prompt"}, "not exact with lora_dropout=0.05"),
        ({"dtype": "bf16"}, "Unknown dtype 'bf16'.*Known: float32, bfloat16"),
        ({"adapter_dtype": "int8"}, "Unknown adapter_dtype 'int8'"),
        ({"packing": "shared"}, "Unknown packing 'shared'. Did you mean 'shared_prompt'"),
        ({"optim": "adam_8bit"}, "Unknown optim 'adam_8bit'. Did you mean 'adamw_8bit'"),
        ({"load_in_4bit": True}, "trains nothing without adapters. Set lora_r"),
        ({"num_generations": 6}, "8 rows.*does not hold whole groups of num_generations=6"),
    ],
)
def test_an_impossible_run_is_refused(settings: dict[str, Any], message):
    with pytest.raises(ValueError, match=message):
        Run(**settings)


@pytest.mark.parametrize(
    ("text", "size"),
    [("24GB", 24 * 2**30), ("7.5 GiB", 7.5 * 2**30), ("800mb", 800 * 2**20), ("0.5T", 2**39), ("24g", 24 * 2**30)],
)
def test_sizes(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("12", r"gpu='12' is not a size with a unit. Write 12GB."),
        ("-8GB", "gpu='-8GB' is not above 0"),
        ("0GB", "is not above 0"),
        ("twelve", "gpu='twelve' is not a size with a unit. Write for example 24GB"),
        ("12KB", "is not a size with a unit"),
        ("", "is not a size"),
    ],
)
def test_a_size_that_is_none_says_what_to_write(text, message):
    with pytest.raises(ValueError, match=message):
        parse_bytes(text)


def test_constants_come_from_a_file(tmp_path):
    path = tmp_path / "constants.json"
    path.write_text('{"fragmentation": 1.2}')
    assert load_constants(path) == Constants(fragmentation=1.2)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read: No such file"),
        ("{", "is not JSON"),
        ("[]", "is no JSON object"),
        ('{"fragmentatoin": 1}', "unknown constant 'fragmentatoin'. Did you mean 'fragmentation'"),
        ('{"fragmentation": 0.5}', "fragmentation=0.5 is not a number of 1 or more"),
        ('{"context_bytes": "0.6"}', "context_bytes='0.6' is not a number"),
        ('{"context_bytes": -1}', "context_bytes=-1 is not a number of 0 or more"),
        ('{"activations": NaN}', "activations=nan is not a number"),
    ],
)
def test_a_wrong_calibration_says_what_is_wrong(tmp_path, content, message):
    path = tmp_path / "constants.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=message):
        load_constants(path)


def test_the_recipe_is_a_run():
    assert Run(**QLORA).load_in_4bit


def test_the_planner_loads_neither_torch_nor_the_hub_and_answers_at_once(tmp_path):
    from tests.planner.configs import QWEN3_4B

    (tmp_path / "config.json").write_text(json.dumps(QWEN3_4B))
    code = f"""
import sys
from grpo_plus.cli import main
main(["plan", {str(tmp_path)!r}, "--gpu", "8GB", "--max_completion_length", "4096"])
print(sorted({{"torch", "trl", "transformers", "peft", "numpy", "huggingface_hub"}} & set(sys.modules)))
"""
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        best = min(best, time.perf_counter() - start)
    assert "to make it fit" in done.stdout
    assert done.stdout.endswith("[]\n")
    assert best < 2
