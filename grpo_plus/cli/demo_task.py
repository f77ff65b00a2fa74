"""The demo's task as something to compare estimators on."""

import functools

from transformers import PreTrainedModel

from grpo_plus.compare.samples import KEPT, Sample
from grpo_plus.compare.task import Scores, Task
from grpo_plus.config import GRPOPlusConfig
from grpo_plus.demo import task
from grpo_plus.demo.run import (
    MAX_STEPS,
    NUM_EXAMPLES,
    NUM_HELD_OUT,
    NUM_TRAIN,
    SETTINGS,
    WARM_UP_STEPS,
    warmed_up_model,
)
from grpo_plus.demo.tiny import tiny_tokenizer
from grpo_plus.trainer import GRPOPlusTrainer

REWARDS = (task.correctness_reward, task.format_reward)
DATA_SEED = 0  # of rows, weights and warm-up, which all arms share


def sorting_task(
    *, max_steps: int = MAX_STEPS, warm_up_steps: int = WARM_UP_STEPS, num_held_out: int = NUM_HELD_OUT
) -> Task:
    """Sorting four digits, from the demo's warmed-up model, judged by greedy completions of held-out prompts."""
    if max_steps < 1:
        raise ValueError(
            f"max_steps={max_steps} trains nothing. Set max_steps to 1 or more; the default is {MAX_STEPS}."
        )
    tokenizer = tiny_tokenizer()
    train = task.dataset("train", NUM_TRAIN, DATA_SEED)
    held_out = task.dataset("held_out", num_held_out, DATA_SEED)

    def trainer(model: PreTrainedModel, config: GRPOPlusConfig) -> GRPOPlusTrainer:
        return GRPOPlusTrainer(
            model=model, reward_funcs=list(REWARDS), args=config, train_dataset=train, processing_class=tokenizer
        )

    def evaluate(trainer: GRPOPlusTrainer) -> Scores:
        completions = task.complete(trainer.model, tokenizer, held_out["prompt"])
        answers = list(held_out["answer"])
        rewards = {reward.__name__: reward(completions=completions, answer=answers) for reward in REWARDS}
        return {"accuracy": task.exactly_right(completions, answers), **rewards}

    def samples(trainer: GRPOPlusTrainer) -> list[Sample]:
        prompts = held_out["prompt"][:KEPT]
        return [Sample(*texts) for texts in zip(prompts, task.complete(trainer.model, tokenizer, prompts), strict=True)]

    return Task(
        name="sorting four digits",
        config=functools.partial(GRPOPlusConfig, **SETTINGS, max_steps=max_steps),
        start=lambda: warmed_up_model(tokenizer, DATA_SEED, warm_up_steps),
        trainer=trainer,
        evaluate=evaluate,
        samples=samples,
        facts={
            "train rows": NUM_TRAIN,
            "held-out rows": num_held_out,
            "warm-up": f"{warm_up_steps} steps on {NUM_EXAMPLES} examples of the format",
        },
    )
