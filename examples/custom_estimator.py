"""An advantage estimator of your own: one function, registered in your own script.

On the CPU, offline, in seconds: an untrained model learns to write digits.

python examples/custom_estimator.py
"""

import torch

from grpo_plus import GRPOPlusConfig, GRPOPlusTrainer, Rewards
from grpo_plus.advantages import register
from grpo_plus.demo import task
from grpo_plus.demo.tiny import tiny_model, tiny_tokenizer


@register("above_median")
def above_median(rewards: Rewards, *, strength: float = 1.0) -> torch.Tensor:
    """Push completions above their group's median up by `strength`, the others down."""
    total = rewards.total()  # (P, G): weighted sum over the reward functions, NaN where none of them judged
    median = total.nanmedian(-1, keepdim=True).values
    return strength * torch.sign(total - median)


def main() -> None:
    tokenizer = tiny_tokenizer()
    trainer = GRPOPlusTrainer(
        model=tiny_model(tokenizer, hidden_size=64),
        reward_funcs=task.digits_reward,
        train_dataset=task.dataset("train", 64, seed=0),
        processing_class=tokenizer,
        args=GRPOPlusConfig(
            "custom_estimator",
            advantage_estimator="above_median",
            advantage_kwargs={"strength": 0.5},
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
