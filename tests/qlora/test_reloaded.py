"""Adapters come back from the disk above the base of their training, and an export says what it was compared with."""

import json
import stat

import pytest
import torch
from peft import AutoPeftModelForCausalLM, get_peft_model
from transformers import AutoModelForCausalLM

from grpo_plus.demo.tiny import tiny_model, tiny_tokenizer
from grpo_plus.qlora import export, load_trained, save_merged
from grpo_plus.qlora.precision import keep_gradients_on_the_cpu
from grpo_plus.qlora.reloaded import RECORD
from tests.qlora.models import NF4, load_nf4, lora, make_qlora_trainer

IDS = torch.randint(4, 90, (2, 12), generator=torch.Generator().manual_seed(1))


def moved(model, size=0.05):
    """Adapters that have been trained, as it were."""
    torch.manual_seed(1)
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data += (size * torch.randn(weight.shape)).to(weight.dtype)
    keep_gradients_on_the_cpu(model)
    return model


@pytest.fixture
def nf4(base):
    torch.manual_seed(0)
    return moved(get_peft_model(load_nf4(base), lora(init_lora_weights=False)))


def test_a_folder_of_adapters_comes_back_above_the_base_of_its_training(tmp_path, nf4, base):
    result = save_merged(nf4, tmp_path / "adapter", method="adapter", input_ids=IDS)
    assert result.kl == 0.0
    again = load_trained(tmp_path / "adapter")
    assert again.is_loaded_in_4bit
    assert torch.equal(export.token_logps(again, IDS), export.token_logps(nf4, IDS))
    record = json.loads((tmp_path / "adapter" / RECORD).read_text())
    assert (record["base"], record["dtype"], record["vocabulary"]) == (str(base), "bfloat16", 100)
    assert record["quantization"]["bnb_4bit_quant_type"] == "nf4"


def test_a_checkpoint_says_what_its_adapters_were_trained_above(tmp_path, base):
    trainer = make_qlora_trainer(tmp_path, base, max_steps=1, save_strategy="steps", save_steps=1)
    trainer.train()
    again = load_trained(tmp_path / "checkpoint-1")
    assert torch.equal(export.token_logps(again, IDS), export.token_logps(trainer.model, IDS))


def test_without_a_record_the_precision_is_asked_for(tmp_path, nf4, caplog):
    nf4.save_pretrained(tmp_path / "adapter")
    plain = load_trained(tmp_path / "adapter")
    assert "nothing says in which precision the adapter was trained" in caplog.text
    caplog.clear()
    quantized = load_trained(tmp_path / "adapter", quantization_config=NF4)
    assert caplog.text == ""
    trained = export.token_logps(nf4, IDS)
    assert export.kl_divergence(trained, export.token_logps(plain, IDS)) > 1e-5
    assert export.kl_divergence(trained, export.token_logps(quantized, IDS)) < 1e-6


def test_an_export_says_above_which_base_its_adapter_was_compared(tmp_path, nf4, base, capsys):
    nf4.save_pretrained(tmp_path / "adapter")
    save_merged(nf4, tmp_path / "one", input_ids=IDS)
    assert f"compared with the adapter above {base} in 4 bits" in capsys.readouterr().out
    auto = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", dtype=torch.float32)
    result = save_merged(auto, tmp_path / "two", input_ids=IDS)
    assert f"compared with the adapter above {base} in float32" in capsys.readouterr().out
    assert result.kl >= 0.0


@pytest.mark.parametrize("fails", [False, True])
def test_a_folder_that_is_called_unfinished_is_left_alone(tmp_path, nf4, fails):
    other = tmp_path / "merged.unfinished"
    other.mkdir()
    (other / "mine").write_text("kept")
    if fails:
        with pytest.raises(RuntimeError, match="is more than max_kl=-1"):
            save_merged(nf4, tmp_path / "merged", input_ids=IDS, max_kl=-1.0)
    else:
        save_merged(nf4, tmp_path / "merged", input_ids=IDS)
        assert stat.S_IMODE((tmp_path / "merged").stat().st_mode) == stat.S_IMODE(other.stat().st_mode)
    assert (other / "mine").read_text() == "kept"
    assert {path.name for path in tmp_path.iterdir()} == {other.name} | (set() if fails else {"merged"})


@pytest.mark.parametrize("method", ["dequantize", "adapter"])
def test_an_export_that_is_further_than_no_adapter_is_refused(tmp_path, base, monkeypatch, method):
    """Below max_kl, but of a training that moved less: most of what was learned would be lost."""
    model = moved(get_peft_model(load_nf4(base), lora()), 0.005)
    monkeypatch.setattr(export, "_kl_of_folder", lambda *_: 9e-4)
    with pytest.raises(RuntimeError, match=r"further than the model without its adapter, so nothing was saved"):
        save_merged(model, tmp_path / "merged", method=method, input_ids=IDS)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("init", ["pissa_niter_4", "olora", "pissa"])
