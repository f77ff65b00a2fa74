"""A task that trains in a fraction of a second: a tiny model that learns to write vowels."""

import functools
from dataclasses import replace

from datasets import Dataset

from grpo_plus import GRPOPlusConfig, GRPOPlusTrainer
from grpo_plus.compare.task import Task
from grpo_plus.demo.tiny import tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
ROWS = Dataset.from_dict({"prompt": [f"{number}+1=" for number in range(16)]})


def vowels(completions, **_):
    return [float(sum(c in "aeiou" for c in text)) for text in completions]


def brevity(completions, **_):
    return [-len(text) / 10 for text in completions]


def trainer(model, config, rewards=(vowels, brevity)):
    return GRPOPlusTrainer(
        model=model, reward_funcs=list(rewards), args=config, train_dataset=ROWS, processing_class=TOKENIZER
    )


def sizes(trainer):
    """Something that depends on every weight."""
    weights = [weight.detach().float() for weight in trainer.model.parameters()]
    return {"size": [weight.norm().item() for weight in weights], "mean": [weight.mean().item() for weight in weights]}


def small_task(**changes):
    settings = {"num_generations": 4, "per_device_train_batch_size": 8, "max_completion_length": 6, "max_steps": 2}
    settings |= {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": "none"}
    settings |= {"logging_steps": 1, "learning_rate": 1e-2, "temperature": 1.0, "save_strategy": "no"}
    task = Task(
        name="vowels",
        config=functools.partial(GRPOPlusConfig, **settings),
        start=lambda: tiny_model(TOKENIZER, hidden_size=32, num_heads=2, num_layers=1),
        trainer=trainer,
        evaluate=sizes,
    )
    return replace(task, **changes)
