"""A tool: a tiny model learns to call a calculator, since it cannot multiply in its head.

python examples/tools.py    on the CPU, offline, in half a minute

The model has two turns. In the first, it guesses the product or calls the calculator. After a call, TRL runs the tool
and adds the result to the conversation. The model then reads the result and answers. The only reward is for the right
answer: nobody says that calling is good.

A supervised warm-up comes first, as for every model that is to call tools. It teaches the format, and to guess in eight
conversations out of ten. TRL reads the calls with the tokenizer's `response_template`, which needs transformers 5.13.
"""

import random
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from grpo_plus import GRPOPlusConfig, GRPOPlusTrainer
from grpo_plus.demo.tiny import tiny_model, tiny_tokenizer
from grpo_plus.demo.warmup import warm_up

CALLING = 0.2  # share of the warm-up's conversations in which the model calls
WARM_UP_STEPS, MAX_STEPS = 240, 24

# A pretrained model brings both templates along. Its chat template also lists the `tools` in the prompt, which this one
# leaves out: the model knows one tool, and short prompts are fast.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
    {{ '<' + message.role + '>' + message.content }}
    {%- for call in message.tool_calls or [] -%} {{ '<call>' + call.function | tojson + '</call>' }} {%- endfor -%}
    {{ eos_token if message.role == 'assistant' }}
{%- endfor -%}
{{ '<assistant>' if add_generation_prompt }}"""
RESPONSE_TEMPLATE = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<assistant>",
    "fields": {
        "tool_calls": {
            "open": "<call>",
            "close": "</call>",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {"close": "<eos>", "content": "text"},
    },
}
# A token each, so that a call is a few tokens and the digits of two numbers.
WORDS = [
    "<user>",
    "<assistant>",
    "<tool>",
    "<call>",
    "</call>",
    '{"name": "calculator", "arguments": {"a": ',
    ', "b": ',
    "}}",
]


def calculator(a: int, b: int) -> int:
    """Multiply two numbers.

    Args:
        a: The first number.
        b: The second number.
    """
    return a * b


def right(completions: list[list[dict[str, Any]]], answer: list[str], **_: Any) -> list[float]:
    """1 where the last message is the product and nothing else."""
    return [float(messages[-1]["content"] == product) for messages, product in zip(completions, answer, strict=True)]


def factors(rng: random.Random) -> tuple[int, int]:
    """Two numbers of three digits, whose product has six."""
    return rng.randint(317, 999), rng.randint(317, 999)


def problems(size: int, seed: int) -> Dataset:
    rng = random.Random(seed)
    pairs = [factors(rng) for _ in range(size)]
    return Dataset.from_list(
        [{"prompt": [{"role": "user", "content": f"{a}*{b}"}], "answer": str(a * b)} for a, b in pairs]
    )


def calling_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(WORDS)
    tokenizer.chat_template, tokenizer.response_template = CHAT_TEMPLATE, RESPONSE_TEMPLATE
    return tokenizer


def demonstrations(tokenizer: PreTrainedTokenizerFast, size: int, seed: int) -> list[tuple[str, str]]:
    """What comes before, and what the model writes: a first turn, the rest of a call, and an answer for each problem.

    The rest of a call teaches how to call, and leaves the model's first token, which decides whether it does.
    """
    rng, pairs = random.Random(seed), []
    for _ in range(size):
        a, b = factors(rng)
        messages: list[dict[str, Any]] = [
            {"role": "user", "content": f"{a}*{b}"},
            {"role": "assistant", "content": "", "tool_calls": [
                {"type": "function", "function": {"name": "calculator", "arguments": {"a": a, "b": b}}}
            ]},
            {"role": "tool", "name": "calculator", "content": str(a * b)},
        ]  # fmt: skip
        asked, called, answered = (
            tokenizer.apply_chat_template(messages[:turns], tokenize=False, add_generation_prompt=turns != 2)
            for turns in (1, 2, 3)
        )
        call = called.removeprefix(asked).removesuffix(tokenizer.eos_token)
        guess = str(rng.randrange(10**5, 10**6))
        pairs += [
            (asked, call if rng.random() < CALLING else guess),
            (asked + "<call>", call.removeprefix("<call>")),
            (answered, str(a * b)),
        ]
    return pairs


def report(when: str, metrics: dict[str, float]) -> None:
    calls, accuracy = metrics["eval_tools/call_frequency"], metrics["eval_rewards/right/mean"]
    print(f"{when}: {calls:.0%} of the conversations call the calculator, {accuracy:.0%} of the answers are right")


def main(seed: int = 0) -> None:
    torch.set_num_threads(1)  # a model this small gains nothing from more
    tokenizer = calling_tokenizer()
    model = tiny_model(tokenizer, hidden_size=64, num_heads=2, seed=seed)
    pairs = demonstrations(tokenizer, 4000, seed)
    warm_up(model, tokenizer, pairs, steps=WARM_UP_STEPS, batch_size=32, seed=seed)
    trainer = GRPOPlusTrainer(
        model=model,
        reward_funcs=right,
        tools=[calculator],
        train_dataset=problems(2000, seed),
        eval_dataset=problems(32, seed=seed + 1000),
        processing_class=tokenizer,
        args=GRPOPlusConfig(
            "tools",
            seed=seed,
            max_steps=MAX_STEPS,
            num_generations=8,
            per_device_train_batch_size=64,
            per_device_eval_batch_size=256,
            max_completion_length=40,  # of both turns and the result
            learning_rate=1e-3,
            scale_rewards="none",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
        ),
    )
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    report("before", before)
    report("after", after)


if __name__ == "__main__":
    main()
