import functools
import re
import subprocess
import sys

import pytest

from grpo_plus import GRPOPlusConfig, cli
from grpo_plus.advantages import ESTIMATORS, MODIFIERS
from grpo_plus.cli.ls_entry import explained
from grpo_plus.cli.reward_functions import REWARD_NAMES
from grpo_plus.losses import TRL_LOSSES


def test_help_answers_in_under_a_second_and_loads_no_torch():
    code = "import sys; from grpo_plus import cli\ntry: cli.main(['--help'])\nexcept SystemExit: pass\n"
    code += "import time; print([name for name in ('torch', 'trl', 'transformers') if name in sys.modules])\n"
    code += "print(time.process_time())"  # of the process alone: other work on the machine does not count
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    *printed, loaded, seconds = done.stdout.splitlines()
    assert loaded == "[]"
    assert [
        verb for verb in cli.VERBS if f"\n  {verb} " not in done.stdout or f" grpo-plus {verb}" not in done.stdout
    ] == []
    assert [line for line in printed if len(line) > 90] == []
    assert float(seconds) < 1


def test_a_word_that_is_no_verb_is_refused_with_the_nearest_verb(capsys):
    with pytest.raises(SystemExit):
        cli.main(["trian", "--max_steps", "1"])
    assert "there is no verb 'trian'. Did you mean 'train'?" in capsys.readouterr().err


def test_ls_names_everything(capsys):
    assert cli.main(["ls"]) == 0
    output = capsys.readouterr().out
    assert [name for name in (*ESTIMATORS, *MODIFIERS, *TRL_LOSSES, *REWARD_NAMES) if f"{name} " not in output] == []
    assert "https://huggingface.co/papers/2503.20783" in output


def test_ls_of_one_kind(capsys):
    assert cli.main(["ls", "losses"]) == 0
    output = capsys.readouterr().out
    assert "vespo" in output
    assert "rloo" not in output


def test_ls_explains_one_name_with_a_line_to_copy(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert cli.main(["ls", "passk"]) == 0
    output = capsys.readouterr().out
    formula = ESTIMATORS["passk"].documentation.split("\n")[4]
    assert f"\n{formula}\n" in output
    assert "https://huggingface.co/papers/2508.10751" in output
    assert re.search(r"\nk +2 +attempts, from 1 to num_generations", output)
    assert re.search(r"\neps +1e-06 +added to the divisor", output)  # not in the docstring
    assert "- needs rewards of 0 or 1" in output
    assert """--advantage_estimator passk --advantage_kwargs '{"k": 2}'""" in output


@pytest.mark.parametrize("name", ["rloo", "ngrpo", "gmpo", "cispo", "clip", "gfpo"])
def test_the_line_that_ls_prints_is_taken(name):
    (entry,) = explained(name)
    line = next(line for line in entry.lines if line.startswith("GRPOPlusConfig("))
    names = {"GRPOPlusConfig": functools.partial(GRPOPlusConfig, "unused", use_cpu=True, bf16=False, report_to="none")}
    assert name in eval(line, names).describe()


def test_ls_explains_what_shares_a_name_and_suggests_the_nearest(capsys):
    assert [entry.kind for entry in explained("grpo")] == ["advantage estimator", "loss"]
    assert explained("clip")[0].keywords == {"max": ...}
    assert explained("last_number")[0].kind == "reward function of grpo_plus.rewards"
    assert cli.main(["ls", "rlo"]) == 1
    assert "There is nothing called 'rlo'. Did you mean 'rloo'?" in capsys.readouterr().err
    assert cli.main(["ls", "grop"]) == 1  # a loss and an estimator are called grpo
    assert "Did you mean 'grpo' or 'ngrpo'?" in capsys.readouterr().err
    assert cli.main(["ls", "dppo"]) == 1  # nearer to gdpo than to the names that begin with it
    assert "Did you mean 'dppo_kl' or 'dppo_tv'?" in capsys.readouterr().err
    assert cli.main(["ls", "refill_buffer"]) == 1
    assert "'refill_buffer' is a field of GRPOPlusConfig, and no name that a field takes. Let live" in (
        capsys.readouterr().err
    )


def test_a_line_to_copy_is_not_wrapped_and_holds_what_is_needed(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    assert cli.main(["ls", "get_cosine_scaled_reward"]) == 0
    flags = '--reward_kwargs \'{"get_cosine_scaled_reward": {"max_len": 512}}\''
    assert f"\n--reward_funcs get_cosine_scaled_reward {flags}\n" in capsys.readouterr().out


def test_the_usage_of_a_verb_begins_with_what_is_typed(capsys):
    with pytest.raises(SystemExit):
        cli.main(["replay", "--help"])
    assert capsys.readouterr().out.startswith("usage: grpo-plus replay [-h]")


def test_a_value_of_the_wrong_kind_is_told_without_the_list_of_flags(capsys):
    given = "--refill_buffer two --model_name_or_path m --dataset_name d --reward_funcs accuracy_reward"
    with pytest.raises(SystemExit):
        cli.main(["train", *given.split()])
    usage, error = capsys.readouterr().err.splitlines()
    assert usage == "usage: grpo-plus train [--config run.yaml] [--FLAG VALUE ...]"
    assert error.endswith("invalid int value: 'two'")


def test_doctor_prints_versions_and_the_seam(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert cli.main(["doctor"]) == 0
    output = capsys.readouterr().out
    assert "transformers  5." in output
    assert "yes: as tested, trl 1." in output
    assert "  torch   on   One pass over the head" in output
    assert "  triton  off  Triton " in output
    assert max(map(len, output.splitlines())) <= 80
    assert "\x1b" not in output  # colors are for terminals


def test_doctor_fails_when_trl_has_changed(capsys, monkeypatch):
    monkeypatch.setattr("grpo_plus.trainer.contract.check_seam", lambda: ["GRPOTrainer.log is gone since trl 1.16.0."])
    assert cli.main(["doctor"]) == 1
    assert "GRPOTrainer.log is gone" in capsys.readouterr().out


def test_an_error_is_one_line_without_traceback(capsys):
    assert cli.main(["train"]) == 1
    error = capsys.readouterr().err
    assert "train needs --model_name_or_path" in error
    assert "grpo-plus demo" in error
    assert "Traceback" not in error


def test_debug_shows_the_traceback():
    with pytest.raises(ValueError, match="train needs --model_name_or_path"):
        cli.main(["--debug", "train"])


def test_a_debug_flag_with_a_value_is_trls():
    arguments = ["train", "--debug", "underflow_overflow"]
    assert not cli._take_debug(arguments)
    assert arguments == ["train", "--debug", "underflow_overflow"]


def test_an_unknown_flag_is_refused(capsys):
    with pytest.raises(SystemExit):
        cli.main(["ls", "--sort"])
    assert "ls takes no --sort" in capsys.readouterr().err


def test_an_error_shows_no_token(capsys, monkeypatch):
    token = "hf" + "_abcdefghijklmnopqrstuvwx"

    def run(args, rest):
        raise OSError(f"401 for https://me:secret@host/x?token={token}")

    monkeypatch.setattr("grpo_plus.cli.ls.run", run)
    assert cli.main(["ls"]) == 1
    error = capsys.readouterr().err
    assert token not in error
    assert "secret@" not in error
    assert "OSError: 401 for https://***@host/x?token=***" in error
