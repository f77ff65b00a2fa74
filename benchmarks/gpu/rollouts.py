"""Rollouts of real shapes: transformers' own loop beside every way to keep keys and values between the steps."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.gauges import clean, median_s, peak_gib, profile
from benchmarks.gpu.record import Setting, Stage
from benchmarks.gpu.updates import real
from benchmarks.memory_run import random_model
from grpo_plus.models.caches import CACHE
from grpo_plus.planner import Run
from grpo_plus.rollout import Prompts, decode
from grpo_plus.rollout.cache import Expanded
from grpo_plus.rollout.graphs import Graphed, cuda_graph
from grpo_plus.rollout.prefix import SharedPrompts

MEAN_LENGTH = 0.4  # of a completion, as a share of the longest, if it could go on


def rollouts(stage: Stage, setting: Setting) -> None:
    """Groups of eight, sampled, with rows that end at random."""
    shapes = ((2, 24, 8),) if setting.tiny else ((8, 512, 192), (2, 2048, 192))
    run = Run(dtype="float32", bf16=False) if setting.tiny else Run(dtype="bfloat16")
    torch.manual_seed(0)
    model = random_model(real(setting, "Qwen3-1.7B"), run, setting.device).eval()
    # A rehearsal has no graphs: the call itself takes the place of its recording.
    record = (lambda call: call) if setting.tiny else cuda_graph
    ways = {
        "transformers' own loop": None,
        "copies of the prompts": Expanded,
        "one cache of each prompt": SharedPrompts,
        "CUDA graphs": partial(Graphed, record=record),
    }
    for shape in shapes:
        expected: list[Tensor] = []
        for name, make in ways.items():
            label = f"{name}, {shape[0]} x 8 rows, {shape[1]} + {shape[2]}"
            stage.item(label, _rollout, setting, model, make, shape, expected)
            clean()


def _rollout(
    setting: Setting, model: Any, make: Any, shape: tuple[int, int, int], expected: list[Tensor]
) -> dict[str, Any]:
    """Seconds, launches and memory of a rollout, and how many rows have the tokens of the first way."""
    prompts, length, new = shape
    generator = torch.Generator().manual_seed(1)
    vocabulary = model.config.vocab_size
    ids = torch.randint(5, vocabulary, (prompts, length), generator=generator).repeat_interleave(8, 0)
    ids = ids.to(setting.device)
    ends = list(range(2, 2 + round(vocabulary / (MEAN_LENGTH * new))))  # random weights draw one of these soon
    seen: dict[str, Any] = {}
    how = {} if make is None else {"custom_generate": partial(_decode, make, seen)}

    def generate() -> Tensor:
        torch.manual_seed(2)
        with torch.no_grad():
            out: Tensor = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new,
                do_sample=True,
                top_k=0,
                pad_token_id=0,
                eos_token_id=ends,
                disable_compile=True,
                **how,
            )
        return out

    made = generate()
    if not expected:
        expected.append(made)
    equal = sum(torch.equal(a[: len(b)], b[: len(a)]) for a, b in zip(made, expected[0], strict=True))
    row = {"equal": f"{equal} of {len(made)}", "steps": made.shape[1] - length - 1, "s": median_s(setting, generate)}
    traced = profile(setting, generate)
    row |= {"launches_per_step": round(traced["launches"] / max(1, row["steps"]), 1), "busy": traced["busy"]}
    return row | {"peak_gib": peak_gib(setting, generate), **seen}


def _decode(make: Any, seen: dict[str, Any], model: Any, input_ids: Tensor, **arguments: Any) -> Tensor:
    keeper = make(model, arguments[CACHE])
    prompts = Prompts.of(input_ids, arguments.get("attention_mask"))
    ids, statistics = decode(model, input_ids, prompts=prompts, keeper=keeper, **arguments)
    seen["mean_live_rows"] = round(statistics.row_steps / max(1, statistics.steps), 1)
    if keeper.failure is not None:
        seen["no graph"] = keeper.failure
    return ids
