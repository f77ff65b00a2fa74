import pandas as pd
import pytest
import torch

from grpo_plus import GRPOPlusTrainer, cli

CPU = ["--use_cpu", "--bf16", "False", "--gradient_checkpointing", "False", "--report_to", "none"]
SHORT = ["--max_steps", "2", "--num_generations", "4", "--per_device_train_batch_size", "8", "--logging_steps", "1"]


NAMES = ["--model_name_or_path", "model", "--dataset_name", "data", "--reward_funcs", "my_rewards.vowels"]


def test_training_with_trls_flags_and_ours(workplace, capsys):
    ours = ["--advantage_estimator", "grpo", "--advantage_kwargs", '{"ddof": 0}', "--log_completions"]
    lengths = ["--max_completion_length", "8", "--output_dir", "out"]
    assert cli.main(["train", *NAMES, *ours, *lengths, *SHORT, *CPU]) == 0
    assert "advantages grpo(ddof=0); loss dapo" in capsys.readouterr().out
    assert (workplace / "out" / "model.safetensors").exists()
    tables = [pd.read_parquet(path) for path in (workplace / "out" / "completions").glob("*.parquet")]
    for table in tables:
        groups = [table["advantage"][start : start + 4] for start in (0, 4)]
        for group in groups:
            assert (group**2).mean() == pytest.approx(1 if group.any() else 0, abs=1e-2)


def test_training_from_a_config_file(workplace, capsys):
    lines = ["model_name_or_path: model", "dataset_name: data", "reward_funcs: [my_rewards.vowels]"]
    lines += ["advantage_estimator: rloo", "output_dir: out", "max_completion_length: 8", "use_cpu: true"]
    lines += ["bf16: false", "report_to: none", "advantage_kwargs: '{}'", "use_peft: true", "lora_r: 4"]
    (workplace / "run.yaml").write_text("\n".join(lines))
    assert cli.main(["train", "--config=run.yaml", *SHORT]) == 0
    assert "advantages rloo()" in capsys.readouterr().out
    assert (workplace / "out" / "adapter_model.safetensors").exists()


@pytest.mark.newest_trl
def test_qlora_is_one_flag_and_every_other_one_still_counts(workplace, capsys, monkeypatch):
    trainers = []
    monkeypatch.setattr(
        "grpo_plus.GRPOPlusTrainer",
        lambda **given: trainers.append(GRPOPlusTrainer(**given)) or trainers[0],
        raising=False,
    )
    (workplace / "run.yaml").write_text("qlora: true\nlora_r: 4\nmax_completion_length: 8\noutput_dir: out")
    arguments = [
        "--config",
        "run.yaml",
        "--optim",
        "adamw_torch",
        "--lora_dropout",
        "0.25",
        "--use_cpu",
        "--report_to",
        "none",
    ]
    assert cli.main(["train", *NAMES, *arguments, *SHORT]) == 0
    (trainer,) = trainers
    lora = trainer.model.peft_config["default"]
    assert trainer.model.is_loaded_in_4bit
    assert (lora.r, lora.lora_alpha, lora.lora_dropout) == (4, 32, 0.25)
    assert (trainer.args.optim, trainer.args.adapter_dtype) == ("adamw_torch", "float32")
    assert trainer.model.get_input_embeddings().weight.dtype == torch.bfloat16
    assert {weight.dtype for weight in trainer.model.parameters() if weight.requires_grad} == {torch.float32}
    assert (workplace / "out" / "adapter_model.safetensors").exists()


@pytest.mark.newest_trl
def test_trls_own_flags_give_a_quantized_base_too(workplace):
    flags = ["--load_in_4bit", "--use_peft", "--lora_r", "4", "--max_completion_length", "8", "--output_dir", "out"]
    assert cli.main(["train", *NAMES, *flags, *SHORT, *CPU]) == 0
    assert (workplace / "out" / "adapter_model.safetensors").exists()


