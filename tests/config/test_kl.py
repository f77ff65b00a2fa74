"""Where the KL may go, and with what."""

from typing import Any

import pytest

from grpo_plus import GRPOPlusConfig
from grpo_plus.advantages import ESTIMATORS
from grpo_plus.config.speed import why_not_skip, why_not_skip_old_policy

IN_REWARD: dict[str, Any] = {"kl_in_reward": {}}


def config(**fields: Any) -> GRPOPlusConfig:
    given = {"advantage_estimator": "rloo", "advantage_modifiers": IN_REWARD, "beta": 0.1}
    return GRPOPlusConfig("unused", use_cpu=True, bf16=False, **given | fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"beta": 0.0}, "takes beta times the KL from the rewards, but beta=0"),
        ({"demonstration_column": "solution"}, "estimates the KL from what the policy drew"),
        ({"advantage_estimator": "gdpo"}, "'gdpo': it looks at each reward by itself"),
        ({"advantage_estimator": "spo"}, "does not go with advantage_estimator='spo'"),
        ({"advantage_modifiers": IN_REWARD | {"difficulty": {}}}, "Give it by=, the reward that says"),
        ({"loss_type": "gmpo", "kl_estimator": "k2"}, "no effect with a KL in the reward, which is k1"),
        ({"advantage_modifiers": {"kl_in_reward": {"beta": 0.1}}}, "'kl_in_reward' takes no keyword 'beta'"),
        (
            {"use_vllm": True, "skip_old_policy_pass": True},
            "needs the old policy's log-probabilities before the update",
        ),
    ],
)
def test_what_would_not_subtract_the_kl_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        config(**fields)


def test_the_loss_has_no_kl_then_and_completions_can_be_skipped():
    made = config(advantage_modifiers='{"kl_in_reward": {}}', kl_target=0.1, loss_type="bnpo")
    assert why_not_skip(made) is None
    assert "a KL gradient" in str(why_not_skip(config(advantage_modifiers={})))
    assert "before the update" in str(why_not_skip_old_policy(config(use_vllm=True)))


def why_refused(name: str) -> str:
    try:
        config(advantage_estimator=name, advantage_kwargs={"bounds": {"a": [0, 1]}} if name == "sa_mrpo" else {})
    except ValueError as error:
        return str(error)
    return ""


def test_estimators_that_cannot_read_a_lowered_sum_are_refused_before_the_run():
    each_alone = {"dvao", "gd2po", "gdpo", "mo_grpo", "sa_mrpo", "process"}
    of_another_range = {"bnpo_advantage", "passk", "pkpo", "spo"}
    refused = {name: why for name in ESTIMATORS if (why := why_refused(name))}
    assert set(refused) == each_alone | of_another_range
    assert [why for why in refused.values() if "kl_in_reward" not in why] == []


def test_groups_that_agree_are_warned_of_where_their_spread_divides(recwarn):
    config()
    config(advantage_estimator="grpo", advantage_modifiers=IN_REWARD | {"filter_zero_std": {"by": "a"}})
    assert not [warning for warning in recwarn if "kl_in_reward" in str(warning.message)]
    with pytest.warns(UserWarning, match="differs in the KL alone"):
        config(advantage_estimator="grpo")


def test_refills_that_would_find_no_dead_group_are_warned_of(recwarn):
    config(max_refills=1, advantage_modifiers=IN_REWARD | {"filter_zero_std": {"by": "a"}})
    assert not [warning for warning in recwarn if "kl_in_reward" in str(warning.message)]
    for field in ("max_refills", "refill_buffer"):
        with pytest.warns(UserWarning, match=f"{field}=1.* replace none. Add the modifier 'filter_zero_std'"):
            config(**{field: 1})
