"""Reward functions that wait, beside generation: stock TRL, grpo_plus in TRL's order, and both ways of overlap_rewards.

python -m benchmarks.judges [--batches 5] [--cases NAME ...]

A judge sleeps, as one does that asks a server. Eight prompts have four completions each, of lengths with a long tail,
40 % of the longest on average. They are fixed beforehand, so that all sides do the same work. Each batch is trained on
in two steps, so there is a pass for the old policy's log-probabilities. The model is the demo's.

Losses and rewards of the sides must agree, to 1e-5 with TRL and to the last bit among ourselves: others end the run.
Figures are medians of seconds per batch, without each run's first, on one thread. Seconds are those of the training's
own thread, and judges sleep by the same clock: CPU time while the thread computes, wall-clock time while it waits. So
other work on the machine lengthens neither. Writes benchmarks/results/judges.json.
"""

import argparse
import asyncio
import copy
import json
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import LogitsProcessorList, PrinterCallback, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from benchmarks.lengths import FixedLengths, lognormal
from benchmarks.machine import RESULTS, describe
from grpo_plus import GRPOPlusConfig, GRPOPlusTrainer
from grpo_plus.demo.tiny import tiny_model, tiny_tokenizer

PROMPTS, GENERATIONS, PROMPT, LONGEST = 8, 4, 32, 256
STEPS = 2  # of each batch
SIDES = ("trl", "off", "batch", "groups")
Judge = Callable[..., Any]


class Clock:
    """Seconds of the main thread: its CPU time while it computes, wall-clock time while it waits."""

    TICK = 0.004

    def __init__(self) -> None:
        self.now = 0.0
        threading.Thread(target=self._tick, daemon=True).start()

    def _tick(self) -> None:
        main = threading.main_thread()
        cpu_clock = time.pthread_getcpuclockid(main.ident or 0)
        state = Path(f"/proc/self/task/{main.native_id}/stat")
        wall, cpu = time.monotonic(), time.clock_gettime(cpu_clock)
        while True:
            time.sleep(self.TICK)
            new_wall, new_cpu = time.monotonic(), time.clock_gettime(cpu_clock)
            waits = state.read_text().rpartition(")")[2].split()[0] == "S" and new_cpu - cpu < 0.1 * self.TICK
            self.now += new_wall - wall if waits else new_cpu - cpu
            wall, cpu = new_wall, new_cpu


CLOCK = Clock()


