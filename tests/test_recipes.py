"""The YAML recipes say what their paper says, and run, shortened, on the tiny model."""

from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from grpo_plus import GRPOPlusConfig, cli
from grpo_plus.demo.tiny import tiny_model, tiny_tokenizer
from grpo_plus.planner import QLORA, Run, parse_bytes, plan, shape_of
from tests.printed import MODELS, workplace

EXAMPLES = Path(__file__).parents[1] / "examples"
RECIPES = ("deepseekmath.yaml", "deepseekmath_qlora.yaml")


@pytest.mark.parametrize("name", RECIPES)
def test_it_is_the_recipe_of_the_paper(tmp_path, name):
    recipe = yaml.safe_load((EXAMPLES / name).read_text())
    ours = {key: value for key, value in recipe.items() if key in GRPOPlusConfig.__dataclass_fields__}
    config = GRPOPlusConfig(**ours | {"output_dir": str(tmp_path), "use_cpu": True})
    assert config.num_generations == 64
    assert config.max_completion_length == 1024
    assert config.per_device_train_batch_size * config.gradient_accumulation_steps == 1024
    assert (config.beta, config.learning_rate, config.num_iterations) == (0.04, 1e-6, 1)
    assert (config.advantage_estimator, config.loss_type) == ("grpo", "grpo")
    assert config.generation_batch_size == 64  # whole groups, and no update within a batch: 16 generations make one
    assert config.gradient_accumulation_steps % config.steps_per_generation == 0
    # In bfloat16 a step of 1e-6 rounds to nothing on almost every weight; a quantized base does not train.
    assert recipe.get("qlora") or recipe.get("dtype", "float32") == "float32"


def test_the_one_for_one_card_is_planned_to_fit_24_gb():
    qwen2_5_math_7b = {
        "model_type": "qwen2",
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_attention_heads": 28,
        "num_hidden_layers": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "tie_word_embeddings": False,
    }
    recipe = yaml.safe_load((EXAMPLES / "deepseekmath_qlora.yaml").read_text())
    settings = {field.name: recipe[field.name] for field in fields(Run) if field.name in recipe}
    shape = shape_of(qwen2_5_math_7b)
    assert abs(shape.parameters / 1e9 - 7.6) < 0.05
    planned = plan(shape, Run(**QLORA | settings, prompt_length=512))
    assert planned.fits(parse_bytes("24GB"))
    assert not plan(shape, Run(**settings | {"lora_r": None}, prompt_length=512)).fits(parse_bytes("24GB"))


@pytest.mark.parametrize("name", RECIPES)
def test_it_runs_shortened_on_the_tiny_model(tmp_path, monkeypatch, name, capsys):
    monkeypatch.chdir(tmp_path)
    workplace(tmp_path)
    tiny_model(tiny_tokenizer(), hidden_size=64, num_heads=2).save_pretrained(tmp_path / MODELS[0])
    tiny = ["--model_name_or_path", MODELS[0]]
    short = ["--max_steps", "2", "--num_generations", "4", "--per_device_train_batch_size", "4", "--output_dir", "out"]
    shorter = ["--gradient_accumulation_steps", "4", "--steps_per_generation", "2", "--max_completion_length", "8"]
    arguments = [*tiny, *short, *shorter, "--use_cpu", "--report_to", "none"]
    assert cli.main(["train", "--config", str(EXAMPLES / name), *arguments, "--debug"]) == 0
    assert "advantages grpo(); loss grpo" in capsys.readouterr().out
    saved = {path.name for path in (tmp_path / "out").iterdir()}
    assert ("adapter_model.safetensors" in saved) == ("qlora" in name)
