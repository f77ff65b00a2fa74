import sys

import pytest

from grpo_plus import GRPOPlusConfig
from grpo_plus.advantages import ESTIMATORS


def config(**fields) -> GRPOPlusConfig:
    return GRPOPlusConfig(output_dir="unused", use_cpu=True, bf16=False, report_to="none", **fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"advantage_estimator": "dr_grop"}, "Unknown advantage estimator 'dr_grop'. Did you mean 'dr_grpo'"),
        ({"advantage_estimator": "nowhere.mine"}, "no module 'nowhere'"),
        (
            {"advantage_estimator": "grpo", "advantage_kwargs": {"dof": 0}},
            "'grpo' takes no keyword 'dof'. Did you m.*ddof",
        ),
        ({"advantage_estimator": "grpo", "advantage_kwargs": {"ddof": 2}}, "does not fit 'grpo': ddof=2"),
        ({"advantage_estimator": "grpo", "advantage_kwargs": {"eps": -1}}, "does not fit 'grpo': eps=-1 is negative"),
        ({"advantage_estimator": "grpo", "advantage_kwargs": {"eps": "x"}}, "does not fit 'grpo'"),
        ({"advantage_estimator": "grpo", "advantage_kwargs": "{ddof: 0}"}, "is not a JSON object"),
        ({"advantage_estimator": "grpo", "advantage_kwargs": "[0]"}, "is not a JSON object"),
        (
            {"advantage_estimator": "grpo", "advantage_kwargs": {"eps": float("inf")}},
            "does not fit 'grpo': eps=inf is negative or infinite",
        ),
        ({"advantage_estimator": 3}, "advantage estimator 3 is neither a name nor a function"),
        ({"advantage_estimator": "passk", "advantage_kwargs": {"k": 9}}, "does not fit 'passk': .*9"),
        ({"advantage_estimator": "rloo", "advantage_modifiers": {"clipp": {"max": 1.0}}}, "clipp.*Did you mean 'clip'"),
        ({"advantage_modifiers": {"clip": {"max": 1.0}}}, "Set advantage_estimator too"),
        ({"max_nonfinite_steps": 0}, "max_nonfinite_steps=0 is not a number of optimizer steps. Use 1"),
        ({"max_nonfinite_steps": 2.5}, "max_nonfinite_steps=2.5 is not a number of optimizer steps"),
        ({"max_nonfinite_steps": True}, "max_nonfinite_steps=True is not a number of optimizer steps"),
        ({"max_refills": -1}, "max_refills=-1 is not a number of batches"),
        ({"max_refills": 1.5, "advantage_estimator": "rloo"}, "max_refills=1.5 is not a number of batches"),
        ({"max_refills": True}, "max_refills=True is not a number of batches"),
        ({"refill_buffer": 0.5}, "refill_buffer=0.5 is not a number of batches"),
        (
            {"refill_buffer": 2, "loss_type": "reinforce"},
            "refill_buffer=2 is not possible: loss_type='reinforce' has no",
        ),
        ({"refill_buffer": 2, "beta": 0.1, "sync_ref_model": True}, "those of an older one. Set sync_ref_model=False"),
        (
            {"refill_buffer": 2, "reward_weight_schedule": {"a": [0.0, 1.0]}},
            "advantages of other reward weights. Set advantage_estimator='grpo'",
        ),
        (
            {"refill_buffer": 2, "advantage_estimator": "ema_task"},
            "'ema_task' remembers rewards, and would count a group",
        ),
        (
            {"refill_buffer": 2, "scale_rewards": "batch"},
            "refill_buffer=2 replaces groups, but with scale_rewards='batch'",
        ),
        (
            {"refill_buffer": 2, "skip_old_policy_pass": True, "use_vllm": True},
            "skip_old_policy_pass=True .*refill_buffer=2 keeps the log-probabilities",
        ),
        ({"prompt_sampler": {"passrate": {}}}, "Unknown prompt_sampler 'passrate'. Did you mean 'pass_rate'"),
        (
            {"prompt_sampler": "passrate"},
            "Unknown prompt_sampler 'passrate'. Did you mean 'pass_rate'. Known: pass_rate.$",
        ),
        ({"prompt_sampler": {"pass_rate": {"reward": 3}}}, "reward=3 must be the name of a reward function"),
        ({"overlap_rewards": True}, "Unknown overlap_rewards True. Known: batch, groups. Or name functions"),
        ({"reward_weight_schedule": [1.0, 0.1]}, r'Write for example {"format": \[1.0, 0.1\]}'),
        ({"loss_type": "gmpo", "loss_kwargs": {"epsilon": "0.1"}}, "epsilon='0.1' must be a number"),
        (
            {"advantage_estimator": "rloo", "advantage_modifiers": {"alp": {"by": 3, "beta": 0.1, "max_length": 5}}},
            "advantage_modifiers={'alp': .* does not fit: by=3 must be text",
        ),
        ({"prompt_sampler": {}}, "prompt_sampler={} must be the name of one sampler with its keywords"),
        ({"prompt_sampler": {"pass_rate": 3}}, "must be the name of one sampler with its keywords"),
        ({"prompt_sampler": {"pass_rate": {"flor": 0.1}}}, "takes no keyword 'flor'. Did you mean 'floor'"),
        ({"prompt_sampler": {"pass_rate": {"floor": 0}}}, "does not fit 'pass_rate': floor=0 must be above 0"),
        ({"prompt_sampler": {"pass_rate": {"decay": 1.5}}}, "decay=1.5 must be from 0 to 1"),
        ({"prompt_sampler": {"pass_rate": {"threshold": "x"}}}, "threshold='x' must be a finite number"),
        ({"prompt_sampler": {"pass_rate": {}}, "shuffle_dataset": False}, "shuffle_dataset=False asks for the order"),
        (
            {"max_refills": 1, "scale_rewards": "batch"},
            "max_refills=1 .*scale_rewards='batch'.*set advantage_estimator='batch_std'",
        ),
        (
            {"max_refills": 1, "multi_objective_aggregation": "normalize_then_sum"},
            "max_refills=1 .*multi_objective_aggregation='normalize_then_sum'.*set advantage_estimator='gdpo'",
        ),
        (
            {"loss_type": "gmpo", "epsilon": 0.3},
            "loss_type='gmpo': epsilon=0.3 is read by TRL's losses only.*loss_kwargs takes eps",
        ),
        ({"loss_type": "gmpo", "delta": 2.0}, "delta=2.0 is read by TRL's losses only"),
        (
            {"loss_type": "topr", "importance_sampling_level": "sequence"},
            "importance_sampling_level='sequence' is read by",
        ),
        ({"loss_type": "gmpo", "top_entropy_quantile": 0.2}, "top_entropy_quantile=0.2 is read by TRL's losses only"),
        ({"loss_type": "gmpo", "entropy_coef": 0.01}, "entropy_coef=0.01 is read by TRL's losses only"),
        ({"loss_type": "gmpo", "off_policy_mask_threshold": 0.5}, "off_policy_mask_threshold=0.5 is read by"),
        (
            {"loss_type": "gmpo", "loss_kwargs": {"epsilonn": 0.3}},
            "'gmpo' takes no keyword 'epsilonn'. Did you mean 'epsilon'",
        ),
        ({"loss_type": "gmpo", "loss_kwargs": {"epsilon": -0.3}}, "does not fit 'gmpo': epsilon=-0.3"),
        (
            {"loss_type": "gmpo", "loss_reduction": "token_mean"},
            "Unknown loss_reduction 'token_mean'. Did you mean 'token-mean'",
        ),
        ({"loss_type": "gmpo", "kl_estimator": "k4"}, "Unknown kl_estimator 'k4'"),
        (
            {"loss_type": "dapo", "loss_kwargs": {"c": 3.0}},
            "loss_type='dapo': loss_kwargs={'c': 3.0} is read by the losses that",
        ),
        (
            {"loss_type": "dapo", "loss_reduction": "token-mean"},
            "loss_reduction='token-mean' is read by the losses that TRL lacks",
        ),
        ({"kl_target": 0.1}, "kl_target=0.1 moves beta, which is 0"),
        ({"kl_target": -0.1, "beta": 0.1}, "target_kl"),
        ({"kl_horizon": 500}, "kl_horizon=500 has no effect without kl_target"),
        ({"loss_type": "gmpo", "kl_estimator": "k1"}, "kl_estimator='k1' has no effect with beta=0"),
        (
            {"loss_type": "gmpo", "kl_estimator": "k1", "beta": 0.1, "use_bias_correction_kl": False},
            "kl_estimator='k1' with use_bias_correction_kl=False has a gradient of 0",
        ),
        ({"advantage_estimator": "rloo", "advantage_modifiers": {"pods": {"keep": 1}}}, "keep=1 does not fit"),
        (
            {"advantage_estimator": "rloo", "advantage_modifiers": {"pods": {"keep": 9}}},
            "keep=9 does not fit: groups have num_generations=8",
        ),
        ({"loss_type": None}, "loss_type None is neither a name nor a function"),
        ({"advantage_kwargs": {"ddof": 0}}, "Set advantage_estimator too"),
        (
            {"advantage_estimator": "grpo", "scale_rewards": "none"},
            "advantage_estimator='grpo' replaces TRL's advantages, so scale_rewards='none'",
        ),
        (
            {"advantage_estimator": "grpo", "multi_objective_aggregation": "normalize_then_sum"},
            "advantage_estimator='grpo' .*multi_objective_aggregation='normalize_then_sum'",
        ),
        ({"loss_type": "dappo"}, "Unknown loss_type 'dappo'. Did you mean 'dapo'"),
    ],
)
def test_a_wrong_setting_is_refused_at_construction(fields, message):
    with pytest.raises(ValueError, match=message):
        config(**fields)