def test_a_quantized_base_without_bitsandbytes_is_refused(workplace, capsys, monkeypatch):
    monkeypatch.setattr("grpo_plus.qlora.checks.find_spec", lambda name: None)
    for flag in ("--qlora", "--load_in_8bit"):
        assert cli.main(["train", *NAMES, flag, *CPU]) == 1
        assert "pip install bitsandbytes peft" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*NAMES, "--qlora", "--load_in_8bit"], "--qlora loads the base in 4 bits, but load_in_8bit=True"),
        ([*NAMES, "--load_in_4bit", "--load_in_8bit"], "load_in_4bit=True and load_in_8bit=True: a base is loaded in one of the two"),
        (NAMES[:2], "train needs --dataset_name"),
        (NAMES[:4], "train needs --reward_funcs"),
        ([*NAMES[:4], "--reward_funcs", "accuracy_rewards"], "Unknown reward function 'accuracy_rewards'. Did you mean 'acc"),
        ([*NAMES, "--advantage_estimator", "dr_grop"], "Did you mean 'dr_grpo'"),
        ([*NAMES, "--num_processes", "2"], "run `accelerate launch --num_processes 2 -m grpo_plus train ...`"),
        ([*NAMES[:4], "--reward_funcs", "my_rewards.vowel"], "'my_rewards' has no function 'vowel'. Did you mean 'vowels'"),
        ([*NAMES, "--dataset_train_split", "trian"], "no split 'trian'. Did you mean 'train'"),
        ([*NAMES, "--eval_strategy", "steps", "--eval_steps", "1"], "no split 'test'"),
        (["run.yaml", *NAMES], "Write --config run.yaml"),
        ([*NAMES, "--output_dir", "out", "--resume_from_checkpoint", "true"], "output_dir='out' has no checkpoint to go on from. Leave"),
        ([*NAMES, "--config"], "--config needs a file"),
    ],
)  # fmt: skip
def test_a_wrong_command_line_says_what_to_write(workplace, capsys, arguments, message):
    assert cli.main(["train", *arguments, *CPU]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("recipe", [["--qlora"], ["--load_in_4bit", "--use_peft"]], ids=str)
def test_a_dtype_that_4_bits_cannot_take_from_the_weights_is_refused_before_loading(workplace, capsys, recipe):
    assert cli.main(["train", *NAMES, *recipe, "--dtype", "auto", "--output_dir", "out", *CPU]) == 1
    assert "ValueError: --dtype auto with a base in 4 bits" in capsys.readouterr().err


@pytest.mark.newest_trl
def test_a_bug_in_a_reward_function_shows_its_line_and_ours_stays_one(workplace, capsys):
    (workplace / "my_rewards.py").write_text(
        "def vowels(completions, **_):\n    return [table(text) for text in completions]\n\n\n"
        "def table(text):\n    return {'a': 1.0}['b']\n"
    )
    lengths = ["--max_completion_length", "8", "--output_dir", "out"]
    assert cli.main(["train", *NAMES, *SHORT, *CPU, *lengths]) == 1
    error = capsys.readouterr().err
    assert "return {'a': 1.0}['b']" in error
    assert 'my_rewards.py", line 2, in vowels' in error
    assert "KeyError: 'b'" in error
    assert "grpo_trainer.py" not in error
    assert "grpo_plus/trainer" not in error
    assert error.rstrip().endswith("Run it with --debug for the traceback.")


def test_an_error_of_ours_is_one_line(workplace, capsys):
    assert cli.main(["train", *NAMES, "--advantage_estimator", "dr_grop", *CPU]) == 1
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert error.count("\n") <= 3


def test_a_missing_column_is_named_before_the_model_is_loaded(workplace, capsys):
    (workplace / "data" / "train.jsonl").write_text('{"question": "1+1=", "answer": "2"}\n' * 4)
    for name in ("model.safetensors", "config.json"):
        (workplace / "model" / name).unlink()
    assert cli.main(["train", *NAMES, *CPU]) == 1
    error = capsys.readouterr().err
    assert "train_dataset has no column 'prompt', which every row needs. Its columns: question, answer." in error
    assert "train_dataset.rename_column('question', 'prompt')" in error
    assert "On the command line: --prompt_column question." in error


@pytest.mark.newest_trl
def test_evaluations_have_rewards_and_tries_of_their_own(workplace, capsys):
    (workplace / "data" / "test.jsonl").write_text('{"prompt": "3+4="}')
    (workplace / "my_judges.py").write_text("def right(completions, **_):\n    return [1.0] * len(completions)\n")
    own = ["--eval_reward_funcs", "my_judges.right", "--eval_pass_at_k", "1", "4", "--max_completion_length", "8"]
    flags = [*NAMES, *SHORT, *CPU, *own, "--output_dir", "out"]
    assert cli.main(["train", *flags]) == 1
    assert "--eval_reward_funcs has no effect without evaluations. Add --eval_strategy" in capsys.readouterr().err
    assert cli.main(["train", *flags, "--eval_strategy", "steps", "--eval_steps", "2"]) == 0
    printed = capsys.readouterr().out
    assert "'eval_pass@4': '1'" in printed
    assert [
        words
        for words in ("2 steps in ", "held-out pass@4", "generate ", "grpo-plus watch out")
        if words not in printed
    ] == []
    assert cli.main(["watch", "out", "--once"]) == 0
    printed = capsys.readouterr().out
    assert "step 2 of 2" in printed
    assert "finished" in printed
    assert [words for words in ("vowels", "held-out pass@4", "dead groups") if words not in printed] == []
