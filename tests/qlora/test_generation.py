"""A quantized policy samples as it is trained, and in as many rows at a time as memory holds."""

import logging
from dataclasses import replace

import pytest
import torch
from peft import get_peft_model
from transformers import PreTrainedModel
from trl import GRPOConfig, GRPOTrainer

from grpo_plus import GRPOPlusConfig, GRPOPlusTrainer
from grpo_plus.demo.tiny import tiny_model, tiny_tokenizer
from grpo_plus.planner import Constants, generation
from grpo_plus.planner.generation import generation_bytes
from grpo_plus.planner.loaded import shape_and_run
from grpo_plus.trainer.rollouts.generation import Chunks, rows_that_fit
from grpo_plus.trainer.speed import speed_of
from tests.qlora.models import load_nf4, lora, make_qlora_trainer, trained_weights

GREEDY = {"generation_kwargs": {"do_sample": False}, "max_steps": 1, "bf16": True}


def random_adapters(base, **changes):
    torch.manual_seed(3)
    return get_peft_model(load_nf4(base), lora(init_lora_weights=False, **changes))


def completions(trainer):
    """What the trainer's first batches were completed with, and the rows of every call of generate."""
    made, rows = [], []
    generate = trainer.model.generate

    def watched(**arguments):
        rows.append(len(arguments["input_ids"]))
        output = generate(**arguments)
        made.extend(output[:, arguments["input_ids"].shape[1] :].tolist())
        return output

    trainer.model.generate = watched
    trainer.train()
    return made, rows


def test_completions_are_sampled_without_dropout(tmp_path, base):
    kinds = {"ours": (GRPOPlusTrainer, GRPOPlusConfig), "trl": (GRPOTrainer, GRPOConfig)}
    made = {}
    for name, rate in (("ours", 0.0), ("ours", 0.5), ("trl", 0.0), ("trl", 0.5)):
        trainer_class, config_class = kinds[name]
        model = random_adapters(base, lora_dropout=rate)
        # The same arithmetic with and without dropout: bfloat16 would let a greedy choice hang on its rounding.
        config = GREEDY | ({"packing": "none", "lora_backend": "peft"} if name == "ours" else {})
        trainer = make_qlora_trainer(tmp_path, model, trainer_class=trainer_class, config_class=config_class, **config)
        made[name, rate], _ = completions(trainer)
        assert [name for name, module in trainer.model.named_modules() if not module.training] == []
    assert made["ours", 0.5] == made["ours", 0.0]
    assert made["trl", 0.5] != made["trl", 0.0]


def test_float32_adapters_are_computed_in_bfloat16_when_sampling_as_when_training(tmp_path, base):
    seen = set()

    def watch(module, inputs, output):
        seen.add((torch.is_grad_enabled(), output.dtype))

    trainer = make_qlora_trainer(tmp_path, base, **GREEDY)
    for name, module in trainer.model.named_modules():
        if name.endswith("q_proj.lora_A.default"):
            module.register_forward_hook(watch)
    trainer.train()
    assert seen == {(False, torch.bfloat16), (True, torch.bfloat16)}


def test_continuous_batching_leaves_the_adapters_in_float32(tmp_path, base):
    """TRL casts the whole model to bfloat16 there, in which steps of this size round to nothing."""
    config = {"max_steps": 1, "learning_rate": 1e-6, "bf16": True, "use_transformers_continuous_batching": True}
    cache = {"transformers_continuous_batching_config": {"num_blocks": 16, "max_batch_tokens": 64}}
    trainer = make_qlora_trainer(tmp_path, random_adapters(base), **config, **cache)
    start = trained_weights(trainer)
    trainer.train()
    for name, weight in trained_weights(trainer).items():
        assert weight.dtype == torch.float32
        assert 0 < (weight - start[name]).abs().max() < 2e-6, name


