"""Numbers with which nothing can be trained are refused at construction, by field, under both configurations."""

import math

import pytest
import torch
from trl import GRPOConfig, TrlParser

from grpo_plus import GRPOPlusConfig, GRPOPlusTrainer
from grpo_plus.advantages import ESTIMATORS, Rewards, check_keywords
from grpo_plus.config.numbers import RANGES, check_numbers
from grpo_plus.losses import AdaptiveBeta
from tests.training import make_trainer

NAN, INF = math.nan, math.inf
BASE = {"output_dir": "unused", "use_cpu": True, "bf16": False, "report_to": "none"}
WRONG = [
    ("beta", -1.0, "beta=-1.0 must be a finite number of 0 or more. Write one, or leave beta unset (0.0)."),
    ("beta", NAN, "beta=nan must be a finite"),
    ("beta", INF, "beta=inf must be a finite"),
    ("beta", None, "beta=None must be"),
    ("beta", "much", "beta='much' must be"),
    ("delta", NAN, "delta=nan must be a number above 0"),
    ("epsilon", -1.0, "epsilon=-1.0 must be a number of 0 or more"),
    ("epsilon", NAN, "epsilon=nan must be"),
    ("epsilon_high", NAN, "epsilon_high=nan must be"),
    ("learning_rate", NAN, "learning_rate=nan must be"),
    ("learning_rate", 10**400, "must be a finite number of 0 or more"),
    ("max_grad_norm", NAN, "max_grad_norm=nan must be"),
    ("num_iterations", 0, "num_iterations=0 must be a whole number of 1 or more"),
    ("reward_weights", [1.0, NAN], "reward_weights[1]=nan is no weight"),
    ("reward_weights", [-INF, 1.0], "reward_weights[0]=-inf is no weight"),
    ("reward_weights", ["heavy"], "reward_weights[0]='heavy' is no weight"),
    ("sapo_temperature_pos", 0.0, "sapo_temperature_pos=0.0 must be a finite number above 0"),
    ("temperature", 0.0, "temperature=0.0 must be a finite number above 0"),
    ("temperature", -0.5, "temperature=-0.5 must be"),
    ("temperature", INF, "temperature=inf must be"),
    ("top_entropy_quantile", 1.5, "top_entropy_quantile=1.5 must be a number from 0 to 1"),
    ("top_p", 0.0, "top_p=0.0 must be a number above 0 and not above 1"),
]
VALID = {
    "epsilon_high": INF,
    "delta": INF,
    "max_grad_norm": None,
    "max_completion_length": None,
    "vllm_importance_sampling_clip_max": None,
    "vllm_importance_sampling_clip_min": 0.1,
    "beta": torch.tensor(0.1),
    "reward_weights": [0.0, -1],
    "top_k": 0,
}


@pytest.mark.parametrize(("field", "value", "message"), WRONG)
def test_a_number_that_cannot_train_is_refused_by_its_field(field, value, message):
    with pytest.raises(ValueError, match="unset|watched") as refused:
        GRPOPlusConfig(**BASE, **{field: value})
    assert message in str(refused.value)


@pytest.mark.parametrize(("field", "value", "message"), [WRONG[0], WRONG[13], WRONG[17]])
def test_a_plain_configuration_is_refused_by_the_trainer(tmp_path, field, value, message):
    settings = {"reward_weights": [1.0, 1.0]} | {field: value}
    with pytest.raises(ValueError, match="unset|watched") as refused:
        make_trainer(tmp_path, trainer_class=GRPOPlusTrainer, config_class=GRPOConfig, **settings)
    assert message in str(refused.value)


def test_what_trl_can_train_with_is_taken():
    TrlParser(GRPOPlusConfig)  # transformers' parser takes None out of the types of TRL's fields
    config = GRPOPlusConfig(**BASE, **VALID)
    assert (config.epsilon_high, config.delta, config.reward_weights) == (INF, INF, [0.0, -1.0])


def test_every_default_of_trls_is_taken_and_every_field_is_one():
    config = GRPOConfig(**BASE)
    check_numbers(config)
    assert sorted(RANGES) == list(RANGES)
    assert [name for name in RANGES if not hasattr(config, name)] == []


def test_numbers_in_text_become_numbers():
    # YAML reads 1e-3 as text; TRL's own parser turns it into a number for a scalar, and not inside a list.
    config = GRPOPlusConfig(**BASE, beta="1e-3", learning_rate="1e-5", num_iterations="2", reward_weights=["5e-1"])
    assert (config.beta, config.learning_rate, config.num_iterations) == (1e-3, 1e-5, 2)
    assert config.reward_weights == [0.5]


def test_a_count_is_whole():
    config = GRPOPlusConfig(**BASE, num_generations=4.0, max_completion_length="16")
    assert [(type(n), n) for n in (config.num_generations, config.max_completion_length)] == [(int, 4), (int, 16)]
    with pytest.raises(ValueError, match=r"max_completion_length=2.5 must be a whole number of 1 or more"):
        GRPOPlusConfig(**BASE, max_completion_length=2.5)


@pytest.mark.parametrize("weights", [1.0, "[1, 1]", {"vowels": 1.0}])
def test_weights_are_a_list(weights):
    with pytest.raises(ValueError, match=r"reward_weights=.* is no list. Give one number per reward function"):
        GRPOPlusConfig(**BASE, reward_weights=weights)


def test_the_command_line_reaches_the_switches(tmp_path):
    (tmp_path / "run.yaml").write_text(
        "output_dir: unused\nuse_cpu: true\nbf16: false\nbeta: 1e-3\nreward_weights: [1e-1, 1]\nhealth_warnings: false\n"
    )
    flags = ["--config", str(tmp_path / "run.yaml"), "--reward_timeout", "30"]
    (config,) = TrlParser((GRPOPlusConfig,)).parse_args_and_config(flags)
    assert (config.health_warnings, config.reward_timeout) == (False, 30.0)
    assert (config.beta, config.reward_weights) == (1e-3, [0.1, 1.0])


@pytest.mark.parametrize("seconds", [0, -1, NAN, INF, "soon"])
def test_a_timeout_in_which_nothing_can_return_is_refused(seconds):
    with pytest.raises(ValueError, match="reward_timeout=.* must be a number of seconds above 0"):
        GRPOPlusConfig(**BASE, reward_timeout=seconds)


@pytest.mark.parametrize("name", ["beta", "target_kl", "horizon"])
@pytest.mark.parametrize("value", [NAN, INF, 0.0])
def test_a_controller_of_beta_takes_positive_finite_numbers(name, value):
    with pytest.raises(ValueError, match=f"{name} must be positive and finite"):
        AdaptiveBeta(**({"beta": 0.1, "target_kl": 0.1} | {name: value}))


def test_rewards_take_no_weight_that_would_drop_them():
    with pytest.raises(ValueError, match="weights are .*nan.*Use finite numbers"):
        Rewards.from_table(torch.zeros(2, 1), num_generations=2, weights=torch.tensor([NAN]), names=("r",))


@pytest.mark.parametrize(
    ("name", "keywords", "message"),
    [
        ("ngrpo", {"r_max": NAN}, "r_max=nan is no reward"),
        ("sa_mrpo", {"bounds": 0.5}, "bounds=0.5 is no table"),
        ("sa_mrpo", {"bounds": {"r": [0.0, INF]}}, "bounds nothing"),
    ],
)
def test_a_keyword_that_gives_no_advantages_is_refused(name, keywords, message):
    with pytest.raises(ValueError, match=message):
        check_keywords(ESTIMATORS[name], keywords)
