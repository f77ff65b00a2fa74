"""Which runs the detector of frozen adapters stops, warns of and leaves alone, each with its cause."""

import logging

import pytest
import torch
from accelerate.state import DistributedType, PartialState
from peft import PeftModel, get_peft_model
from transformers import TrainerState
from trl import GRPOConfig, GRPOTrainer

from grpo_plus.qlora import FrozenAdapterCallback
from tests.qlora.models import load_nf4, lora, make_qlora_trainer
from tests.training import make_trainer


def run(tmp_path, base, callback, **config):
    trainer = make_qlora_trainer(tmp_path, base, **config)
    trainer.remove_callback(FrozenAdapterCallback)
    trainer.add_callback(callback)
    trainer.train()
    return callback


def test_a_run_that_learns_is_left_alone(tmp_path, base, caplog):
    run(tmp_path, base, FrozenAdapterCallback(steps=3), max_steps=4)
    assert not [record for record in caplog.records if record.name == "grpo_plus" and record.levelno > logging.INFO]


def test_a_step_of_the_warm_up_without_a_learning_rate_does_not_count(tmp_path, base):
    warm_up = {"warmup_steps": 2, "lr_scheduler_type": "constant_with_warmup"}
    judged = run(tmp_path, base, FrozenAdapterCallback(steps=1), max_steps=2, **warm_up)
    assert judged.counted == 1


def test_a_part_that_stays_is_a_warning_with_its_cause(tmp_path, base, caplog):
    run(tmp_path, base, FrozenAdapterCallback(steps=3), max_steps=4, adapter_dtype="bfloat16", learning_rate=1e-6)
    (message,) = [record.getMessage() for record in caplog.records if "of the elements moved" in record.getMessage()]
    assert "lora_B 100.0%" in message
    assert "lora_A is bfloat16, where a step of learning_rate=1e-06 rounds to nothing" in message
    assert "Set adapter_dtype='float32'" in message


def moving_adapters(base):
    """Adapters whose lora_B has left 0, from which even the smallest step would count as a move."""
    model = get_peft_model(load_nf4(base), lora())
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data = 0.1 + torch.rand_like(weight)
    return model


def test_a_run_in_which_nothing_moves_is_stopped(tmp_path, base):
    config = {"adapter_dtype": "bfloat16", "learning_rate": 1e-6, "max_steps": 4}
    with pytest.raises(RuntimeError, match=r"lora_A 0.0%, lora_B 0.0%. Nothing is learned. lora_. is bfloat16"):
        run(tmp_path, moving_adapters(base), FrozenAdapterCallback(steps=3), **config)


def test_a_step_is_judged_in_one_wait_for_the_device(monkeypatch):
    model = torch.nn.ParameterList([torch.nn.Parameter(torch.ones(3)) for _ in range(5)])
    callback, state = FrozenAdapterCallback(), TrainerState()
    callback.on_train_begin(None, state, None, model=model)
    optimizer, waits, is_true = torch.optim.SGD(model.parameters(), lr=0.1), [], torch.Tensor.__bool__
    monkeypatch.setattr(torch.Tensor, "__bool__", lambda tensor: waits.append(tensor) or is_true(tensor))
    for gradient, live in ((0.0, False), (1.0, True), (float("nan"), False)):
        for weight in model:
            weight.grad = torch.zeros(3)
        model[3].grad[1] = gradient
        waits.clear()
        callback.on_pre_optimizer_step(None, state, None, optimizer=optimizer)
        assert callback.live == live
        assert len(waits) == 1


def test_float32_can_be_too_coarse_too(tmp_path, base):
    config = {"learning_rate": 1e-10, "max_steps": 4}
    with pytest.raises(RuntimeError, match="learning_rate=1e-10 is below the rounding of lora_"):
        run(tmp_path, moving_adapters(base), FrozenAdapterCallback(steps=3), **config)


def test_an_optimizer_with_other_weights_is_named(tmp_path, base):
    model = get_peft_model(load_nf4(base), lora())
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    trainer = make_trainer(
        tmp_path,
        model=model,
        max_steps=4,
        trainer_arguments={"optimizers": (optimizer, None), "callbacks": [FrozenAdapterCallback(steps=3)]},
    )
    with pytest.raises(RuntimeError, match="The optimizer does not hold the weights of lora_"):
        trainer.train()


def test_adapters_that_do_not_train_stop_a_plain_trl_trainer(tmp_path, base):
    make_qlora_trainer(tmp_path / "first", base, max_steps=1).save_model(str(tmp_path / "adapter"))
    model = PeftModel.from_pretrained(load_nf4(base), tmp_path / "adapter")
    trainer = make_trainer(
        tmp_path,
        model=model,
        trainer_class=GRPOTrainer,
        config_class=GRPOConfig,
        trainer_arguments={"callbacks": [FrozenAdapterCallback()]},
        beta=0.1,
    )
    with pytest.raises(
        ValueError, match=r"None of the weights of the PeftModel \(adapter default, ref\) requires a grad"
    ):
        trainer.train()


def test_steps_without_a_gradient_do_not_count(tmp_path, base, caplog):
    def constant(completions, **_):
        return [1.0] * len(completions)

    callback = FrozenAdapterCallback(steps=1)
    trainer = make_qlora_trainer(tmp_path, base, max_steps=3)
    trainer.reward_funcs, trainer.reward_func_names = [constant], ["constant"]
    trainer.reward_weights = torch.ones(1)
    trainer.reward_processing_classes = [None]
    trainer.remove_callback(FrozenAdapterCallback)
    trainer.add_callback(callback)
    trainer.train()
    assert callback.counted == 0


@pytest.mark.parametrize("spread", [DistributedType.DEEPSPEED, DistributedType.FSDP])
def test_weights_that_are_spread_over_processes_are_not_judged(tmp_path, base, monkeypatch, caplog, spread):
    """DeepSpeed steps within the backward: before the step that transformers announces, the gradients are gone."""
    trainer = make_qlora_trainer(tmp_path, base)
    monkeypatch.setitem(PartialState._shared_state, "distributed_type", spread)
    callback, optimizer = FrozenAdapterCallback(), torch.optim.SGD(trainer.model.parameters(), lr=1e-3)
    events = trainer.args, trainer.state, trainer.control
    callback.on_train_begin(*events, model=trainer.model)
    callback.on_pre_optimizer_step(*events, optimizer=optimizer)
    callback.on_step_end(*events, optimizer=optimizer)
    assert "Frozen adapters are not looked for" in caplog.text


def test_the_trainer_watches_adapters_by_itself(tmp_path, base):
    trainer = make_qlora_trainer(
        tmp_path, moving_adapters(base), adapter_dtype="bfloat16", learning_rate=1e-6, max_steps=12
    )
    with pytest.raises(RuntimeError, match="After 10 optimizer steps"):
        trainer.train()