@pytest.mark.parametrize("fails", [False, True])
def test_continuous_batching_leaves_adapters_above_an_ordinary_base_as_they_were(tmp_path, monkeypatch, fails):
    """Whether the generation ends well or not."""
    config = {"max_steps": 1, "learning_rate": 1e-6, "bf16": True, "use_transformers_continuous_batching": True}
    cache = {"transformers_continuous_batching_config": {"num_blocks": 16, "max_batch_tokens": 64}}
    model = get_peft_model(tiny_model(tiny_tokenizer(), hidden_size=64, num_heads=2), lora(init_lora_weights=False))
    trainer = make_qlora_trainer(tmp_path, model, **config, **cache)
    start = trained_weights(trainer)
    if fails:

        def no_memory(*_, **__):
            raise torch.OutOfMemoryError("CUDA out of memory")

        monkeypatch.setattr(model.get_base_model(), "generate_batch", no_memory, raising=False)
        with pytest.raises(torch.OutOfMemoryError):
            trainer.train()
    else:
        trainer.train()
    for name, weight in trained_weights(trainer).items():
        assert weight.dtype == torch.float32
        moved = (weight - start[name]).abs().max()
        assert moved == 0 if fails else 0 < moved < 2e-6, name


@pytest.mark.parametrize("size", [1, 3, 8])
def test_greedy_completions_in_chunks_are_those_of_the_whole_batch(tmp_path, base, size):
    whole, _ = completions(make_qlora_trainer(tmp_path, random_adapters(base), **GREEDY))
    trainer = make_qlora_trainer(tmp_path, random_adapters(base), **GREEDY, generation_chunk_size=size)
    chunked, rows = completions(trainer)
    assert chunked == whole
    assert rows == {1: [1] * 8, 3: [3, 3, 2], 8: [8]}[size]


def test_auto_halves_the_rows_that_memory_does_not_hold(tmp_path, base, caplog):
    whole, _ = completions(make_qlora_trainer(tmp_path, random_adapters(base), **GREEDY))
    config = GREEDY | {"max_steps": 2, "generation_chunk_size": "auto", "learning_rate": 1e-9}
    trainer = make_qlora_trainer(tmp_path, random_adapters(base), **config)

    def small_memory(module, inputs, keywords):
        if not torch.is_grad_enabled() and len(keywords["input_ids"]) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")

    base_model = trainer.model.get_base_model()
    base_model.register_forward_pre_hook(small_memory, with_kwargs=True)
    with caplog.at_level(logging.WARNING, logger="grpo_plus"):
        made, rows = completions(trainer)
    assert rows == [8, 4, 2, 2, 2, 2, 2, 2, 2, 2]
    assert made[:8] == whole
    warned = [record.getMessage() for record in caplog.records if "ran out of memory" in record.getMessage()]
    assert [message.split(". ")[1] for message in warned] == ["From here on: 4", "From here on: 2"]


@pytest.mark.parametrize(
    "failure",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        RuntimeError("MPS backend out of memory (MPS allocated: 8 GB, other allocations: 1 GB, max allowed: 9 GB)."),
    ],
)
def test_half_of_an_odd_number_of_rows_is_rounded_up(caplog, failure):
    called = []

    def complete(part):
        rows = prompt_ids[part]
        called.append(len(rows))
        if len(rows) > 4:
            raise failure
        return rows

    prompt_ids = [[row] for row in range(7)]
    room = {1: 7, 2: 3, 3: None}  # rows by length of the prompts
    chunks = Chunks(None, lambda prompt_ids: room[len(prompt_ids[0])])
    with caplog.at_level(logging.WARNING, logger="grpo_plus"):
        assert chunks.generate(complete, prompt_ids) == prompt_ids
    assert called == [7, 4, 3]
    assert "generation_chunk_size=4" in caplog.text
    assert [chunks.fitting([[0] * length]) for length in room] == [4, 3, 4]


