"""The switches for longer rows: what they refuse, what they say where they have no effect, and that they change nothing."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import GenerationMixin

from grpo_plus import GRPOPlusConfig, GRPOPlusTrainer
from grpo_plus.models import tiles
from grpo_plus.models.offload import Offload
from grpo_plus.trainer.update import long_rows
from grpo_plus.trainer.update.long_rows import LongRows
from tests.training import make_trainer, weights_of

LORA = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")


def trainer(output_dir, **config) -> GRPOPlusTrainer:
    config = {"gradient_checkpointing": True, "max_steps": 2, "num_iterations": 2} | config
    classes = {"trainer_class": GRPOPlusTrainer, "config_class": GRPOPlusConfig}
    return make_trainer(output_dir, **classes, trainer_arguments={"peft_config": LORA}, **config)


def test_layer_inputs_on_the_host_train_the_same_weights(tmp_path):
    offload, trained = Offload(least_bytes=1), []
    for changes in ([], [offload.of]):
        made = trainer(tmp_path / str(len(changes)))
        made.speed = replace(made.speed, long_rows=LongRows(changes))
        start = weights_of(made)
        made.train()
        trained.append(weights_of(made))
    assert offload._newest is not None  # inputs have been out
    for name, weight in trained[0].items():
        assert torch.equal(trained[1][name], weight), name
    assert any((start[name] - weight).abs().max() > 1e-4 for name, weight in trained[0].items())


def test_tiles_train_the_same_weights_and_leave_generation_alone(tmp_path, monkeypatch):
    def output(call: Any, x: torch.Tensor) -> torch.Tensor:
        during.append("generation" if generating else "scoring or update")
        return tiled(call, x)

    def generate(model: Any, *args: Any, **kwargs: Any) -> Any:
        generating.append(True)
        completions = whole(model, *args, **kwargs)
        generating.clear()
        return completions

    during: list[str] = []
    generating: list[bool] = []
    tiled, whole = tiles._Call.output, GenerationMixin.generate
    monkeypatch.setattr(tiles._Call, "output", output)
    monkeypatch.setattr(GenerationMixin, "generate", generate)
    monkeypatch.setattr(long_rows, "TILE_TOKENS", 8)
    trained = []
    for tokens in (None, "auto"):
        made = trainer(tmp_path / str(tokens), mlp_tile_tokens=tokens, optim="sgd", learning_rate=0.1, beta=0.1)
        made.train()
        trained.append(weights_of(made))
    assert set(during) == {"scoring or update"}
    for name, weight in trained[0].items():
        torch.testing.assert_close(trained[1][name], weight, rtol=1e-5, atol=1e-6, msg=name)


def test_tiles_are_on_by_themselves_where_they_cost_nothing(tmp_path):
    def changes(**config):
        made = trainer(tmp_path, **config)
        return [change.__self__.tokens for change in made.speed.long_rows._changes]

    reentrant = {"gradient_checkpointing_kwargs": {"use_reentrant": True}}
    assert changes() == [4096]
    assert changes(gradient_checkpointing=False) == changes(**reentrant) == changes(mlp_tile_tokens=0) == []
    assert changes(gradient_checkpointing=False, mlp_tile_tokens="512") == [512]
    with pytest.raises(ValueError, match="mlp_tile_tokens=3 must be a whole number of tokens, 16 or more"):
        trainer(tmp_path, mlp_tile_tokens=3)
    with pytest.raises(ValueError, match="mlp_tile_tokens=512 is not possible: torch_compile compiles"):
        trainer(tmp_path, mlp_tile_tokens=512, torch_compile=True)


def test_offloading_without_checkpoints_or_beside_torch_compile_is_refused(tmp_path):
    with pytest.raises(ValueError, match="but gradient_checkpointing=False. Set gradient_checkpointing=True, or leave"):
        trainer(tmp_path, offload_activations=True, gradient_checkpointing=False)
    with pytest.raises(ValueError, match="offload_activations='yes' must be True or False"):
        trainer(tmp_path, offload_activations="yes")
    with pytest.raises(ValueError, match="offload_activations=True is not possible: torch_compile compiles"):
        trainer(tmp_path, offload_activations=True, torch_compile=True)


def test_offloading_on_a_cpu_says_that_it_has_no_effect(tmp_path):
    with pytest.warns(UserWarning, match="offload_activations: no effect on a device of type 'cpu'") as said:
        trainer(tmp_path, offload_activations=True)
    assert len([warning for warning in said if "offload_activations" in str(warning.message)]) == 1
