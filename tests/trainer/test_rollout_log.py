"""A long rollout has a bar under the training's, and every rollout has figures in the log."""

import warnings
from typing import Any

import pytest
import torch
from tqdm import tqdm

from grpo_plus import GRPOPlusConfig, GRPOPlusTrainer
from grpo_plus.demo.tiny import tiny_model, tiny_tokenizer
from grpo_plus.rollout import Statistics
from grpo_plus.trainer.names import metrics_of
from grpo_plus.trainer.rollouts import rollout_log
from grpo_plus.trainer.rollouts.rollout_log import RolloutBar
from tests.training import PROMPTS, make_trainer

ROWS = [[5, 6, 7]] * 4 + [[8, 9]] * 4
FIGURES = ("rollout/tokens_per_second", "rollout/live_rows", "rollout/prompt_sharing", "rollout/prefill_ratio")


def made(folder: Any, **config: Any) -> Any:
    return make_trainer(folder, trainer_class=GRPOPlusTrainer, config_class=GRPOPlusConfig, max_steps=1, **config)


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    """Four rows at a time, so that a rollout has two parts."""
    return made(tmp_path_factory.mktemp("run"), generation_chunk_size=4)


def completions(trainer: Any) -> list[list[int]]:
    torch.manual_seed(0)
    return trainer._generate_single_turn(ROWS, None, {}, 4)[0]


@pytest.fixture
def _at_once(monkeypatch):
    """Every rollout counts as long."""
    monkeypatch.setattr(rollout_log, "DELAY", 0.0)


@pytest.mark.usefixtures("_at_once")
def test_a_long_rollout_has_one_bar_for_all_its_parts(trainer, capsys):
    completions(trainer)
    shown = capsys.readouterr().err
    assert "rollout:   0%|" in shown
    assert "| 0/8 rows, 4 tokens, " in shown  # after the first token of the first part
    assert " tokens/s, 00:00" in shown
    assert shown.count("rollout:") == 1
    assert not [bar for bar in tqdm._instances if bar.desc == "rollout: "]


def test_a_rollout_of_a_moment_has_no_bar(trainer, capsys):
    completions(trainer)
    assert "rollout" not in capsys.readouterr().err


SILENT = {"disable_tqdm": True, "log_level": "error"}


@pytest.mark.usefixtures("_at_once")
@pytest.mark.parametrize("field", SILENT)
def test_there_is_no_bar_where_the_run_shows_none(trainer, capsys, monkeypatch, field):
    monkeypatch.setattr(trainer.args, field, SILENT[field])
    completions(trainer)
    assert "rollout" not in capsys.readouterr().err


@pytest.mark.usefixtures("_at_once")
def test_there_is_no_bar_on_another_process(trainer, capsys, monkeypatch):
    monkeypatch.setattr(trainer, "is_world_process_zero", lambda: False)
    completions(trainer)
    assert "rollout" not in capsys.readouterr().err


@pytest.mark.usefixtures("_at_once")
def test_a_bar_that_fails_ends_nothing_and_is_warned_of_once(trainer, monkeypatch):
    expected = completions(trainer)

    def broken(*_: Any) -> None:
        raise OSError("no terminal")

    monkeypatch.setattr(RolloutBar, "_drawn", broken)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert completions(trainer) == expected
    messages = [str(warning.message) for warning in caught]
    assert [text for text in messages if text.startswith("The bar of a rollout raised OSError: no terminal")]
    assert len([text for text in messages if "The bar" in text]) == 1


def test_a_bar_stands_below_the_trainings_and_follows_parts_and_second_tries(capsys):
    with tqdm(total=10, desc="training"):
        capsys.readouterr()
        bar = RolloutBar(8, delay=0.0, silent=False)
        bar.show(Statistics(new_tokens=4000, seconds=2.0), 3)
        shown = capsys.readouterr().err
        for finished in (5, 4):  # the part that finished a fifth row ran out of memory, and began anew
            bar.show(Statistics(new_tokens=5000, seconds=2.0), finished)
            assert bar._bar is not None
            assert bar._bar.n == finished
        bar.close()
    assert shown.startswith("\n")
    assert shown.endswith("\x1b[A")
    assert "rollout:  38%|" in shown
    assert "| 3/8 rows, 4,000 tokens, 2,000 tokens/s, 00:00" in shown


def test_the_log_has_the_figures_of_all_parts_of_a_rollout(tmp_path):
    evaluated = {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 4}
    data = {"trainer_arguments": {"eval_dataset": PROMPTS.select(range(1))}}
    model = tiny_model(tiny_tokenizer(), hidden_size=32, num_heads=2)
    # Many tokens end a completion, so that rows leave at different tokens.
    model.generation_config.eos_token_id = [*range(2, 20)]
    run = made(tmp_path, model=model, generation_chunk_size=4, **evaluated, **data)
    parts: list[Statistics] = []
    rolled_out = run._step_figures.rolled_out

    def spy(done: Statistics) -> None:
        parts.extend(run.speed.rollouts.statistics)
        rolled_out(done)

    run._step_figures.rolled_out = spy
    run.train()
    first, second, evaluation = parts
    log, evaluated_log = run.state.log_history[:2]
    tokens = log["completions/mean_length"] * 8
    assert tokens == first.new_tokens + second.new_tokens
    assert log["rollout/tokens_per_second"] == pytest.approx(tokens / (first.seconds + second.seconds))
    # A row with n tokens takes part in n - 1 steps, the last token needs none.
    assert log["rollout/live_rows"] == pytest.approx((tokens - 8) / (first.steps + second.steps))
    assert log["rollout/prompt_sharing"] == 4.0
    assert log["rollout/prefill_ratio"] == 4.0
    assert evaluated_log["eval_rollout/live_rows"] == pytest.approx(evaluation.row_steps / evaluation.steps)


def test_a_rollout_by_transformers_own_loop_has_no_figures(trainer):
    metrics_of(trainer).clear()
    trainer._step_figures.reset()
    trainer._step_figures.rolled_out(Statistics())
    # The names are there all the same: processes add figures up by their names.
    assert {part.name for part in trainer._step_figures.copy()} == set(FIGURES)
    trainer._step_figures.log()
    assert not metrics_of(trainer)
