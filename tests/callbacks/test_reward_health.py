import warnings
from typing import Any

import pytest
from transformers import TrainerControl, TrainerState
from trl import GRPOConfig

from grpo_plus import GRPOPlusConfig, GRPOPlusTrainer, RewardHealthCallback
from tests.training import make_trainer, vowels

HEALTHY = {
    "frac_reward_zero_std": 0.25,
    "rewards/correct/mean": 0.5,
    "rewards/correct/std": 0.5,
    "rewards/format/mean": 0.8,
    "rewards/format/std": 0.4,
    "reward": 1.3,
    "entropy": 2.0,
    "completions/mean_length": 100.0,
    "completions/clipped_ratio": 0.1,
    "advantages/zero_spread/correct": 0.5,
    "advantages/zero_spread/format": 0.6,
    "advantages/dead_groups": 0.25,
    "advantages/reward_share/correct": 0.6,
    "advantages/reward_share/format": 0.4,
    "advantages/length_correlation": 0.3,
}
SICK = [
    pytest.param({"advantages/dead_groups": 1.0}, "100% of the groups", id="dead"),
    pytest.param({"advantages/zero_spread/format": 1.0}, "reward 'format'", id="constant in each group"),
    pytest.param({"advantages/reward_share/correct": 0.96}, "reward 'correct' makes up 96%", id="dominant"),
    pytest.param({"completions/mean_length": 201.0}, "201 tokens on average and had 100", id="longer"),
    pytest.param({"completions/mean_length": 49.0}, "49 tokens on average and had 100", id="shorter"),
    pytest.param({"advantages/length_correlation": 0.81}, r"\+0.81.*longer", id="longer is better"),
    pytest.param({"advantages/length_correlation": -0.81}, r"-0.81.*shorter", id="shorter is better"),
    pytest.param({"entropy": 0.19}, "entropy fell to 0.19 from 2", id="entropy"),
]
ALMOST_SICK = {
    "advantages/dead_groups": 0.94,
    "rewards/format/std": 1e-3,
    "advantages/zero_spread/format": 0.99,
    "advantages/reward_share/correct": 0.95,
    "completions/mean_length": 200.0,
    "advantages/length_correlation": -0.8,
    "entropy": 0.2,
}


