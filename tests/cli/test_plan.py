import json

import pytest

from grpo_plus import cli
from grpo_plus.cli.plan_config import asked
from grpo_plus.planner import QLORA, Run, load_shape, longest, longest_table, plan
from tests.planner.configs import QWEN3_4B
from tests.readme import DOCS


@pytest.fixture
def model(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_4B))
    return str(tmp_path)


def test_the_table_is_the_python_apis(model, capsys):
    assert cli.main(["plan", model, "--qlora", "--max_completion_length", "1024", "--beta", "0.04"]) == 0
    expected = plan(load_shape(model), Run(**QLORA, max_completion_length=1024, beta=0.04))
    output = capsys.readouterr().out
    assert expected.table() in output
    assert "4.02 B parameters in nf4; trains LoRA r=16" in output
    assert "rows: shared_prompt" in output


def test_what_fits_is_said(model, capsys):
    assert cli.main(["plan", model, "--qlora", "--gpu", "12GB"]) == 0
    output = capsys.readouterr().out
    assert "11.30 GiB of the card's 12 are usable: the run fits." in output
    assert "max_completion_length" in output
    assert "to make it fit" not in output


def test_what_does_not_fit_exits_with_1_and_says_what_to_change(model, capsys):
    assert cli.main(["plan", model, "--gpu", "12GB", "--gradient_checkpointing", "false"]) == 1
    output = capsys.readouterr().out
    assert "the run does not fit" in output
    assert "--gradient_checkpointing true" in output or "--load_in_4bit true" in output
    assert "GiB, in " in output.splitlines()[-1]
    assert output.splitlines()[-1].endswith("fits.")


def test_the_advised_flags_make_it_fit(model, capsys):
    arguments = ["plan", model, "--gpu", "12GB", "--max_completion_length", "2048", "--packing", "none"]
    assert cli.main(arguments) == 1
    advised = [
        line.partition(": --")[2].partition(" (")[0] for line in capsys.readouterr().out.splitlines() if ": --" in line
    ]
    flags = " ".join(f"--{flags}" for flags in advised).split()
    assert cli.main([*arguments, *flags]) == 0


def test_a_switch_needs_no_value(model, capsys):
    """As in training, where `--fp16` alone is the usual form."""
    outputs = []
    for switch in (["--fp16"], ["--fp16", "true"]):
        assert cli.main(["plan", model, "--qlora", "--dtype", "float16", "--bf16", "false", *switch]) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]


@pytest.mark.parametrize(
    ("size", "training"), [("14GB", "--use_peft --lora_target_modules all-linear"), ("6GB", "--qlora")]
)
def test_advice_says_how_training_is_told_to_use_adapters(model, capsys, size, training):
    """There --lora_r alone has no effect."""
    assert cli.main(["plan", model, "--gpu", size]) == 1
    assert f"in training: {training}" in capsys.readouterr().out


def test_several_cards_are_compared_in_one_table(model, capsys):
    assert cli.main(["plan", model, "--qlora", "--gpu", "8GB,rtx 3060"]) == 0
    output = capsys.readouterr().out
    cards = [8 * 2**30, 12 * 2**30]
    assert longest_table(longest(load_shape(model), Run(**QLORA), cards), cards) in output
    assert "rtx 3060: 12 GB" in output
    assert "positions" not in output  # the config does not say how many there are


def test_more_tokens_than_a_model_has_positions_are_said(model, tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_4B | {"max_position_embeddings": 40_960}))
    assert cli.main(["plan", model, "--qlora", "--gpu", "8GB,24GB"]) == 0
    assert "The model knows 40,960 positions." in capsys.readouterr().out


def test_a_file_of_train_is_planned_under_the_command_line(model, tmp_path, capsys):
    """It names the model, its adapters are QLoRA's, and what takes memory beside the plan is said."""
    file = tmp_path / "run.yaml"
    file.write_text(
        f"model_name_or_path: {model}\nqlora: true\nmax_completion_length: 1024\nlearning_rate: 1e-5\nbeta: 4e-2\n"
        "mlp_tile_tokens: 0\ngeneration_batch_size: 32\nuse_vllm: true\nfsdp: ''\n"
    )
    assert cli.main(["plan", "--config", str(file), "--max_completion_length", "2048"]) == 0
    settings = QLORA | {"beta": 0.04, "mlp_tile_tokens": None, "steps_per_generation": 4}
    output = capsys.readouterr().out
    assert plan(load_shape(model), Run(**settings, max_completion_length=2048)).table() in output
    assert f"Not planned, though in {file}, and it changes the memory: use_vllm.\n" in output


