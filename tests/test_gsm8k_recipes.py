"""The GSM8K recipes fit the cards that they name, and run, shortened, on rows in GSM8K's form."""

import itertools
import json
import warnings

import pandas as pd
import pytest

from grpo_plus import cli
from grpo_plus.cli.plan_config import asked
from grpo_plus.demo.tiny import tiny_model, tiny_tokenizer
from grpo_plus.planner import shape_of
from tests.recipes import MODELS, NAMES, RECIPES, card_of, planned, read

QUESTION = "Natalia sold 48 clips in April and half as many in May. How many in all?"
ANSWER = "48/2 = <<48/2=24>>24 in May.\n48+24 = <<48+24=72>>72 in all.\n#### 72"
SHORT = ["--max_steps", "2", "--num_generations", "4", "--per_device_train_batch_size", "4", "--report_to", "none"]
SHORT += ["--gradient_accumulation_steps", "1", "--generation_chunk_size", "4", "--max_completion_length", "8"]


def test_every_recipe_is_tested():
    assert {path.name for path in RECIPES.glob("*.yaml")} == set(NAMES)
    sizes = {name: round(shape_of(config).parameters / 1e9, 2) for name, config in MODELS.items()}
    assert sizes == {"Qwen/Qwen3-1.7B": 1.72, "meta-llama/Llama-3.2-3B-Instruct": 3.21, "Qwen/Qwen3-4B": 4.02}


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_fits_its_card_by_what_it_says(name):
    own, _, _, _, config = read(name)
    assert all(planned(name, model).fits(card_of(name)) for model in MODELS)
    assert not planned(name, generation_chunk_size=None).fits(card_of(name))  # "would not fit"
    assert config.generation_chunk_size % config.num_generations == 0
    assert config.per_device_eval_batch_size % config.num_generations == 0  # or `grpo-plus compare` refuses it
    limit = own.reward_kwargs["get_soft_overlong_punishment"]["max_completion_len"]
    assert limit == config.max_completion_length


@pytest.mark.parametrize("name", NAMES)
def test_plan_reads_a_recipe_as_trls_parser_does(name):
    read_by_plan = asked(str(RECIPES / name), {}, model=None, revision=None, qlora=False)
    given = planned(name).run.changed_from(read_by_plan.run)
    assert given.pop("steps_per_generation") == read_by_plan.run.gradient_accumulation_steps  # TRL's default, filled in
    assert (given, read_by_plan.notes) == ({}, ())


@pytest.mark.parametrize(("smaller", "name"), itertools.pairwise(NAMES))
def test_a_recipe_uses_what_the_next_smaller_card_lacks(smaller, name):
    assert not planned(name).fits(card_of(smaller))


@pytest.mark.parametrize("name", ["gsm8k_8gb.yaml", "gsm8k_16gb.yaml"])
def test_it_runs_shortened_on_the_tiny_model(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path / "tiny")
    tiny_model(tokenizer, hidden_size=32, num_layers=1, num_heads=1).save_pretrained(tmp_path / "tiny")
    gsm8k = tmp_path / "openai" / "gsm8k"
    (gsm8k / "main").mkdir(parents=True)
    (gsm8k / "main" / "train.jsonl").write_text(json.dumps({"question": QUESTION, "answer": ANSWER}) + "\n")
    (gsm8k / "README.md").write_text("---\nconfigs:\n- config_name: main\n  data_files: main/train.jsonl\n---\n")
    arguments = ["--model_name_or_path", "tiny", "--output_dir", "out", "--use_cpu", *SHORT]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert cli.main(["train", "--config", str(RECIPES / name), *arguments, "--debug"]) == 0
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()
    table = pd.read_parquet(next((tmp_path / "out" / "completions").glob("*.parquet")))
    asked = {"role": "user", "content": f"{QUESTION}\n\nThink step by step. Put the final number into \\boxed{{}}."}
    assert [list(prompt) for prompt in table["prompt"]] == [[asked]] * 4
    assert set(table["boxed_answer"]) == {0.0}  # None without a solution
    assert "soft_overlong_punishment_reward" in table
