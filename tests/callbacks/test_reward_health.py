import warnings
from typing import Any

import pytest
from transformers import TrainerControl, TrainerState
from trl import GRPOConfig

from grpo_plus import GRPOPlusConfig, GRPOPlusTrainer, RewardHealthCallback
from tests.training import make_trainer

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
    "grad_norm": 0.5,
}
SICK = [
    pytest.param({"advantages/dead_groups": 1.0}, "100% of the groups", id="dead"),
    pytest.param(
        {"advantages/zero_spread/format": 1.0, "advantages/zero_spread/correct": 1.0},
        r"reward 'correct' \(mean 0.5\) and reward 'format' \(mean 0.8\) do not tell",
        id="constant in each group",
    ),
    pytest.param({"grad_norm": 0.0}, "the gradient is 0", id="no gradient"),
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
    "advantages/zero_spread/correct": 0.99,
    "advantages/zero_spread/format": 1.0,
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
    log = stock | {"rewards/format/std": std, "rewards/correct/std": 0.0}
    messages = on_main(RewardHealthCallback(patience=2), [log] * 4)
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
    sick = HEALTHY | {"advantages/dead_groups": 1.0, "completions/mean_length": 500.0}
    assert len(on_main(RewardHealthCallback(patience=2), [HEALTHY] * 2 + [sick] * 5)) == 2


def test_a_run_that_cannot_learn_has_one_cause():
    # Constant rewards make dead groups, and these no gradient: the first of the three is said.
    sick = {"advantages/zero_spread/format": 1.0, "advantages/zero_spread/correct": 1.0, "grad_norm": 0.0}
    (message,) = on_main(RewardHealthCallback(patience=2), [HEALTHY | sick | {"advantages/dead_groups": 1.0}] * 9)
    assert "tell the completions of any group apart" in message


SATURATED = {"advantages/zero_spread/format": 1.0, "rewards/format/std": 0.0, "advantages/reward_share/correct": 1.0}


def test_a_reward_that_is_solved_while_another_teaches_is_healthy():
    log = HEALTHY | SATURATED | {"advantages/reward_share/format": 0.0}
    assert on_main(RewardHealthCallback(patience=2), [HEALTHY] * 2 + [log] * 9) == []


def test_a_reward_that_is_only_watched_may_be_constant():
    weights = {"correct": 1.0, "format": 0.0}
    assert on_main(RewardHealthCallback(weights=weights, patience=2), [HEALTHY | SATURATED] * 9) == []
    # ... and does not hide that the other teaches nothing.
    sick = HEALTHY | {"advantages/zero_spread/correct": 1.0}
    (message,) = on_main(RewardHealthCallback(weights=weights, patience=2), [sick] * 9)
    assert "reward 'correct' (mean 0.5) does not tell" in message


@pytest.mark.parametrize(("groups", "logs"), [(2, 32), (16, 5)])
def test_dead_groups_after_live_ones_are_counted_in_groups(tmp_path, groups, logs):
    """Where tasks are hard, five small batches of dead groups in a row are chance."""
    config = GRPOPlusConfig(str(tmp_path), use_cpu=True, bf16=False, generation_batch_size=8 * groups)
    callback, state = RewardHealthCallback(), TrainerState(logging_steps=1, is_world_process_zero=True)
    dead = HEALTHY | {"advantages/dead_groups": 1.0}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for entry in [HEALTHY, *[dead] * (logs - 1)]:
            callback.on_log(config, state, TrainerControl(), logs=entry)
    with pytest.warns(UserWarning, match=f"{logs} logs in a row: in 100% of the groups"):
        callback.on_log(config, state, TrainerControl(), logs=dead)


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


def said(trainer: Any) -> list[str]:
    """What the callback says in a training."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    messages = [str(warning.message) for warning in caught]
    return [message.partition("logs in a row: ")[2] for message in messages if "logs in a row" in message]


def by_hand(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    """Unlike the same reward for all, and unlike vowels never constant: a completion's place decides."""
    return [float(row % 4) for row in range(len(completions))]


OURS: dict[str, Any] = {"trainer_class": GRPOPlusTrainer, "config_class": GRPOPlusConfig, "max_steps": 6}
HOPELESS = [
    ({"reward_funcs": [constant]}, "reward 'constant' (mean 0.7) does not tell the completions"),
    (
        {"mask_truncated_completions": True, "max_completion_length": 1},
        "100% of the completions reach max_completion_length=1 without an end",
    ),
    ({"reward_weights": [0.0, 0.0]}, "every reward weight is 0"),
    ({"top_k": 1}, "with top_k=1 the likeliest token is chosen each time"),
    ({"temperature": 1e-4}, "with temperature=0.0001 the likeliest token"),
]


@pytest.mark.parametrize("config_class", [GRPOPlusConfig, GRPOConfig])
@pytest.mark.parametrize(("settings", "message"), HOPELESS)
def test_a_run_that_cannot_learn_says_so_by_itself(tmp_path, settings, message, config_class):
    (only,) = said(make_trainer(tmp_path, **(OURS | {"config_class": config_class} | settings)))
    assert only.startswith(message)


def test_the_field_switches_the_warnings_off(tmp_path):
    assert said(make_trainer(tmp_path, reward_funcs=[constant], health_warnings=False, **OURS)) == []


def test_a_callback_of_the_users_stands_alone(tmp_path):
    mine = RewardHealthCallback(patience=2)
    trainer = make_trainer(tmp_path, reward_funcs=[constant], **OURS)
    trainer.add_callback(mine)
    assert len(said(trainer)) == 1
    assert [c for c in trainer.callback_handler.callbacks if isinstance(c, RewardHealthCallback)] == [mine]


def test_a_training_that_learns_says_nothing(tmp_path):
    assert said(make_trainer(tmp_path, reward_funcs=[by_hand, constant], reward_weights=[1.0, 0.0], **OURS)) == []
    assert said(make_trainer(tmp_path, reward_funcs=[by_hand, constant], **OURS)) == []


def test_trls_own_trainer_is_read_too(tmp_path):
    callback = RewardHealthCallback(patience=3)
    trainer = make_trainer(tmp_path, reward_funcs=[constant], trainer_arguments={"callbacks": [callback]})
    (message,) = said(trainer)
    assert message.startswith("reward 'constant' (mean 0.7) does not tell")
