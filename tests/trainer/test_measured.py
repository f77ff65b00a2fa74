"""The measured choice inside a training, on a clock that counts work: what is taken, what it changes, how it resumes."""

import logging

import pytest
import torch
from peft import LoraConfig
from torch import nn

from grpo_plus import GRPOPlusConfig, GRPOPlusTrainer
from grpo_plus.trainer import speed
from tests.close import assert_close
from tests.training import make_trainer, weights_of

LORA = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")


@pytest.fixture(autouse=True)
def measured_here(monkeypatch):
    monkeypatch.setattr(speed, "MEASURED_ON", ("cpu",))


class Work:
    """A clock that moves with every token that is embedded, and with every layer that PEFT computes itself."""

    def __init__(self, trainer, *, per_token=1.0, per_call=0.0, per_peft_layer=0.0):
        self.seconds, self.readings = 0.0, 0
        trainer.speed.measure.clock_of = lambda device: self.read
        self.count(trainer.model.get_input_embeddings(), lambda ids: per_call + ids.numel() * per_token)
        for name, module in trainer.model.named_modules():
            if isinstance(module, nn.Identity) and ".lora_dropout." in name:  # ours skips it
                self.count(module, lambda _: per_peft_layer)

    def count(self, module, seconds):
        def forward(original, x):
            self.seconds += seconds(x)
            return original(x)

        original = module.forward
        module.forward = lambda x: forward(original, x)

    def read(self):
        self.readings += 1
        return self.seconds * 2.0**-16  # exact, so that ways with the same work tie


def trainer(folder, adapter=None, **config):
    return make_trainer(
        folder,
        trainer_class=GRPOPlusTrainer,
        config_class=GRPOPlusConfig,
        trainer_arguments={"peft_config": adapter},
        **config,
    )


def trained(folder, adapter=None, clock=None, **config):
    made = trainer(folder, adapter, **config)
    work = Work(made, **clock) if clock else None
    made.train()
    return made, work


def found(made):
    return made.running_state()["measured"]


def test_where_tokens_cost_the_fewest_tokens_win_and_the_weights_are_those_of_the_fixed_order(tmp_path, caplog):
    with caplog.at_level(logging.INFO, "grpo_plus"):
        made, work = trained(tmp_path, clock={"per_token": 1.0})
    assert found(made)["form"] == "shared_prompt (segment attention)"
    assert "packing: measured shared_prompt (segment attention)" in caplog.text
    assert "TRL 1.0x" in caplog.text
    expected = trainer(tmp_path, packing="none")
    expected.train()
    for name, weight in weights_of(expected).items():
        assert_close(name, weights_of(made)[name], weight, rtol=2e-4)
    assert work.readings == 6 * len(found_ways(caplog.text))  # two readings in each of three runs, and never again


def found_ways(text):
    return next(line for line in text.splitlines() if "measured" in line).split("; ")


def test_where_calls_cost_and_tokens_are_free_rows_stay_padded(tmp_path):
    # A call of everything is one call in every form but the cached one: a tie, which the padding loses. Tokens that
    # pay decide.
    made, _ = trained(tmp_path, clock={"per_token": -1e-3, "per_call": 1.0})
    assert found(made)["form"] == "None"
    assert made.speed.packer.describe() == "none"


def test_layers_are_pefts_where_ours_are_not_faster(tmp_path):
    theirs, _ = trained(tmp_path, LORA, clock={"per_token": 1.0, "per_peft_layer": -1.0})
    assert found(theirs)["own_layers"] is False
    assert theirs.speed.adapters.on is False
    ours, _ = trained(tmp_path, LORA, clock={"per_token": 1.0, "per_peft_layer": 1.0})
    assert found(ours)["own_layers"] is True
    for name, weight in weights_of(theirs).items():
        assert_close(name, weights_of(ours)[name], weight, rtol=2e-4)


