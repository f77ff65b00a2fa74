"""Which speed-ups a run has whose weights, gradients or optimizer are spread over processes."""

import pytest
from peft import LoraConfig

from grpo_plus import GRPOPlusConfig, GRPOPlusTrainer
from grpo_plus.packing import SpreadPacker, base_model
from grpo_plus.trainer.speed import speed_of
from grpo_plus.trainer.update.spread import check_alike
from tests.spreading import under_fsdp, under_zero
from tests.training import make_trainer
from tests.vision.models import family

ADAPTERS = {"trainer_arguments": {"peft_config": LoraConfig(r=4, target_modules="all-linear")}}


def made(tmp_path, **config):
    return make_trainer(tmp_path, trainer_class=GRPOPlusTrainer, config_class=GRPOPlusConfig, **(ADAPTERS | config))


def speed(trainer, **fields):
    for name, value in fields.items():
        setattr(trainer.plus, name, value)
    return speed_of(trainer, trainer.plus)


@pytest.mark.parametrize("stage", [1, 2])
def test_zero_1_and_2_keep_what_whole_weights_allow(tmp_path, monkeypatch, stage):
    trainer = made(tmp_path)
    under_zero(trainer, monkeypatch, stage)
    found = speed(trainer, generation_chunk_size="auto")
    assert found.packer is not None
    assert not isinstance(found.packer, SpreadPacker)
    assert found.rollouts is not None
    assert found.fuses_lora
    assert found.chunks is not None


def test_zero_3_packs_with_the_models_own_head_and_layers(tmp_path, monkeypatch):
    trainer = made(tmp_path)
    under_zero(trainer, monkeypatch, 3)
    reason = "DeepSpeed ZeRO-3 spreads the weights over the processes"
    with pytest.warns(UserWarning, match=f"lora_backend: PEFT's own forward in all layers. {reason}"):
        found = speed(trainer)
    assert isinstance(found.packer, SpreadPacker)
    assert found.packer.head is None
    assert (found.rollouts, found.fuses_lora) == (None, False)
    with pytest.raises(ValueError, match="generation_loop='grouped' is not possible: DeepSpeed ZeRO-3"):
        speed(trainer, generation_loop="grouped")


def test_zero_3_with_weights_on_the_host_stays_padded(tmp_path, monkeypatch):
    trainer = made(tmp_path)
    under_zero(trainer, monkeypatch, 3, offload_param_device="cpu")
    reason = "DeepSpeed keeps the weights on the host"
    with pytest.warns(UserWarning, match=f"packing: none, rows stay padded. {reason}"):
        assert speed(trainer).packer is None
    with pytest.raises(ValueError, match=f"packing='shared_prompt' is not possible: {reason}"):
        speed(trainer, packing="shared_prompt")


def test_fsdp2_packs_with_the_models_own_head_and_layers(tmp_path, monkeypatch):
    trainer = made(tmp_path)
    under_fsdp(trainer, monkeypatch)
    with pytest.warns(UserWarning, match="PEFT's own forward in all layers. FSDP spreads the weights"):
        found = speed(trainer)
    assert isinstance(found.packer, SpreadPacker)
    assert found.packer.head is None
    assert (found.rollouts, found.fuses_lora) == (None, False)
    with pytest.raises(ValueError, match="max_tokens_per_pass=64 is not possible: FSDP spreads the weights"):
        speed(trainer, max_tokens_per_pass=64)
    with pytest.raises(ValueError, match="logprob_backend='torch' cannot run here: FSDP spreads the weights"):
        speed(trainer, max_tokens_per_pass=None, logprob_backend="torch")


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"version": 1}, "FSDP spreads the weights over the processes, where packing is tested with FSDP2 alone"),
        ({"cpu_offload": True}, "FSDP keeps the weights on the host"),
        ({"activation_checkpointing": True}, "FSDP's own activation_checkpointing is not tested with packing"),
    ],
)
def test_what_is_not_tested_under_fsdp_stays_padded(tmp_path, monkeypatch, settings, reason):
    trainer = made(tmp_path)
    under_fsdp(trainer, monkeypatch, **settings)
    with pytest.warns(UserWarning, match=f"packing: none, rows stay padded. {reason}"):
        assert speed(trainer).packer is None


def test_models_that_processes_could_call_unequally_stay_padded_under_fsdp(tmp_path, monkeypatch):
    trainer = made(tmp_path)
    under_fsdp(trainer, monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "model", family("gemma3")[0])
        with pytest.warns(UserWarning, match="rows stay padded. the model reads images"):
            assert speed(trainer).packer is None
    monkeypatch.setattr(base_model(trainer.model).config, "rope_parameters", {"rope_type": "dynamic"})
    with pytest.warns(UserWarning, match="rows stay padded. position frequencies depend on a row's length"):
        assert speed(trainer).packer is None


def test_processes_that_have_decided_differently_are_told_on_each_of_them(monkeypatch):
    other = {"packing": "auto", "lora_backend": False}
    monkeypatch.setattr("grpo_plus.trainer.update.spread.gather_object", lambda values: [*values, other])
    check_alike({"packing": "auto", "lora_backend": False})
    with pytest.raises(ValueError, match="differ in lora_backend: True, False. Give all of them the same settings"):
        check_alike({"packing": "auto", "lora_backend": True})
