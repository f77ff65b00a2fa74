"""The flags of `grpo-plus train` and `compare` that neither TRL nor the configuration has."""

from dataclasses import dataclass, field
from typing import Any


@dataclass
class OwnArguments:
    """Flags of ours beside those of the configuration."""

    qlora: bool = field(
        default=False,
        metadata={
            "help": "QLoRA: a base in nf4 with double quantization, bf16 computation, LoRA without dropout on all "
            "linear layers, 8-bit Adam. Other values of the same flags win."
        },
    )
    prompt_column: str | None = field(
        default=None,
        metadata={
            "help": "Column with the prompt, such as question: text, or the messages of a conversation. Text becomes a "
            "message of the user where the model has a chat template. Unset: the column prompt, as it is."
        },
    )
    answer_column: str | None = field(
        default=None,
        metadata={
            "help": "Column with the right answer, such as answer. Reward functions read it as solution, and under its "
            "own name."
        },
    )
    prompt_template: str | None = field(
        default=None,
        metadata={
            "help": "Text of the prompt, with columns in braces: '{question} Put the answer into \\boxed{}.' Empty "
            "braces, and those around numbers, are text."
        },
    )
    system_prompt: str | None = field(
        default=None,
        metadata={"help": "System message before the prompt, for a model with a chat template."},
    )
    eval_reward_funcs: list[str] | None = field(
        default=None,
        metadata={"help": "Reward functions of the evaluations, in place of reward_funcs: names or dotted paths."},
    )
    reward_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Keywords of reward functions, by name, as JSON: "
            '\'{"get_soft_overlong_punishment": {"max_completion_len": 512, "soft_punish_cache": 128}}\'. '
            "`grpo-plus ls rewards` lists the names."
        },
    )
