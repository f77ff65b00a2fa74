"""What a run records of itself: settings that a replay takes up again, and a model card that says what was trained."""

import json

import pytest
from trl import GRPOConfig

from grpo_plus import GRPOPlusConfig, GRPOPlusTrainer, cli
from grpo_plus.replay import Rollouts, replay
from grpo_plus.report.run_file import RUN_FILE, read_run
from tests.training import make_trainer

LOGGED = {"log_completions": True, "num_completions_to_print": 0, "max_steps": 2}
OURS = {
    "advantage_estimator": "grpo",
    "advantage_kwargs": {"ddof": 0},
    "advantage_modifiers": {"clip": {"max": 0.9}},
    "reward_weights": [1.0, 3.0],
    "hub_token": "open-sesame-17",
}


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A run of ours with one group per table, other weights than 1, and settings that are not the defaults."""
    folder = tmp_path_factory.mktemp("run")
    trainer = make_trainer(
        folder, trainer_class=GRPOPlusTrainer, config_class=GRPOPlusConfig, num_generations=8, **LOGGED, **OURS
    )
    trainer.train()
    trainer.create_model_card(model_name="mine")
    return folder


def test_a_run_records_its_settings_without_secrets(run_dir):
    record = read_run(run_dir)
    assert record.trainer == "grpo_plus.trainer.trainer.GRPOPlusTrainer"
    assert record.rewards == {"vowels": 1.0, "brevity": 3.0}
    assert record.num_generations == 8
    assert {name: record.settings[name] for name in OURS} | {"reward_weights": [1.0, 3.0]} == OURS | {
        "hub_token": "***"
    }
    assert {"grpo_plus", "trl", "torch", "python"} <= set(record.versions)


def test_replay_takes_up_what_the_run_recorded(run_dir, capsys, monkeypatch):
    result = replay(Rollouts(run_dir))
    assert result.rollouts.weights.tolist() == [1.0, 3.0]
    assert result.rollouts.size == 8  # of one group per table, which the tables alone leave open
    assert result.same == ["grpo(ddof=0) + clip"]
    assert result.difference["grpo"] > 1e-3
    monkeypatch.chdir(run_dir)
    assert cli.main(["replay", "."]) == 0
    assert "are those of `grpo(ddof=0) + clip`, as the run recorded" in capsys.readouterr().out


def test_what_the_command_line_says_goes_before_the_record(run_dir):
    rollouts = Rollouts(run_dir, num_generations=4, reward_names=["brevity"], reward_weights=[2.0])
    assert (rollouts.size, rollouts.names, rollouts.weights.tolist()) == (4, ("brevity",), [2.0])


def test_the_model_card_says_what_was_trained(run_dir):
    card = (run_dir / "README.md").read_text(encoding="utf-8")
    assert card.count("## Training settings") == 1
    for row in (
        "| advantages | `grpo` |",
        "| advantage_kwargs | `{'ddof': 0}` |",
        "| advantage_modifiers | `{'clip': {'max': 0.9}}` |",
        "| rewards | `vowels (weight 1), brevity (weight 3)` |",
        "| loss_type | `dapo` |",
        "| num_generations | `8` |",
        "| learning_rate | `0.01` |",
    ):
        assert row in card
    assert "| trl | `" in card
    assert "open-sesame" not in card
    assert card.index("## Training settings") < card.index("### Framework versions")


def test_a_plain_config_is_recorded_too(tmp_path):
    trainer = make_trainer(tmp_path, trainer_class=GRPOPlusTrainer, config_class=GRPOConfig, max_steps=1)
    trainer.train()
    record = read_run(tmp_path)
    assert (record.settings["scale_rewards"], record.settings["num_generations"]) == ("group", 4)
    trainer.create_model_card(model_name="mine")
    assert "| advantages | `TRL's own` |" in (tmp_path / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "settings",
    [
        {"advantage_estimator": "os.system", "num_generations": 8},
        {"advantage_estimator": ["grpo"], "num_generations": 2**40},
        {"advantage_estimator": "grpo", "advantage_kwargs": [1, 2]},
        {"advantage_estimator": "grpo", "advantage_kwargs": {"dof": 0}, "num_generations": "8"},
        {"advantage_estimator": "grpo", "advantage_modifiers": {"clip": {"max": -1}}},
    ],
)
def test_a_record_that_somebody_wrote_is_not_believed(run_dir, settings):
    path = run_dir / RUN_FILE
    before = path.read_text()
    try:
        path.write_text(json.dumps({"settings": settings, "rewards": {"vowels": 1.0, "brevity": 3.0}}))
        result = replay(Rollouts(run_dir, num_generations=8))
    finally:
        path.write_text(before)
    assert all(not recipe.recorded for recipe in result.recipes.values())
    assert result.same == []
