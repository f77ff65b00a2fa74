"""The exported model is the one that was trained, loads without bitsandbytes, and the lossy ways are refused."""

import json
import math
import subprocess
import sys

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from grpo_plus.demo.tiny import tiny_model, tiny_tokenizer
from grpo_plus.qlora import export, save_merged
from grpo_plus.qlora.precision import keep_gradients_on_the_cpu
from tests.close import differing
from tests.qlora.models import load_nf4, lora, make_qlora_trainer


@pytest.fixture(scope="module")
def trained(tmp_path_factory, base):
    """A trained model and its tokenizer; module-wide, as exporting must not change it."""
    trainer = make_qlora_trainer(tmp_path_factory.mktemp("run"), base, max_steps=5, learning_rate=1e-2)
    trainer.train()
    return trainer.model


IDS = torch.randint(4, 90, (4, 32), generator=torch.Generator().manual_seed(1))

RELOAD = """
import json, sys
sys.modules["bitsandbytes"] = None  # importing it fails
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
ids = torch.tensor(json.load(sys.stdin))
torch.save(model(input_ids=ids).logits.float().log_softmax(-1).detach(), sys.argv[2])
"""


def test_the_dequantized_export_is_the_trained_model_without_bitsandbytes(tmp_path, trained, capsys):
    result = save_merged(trained, tmp_path / "merged", tokenizer=tiny_tokenizer(), input_ids=IDS)
    assert f"KL to the trained model {result.kl:.2g} per token" in capsys.readouterr().out
    assert result.kl < 1e-4 < result.kl_without_adapter
    command = [sys.executable, "-c", RELOAD, str(tmp_path / "merged"), str(tmp_path / "logps.pt")]
    subprocess.run(command, input=json.dumps(IDS.tolist()), text=True, check=True, capture_output=True)
    reloaded = torch.load(tmp_path / "logps.pt")
    assert export.kl_divergence(export.token_logps(trained, IDS), reloaded) == pytest.approx(result.kl, abs=1e-6)
    assert (
        AutoTokenizer.from_pretrained(tmp_path / "merged")("1+1=")["input_ids"] == tiny_tokenizer()("1+1=")["input_ids"]
    )


def test_tokens_to_compare_on_go_through_the_model_row_by_row(trained):
    """Many prompts of one's own would need (B, L, V) logits on the card at once."""
    rows = []
    handle = trained.register_forward_pre_hook(
        lambda _, __, named: rows.append(len(named["input_ids"])), with_kwargs=True
    )
    whole = export.token_logps(trained, IDS)
    handle.remove()
    assert rows == [1] * len(IDS)
    assert whole.shape[:2] == IDS.shape
    # By hand: p = (3/4, 1/4) against (1/2, 1/2) in the first row, itself in the second.
    trained_logps = torch.tensor([[[0.75, 0.25]], [[0.75, 0.25]]]).log()
    other = torch.tensor([[[0.5, 0.5]], [[0.75, 0.25]]]).log()
    expected = (0.75 * math.log(1.5) + 0.25 * math.log(0.5)) / 2
    assert export.kl_divergence(trained_logps, other) == pytest.approx(expected, abs=1e-7)


def test_the_three_methods_and_the_refused_one_by_their_distance(tmp_path, trained, base, caplog):
    """dequantize << without an adapter; base has the quantization on top; a merge into the codes keeps little."""
    kl = {name: save_merged(trained, tmp_path / name, method=name, input_ids=IDS).kl for name in export.METHODS}
    trained.save_pretrained(tmp_path / "plain")
    lossy = PeftModel.from_pretrained(load_nf4(base), tmp_path / "plain")
    keep_gradients_on_the_cpu(lossy)
    merged = export.kl_divergence(export.token_logps(trained, IDS), export.token_logps(lossy.merge_and_unload(), IDS))
    assert kl["adapter"] == 0.0
    assert kl["dequantize"] < kl["base"] / 10
    assert kl["dequantize"] < merged / 10


def test_a_base_that_differs_more_than_the_training_did_is_refused(tmp_path, base):
    trainer = make_qlora_trainer(tmp_path, base, max_steps=2, learning_rate=1e-5)
    trainer.train()
    with pytest.raises(
        RuntimeError, match=r"further than the model without its adapter.*Quantizing the base.*dequanti"
    ):
        save_merged(trainer.model, tmp_path / "merged", method="base")
    assert not (tmp_path / "merged").exists()


def test_the_adapter_alone_goes_back_onto_the_quantized_base(tmp_path, trained, base):
    save_merged(trained, tmp_path / "adapter", method="adapter")
    again = PeftModel.from_pretrained(load_nf4(base), tmp_path / "adapter")
    keep_gradients_on_the_cpu(again)
    assert torch.equal(export.token_logps(again, IDS), export.token_logps(trained, IDS))


def test_exporting_leaves_the_model_as_it_was(tmp_path, trained):
    before = {name: weight.detach().clone() for name, weight in trained.named_parameters()}
    training = trained.training
    save_merged(trained, tmp_path / "merged")
    assert trained.training == training
    assert differing(dict(trained.named_parameters()), before) == []


@pytest.mark.parametrize(
    ("method", "message"),
    [("4bit", "steps are larger than most updates"), ("gguf", "Known: dequantize, base, adapter")],
)
def test_lossy_and_unknown_methods_are_refused(tmp_path, trained, method, message):
    with pytest.raises(ValueError, match=message):
        save_merged(trained, tmp_path / "merged", method=method)


def test_a_folder_that_holds_something_is_left_alone(tmp_path, trained):
    (tmp_path / "file").write_text("kept")
    with pytest.raises(FileExistsError, match="is not an empty folder"):
        save_merged(trained, tmp_path)
    assert (tmp_path / "file").read_text() == "kept"


def test_an_export_that_is_too_far_is_not_left_behind(tmp_path, trained):
    with pytest.raises(RuntimeError, match="is more than max_kl=-1"):
        save_merged(trained, tmp_path / "merged", max_kl=-1.0)
    assert list(tmp_path.iterdir()) == []


def test_a_model_without_adapters_has_nothing_to_merge(tmp_path):
    with pytest.raises(ValueError, match="has no adapters to merge"):
        save_merged(tiny_model(tiny_tokenizer()), tmp_path / "merged")


@pytest.mark.parametrize(
    "changes", [{"use_dora": True}, {"modules_to_save": ["embed_tokens"]}, {"use_rslora": True}], ids=str
)
def test_other_kinds_of_adapters_are_exported_too(tmp_path, base, changes):
    from peft import get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(load_nf4(base), lora(init_lora_weights=False, **changes))
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data += 0.05 * torch.randn_like(weight)
    result = save_merged(model, tmp_path / "merged", input_ids=IDS)
    assert result.kl < 1e-3 < result.kl_without_adapter


def test_tied_embeddings_and_adapters_above_an_ordinary_base(tmp_path):
    from peft import get_peft_model

    model = tiny_model(tiny_tokenizer(), hidden_size=64, num_heads=2)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(tmp_path / "tied")
    for quantized in (load_nf4(tmp_path / "tied"), AutoModelForCausalLM.from_pretrained(tmp_path / "tied")):
        wrapped = get_peft_model(quantized, lora(init_lora_weights=False))
        folder = tmp_path / f"merged-{quantized.dtype}"
        assert save_merged(wrapped, folder, input_ids=IDS).kl < 1e-4
