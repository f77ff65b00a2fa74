"""A function in place of a name, in every setting that takes a name."""

import functools
import json
import pickle

import pytest
import torch

from grpo_plus import GRPOPlusConfig, GRPOPlusTrainer
from grpo_plus.advantages import ESTIMATORS, Rewards, estimate, register
from grpo_plus.compare.plan import Variant, planned_arms
from grpo_plus.losses import LOSSES, LossInputs, TokenLoss
from grpo_plus.replay import Rollouts, replay
from tests.replay.logs import write_rewards
from tests.training import make_trainer, weights_of


def halves(rewards: Rewards, *, factor: float = 0.5) -> torch.Tensor:
    total = rewards.total()
    return factor * (total - total.nanmean(-1, keepdim=True))


def plain(inputs: LossInputs) -> TokenLoss:
    return TokenLoss(-inputs.advantages * inputs.logps)


def trained(tmp_path, **config):
    trainer = make_trainer(
        tmp_path, trainer_class=GRPOPlusTrainer, config_class=GRPOPlusConfig, max_steps=1, num_generations=8, **config
    )
    trainer.train()
    return trainer, torch.cat([weight.flatten() for weight in weights_of(trainer).values()])


def test_functions_train_as_their_paths_do(tmp_path):
    with ESTIMATORS.temporarily(), LOSSES.temporarily():
        settings = {"advantage_estimator": halves, "loss_type": plain, "advantage_kwargs": {"factor": 2.0}}
        trainer, by_function = trained(tmp_path, **settings)
        paths = {"advantage_estimator": f"{__name__}.halves", "loss_type": f"{__name__}.plain"}
        _, by_path = trained(tmp_path, **settings | paths)
    assert torch.equal(by_function, by_path)
    args = trainer.args
    assert (args.advantage_estimator, args.loss_type) == (f"{__name__}.halves", f"{__name__}.plain")
    assert f"advantages {__name__}.halves(factor=2.0); loss {__name__}.plain" in args.describe()
    assert json.loads(args.to_json_string())["advantage_estimator"] == f"{__name__}.halves"
    assert pickle.loads(pickle.dumps(args)).loss_type == f"{__name__}.plain"


def test_a_registered_function_keeps_its_name_and_promises(tmp_path):
    with ESTIMATORS.temporarily():
        mine = register("halved", scope="group")(halves)
        config = GRPOPlusConfig(str(tmp_path), advantage_estimator=mine, use_cpu=True, bf16=False)
        assert config.advantage_estimator == "halved"
        assert ESTIMATORS[mine].scope == "group"


def test_a_keyword_of_a_function_is_checked(tmp_path):
    with ESTIMATORS.temporarily(), pytest.raises(ValueError, match="takes no keyword 'fact'.* Did you mean 'factor'"):
        GRPOPlusConfig(
            str(tmp_path), advantage_estimator=halves, advantage_kwargs={"fact": 2}, use_cpu=True, bf16=False
        )


@pytest.mark.parametrize(
    "function", [lambda rewards: halves(rewards), functools.partial(halves, factor=0.5)], ids=["lambda", "partial"]
)
def test_functions_go_everywhere_a_name_goes(tmp_path, function):
    write_rewards(tmp_path, 1, {"r": [1.0, 0.0, 0.5, 0.0]}, advantage=[0.25, -0.25, 0.125, -0.125])
    rewards = next(Rollouts(tmp_path).batches()).rewards
    with ESTIMATORS.temporarily():
        assert estimate(function, rewards).tolist() == [[0.25, -0.25], [0.125, -0.125]]
        assert replay(Rollouts(tmp_path), [function]).same == [ESTIMATORS.name_of(function)]
        (arm,) = planned_arms([function], [0])
        assert arm.variant == Variant(ESTIMATORS.name_of(function))
