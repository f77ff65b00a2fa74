"""Process supervision: a reward for every step of a completion, one advantage for every token.

On the CPU, offline, in seconds: an untrained model learns to write digits.

The reward function of TRL's kind reports the steps through TRL's `log_extra`, which also shows them in the completions
table; `advantage_estimator="process"` turns them into advantages per token. Nothing else changes.

python examples/process_rewards.py
"""

from collections.abc import Callable
from typing import Any

from grpo_plus import GRPOPlusConfig, GRPOPlusTrainer
from grpo_plus.demo import task
from grpo_plus.demo.tiny import tiny_model, tiny_tokenizer

tokenizer = tiny_tokenizer()


def two_by_two(completion_ids: list[list[int]], log_extra: Callable[[str, list], None], **_: Any) -> list[float]:
    """Two tokens are a step. Its reward is the share of digits in it."""
    step_rewards, step_ends = [], []
    for ids in completion_ids:
        tokens = tokenizer.convert_ids_to_tokens(ids)
        steps = [tokens[start : start + 2] for start in range(0, len(tokens), 2)]
        step_rewards.append([sum(map(str.isdigit, step)) / len(step) for step in steps])
        step_ends.append([min(start + 1, len(tokens) - 1) for start in range(0, len(tokens), 2)])  # its last token
    log_extra("step_rewards", step_rewards)
    log_extra("step_ends", step_ends)
    return [sum(steps) / max(len(steps), 1) for steps in step_rewards]  # logged as the reward; the steps decide


def main() -> None:
    trainer = GRPOPlusTrainer(
        model=tiny_model(tokenizer, hidden_size=64),
        reward_funcs=two_by_two,
        train_dataset=task.dataset("train", 64, seed=0),
        processing_class=tokenizer,
        args=GRPOPlusConfig(
            "process_rewards",
            advantage_estimator="process",
            max_steps=15,
            per_device_train_batch_size=32,
            learning_rate=1e-2,
            max_completion_length=task.MAX_COMPLETION_LENGTH,
            logging_steps=1,
            use_cpu=True,
            bf16=False,
            report_to="none",
        ),
    )
    trainer.train()


if __name__ == "__main__":
    main()
