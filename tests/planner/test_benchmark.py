import sys

import pytest
import torch

from benchmarks import memory, memory_cap
from benchmarks.memory_cap import longest
from benchmarks.memory_run import TINY, TRL_DEFAULT, Case, case_of, make_trainer, measure, random_model
from grpo_plus.models.caches import CACHE
from grpo_plus.planner import QLORA, Run, shape_of


def test_the_benchmark_runs_on_a_cpu_and_knows_a_gpu_from_one(monkeypatch, capsys):
    """The run itself is a process of its own."""
    monkeypatch.setattr(sys, "argv", ["memory", "--tiny"])
    memory.main()
    output = capsys.readouterr().out
    rows = [line.split() for line in output.splitlines() if line.startswith("tiny")]
    assert [row[2] for row in rows] == ["load", "generate", "update", "optimizer"], output
    weights, measured = map(float, rows[0][3:5])
    assert 0.8 * weights < measured < 1.5 * weights + 0.05  # resident memory: the weights, and little else


def test_without_a_gpu_it_reports_nothing(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["memory"])
    with pytest.raises(SystemExit) as ended:
        memory.main()
    assert ended.value.code == 2
    assert "no GPU" in capsys.readouterr().err


def test_every_kind_of_run_is_measured():
    """In this process, so that no peak is its own alone: what is looked at is that each phase has one."""
    rows = {"prompt_length": 8, "max_completion_length": 8, "per_device_train_batch_size": 4, "num_generations": 4}
    recipe = Run(**rows, **QLORA | {"lora_r": 4}, gradient_accumulation_steps=2, beta=0.04, generation_chunk_size=3)
    stock = Run(**rows, **TRL_DEFAULT | {"lora_r": 4})
    small = TINY | {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 128, "tie_word_embeddings": True}
    phases = {}
    for name, case in {"recipe": Case(small, recipe, "cpu"), "stock": Case(small, stock, "cpu", stock=True)}.items():
        assert case_of(case.to_json()) == case
        phases[name] = [phase for phase, _ in measure(case)["peaks"].items()]
    assert phases["recipe"] == ["load", "generate", "score", "update", "optimizer"]
    assert phases["stock"] == ["load", "generate", "update", "optimizer"]
    with pytest.raises(MemoryError, match="are more than cap=-1000000000"):
        measure(Case(small, stock, "cpu", cap=-(10**9), stock=True))


def test_a_random_model_is_the_shape_that_was_planned():
    for quantized in (False, True):
        run = Run(**QLORA) if quantized else Run(dtype="bfloat16")
        model = random_model(TINY, run, "cpu")
        shape = shape_of(TINY)
        tensors = dict([*model.named_parameters(), *model.named_buffers()])
        assert [name for name, tensor in tensors.items() if tensor.is_meta] == []
        assert model.lm_head.weight is model.model.embed_tokens.weight
        codes = [parameter for parameter in model.parameters() if parameter.dtype == torch.uint8]
        assert sum(code.numel() for code in codes) == (shape.linear // 2 if quantized else 0)
        others = sum(parameter.numel() for parameter in model.parameters() if parameter.dtype == torch.bfloat16)
        assert others == shape.parameters - (shape.linear if quantized else 0)


@pytest.mark.parametrize("limit", [0, 1, 2, 37, 1000, 5000, 300_000])
@pytest.mark.parametrize("start", [1, 30, 1000, 20_000])
def test_the_search_ends_within_the_tolerance(limit, start):
    tried = []

    def runs(length):
        tried.append(length)
        return length <= limit

    found = longest(runs, start, 0.1)
    limit = min(limit, memory_cap.LONGEST)
    assert found <= limit <= max(found + 1, found * 1.1)
    if start == limit:
        assert len(tried) <= 5


def test_each_trial_of_the_search_is_the_run_at_another_length(monkeypatch):
    asked = []

    def run_it(case):
        asked.append(case)
        return {"peaks": {}} if case.run.max_completion_length <= 50 else {"error": "out of memory"}

    monkeypatch.setattr(memory_cap, "in_a_fresh_process", run_it)
    run, stock = memory_cap.TINY_SETTINGS["LoRA"]
    found = memory_cap.search(Case(TINY, run, "cpu", 200 * 2**20, stock), 0.1)
    assert found["planned"] == asked[0].run.max_completion_length > 50
    assert 46 <= found["runs"] <= 50
    assert {(case.stock, case.cap, case.run.prompt_length) for case in asked} == {(True, 200 * 2**20, 32)}
    monkeypatch.setattr(memory_cap, "in_a_fresh_process", lambda case: {"error": "no kernel image"})
    with pytest.raises(RuntimeError, match="failed for another reason: no kernel image"):
        memory_cap.search(Case(TINY, run, "cpu", 200 * 2**20, stock), 0.1)


SHAPE = {"prompt_length": 8, "max_completion_length": 6, "per_device_train_batch_size": 4, "num_generations": 4}
SMALL = TINY | {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 64, "vocab_size": 128}


@pytest.mark.parametrize("last_step", [False, True])
@pytest.mark.parametrize("stock", [False, True])
def test_one_completion_of_a_batch_is_a_token_shorter(tmp_path, stock, last_step):
    run = Run(**SHAPE, lora_r=4, bf16=False, generation_chunk_size=None if stock else 2)
    case = Case(SMALL, run, "cpu", stock=stock, last_step=last_step)
    trainer = make_trainer(str(tmp_path), random_model(SMALL, run, "cpu"), case)
    lengths, caches = [], []
    trainer.reward_funcs[0] = lambda completion_ids, **_: (
        lengths.extend(map(len, completion_ids)) or [0.0] * len(completion_ids)
    )
    trainer.model.register_forward_pre_hook(lambda _, args, kwargs: caches.append(kwargs.get(CACHE)), with_kwargs=True)
    trainer.train()
    assert lengths == [5, 6, 6, 6] * 2
    if last_step:
        held = [cache.layers[0].keys.shape for cache in caches if cache is not None]
        rows = 4 if stock else 2
        assert held == [(rows, SMALL["num_key_value_heads"], 8 + 6, SMALL["head_dim"])] * 2
        assert trainer.model.training
