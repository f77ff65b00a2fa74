"""Process supervision: a reward for every step of a completion, one advantage for every token. On the CPU, offline.

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


def digit_by_digit(
    completion_ids: list[list[int]], answer: list[str], log_extra: Callable[[str, list], None], **_: Any
) -> list[float]:
    """Each digit is a step: 1 where the sorted number has it in this place, 0 where not."""
    step_rewards, step_ends = [], []
    for ids, digits in zip(completion_ids, answer, strict=True):
        tokens = tokenizer.convert_ids_to_tokens(ids)
        ends = [index for index, token in enumerate(tokens) if token.isdigit()]  # index of each step's last token
        step_ends.append(ends)
        step_rewards.append([float(tokens[end] == digits[n : n + 1]) for n, end in enumerate(ends)])
    log_extra("step_rewards", step_rewards)
    log_extra("step_ends", step_ends)
    return [sum(steps) for steps in step_rewards]  # logged as this function's reward; the steps decide


def main() -> None:
    trainer = GRPOPlusTrainer(
        model=tiny_model(tokenizer),
        reward_funcs=digit_by_digit,
        train_dataset=task.dataset("train", 64, seed=0),
        processing_class=tokenizer,
        args=GRPOPlusConfig(
            "process_rewards",
            advantage_estimator="process",
            max_steps=3,
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
