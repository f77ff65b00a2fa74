"""One short GRPO run on random weights of a real shape, in a process of its own, and the peaks of its phases."""

import json
import os
import subprocess
import sys
import tempfile
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from grpo_plus.models.caches import CACHE
from grpo_plus.planner import Run

QWEN3 = {"model_type": "qwen3", "head_dim": 128, "num_key_value_heads": 8, "vocab_size": 151936}
MODELS: dict[str, dict[str, Any]] = {
    "Qwen3-1.7B": QWEN3
    | {
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_attention_heads": 16,
        "num_hidden_layers": 28,
        "tie_word_embeddings": True,
    },
    "Qwen3-4B": QWEN3
    | {
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_attention_heads": 32,
        "num_hidden_layers": 36,
        "tie_word_embeddings": True,
    },
    "Qwen3-8B": QWEN3
    | {
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_attention_heads": 32,
        "num_hidden_layers": 36,
        "tie_word_embeddings": False,
    },
    "Llama-3.1-8B": {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": False,
        "vocab_size": 128256,
    },
}
TINY = QWEN3 | {
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
    "vocab_size": 4096,
}

# nf4 as `BitsAndBytesConfig(load_in_4bit=True)` alone gives it, and as who knows TRL well sets it up.
TRL_DEFAULT: dict[str, Any] = {
    "packing": "none",
    "max_tokens_per_pass": None,
    "load_in_4bit": True,
    "lora_r": 16,
    "adapter_dtype": "bfloat16",
}
TRL_TUNED = TRL_DEFAULT | {"use_bnb_nested_quant": True, "dtype": "bfloat16", "optim": "adamw_8bit"}

OUT_OF_MEMORY = "out of memory"
THEIRS = (
    "max_completion_length", "per_device_train_batch_size", "gradient_accumulation_steps", "steps_per_generation",
    "num_generations", "num_iterations", "beta", "gradient_checkpointing", "optim", "bf16",
)  # fmt: skip
OURS = ("packing", "generation_chunk_size", "max_tokens_per_pass", "mlp_tile_tokens", "offload_activations",
        "adapter_dtype")  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A run on a model.

    stock: by TRL's own trainer and configuration.
    last_step: completions are random ids, and of their generation only the last step runs, on a cache of full length.
    """

    config: dict[str, Any]
    run: Run
    device: str
    cap: int | None = None
    stock: bool = False
    last_step: bool = False

    def to_json(self) -> str:
        """For the command line."""
        return json.dumps(asdict(self))


def case_of(text: str) -> Case:
    """The inverse of `Case.to_json`."""
    given = json.loads(text)
    return Case(**given | {"run": Run(**given["run"])})


def in_a_fresh_process(case: Case) -> dict[str, Any]:
    """`measure` where nothing was allocated before; a run that dies is an error and not the end."""
    # Else the C library keeps what a phase freed, and on a CPU the next phase would seem to need it.
    keys = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_") if case.device == "cpu" else ()
    command = [sys.executable, "-m", "benchmarks.memory_run", case.to_json()]
    environment = os.environ | dict.fromkeys(keys, "1048576")
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        return {"error": OUT_OF_MEMORY if "OutOfMemoryError" in last or "MemoryError" in last else last[:200]}
    return json.loads(done.stdout.splitlines()[-1])


def measure(case: Case) -> dict[str, Any]:
    """Peaks of the phases of two optimizer steps, in bytes: the second generates beside the optimizer's state."""
    from grpo_plus import StepProfile

    run, device = case.run, case.device
    with tempfile.TemporaryDirectory() as folder:  # what is imported and set up on first use
        small = case.config | {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 128}
        short = replace(run, prompt_length=8, max_completion_length=8, load_in_4bit=False, use_bnb_nested_quant=False)
        short_case = replace(case, config=small, run=short)
        make_trainer(folder, random_model(small, short, device), short_case).train()
    before = _in_use(device)
    model = random_model(case.config, run, device)
    static = _in_use(device) - before
    if case.cap is not None and device == "cuda":
        torch.cuda.set_per_process_memory_fraction(case.cap / torch.cuda.get_device_properties(0).total_memory)
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(folder, model, case)
        trainer.add_callback(StepProfile(trainer))
        trainer.train()
        last = [entry for entry in trainer.state.log_history if "profile/update_peak_gb" in entry][-1]
    offset = before if device == "cpu" else 0  # resident memory holds the program, too
    phases = [name for name in ("generate", "score", "update", "optimizer") if run.scores or name != "score"]
    peaks = {name: round(last[f"profile/{name}_peak_gb"] * 1e9) - offset for name in phases}
    if case.cap is not None and device == "cpu" and max(peaks.values()) > case.cap:
        raise MemoryError(f"{max(peaks.values())} bytes are more than cap={case.cap}")
    took = {"static_bytes": static, "update_s": last["profile/update_s"]}
    return {"peaks": {"load": static} | peaks} | took | _outside(device)


def _outside(device: str) -> dict[str, int]:
    """What a GPU has in use beside torch's tensors. Others on the card count, too: have it alone."""
    if device != "cuda":
        return {"context_bytes": 0, "reserved_bytes": 0}
    free, total = torch.cuda.mem_get_info()
    context = total - free - torch.cuda.memory_reserved()
    return {"context_bytes": context, "reserved_bytes": torch.cuda.max_memory_reserved()}


