"""`grpo-plus train --help`: our flags first, then TRL's by what they are about, then transformers'."""

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import fields

from transformers import TrainingArguments
from trl import GRPOConfig

USAGE = "%(prog)s [--config run.yaml] [--FLAG VALUE ...]"
ABOUT = (
    "Train a model with GRPO. A --config file holds flags by name, one per line; the command line goes before "
    "it. `grpo-plus ls` lists the names that can be chosen."
)
# Our flags by what somebody wants to change.
OURS = {
    "advantages": (
        "advantage_estimator",
        "advantage_kwargs",
        "advantage_modifiers",
        "max_refills",
        "refill_buffer",
        "prompt_sampler",
        "task_column",
        "reward_weight_schedule",
    ),
    "losses": (
        "loss_kwargs",
        "loss_reduction",
        "kl_estimator",
        "kl_target",
        "kl_horizon",
        "truncated_sampling",
        "demonstration_column",
        "demonstration_loss",
    ),
    "evaluation": ("eval_reward_funcs", "eval_pass_at_k", "eval_pass_reward", "eval_pass_threshold"),
    "memory": (
        "qlora",
        "adapter_dtype",
        "max_tokens_per_pass",
        "mlp_tile_tokens",
        "generation_chunk_size",
        "offload_activations",
    ),
    "speed": (
        "packing",
        "generation_loop",
        "skip_zero_advantage",
        "skip_old_policy_pass",
        "vllm_lora_sync",
        "logprob_backend",
        "lora_backend",
        "overlap_rewards",
    ),
    "safety": ("health_warnings", "max_nonfinite_steps", "reward_timeout", "deterministic"),
}


def help_of(parser: argparse.ArgumentParser, inputs: Sequence[type]) -> str:
    """The help of TRL's parser, in groups.

    Args:
        inputs: the dataclasses of model, data and rewards, ours among them.
    """
    trls, transformers = _names(GRPOConfig), _names(TrainingArguments)
    groups = {
        **{f"grpo_plus: {title}": _both_ways(names) for title, names in OURS.items()},
        "model, data and rewards": set().union(*map(_names, inputs)),
        "GRPO (TRL)": trls - transformers,
        "training (transformers)": transformers,
    }
    shown = argparse.ArgumentParser(
        prog=parser.prog, usage=USAGE, description=ABOUT, add_help=False, formatter_class=parser.formatter_class
    )
    left = [action for action in parser._actions if action.dest != "help"]
    for title, names in groups.items():
        group = shown.add_argument_group(title)
        for action in left:
            if action.dest in names:
                group._add_action(action)
        left = [action for action in left if action.dest not in names]
    for action in left:
        shown._add_action(action)
    return shown.format_help()


def _names(kind: type) -> set[str]:
    return _both_ways(entry.name for entry in fields(kind))


def _both_ways(names: Iterable[str]) -> set[str]:
    """The names of fields, with those of the flags that switch one off."""
    return {way for name in names for way in (name, f"no_{name}")}
