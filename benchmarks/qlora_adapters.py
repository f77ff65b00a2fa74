"""Adapters in float32 against TRL's bf16 above a 4-bit base: how much of lora_A moves, and how the reward grows.

python -m benchmarks.qlora_adapters [--seeds 5] [--steps 40]

The demo's task and model in nf4 after its warm-up, TRL's optimizer, constant learning rate; both sides in one run, from
the same weights and prompts. Prints a table and writes benchmarks/results/qlora_adapters.json.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PrinterCallback, ProgressCallback, TrainerCallback

from benchmarks.machine import RESULTS, describe
from grpo_plus import GRPOPlusConfig, GRPOPlusTrainer
from grpo_plus.demo import task
from grpo_plus.demo.tiny import tiny_model, tiny_tokenizer
from grpo_plus.demo.warmup import warm_up
from grpo_plus.qlora import qlora

LEARNING_RATES = (1e-6, 1e-5, 1e-4)
DTYPES = ("float32", "bfloat16")
AFTER = 10


class LoraA(TrainerCallback):
    """Elements of lora_A that have had another value than at the start, after any of the first AFTER steps."""

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Remember the start."""
        self.weights = [weight for name, weight in model.named_parameters() if "lora_A" in name]
        self.start = [weight.detach().clone() for weight in self.weights]
        self.moved = [torch.zeros_like(weight, dtype=torch.bool) for weight in self.weights]
        self.differs = [0.0, 0.0]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Compare."""
        if state.global_step <= AFTER:
            for moved, weight, start in zip(self.moved, self.weights, self.start, strict=True):
                moved |= weight.ne(start)
        if state.global_step == AFTER:
            now = torch.cat([w.ne(start).flatten() for w, start in zip(self.weights, self.start, strict=True)])
            ever = torch.cat([moved.flatten() for moved in self.moved])
            self.differs = [ever.float().mean().item(), now.float().mean().item()]


def main() -> None:
    """Every learning rate and dtype, once per seed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=40)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for seed in range(args.seeds):
        with tempfile.TemporaryDirectory() as folder:
            base = warm_base(Path(folder), seed)
            for rate in LEARNING_RATES:
                rows += [measure(base, seed, args.steps, rate, dtype) for dtype in DTYPES]
    summary = [summarize(rows, rate, dtype) for rate in LEARNING_RATES for dtype in DTYPES]
    print(f"{'lr':>7} {'adapters':>9} {'moved, median (lowest)':>23} {'reward, first 5 -> last 5 steps':>33}")
    for row in summary:
        moved = f"{row['moved_median']:.1%} ({row['moved_lowest']:.1%})"
        reward = f"{row['reward_first_5']:.3f} -> {row['reward_last_5']:.3f} (std {row['reward_last_5_std']:.3f})"
        print(f"{row['learning_rate']:>7.0e} {row['adapter_dtype']:>9} {moved:>23} {reward:>33}")
    RESULTS.mkdir(exist_ok=True)
    result = {
        "command": f"python -m benchmarks.qlora_adapters --seeds {args.seeds} --steps {args.steps}",
        "machine": describe(("bitsandbytes", "peft")),
        "summary": summary,
        "runs": rows,
    }
    (RESULTS / "qlora_adapters.json").write_text(json.dumps(result, indent=2) + "\n")


def warm_base(folder: Path, seed: int) -> Path:
    """The demo's model after its supervised warm-up, as a folder to load in 4 bits."""
    tokenizer = tiny_tokenizer()
    model = tiny_model(tokenizer, hidden_size=128, intermediate_size=256, num_heads=8, seed=seed)
    warm_up(model, tokenizer, task.format_examples(4_000, seed), steps=160, seed=seed)
    model.save_pretrained(folder)
    return folder


def measure(base: Path, seed: int, steps: int, learning_rate: float, adapter_dtype: str) -> dict[str, Any]:
    """One short run."""
    recipe = qlora(r=16)
    model = AutoModelForCausalLM.from_pretrained(
        base, quantization_config=recipe.quantization_config, dtype=torch.bfloat16
    )
    changes = {"adapter_dtype": adapter_dtype, "optim": "adamw_torch_fused", "gradient_checkpointing": False}
    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOPlusTrainer(
            model=model,
            reward_funcs=[task.correctness_reward, task.format_reward],
            args=GRPOPlusConfig(
                folder,
                seed=seed,
                max_steps=steps,
                learning_rate=learning_rate,
                lr_scheduler_type="constant",
                num_generations=8,
                per_device_train_batch_size=64,
                max_completion_length=task.MAX_COMPLETION_LENGTH,
                logging_steps=1,
                save_strategy="no",
                use_cpu=True,
                report_to="none",
                **{name: value for name, value in recipe.config.items() if name != "model_init_kwargs"} | changes,
            ),
            train_dataset=task.dataset("train", 1_000, seed),
            processing_class=tiny_tokenizer(),
            peft_config=recipe.peft_config,
        )
        lora_a = LoraA()
        trainer.add_callback(lora_a)
        trainer.remove_callback(ProgressCallback)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    return {
        "seed": seed,
        "learning_rate": learning_rate,
        "adapter_dtype": adapter_dtype,
        "lora_a_moved": lora_a.differs[0],
        "lora_a_differs_after_10": lora_a.differs[1],
        "rewards": [round(reward, 4) for reward in rewards],
    }


def summarize(rows: list[dict[str, Any]], learning_rate: float, adapter_dtype: str) -> dict[str, Any]:
    """Over the seeds of one setting."""
    chosen = [row for row in rows if (row["learning_rate"], row["adapter_dtype"]) == (learning_rate, adapter_dtype)]
    last = [statistics.mean(row["rewards"][-5:]) for row in chosen]
    return {
        "learning_rate": learning_rate,
        "adapter_dtype": adapter_dtype,
        "moved_median": statistics.median(row["lora_a_moved"] for row in chosen),
        "moved_lowest": min(row["lora_a_moved"] for row in chosen),
        "reward_first_5": statistics.mean(statistics.mean(row["rewards"][:5]) for row in chosen),
        "reward_last_5": statistics.mean(last),
        "reward_last_5_std": statistics.stdev(last) if len(last) > 1 else 0.0,
    }


if __name__ == "__main__":
    main()