def test_an_adapter_that_changed_its_base_is_exported_with_that_base_only(tmp_path, base, init):
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = moved(get_peft_model(plain, lora(init_lora_weights=init, r=8)), 0.02)
    with pytest.raises(ValueError, match=f"init_lora_weights='{init}' has changed the base.*method='dequantize'"):
        save_merged(model, tmp_path / "base", method="base", input_ids=IDS)
    trained = export.token_logps(model, IDS)
    merged = save_merged(model, tmp_path / "merged", input_ids=IDS)
    assert merged.kl < 1e-6
    if init == "pissa_niter_4":  # whose start is drawn, so that a reload gives the base another one
        with pytest.raises(RuntimeError, match="needs the base that it was trained above"):
            save_merged(model, tmp_path / "adapter", method="adapter", input_ids=IDS)
        assert not (tmp_path / "adapter").exists()
    else:  # the same start is computed from the base again
        save_merged(model, tmp_path / "adapter", method="adapter", input_ids=IDS)
        again = load_trained(tmp_path / "adapter")
        assert export.kl_divergence(trained, export.token_logps(again, IDS)) < 1e-6


def test_a_changed_base_that_a_reload_misses_by_a_little_is_refused(tmp_path, base, monkeypatch):
    """Below max_kl, and a little nearer than no adapter at all: most of a short training would be lost."""
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = moved(get_peft_model(plain, lora(init_lora_weights="pissa", r=8)), 0.02)
    measured = save_merged(model, tmp_path / "merged", input_ids=IDS)
    monkeypatch.setattr(export, "_kl_of_folder", lambda *_: 0.8 * measured.kl_without_adapter)
    with pytest.raises(RuntimeError, match="needs the base that it was trained above"):
        save_merged(model, tmp_path / "adapter", method="adapter", input_ids=IDS, max_kl=1.0)


def test_a_base_that_has_no_name_cannot_be_read_again(tmp_path, caplog):
    def made(**changes):
        torch.manual_seed(0)
        model = tiny_model(tiny_tokenizer(), hidden_size=32, num_heads=2)
        return moved(get_peft_model(model, lora(**changes)))

    with pytest.raises(ValueError, match="made in memory and has no name.*as base=.*method='dequantize'"):
        save_merged(made(), tmp_path / "base", method="base", input_ids=IDS)
    assert save_merged(made(), tmp_path / "adapter", method="adapter", input_ids=IDS).kl == 0.0
    assert "compared weight by weight, because the base cannot be loaded again" in caplog.text
    with pytest.raises(ValueError, match="names no base: it was trained above a model that was made in memory.*--base"):
        load_trained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="init_lora_weights='olora' has changed the base, which cannot be loaded"):
        save_merged(made(init_lora_weights="olora"), tmp_path / "olora", method="adapter", input_ids=IDS)


@pytest.mark.parametrize("tied", [False, True])
def test_the_original_base_gets_the_vocabulary_of_the_trained_one(tmp_path, tied):
    model = tiny_model(tiny_tokenizer(), hidden_size=64, num_heads=2)
    model.config.tie_word_embeddings = tied
    model.tie_weights()
    model.save_pretrained(tmp_path / "base")
    loaded = load_nf4(tmp_path / "base")
    loaded.resize_token_embeddings(107)
    trained = moved(get_peft_model(loaded, lora(init_lora_weights=False)))
    ids = torch.cat([IDS, torch.tensor([[99, 100, 101, 102, 103, 104, 105, 106, 5, 6, 7, 8]])])
    for method in export.METHODS:
        assert save_merged(trained, tmp_path / f"by-{method}", method=method, input_ids=ids).kl < 1e-3
    with pytest.raises(ValueError, match="base='/nowhere/at-all' cannot be loaded.*Give their folder as base="):
        save_merged(trained, tmp_path / "gone", method="base", base="/nowhere/at-all", input_ids=ids)


def test_trained_biases_without_a_place_are_refused_before_anything_is_written(tmp_path, base):
    model = moved(get_peft_model(load_nf4(base), lora(lora_bias=True)))
    with pytest.raises(ValueError, match="lora_bias=True has trained biases.*no place.*method='adapter'"):
        save_merged(model, tmp_path / "merged", input_ids=IDS)
    assert save_merged(model, tmp_path / "adapter", method="adapter", input_ids=IDS).kl == 0.0


def test_adapters_that_are_no_weights_are_refused_by_name(tmp_path, base):
    from peft import PromptTuningConfig

    model = get_peft_model(load_nf4(base), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(ValueError, match="PROMPT_TUNING adapters are no weights.*method='adapter'"):
        save_merged(model, tmp_path / "merged", input_ids=IDS)