def words(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """Differs within a group, and needs no language."""
    return [sum(ids) % 97 / 97 for ids in completion_ids]


def sleep(seconds: float) -> None:
    """Sleep by the main thread's clock."""
    until = CLOCK.now + seconds
    while CLOCK.now < until:
        time.sleep(Clock.TICK)


def per_completion(seconds: float) -> Judge:
    """A judge that asks for one completion after another."""

    def judge(completion_ids: list[list[int]], **_: Any) -> list[float]:
        sleep(seconds * len(completion_ids))
        return words(completion_ids)

    return judge


def per_call(seconds: float, name: str = "judge") -> Judge:
    """A judge that asks for all completions of a call at once."""

    def judge(completion_ids: list[list[int]], **_: Any) -> list[float]:
        sleep(seconds)
        return words(completion_ids)

    judge.__name__ = name
    return judge


def one_at_a_time(function: Judge) -> Judge:
    """A judge whose server answers one call after another."""
    lock = threading.Lock()

    def judge(**columns: Any) -> list[float]:
        with lock:
            return function(**columns)

    return judge


def coroutine(seconds: float) -> Judge:
    """`per_call` as a coroutine function."""

    async def judge(completion_ids: list[list[int]], **_: Any) -> list[float]:
        until = CLOCK.now + seconds
        while CLOCK.now < until:
            await asyncio.sleep(Clock.TICK)
        return words(completion_ids)

    return judge


CASES: dict[str, list[Judge]] = {
    "nothing": [words],
    "1 s a call": [per_call(1.0)],
    "1 s a call, coroutine": [coroutine(1.0)],
    "two functions, 1 s a call each": [per_call(1.0, "one"), per_call(1.0, "other")],
    "1/16 s a completion": [per_completion(1 / 16)],
    "1/16 s a completion, one at a time": [one_at_a_time(per_completion(1 / 16))],
    "5 s a call": [per_call(5.0)],
}


class Batches(TrainerCallback):
    """Seconds of each batch."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._since = CLOCK.now

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Note the end of a batch."""
        if state.global_step % STEPS == 0:
            self.seconds.append(CLOCK.now - self._since)
            self._since = CLOCK.now


def main() -> None:
    """Train every case on all sides, in turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=5)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    args = parser.parse_args()
    torch.set_num_threads(1)
    load = round(os.getloadavg()[0], 1)
    rows = {}
    for name in args.cases:
        rows[name] = measured(CASES[name], args.batches)
        print(f"{name:<34} " + "  ".join(f"{side} {rows[name][side]:5.2f} s" for side in SIDES), flush=True)
    summary = {
        "command": f"python -m benchmarks.judges --batches {args.batches}",
        "machine": describe() | {"threads": 1, "load": load},
        "shape": {"prompts": PROMPTS, "generations": GENERATIONS, "prompt": PROMPT, "longest": LONGEST},
        "seconds": rows,
    }
    (RESULTS / "judges.json").write_text(json.dumps(summary, indent=1) + "\n")


def measured(judges: list[Judge], batches: int) -> dict[str, float]:
    """Median seconds of a batch on each side."""
    runs = {side: trained(side, judges, batches) for side in SIDES}
    check({side: log for side, (_, log) in runs.items()})
    return {side: round(statistics.median(seconds[1:]), 3) for side, (seconds, _) in runs.items()}


def check(logs: dict[str, list[list[float]]]) -> None:
    """End the run where the sides have not trained the same."""
    if logs["batch"] != logs["off"] or logs["groups"] != logs["off"]:
        raise SystemExit(f"overlap_rewards has changed the training: {logs}")
    if not torch.allclose(torch.tensor(logs["trl"]), torch.tensor(logs["off"]), rtol=1e-5, atol=1e-5):
        raise SystemExit(f"TRL has trained something else: {logs}")


def trained(side: str, judges: list[Judge], batches: int) -> tuple[list[float], list[list[float]]]:
    """Seconds of each batch, and loss and reward of each step."""
    tokenizer, rows = tiny_tokenizer(), PROMPTS * GENERATIONS
    starts = range(0, 7 * batches * PROMPTS, 7)
    texts = ["".join(chr(97 + (start + place) % 26) for place in range(PROMPT)) for start in starts]
    torch.manual_seed(0)
    model = tiny_model(tokenizer)
    generator = torch.Generator().manual_seed(0)
    lengths = [lognormal(rows, LONGEST, generator) for _ in range(batches)]
    fixed, generate = LogitsProcessorList([FixedLengths(lengths, tokenizer.eos_token_id)]), model.generate
    model.generate = lambda *given, **named: generate(*given, logits_processor=fixed, **named)
    settings: dict[str, Any] = {
        "max_completion_length": LONGEST, "num_generations": GENERATIONS, "steps_per_generation": STEPS,
        "per_device_train_batch_size": rows // STEPS, "max_steps": batches * STEPS, "shuffle_dataset": False,
        "logging_steps": 1, "report_to": [], "save_strategy": "no", "disable_tqdm": True, "use_cpu": True,
        "bf16": False, "gradient_checkpointing": False,
    }  # fmt: skip
    plus = {} if side == "trl" else {"overlap_rewards": None if side == "off" else side, "health_warnings": False}
    trainer_class, config_class = (GRPOTrainer, GRPOConfig) if side == "trl" else (GRPOPlusTrainer, GRPOPlusConfig)
    trainer = trainer_class(
        model=model,
        reward_funcs=list(judges),
        args=config_class(tempfile.mkdtemp(), **settings, **plus),
        train_dataset=Dataset.from_list([{"prompt": text} for text in texts]),
        processing_class=copy.deepcopy(tokenizer),
    )
    trainer.remove_callback(PrinterCallback)
    clock = Batches()
    trainer.add_callback(clock)
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    return clock.seconds, [[entry["loss"], entry.get("reward", 0.0)] for entry in steps]


if __name__ == "__main__":
    main()