def warnings_of(callback: RewardHealthCallback, logs: list[dict[str, Any]], **state: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for entry in logs:
            callback.on_log(GRPOConfig, TrainerState(**state), TrainerControl(), logs=entry)
    return [str(warning.message) for warning in caught]


def on_main(callback: RewardHealthCallback, logs: list[dict[str, Any]]) -> list[str]:
    return warnings_of(callback, logs, is_world_process_zero=True)


@pytest.mark.parametrize(("change", "message"), SICK)
def test_each_cause_warns_once_after_patience_logs(change, message):
    callback = RewardHealthCallback(patience=3)
    assert on_main(callback, [HEALTHY] * 3 + [HEALTHY | change] * 2) == []
    with pytest.warns(UserWarning, match=message):
        callback.on_log(None, TrainerState(), TrainerControl(), logs=HEALTHY | change)
    assert on_main(callback, [HEALTHY | change] * 4 + [HEALTHY] + [HEALTHY | change] * 4) == []


@pytest.mark.parametrize(("change", "message"), SICK)
def test_a_healthy_log_restarts_the_count(change, message):
    callback = RewardHealthCallback(patience=3)
    assert on_main(callback, [HEALTHY] * 3 + ([HEALTHY | change] * 2 + [HEALTHY]) * 3) == []


def test_values_at_the_harmless_side_of_each_threshold_are_silent():
    assert on_main(RewardHealthCallback(patience=2), [HEALTHY] * 2 + [HEALTHY | ALMOST_SICK] * 6) == []


def test_without_our_figures_trls_share_of_dead_groups_decides():
    stock = {key: value for key, value in HEALTHY.items() if not key.startswith("advantages/")}
    (message,) = on_main(RewardHealthCallback(patience=2), [stock | {"frac_reward_zero_std": 0.95}] * 4)
    assert "95% of the groups" in message


@pytest.mark.parametrize(("std", "warned"), [(0.0, 1), (6e-8, 1), (1e-3, 0)])
def test_without_our_figures_trls_std_tells_a_constant_reward(std, warned):
    stock = {key: value for key, value in HEALTHY.items() if not key.startswith("advantages/")}
    messages = on_main(RewardHealthCallback(patience=2), [stock | {"rewards/format/std": std}] * 4)
    assert len([message for message in messages if "reward 'format'" in message]) == warned


def test_constant_returns_beside_varied_steps_are_healthy():
    # Under advantage_estimator="process" zero_spread is that of the steps.
    steps = HEALTHY | {"rewards/format/std": 0.0, "advantages/zero_spread/format": 0.2}
    assert on_main(RewardHealthCallback(patience=2), [steps] * 4) == []


@pytest.mark.parametrize(
    ("settings", "suggested"),
    [
        ({"advantage_estimator": "rloo"}, True),
        ({"advantage_estimator": "gdpo"}, False),
        ({"multi_objective_aggregation": "normalize_then_sum"}, False),
        ({}, True),
    ],
)
def test_normalizing_is_not_suggested_to_a_run_that_does(tmp_path, settings, suggested):
    callback = RewardHealthCallback(patience=1)
    dominated = HEALTHY | {"advantages/reward_share/correct": 0.99}
    config = GRPOPlusConfig(str(tmp_path), use_cpu=True, bf16=False, **settings)
    with pytest.warns(UserWarning, match="makes up 99%.*in reward_weights") as caught:
        callback.on_log(config, TrainerState(), TrainerControl(), logs=dominated)
    assert ("gdpo" in str(caught[0].message)) == suggested


def test_two_causes_are_two_warnings():
    sick = HEALTHY | {"advantages/zero_spread/format": 1.0, "advantages/zero_spread/correct": 1.0}
    assert len(on_main(RewardHealthCallback(patience=2), [sick] * 5)) == 2


def test_a_log_without_the_figure_neither_counts_nor_restarts():
    dead = {"frac_reward_zero_std": 1.0}
    others = [{"train_runtime": 3.0}, {"eval_frac_reward_zero_std": 0.0}, {"frac_reward_zero_std": None}]
    assert on_main(RewardHealthCallback(patience=3), [dead, *others, dead, *others]) == []
    assert len(on_main(RewardHealthCallback(patience=3), [dead, *others, dead, *others, dead])) == 1


def test_evaluation_logs_are_ignored():
    sick = {f"eval_{key}": value for key, value in HEALTHY.items()}
    sick |= {"eval_frac_reward_zero_std": 1.0, "eval_rewards/format/std": 0.0, "eval_entropy": 0.0}
    assert on_main(RewardHealthCallback(patience=1), [HEALTHY, sick, sick]) == []


def test_a_resumed_run_compares_with_the_first_logs_of_the_checkpoint():
    callback = RewardHealthCallback(patience=2)
    state = TrainerState(log_history=[HEALTHY, HEALTHY])
    callback.on_train_begin(None, state, TrainerControl())
    (message,) = on_main(callback, [HEALTHY | {"entropy": 0.1}] * 2)
    assert "from 2" in message


def test_only_the_main_process_warns():
    dead = {"frac_reward_zero_std": 1.0}
    assert warnings_of(RewardHealthCallback(patience=1), [dead], is_world_process_zero=False) == []
    assert len(on_main(RewardHealthCallback(patience=1), [dead])) == 1


@pytest.mark.parametrize(
    "wrong", [{"patience": 0}, {"length_ratio": 1.0}, {"dead_groups": 0.0}, {"reward_share": 95}, {"entropy_ratio": -1}]
)
def test_a_wrong_threshold_is_refused_at_construction(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        RewardHealthCallback(**wrong)


def constant(completions: list[str], **_: Any) -> list[float]:
    return [0.7] * len(completions)


@pytest.mark.parametrize("ours", [False, True])
def test_a_training_with_a_constant_reward_warns(tmp_path, ours):
    classes = {"trainer_class": GRPOPlusTrainer, "config_class": GRPOPlusConfig, "advantage_estimator": "rloo"}
    trainer = make_trainer(
        tmp_path,
        reward_funcs=(vowels, constant),
        trainer_arguments={"callbacks": [RewardHealthCallback(patience=3, length_correlation=1.0)]},
        **(classes if ours else {}),
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    messages = [str(warning.message) for warning in caught if "logs in a row" in str(warning.message)]
    assert len([message for message in messages if "reward 'constant'" in message]) == 1
    # Beside a constant, the other reward makes all the difference; only our log says so.
    assert len([message for message in messages if "reward 'vowels' makes up 100%" in message]) == ours
    assert len(messages) == 1 + ours
