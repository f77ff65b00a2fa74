import json

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from grpo_plus import cli
from grpo_plus.demo.tiny import tiny_tokenizer
from grpo_plus.qlora.export import kl_divergence, token_logps
from grpo_plus.qlora.reloaded import RECORD, write_record
from tests.qlora.models import load_nf4, lora, save_base
from tests.qlora.test_reloaded import IDS, moved


@pytest.fixture
def adapter(tmp_path, monkeypatch):
    """A folder of adapters that were trained above nf4, in a working directory that holds nothing else of use."""
    monkeypatch.chdir(tmp_path)
    base = save_base(tmp_path / "base")
    torch.manual_seed(0)
    model = moved(get_peft_model(load_nf4(base), lora(init_lora_weights=False)))
    model.save_pretrained(tmp_path / "adapter")
    write_record(model, tmp_path / "adapter")
    return model


def test_merge_reads_measures_and_says_what_it_compared_with(adapter, tmp_path, capsys):
    (tmp_path / "text").write_text("1+2=3 and so on " * 20)
    assert cli.main(["merge", "adapter", "merged", "--text", "text"]) == 0
    output = capsys.readouterr().out
    assert "merged: method='dequantize', KL to the trained model " in output
    assert f"compared with the adapter above {tmp_path / 'base'} in 4 bits" in output
    merged = AutoModelForCausalLM.from_pretrained("merged", dtype=torch.bfloat16)
    assert kl_divergence(token_logps(adapter, IDS), token_logps(merged, IDS)) < 1e-4
    assert AutoTokenizer.from_pretrained("merged")("1+1=")["input_ids"] == tiny_tokenizer()("1+1=")["input_ids"]


def test_merge_of_a_folder_without_a_record_is_told_the_precision(adapter, tmp_path, capsys):
    (tmp_path / "adapter" / RECORD).unlink()
    assert cli.main(["merge", "adapter", "merged", "--load_in_4bit", "--method", "base"]) == 0
    assert "method='base'" in capsys.readouterr().out
    merged = AutoModelForCausalLM.from_pretrained("merged", dtype=torch.bfloat16)
    assert kl_divergence(token_logps(adapter, IDS), token_logps(merged, IDS)) < 1e-3


def test_merge_of_a_base_that_has_moved_or_gone(adapter, tmp_path, capsys):
    (tmp_path / "base").rename(tmp_path / "moved")
    assert cli.main(["merge", "adapter", "merged"]) == 1
    assert "base" in capsys.readouterr().err
    assert cli.main(["merge", "adapter", "merged", "--base", "moved"]) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "adapter_config.json").unlink(), "holds no adapter_config.json. Name the folder of"),
        (lambda folder: (folder / RECORD).write_text("{"), f"{RECORD}' is not JSON"),
        (lambda folder: (folder / RECORD).write_text(json.dumps({"base": 3})), f"{RECORD}' has base=3"),
    ],
)
def test_a_folder_that_cannot_be_merged_is_an_error_of_one_line(adapter, tmp_path, capsys, change, message):
    change(tmp_path / "adapter")
    assert cli.main(["merge", "adapter", "merged"]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "merged").exists()
