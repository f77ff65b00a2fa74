"""Aligned vLLM runs without TRL's forward of the old policy: its loss, its gradients, its log, one forward less."""

import warnings

import pytest
import torch
from peft import LoraConfig

from grpo_plus import GRPOPlusConfig, GRPOPlusTrainer
from grpo_plus.losses import LOSSES
from tests.close import assert_close
from tests.engine import install_engine
from tests.refilling import MIXED, Judge
from tests.training import PROMPTS, logs_of, make_trainer, newest, weights_of

LORA = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
OFF = {"packing": "none", "skip_zero_advantage": False, "skip_old_policy_pass": False}
# One step of plain SGD: what changes in the weights is the gradient. Two generation batches of two micro-batches.
COMMON = {
    "use_vllm": True,
    "optim": "sgd",
    "learning_rate": 0.5,
    "max_steps": 1,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 4,
    "steps_per_generation": 2,
}


def settings(mode: str, low: float | None, high: float | None) -> dict:
    return {
        "vllm_importance_sampling_mode": mode,
        "vllm_importance_sampling_clip_min": low,
        "vllm_importance_sampling_clip_max": high,
    }


CASES = [
    ("dapo", settings("token_truncate", 0.8, 1.2), {"packing": "shared_prompt"}, LORA),
    newest("bnpo", settings("token_mask", 0.8, None), {"packing": "padding_free"}, None),
    newest("grpo", settings("sequence_truncate", None, 1.3), {"packing": "none"}, None),
    newest("dr_grpo", settings("sequence_mask", 0.5, 2.0), {"packing": "shared_prompt"}, None),
    newest("vespo", settings("token_mask", None, 1.2), {"packing": "shared_prompt"}, None),
    newest("sapo", {"off_policy_mask_threshold": 0.05, "max_steps": 2}, {"packing": "none"}, LORA),
    newest("cispo", {"num_iterations": 2, "beta": 0.1}, {"packing": "shared_prompt"}, LORA),
    newest("topr", settings("token_truncate", None, 1.2), {"packing": "shared_prompt"}, None),
]


def trainer(folder, *, stock=False, adapter=None, eval_dataset=None, **config):
    return make_trainer(
        folder,
        trainer_arguments={"peft_config": adapter, "eval_dataset": eval_dataset},
        **({} if stock else {"trainer_class": GRPOPlusTrainer, "config_class": GRPOPlusConfig}),
        **(COMMON | config),
    )


def assert_same_run(ours, theirs, *, but=()):
    changes = []
    for made in (ours, theirs):
        start = weights_of(made)
        torch.manual_seed(0)  # TRL shuffles the rows
        made.train()
        changes.append(torch.cat([(weight - start[name]).flatten() for name, weight in weights_of(made).items()]))
    assert changes[1].norm() > 1e-3
    assert_close("changes of the weights", *changes, rtol=5e-6)
    for mine, expected in zip(logs_of(ours), logs_of(theirs), strict=True):
        shared = {name: value for name, value in expected.items() if not name.startswith(but)}
        assert mine == pytest.approx(mine | shared, rel=1e-4, abs=1e-6, nan_ok=True)


def forwards_without_a_gradient(made):
    """Filled while `made` trains: the padded sizes of its model's forwards that nothing is learned from."""
    sizes = []
    made.model.register_forward_pre_hook(
        lambda _, args, kwargs: sizes.append(tuple(kwargs["input_ids"].shape)) if not torch.is_grad_enabled() else None,
        with_kwargs=True,
    )
    return sizes


@pytest.mark.parametrize(("loss", "config", "ours", "adapter"), CASES)
def test_a_run_is_trls(tmp_path, monkeypatch, loss, config, ours, adapter):
    install_engine(monkeypatch)
    config = {"loss_type": loss, "adapter": adapter} | config
    trls = {"stock": True} if LOSSES[loss].origin == "trl" else OFF
    made = trainer(tmp_path / "ours", **config, **ours)
    assert made.speed.drops_old_policy_pass
    assert_same_run(made, trainer(tmp_path / "theirs", **config, **trls))