@pytest.mark.parametrize(("more", "size"), [("", None), ("max_tokens_per_pass: 512\n", 512)])
def test_a_deterministic_run_is_planned_in_the_passes_that_it_takes(model, tmp_path, more, size):
    file = tmp_path / "run.yaml"
    file.write_text(f"model_name_or_path: {model}\ndeterministic: true\n{more}")
    run = asked(str(file), {}, model=None, revision=None, qlora=False).run
    assert run.max_tokens_per_pass == size


def test_adapters_of_a_file_have_trls_dropout_and_need_use_peft(model, tmp_path, capsys):
    file = tmp_path / "run.yaml"
    for use_peft, trained, rows in (("true", "LoRA r=16", "padding_free"), ("false", "all weights", "shared_prompt")):
        file.write_text(f"lora_r: 16\nuse_peft: {use_peft}\n")
        assert cli.main(["plan", model, f"--config={file}"]) == 0
        output = capsys.readouterr().out
        assert f"trains {trained}" in output
        assert f"rows: {rows}" in output
        assert ("lora_target_modules" in output) == (use_peft == "true")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("beta: 0.04", "run.yaml' has no model_name_or_path"),
        ("- beta", "run.yaml' holds no flags"),
        ("beta: [", "run.yaml' cannot be read as YAML"),
    ],
)
def test_a_file_that_names_no_run_is_one_line(tmp_path, capsys, content, message):
    (tmp_path / "run.yaml").write_text(content)
    assert cli.main(["plan", "--config", str(tmp_path / "run.yaml")]) == 1
    assert message in capsys.readouterr().err


def test_flags_override_the_recipe(model, capsys):
    assert cli.main(["plan", model, "--qlora", "--lora_r", "64"]) == 0
    assert "LoRA r=64" in capsys.readouterr().out


def test_a_calibration_counts(model, tmp_path, capsys):
    path = tmp_path / "constants.json"
    path.write_text('{"context_bytes": 2147483648}')
    assert cli.main(["plan", model, "--calibrate", str(path)]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("context"))
    assert set(line.split()[1:]) == {"2.00"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpu", "4091"], "gpu='4091' is no known card. Did you mean '4090'"),
        (["--gpu", "-8GB"], "gpu='-8GB' is not above 0"),
        (["--prompt_length", "-5"], "prompt_length=-5 is not a positive whole number"),
        (["--optim", "adam8"], "Unknown optim 'adam8'"),
        (["--calibrate", "nowhere.json"], "calibrate='nowhere.json' cannot be read"),
    ],
)
def test_bad_input_is_one_line(model, capsys, arguments, message):
    arguments = [f"{arguments[0]}={arguments[1]}"]
    assert cli.main(["plan", model, *arguments]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_a_file_without_its_flag_is_told_the_flag(capsys):
    assert cli.main(["plan", "run.yaml"]) == 1
    assert "Write --config run.yaml." in capsys.readouterr().err


def test_an_unknown_architecture_is_one_line(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"model_type": "nothing"}')
    assert cli.main(["plan", str(tmp_path)]) == 1
    assert "model_type='nothing', an architecture that neither the planner nor" in capsys.readouterr().err


def test_an_architecture_that_nobody_tested_is_planned_with_a_line_that_says_so(tmp_path, capsys):
    sizes = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4}
    (tmp_path / "config.json").write_text(json.dumps(sizes | {"model_type": "cohere", "num_key_value_heads": 4}))
    assert cli.main(["plan", str(tmp_path)]) == 0
    assert "not tested on model_type='cohere'. Its shape was read off transformers' Coh" in capsys.readouterr().out


def test_a_flag_that_is_neither_true_nor_false_is_refused(model, capsys):
    with pytest.raises(SystemExit):
        cli.main(["plan", model, "--bf16", "yes"])
    assert "'yes' is neither true nor false" in capsys.readouterr().err


def test_the_example_of_the_page_on_memory_is_what_it_prints(tmp_path, monkeypatch, capsys):
    (tmp_path / "Qwen").mkdir()
    (tmp_path / "Qwen" / "Qwen3-4B").mkdir()
    (tmp_path / "Qwen" / "Qwen3-4B" / "config.json").write_text(json.dumps(QWEN3_4B))
    monkeypatch.chdir(tmp_path)
    example = (DOCS / "memory.md").read_text().partition("$ grpo-plus ")[2].partition("```")[0]
    command, _, output = example.replace("\\\n", " ").partition("\n")
    cli.main(command.split())
    assert capsys.readouterr().out == output
