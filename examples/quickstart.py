"""TRL's own GRPO example (the one in GRPOTrainer's documentation) with its import line changed, and nothing else.

python examples/quickstart.py            needs a GPU and the hub
python examples/quickstart.py --offline  on the CPU, in seconds: a tiny model learns to write digits
"""

import sys

from datasets import load_dataset
from trl.rewards import accuracy_reward

from grpo_plus import GRPOPlusTrainer as GRPOTrainer  # was: from trl import GRPOTrainer


def main() -> None:
    dataset = load_dataset("trl-lib/DeepMath-103K", split="train")

    trainer = GRPOTrainer(
        model="Qwen/Qwen2.5-0.5B-Instruct",
        reward_funcs=accuracy_reward,
        train_dataset=dataset,
    )
    trainer.train()


def main_offline() -> None:
    from grpo_plus import GRPOPlusConfig
    from grpo_plus.demo import task
    from grpo_plus.demo.tiny import tiny_model, tiny_tokenizer

    tokenizer = tiny_tokenizer()
    trainer = GRPOTrainer(
        model=tiny_model(tokenizer, hidden_size=64),
        reward_funcs=task.digits_reward,
        train_dataset=task.dataset("train", 64, seed=0),
        processing_class=tokenizer,
        args=GRPOPlusConfig(
            "quickstart",
            max_steps=15,
            per_device_train_batch_size=32,
            max_completion_length=8,
            learning_rate=1e-2,
            logging_steps=1,
            use_cpu=True,
            bf16=False,
            report_to="none",
        ),
    )
    trainer.train()


if __name__ == "__main__":
    main_offline() if "--offline" in sys.argv else main()