def _in_use(device: str) -> int:
    if device == "cuda":
        return torch.cuda.memory_allocated()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def random_model(config: dict[str, Any], run: Run, device: str, auto_class: Any = None) -> Any:
    """A model with random weights on the device; its linear layers in nf4 where the run asks for it.

    Args:
        auto_class: what makes a model of a config. None: `AutoModelForCausalLM`.

    It is made without weights, and one tensor after the other gets them, so that a card needs no room for all of them
    in `dtype` first.
    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    with init_empty_weights(include_buffers=False):
        made_by = auto_class or AutoModelForCausalLM
        model = made_by.from_config(AutoConfig.for_model(**config), dtype=getattr(torch, run.dtype))
    head = model.get_output_embeddings()
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if run.load_in_4bit and type(child) is nn.Linear and child is not head:
                setattr(parent, name, _quantized(child, run, device))
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and parameter.is_meta:
                module._parameters[name] = nn.Parameter(_random(parameter, device))
    model.tie_weights()
    model.is_loaded_in_4bit = run.load_in_4bit
    model.to(device)  # buffers
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return model


def _random(parameter: torch.Tensor, device: str) -> torch.Tensor:
    if parameter.dim() == 1:
        return torch.ones(parameter.shape, dtype=parameter.dtype, device=device)
    return torch.randn(parameter.shape, dtype=parameter.dtype, device=device) * 0.02


def _quantized(linear: nn.Linear, run: Run, device: str) -> nn.Module:
    import bitsandbytes

    quantized = bitsandbytes.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        compute_dtype=linear.weight.dtype,
        compress_statistics=run.use_bnb_nested_quant,
        quant_type="nf4",
        device="meta",
    )
    quantized.weight = bitsandbytes.nn.Params4bit(
        _random(linear.weight, device),  # quantized where it is made, without a way over the host
        requires_grad=False,
        compress_statistics=run.use_bnb_nested_quant,
        quant_type="nf4",
        module=quantized,
    ).to(device)
    quantized.bias = linear.bias
    return quantized


def make_trainer(folder: str, model: Any, case: Case) -> Any:
    """A trainer of two steps whose completions have their full length, but for the last token of one in each batch."""
    from datasets import Dataset
    from peft import LoraConfig
    from trl import GRPOConfig, GRPOTrainer

    from grpo_plus import GRPOPlusConfig, GRPOPlusTrainer
    from grpo_plus.demo.tiny import tiny_tokenizer

    run = case.run
    prompts = Dataset.from_list([{"prompt": f"{index:>{run.prompt_length}}"} for index in range(64)])
    names = THEIRS if case.stock else (*THEIRS, *OURS)
    config = (GRPOConfig if case.stock else GRPOPlusConfig)(
        folder,
        max_steps=2,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=case.device == "cpu",
        generation_kwargs={"min_new_tokens": run.max_completion_length},
        **{name: getattr(run, name) for name in names},
    )
    adapters = LoraConfig(r=run.lora_r, target_modules="all-linear", lora_dropout=run.lora_dropout)
    trainer = (GRPOTrainer if case.stock else GRPOPlusTrainer)(
        model=model,
        reward_funcs=_some_reward,
        args=config,
        train_dataset=prompts,
        processing_class=tiny_tokenizer(),
        peft_config=adapters if run.lora_r else None,
    )
    generate = partial(_last_step, trainer, case) if case.last_step else trainer._generate_single_turn
    trainer._generate_single_turn = lambda *args, **kwargs: _one_shorter(generate(*args, **kwargs))
    return trainer


def _last_step(trainer: Any, case: Case, prompt_ids: list[list[int]], *_: Any) -> tuple[list[list[int]], None]:
    """Random completions of full length, after the last decoding step of as many rows as generate together."""
    run, model = case.run, trainer.accelerator.unwrap_model(trainer.model)
    rows = min(run.generation_chunk_size or len(prompt_ids), len(prompt_ids))
    before = model.training
    model.eval()  # checkpointed layers take no cache in training
    with torch.no_grad(), nullcontext() if case.stock else trainer.accelerator.autocast():
        cache = _full_cache(model, rows, run.prompt_length + run.max_completion_length - 1, in_place=not case.stock)
        token = torch.ones((rows, 1), dtype=torch.long, device=model.device)
        model(input_ids=token, **{CACHE: cache}, use_cache=True, logits_to_keep=1)
    model.train(before)
    return torch.randint(5, 90, (len(prompt_ids), run.max_completion_length)).tolist(), None


def _full_cache(model: Any, rows: int, length: int, *, in_place: bool) -> Any:
    """Random keys and values of a model of attention layers. In place: in buffers with room, as our loop has them."""
    from transformers import DynamicCache

    from grpo_plus.rollout.cache import GrowingLayer

    config, cache = model.config, DynamicCache()
    shape = rows, config.num_key_value_heads, length, config.head_dim
    for index in range(config.num_hidden_layers):
        keys, values = (torch.randn(shape, dtype=model.dtype, device=model.device) for _ in range(2))
        cache.update(keys, values, index)
        if in_place:
            cache.layers[index] = GrowingLayer(keys, values)
        del keys, values
    return cache


def _one_shorter(generated: tuple[Any, ...]) -> tuple[Any, ...]:
    """Shorten a completion. transformers drops the mask of rows that are all full, which no real batch is."""
    completion_ids, *others = generated
    return [completion_ids[0][:-1], *completion_ids[1:]], *others


def _some_reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """No two completions alike, so that every group trains."""
    return [sum(ids) % 1009 + index / 7 for index, ids in enumerate(completion_ids)]


if __name__ == "__main__":
    print(json.dumps(measure(case_of(sys.argv[1]))))