@pytest.mark.parametrize(
    ("groups", "size", "parts"),
    [
        ([4, 4, 4, 4], 4, [4, 4, 4, 4]),
        ([4, 4, 4, 4], 7, [7, 5, 4]),  # whole groups would take four parts
        ([4, 4, 4, 4], 9, [8, 8]),
        ([4, 4, 4, 4], 15, [12, 4]),
        ([4, 4], 3, [3, 3, 2]),  # no group fits
        ([2, 1, 3, 2], 5, [3, 5]),  # prompts after a tool: groups of any size
        ([1, 1, 1, 1, 1], 2, [2, 2, 1]),
        ([5, 3, 3], 4, [4, 4, 3]),  # the rest of a group that did not fit goes with the next ones
        ([3], 8, [3]),
        ([], 8, []),
    ],
)
@pytest.mark.parametrize("adapts", [False, True])
def test_parts_are_whole_groups_where_that_takes_no_further_part(groups, size, parts, adapts):
    prompt_ids = [[group, 7] for group, rows in enumerate(groups) for _ in range(rows)]
    called = []

    def complete(part):
        called.append(len(prompt_ids[part]))
        return [[*prompt, 1] for prompt in prompt_ids[part]]

    chunks = Chunks(None, lambda prompt_ids: size) if adapts else Chunks(size)
    assert chunks.generate(complete, prompt_ids) == [[*prompt, 1] for prompt in prompt_ids]
    assert called == parts


def test_half_of_the_rows_that_ran_out_of_memory_is_whole_groups():
    called = []

    def complete(part):
        rows = prompt_ids[part]
        called.append(len(rows))
        if len(rows) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return rows

    prompt_ids = [[group] for group in range(3) for _ in range(3)]
    chunks = Chunks(None)
    assert chunks.generate(complete, prompt_ids) == prompt_ids
    assert called == [9, 5, 4]  # three parts would be whole groups, two are not
    prompt_ids = prompt_ids[:6]
    assert chunks.generate(complete, prompt_ids) == prompt_ids
    assert called[3:] == [3, 3]


def test_one_row_that_does_not_fit_and_a_number_that_was_asked_for_stay_errors():
    def never(part):
        raise torch.OutOfMemoryError("CUDA out of memory")

    for chunks in (Chunks(None), Chunks(2)):
        with pytest.raises(torch.OutOfMemoryError):
            chunks.generate(never, [[1], [2]])


def test_another_failure_of_generation_is_no_lack_of_memory():
    def broken(part):
        raise RuntimeError("CUDA error: device-side assert triggered")

    with pytest.raises(RuntimeError, match="device-side assert"):
        Chunks(None).generate(broken, [[1], [2]])


def test_auto_takes_the_rows_that_the_planner_finds_room_for(tmp_path, base, monkeypatch):
    monkeypatch.setattr(generation, "LEAST_SAVED", 0)  # each prompt is kept once
    trainer = make_qlora_trainer(tmp_path, base, generation_chunk_size="auto")
    prompt_ids = [[group] * (10 - group) for group in range(2) for _ in range(4)]
    assert rows_that_fit(trainer.model, trainer.args, prompt_ids) is None  # the memory of a CPU is not asked for
    shape, run = shape_and_run(trainer.model, trainer.args, 10)
    needed = {rows: _needed(shape, run, rows) for rows in (4, 5)}
    # 1.5 of the bytes are reserved and not allocated.
    free = {"mem_get_info": (needed[4] / 2 + 1, 0), "memory_reserved": needed[4], "memory_allocated": needed[4] / 2}
    for name, value in free.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    monkeypatch.setattr(PreTrainedModel, "device", property(lambda self: torch.device("cuda")))
    assert rows_that_fit(trainer.model, trainer.args, prompt_ids) == 4
    alone = [[row, 1] * 5 for row in range(8)]
    assert rows_that_fit(trainer.model, trainer.args, alone) == 3  # four prompts in place of one
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 0))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    assert rows_that_fit(trainer.model, trainer.args, prompt_ids) == 1


def _needed(shape, run, rows):
    causes = generation_bytes(shape, replace(run, generation_chunk_size=rows), Constants())
    return sum(causes.values()) * Constants().fragmentation


def test_auto_is_refused_where_the_processes_must_generate_together(tmp_path, base):
    trainer = make_qlora_trainer(tmp_path, base, generation_chunk_size="auto")
    trainer.is_fsdp_enabled = True
    with pytest.raises(ValueError, match="generation_chunk_size='auto' lets every process.*Set a number of rows"):
        speed_of(trainer, trainer.plus)