def test_keywords_may_be_json():
    given = config(advantage_estimator="grpo", advantage_kwargs='{"ddof": 0, "eps": 0}')
    assert given.advantage_kwargs == {"ddof": 0, "eps": 0}


def test_a_function_of_the_user_is_found_by_its_path(tmp_path, monkeypatch):
    (tmp_path / "my_estimators.py").write_text(
        "def double(rewards, *, factor=2.0):\n    return factor * rewards.total()\n"
        "def strict(rewards, *, factor):\n    return factor * rewards.total()\n"
        "def any_keyword(rewards, **keywords):\n    return rewards.total()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    config(advantage_estimator="my_estimators.double", advantage_kwargs={"factor": 3.0})
    with pytest.raises(
        ValueError, match="does not fit 'my_estimators.strict': missing a required.* argument: 'factor'"
    ):
        config(advantage_estimator="my_estimators.strict")
    config(advantage_estimator="my_estimators.any_keyword", advantage_kwargs={"whatever": 3.0})
    with pytest.raises(ValueError, match="takes no keyword 'faktor'. Did you mean 'factor'"):
        config(advantage_estimator="my_estimators.double", advantage_kwargs={"faktor": 3.0})
    sys.modules.pop("my_estimators")


def test_the_summary_names_what_is_active():
    assert (
        config(advantage_estimator="grpo", advantage_kwargs={"ddof": 0})
        .describe()
        .endswith("advantages grpo(ddof=0); loss dapo; packing auto")
    )
    assert "TRL's (scale_rewards=group" in config().describe()


@pytest.mark.parametrize("name", ESTIMATORS)
def test_every_estimator_passes_with_its_defaults(name):
    assert name in config(advantage_estimator=name).describe()


def test_cispo_without_an_upper_bound_is_warned_about():
    with pytest.warns(UserWarning, match="scales every token by 0.2"):
        config(loss_type="cispo")


def test_a_loss_that_cannot_differ_is_warned_about():
    with pytest.warns(
        UserWarning, match="'gmpo' with one update per batch of completions has the gradient of 'reinforce'"
    ):
        config(loss_type="gmpo")


@pytest.mark.parametrize(("corrected", "warned"), [(True, True), (False, False)])
def test_k2_times_the_ratio_is_warned_about(corrected, warned, recwarn):
    config(loss_type="gmpo", num_iterations=2, kl_estimator="k2", beta=0.1, use_bias_correction_kl=corrected)
    assert any("adds the gradient of k2's bias" in str(warning.message) for warning in recwarn) == warned


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"loss_type": "gmpo", "num_iterations": 2},
        {"loss_type": "cispo", "epsilon_high": 5.0},
        {"loss_type": "reinforce"},
    ],
)
def test_other_settings_are_not_warned_about(fields, recwarn):
    config(**fields)
    assert not [warning for warning in recwarn if "loss_type" in str(warning.message)]