@pytest.mark.newest_trl
def test_the_pass_is_gone_in_training_and_stays_in_evaluation(tmp_path, monkeypatch):
    install_engine(monkeypatch)
    made, stock = (
        trainer(tmp_path / name, eval_dataset=PROMPTS.select(range(2)), eval_strategy="steps", eval_steps=1, **config)
        for name, config in {"ours": {"packing": "none"}, "stock": {"stock": True}}.items()
    )
    ours, stocks = forwards_without_a_gradient(made), forwards_without_a_gradient(stock)
    assert_same_run(made, stock)
    # TRL scores each of two generation batches in chunks of a micro-batch: 2 * 2 forwards. Two of each evaluation batch.
    assert len(stocks) - len(ours) == 4
    assert len(ours) % 2 == 0
    assert ours


@pytest.mark.newest_trl
def test_skipped_completions_need_no_old_policy(tmp_path, monkeypatch):
    install_engine(monkeypatch)

    def half_dead(prompts, completions, **_):
        return [float(len(c)) if p.startswith(("0", "2")) else 1.0 for p, c in zip(prompts, completions, strict=True)]

    config = {"reward_funcs": [half_dead], "advantage_estimator": "dr_grpo", **settings("token_mask", None, None)}
    made = trainer(tmp_path / "on", packing="shared_prompt", **config)
    assert_same_run(made, trainer(tmp_path / "off", **config, **OFF), but=("sampling/", "entropy"))
    log = logs_of(made)[0]
    assert log["packing/live_fraction"] < 1
    # The engine's noise has a standard deviation of 0.2; of a skipped row no log-probabilities are known.
    assert log["sampling/sampling_logp_difference/mean"] == pytest.approx(0.2 * (2 / torch.pi) ** 0.5, rel=0.3)
    assert 0.4 < log["sampling/importance_sampling_ratio/min"] < 1 < log["sampling/importance_sampling_ratio/max"] < 2.5


@pytest.mark.newest_trl
@pytest.mark.parametrize("noise", [0.05, 1.0])
def test_an_engine_that_is_far_from_the_policy_is_warned_of(tmp_path, monkeypatch, noise):
    install_engine(monkeypatch, noise=noise)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(tmp_path, packing="none").train()
    assert sum("not sampled from the policy" in str(warning.message) for warning in caught) == (noise == 1.0)


@pytest.mark.newest_trl
def test_refilled_groups_bring_what_their_ratio_needs(tmp_path, monkeypatch):
    install_engine(monkeypatch)
    runs = []
    for name, switches in (("on", {"skip_zero_advantage": False}), ("off", OFF)):
        config = {"reward_funcs": [Judge()], "train_dataset": MIXED, "advantage_estimator": "rloo", "max_refills": 1}
        runs.append(trainer(tmp_path / name, **config, **switches))
    assert_same_run(*runs, but=("sampling/",))
    assert logs_of(runs[0])[0]["sampling/refills"] == 1


@pytest.mark.newest_trl
@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"use_vllm": False}, "for vLLM's importance sampling correction, which is off"),
        ({"vllm_importance_sampling_correction": False}, "which is off"),
        ({"num_iterations": 4}, r"steps_per_generation \* num_iterations = 8 does not divide gradient_accum.*=4"),
        ({"steps_per_generation": 8}, "a generation batch outlives the policy that it came from"),
    ],
)
def test_the_pass_stays_where_the_policy_changes(tmp_path, monkeypatch, config, reason):
    install_engine(monkeypatch)
    assert not trainer(tmp_path, **config).speed.drops_old_policy_pass
    with pytest.raises(ValueError, match=f"skip_old_policy_pass=True is not possible: .*{reason}"):
        trainer(tmp_path, skip_old_policy_pass=True, **config)


@pytest.mark.newest_trl
def test_the_pass_stays_under_dropout_and_where_it_is_switched_off(tmp_path, monkeypatch):
    install_engine(monkeypatch)
    dropout = LoraConfig(r=4, lora_dropout=0.3, target_modules="all-linear", task_type="CAUSAL_LM")
    assert not trainer(tmp_path, adapter=dropout).speed.drops_old_policy_pass
    with pytest.raises(ValueError, match=r"skip_old_policy_pass=True is not possible: dropout 0.3 in"):
        trainer(tmp_path, adapter=dropout, skip_old_policy_pass=True)
    made = trainer(tmp_path, **OFF)
    sizes = forwards_without_a_gradient(made)
    made.train()
    assert len(sizes) == 4