def test_a_resumed_run_takes_the_same_without_measuring(tmp_path):
    clock = {"per_token": -1e-3, "per_call": 1.0}
    first, _ = trained(tmp_path, clock=clock, save_strategy="steps", save_steps=2)
    second = trainer(tmp_path, save_strategy="no")
    work = Work(second, per_token=1.0)
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert found(second) == found(first)
    assert work.readings == 0
    for name, weight in weights_of(first).items():
        assert weight.equal(weights_of(second)[name]), name


def test_another_card_is_measured_anew(tmp_path):
    trained(tmp_path, clock={"per_token": -1e-3, "per_call": 1.0}, save_strategy="steps", save_steps=2)
    second = trainer(tmp_path, save_strategy="no")
    work = Work(second, per_token=1.0)
    load = second.load_running_state
    second.load_running_state = lambda state: load(state | {"measured": state["measured"] | {"card": "NVIDIA T4"}})
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert work.readings > 0
    assert found(second)["form"] == "shared_prompt (segment attention)"


def test_a_way_that_is_gone_is_measured_in_an_update_and_not_in_a_pass_of_the_reference(tmp_path):
    # The reference's pass comes first, without gradients and with the adapters off: nothing can be timed there.
    settings = {"beta": 0.1, "max_steps": 1}
    trained(tmp_path, LORA, clock={"per_token": 1.0}, save_strategy="steps", save_steps=1, **settings)
    second = trainer(tmp_path, LORA, save_strategy="no", **settings | {"max_steps": 2})
    work = Work(second, per_token=1.0)
    load = second.load_running_state
    second.load_running_state = lambda state: load(state | {"measured": state["measured"] | {"form": "gone"}})
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert work.readings > 0
    assert found(second)["form"] == "shared_prompt (segment attention)"


def test_layers_that_are_pefts_in_an_update_stay_ours_in_generation(tmp_path):
    made = trainer(tmp_path, LORA)
    Work(made, per_token=1.0, per_peft_layer=-1.0)
    layer = next(module for name, module in made.model.named_modules() if ".lora_dropout." in name)
    forward, with_graph = layer.forward, []
    layer.forward = lambda x: with_graph.append(torch.is_grad_enabled()) or forward(x)
    made.train()
    assert found(made)["own_layers"] is False
    assert set(with_graph) == {True}


def test_a_trainer_that_has_measured_takes_what_a_checkpoint_says(tmp_path):
    # Padded rows were the fastest for this trainer, which is another thing than rows that cannot be packed.
    made, work = trained(tmp_path, clock={"per_token": -1e-3, "per_call": 1.0}, save_strategy="steps", save_steps=2)
    before, load = work.readings, made.load_running_state
    faster = found(made) | {"form": "shared_prompt (segment attention)"}
    made.load_running_state = lambda state: load(state | {"measured": faster})
    made.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert work.readings == before
    assert found(made) == faster
    assert made.speed.packer.describe() == "shared_prompt (segment attention)"


def test_a_damaged_measure_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"damaged\. measured is \[1\], where a dictionary belongs"):
        trainer(tmp_path).load_running_state({"measured": [1]})


def test_the_measure_leaves_gradients_and_random_numbers_alone(tmp_path):
    measured, _ = trained(tmp_path, clock={"per_token": 1.0})
    fixed = trainer(tmp_path)
    fixed.speed.packer.measure = None
    fixed.train()
    for name, weight in weights_of(fixed).items():
        assert weight.equal(weights_of(measured)[name]), name


@pytest.mark.parametrize(
    "config",
    [
        {"packing": "none"},
        {"full_determinism": True},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    ],
)
def test_runs_whose_order_must_stay_fixed_are_not_measured(tmp_path, config):
    assert trainer(tmp_path, **config).speed.measure is None


def test_an_explicit_form_never_becomes_trls(tmp_path):
    made, _ = trained(tmp_path, packing="shared_prompt", clock={"per_token": -1e-3, "per_call": 1.0})
    assert found(made)["form"].startswith("shared_prompt")
