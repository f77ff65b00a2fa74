"""vLLM beside the trainer is sent the adapters alone: its completions come from the trained policy."""

import gc
from pathlib import Path

import pytest
import torch
from trl.generation.vllm_client import VLLMClient
from trl.generation.vllm_generation import VLLMGeneration
from trl.trainer import grpo_trainer

from tests.qlora.models import save_base
from tests.trainer.adapters_to_vllm import gaps, load, make
from tests.training import logs_of

pytestmark = [pytest.mark.newest_trl, pytest.mark.usefixtures("vllm")]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("base"), num_layers=1)


@pytest.mark.parametrize("bits", [32, 4])
def test_rollouts_come_from_the_trained_adapter_after_every_sync(tmp_path, base, bits):
    trainer = make(tmp_path, load(base, bits=bits))
    engine = trainer.vllm_generation.llm
    assert (engine.enable_lora, engine.max_loras, engine.max_lora_rank) == (True, 1, 8)
    assert engine.quantization == ("bitsandbytes" if bits == 4 else None)
    trainer.train()
    assert len(gaps(trainer)) == 3
    assert max(gaps(trainer)) < 1e-3
    # A name and a number per sync: vLLM takes a number that it knows, and prompts of a name that it knows, from memory.
    assert [request.lora_int_id for request in engine.requests] == [1, 2, 3]
    assert len({request.lora_name for request in engine.requests}) == 3
    assert engine.resets == 3


def test_an_adapter_that_stays_behind_shows(tmp_path, base, monkeypatch):
    trainer = make(tmp_path, load(base))
    engine = trainer.vllm_generation.llm
    use = engine.use
    monkeypatch.setattr(engine, "use", lambda adapter: use(adapter) if adapter.version == 1 else None)
    trainer.vllm_generation._files.keep_only = lambda _: None
    trainer.train()
    first, *later = gaps(trainer)
    assert first < 1e-3
    assert min(later) > 1e-2


def test_a_run_is_the_one_that_trl_makes_with_merged_weights(tmp_path, base):
    alone, merged = (make(tmp_path / str(on), load(base), vllm_lora_sync=on) for on in (True, False))
    for trainer in (alone, merged):
        torch.manual_seed(0)  # TRL shuffles the rows
        trainer.train()
    assert alone._logs["completion"] == merged._logs["completion"]
    for ours, theirs in zip(logs_of(alone), logs_of(merged), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-5)


def test_an_engine_that_sleeps_keeps_its_base(tmp_path, base):
    trainer = make(tmp_path, load(base), max_steps=2, vllm_enable_sleep_mode=True)
    trainer.train()
    assert trainer.vllm_generation.llm.levels == [1, 1, 1]
    assert max(gaps(trainer)) < 1e-3


def test_a_resumed_run_sends_the_adapter_of_the_checkpoint_first(tmp_path, base):
    make(tmp_path, load(base), max_steps=1, save_strategy="steps", save_steps=1).train()
    resumed = make(tmp_path, load(base), max_steps=2)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert gaps(resumed)[-1] < 1e-3
    weights = resumed.vllm_generation.llm._model.state_dict()
    assert max(weight.abs().max() for name, weight in weights.items() if "lora_B" in name) > 0


def test_the_files_of_one_version_are_kept_and_gone_with_the_trainer(tmp_path, base):
    trainer = make(tmp_path, load(base))
    for _ in range(2):
        trainer.vllm_generation.sync_weights()
    (folder,) = tmp_path.glob("_vllm_lora_0-*")
    request = trainer.vllm_generation.llm._newest
    assert [str(path) for path in folder.iterdir()] == [request.lora_path]
    assert request.lora_name.endswith("-v2")
    del trainer
    gc.collect()
    assert not folder.exists()


def test_a_trainer_that_is_collected_late_leaves_the_files_of_its_successor(tmp_path, base):
    (tmp_path / "_vllm_lora_0-killed").mkdir()
    first = make(tmp_path, load(base))
    second = make(tmp_path, load(base))
    second.vllm_generation.sync_weights()
    del first
    gc.collect()
    path = Path(second.vllm_generation.llm._newest.lora_path)
    assert (path / "adapter_config.json").exists()
    assert list(tmp_path.glob("_vllm_lora*")) == [path.parent]


def test_requests_of_a_users_own_adapter_stay_theirs(tmp_path, base):
    engine = make(tmp_path, load(base)).vllm_generation.llm
    engine._newest = "newest"
    engine.chat([])
    engine.chat([], lora_request=None)
    assert engine.requests == ["newest", None]


def test_trl_has_its_names_back_when_a_trainer_is_built(tmp_path, base):
    with pytest.warns(UserWarning, match="vllm_lora_sync=True .*was tested with a stand-in .*not run against vLLM"):
        make(tmp_path, load(base))
    with pytest.raises(ValueError, match="vllm_lora_sync=True is not possible: the model has no adapters"):
        make(tmp_path, load(base), peft_config=None)
    assert grpo_trainer.VLLMGeneration.__name__ == "VLLMGeneration"
    names = VLLMGeneration._init_vllm.__globals__
    assert (names["LLM"].__name__, names["VLLMClient"].__name__) == ("LLM", VLLMClient.__name__)
