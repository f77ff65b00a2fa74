"""QLoRA on one card: a 4-bit base, float32 adapters, and an export that loads without bitsandbytes.

python examples/qlora_single_gpu.py                       needs the hub and a GPU; `grpo-plus plan` expects 5 GB
python examples/qlora_single_gpu.py --model NAME --r 32   another model, a higher rank
python examples/qlora_single_gpu.py --offline             the project's tiny model in nf4, on the CPU, in seconds

The first lines of its log, from the logger "grpo_plus", say what is quantized and which dtypes train.
"""

import argparse
import logging
import tempfile
from typing import Any

from datasets import Dataset, load_dataset
from transformers import AutoTokenizer
from trl.rewards import accuracy_reward

from grpo_plus import GRPOPlusConfig, GRPOPlusTrainer
from grpo_plus.qlora import qlora, save_merged


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="Qwen/Qwen3-1.7B")
    parser.add_argument("--dataset", default="trl-lib/DeepMath-103K")
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--output_dir", default="qlora_single_gpu")
    parser.add_argument("--offline", action="store_true")
    args = parser.parse_args()
    logging.basicConfig(format="%(message)s")
    logging.getLogger("grpo_plus").setLevel(logging.INFO)

    config: dict[str, Any] = {"max_completion_length": 1024, "learning_rate": 1e-5, "max_steps": 500}
    reward: Any = accuracy_reward
    if args.offline:
        args.model, dataset, reward = tiny_task()
        config = {"max_completion_length": 8, "learning_rate": 1e-2, "max_steps": 8, "use_cpu": True}
    else:
        dataset = load_dataset(args.dataset, split="train")

    recipe = qlora(r=args.r)
    trainer = GRPOPlusTrainer(
        model=args.model,
        reward_funcs=reward,
        train_dataset=dataset,
        args=GRPOPlusConfig(
            args.output_dir,
            per_device_train_batch_size=8,
            num_generations=8,
            gradient_accumulation_steps=2,
            generation_chunk_size="auto",
            logging_steps=1,
            report_to="none",
            **recipe.config,
            **config,
        ),
        quantization_config=recipe.quantization_config,
        peft_config=recipe.peft_config,
    )
    trainer.train()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    save_merged(trainer.model, f"{args.output_dir}/merged", tokenizer=tokenizer)


def tiny_task() -> tuple[str, Dataset, Any]:
    """A folder with the demo's model and tokenizer, its prompts and a reward that an untrained model can earn."""
    from grpo_plus.demo import task
    from grpo_plus.demo.tiny import tiny_model, tiny_tokenizer

    folder = tempfile.mkdtemp()
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(folder)
    model = tiny_model(tokenizer, hidden_size=64)
    model.lm_head.weight.data *= 8  # adapters leave the head alone, and an untrained one is too small to say anything
    model.save_pretrained(folder)
    return folder, task.dataset("train", 64, seed=0), task.digits_reward


if __name__ == "__main__":
    main()
