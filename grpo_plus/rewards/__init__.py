"""Reward functions for text, in TRL's calling convention: (completions, **columns) -> one number or None each.

    GRPOPlusTrainer(reward_funcs=[last_number, think_answer_format], ...)
    grpo-plus train --reward_funcs last_number think_answer_format ...

They are pure functions. Each takes conversations and plain text. None says that a completion is not judged, because its
row has no solution to compare with. Hyper-parameters are keywords: `functools.partial(last_number, tolerance=0.01)`, or
`--reward_kwargs '{"last_number": {"tolerance": 0.01}}'`.

What `trl.rewards` has is not here: mathematics in LaTeX (`accuracy_reward`), the `<think>` tag alone
(`think_format_reward`), repeated n-grams (`get_repetition_penalty_reward`), a soft limit of the length
(`get_soft_overlong_punishment`). All of these go by name on the command line too.

To add a function, write it in the file of its kind with `**_` behind its parameters, and name it below.
"""

from grpo_plus.rewards.answers import boxed_answer, last_number, tagged_answer
from grpo_plus.rewards.form import target_length, think_answer_format, think_answer_tags
from grpo_plus.rewards.scripts import script_share

__all__ = [
    "boxed_answer",
    "last_number",
    "script_share",
    "tagged_answer",
    "target_length",
    "think_answer_format",
    "think_answer_tags",
]
