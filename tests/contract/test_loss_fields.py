"""Every field that TRL's loss reads is read by the path of our losses too, or refused at construction."""

import ast
import inspect
import textwrap
from dataclasses import fields

import pytest
from trl import GRPOConfig, GRPOTrainer

from grpo_plus import GRPOPlusConfig
from grpo_plus.config.losses import TRL_ONLY

# `use_vllm` and the correction decide whether the inputs hold the sampler's ratio, which our losses are multiplied by.
READ_BY_OURS = {
    "loss_type",
    "beta",
    "use_bias_correction_kl",
    "steps_per_generation",
    "max_completion_length",
    "use_vllm",
    "vllm_importance_sampling_correction",
}
# By the trainer, which knows the model: tests/test_mixture_of_experts.py.
REFUSED_BY_THE_TRAINER = {"router_aux_loss_coef"}
# The trainer's names for what the configuration calls otherwise.
ALIASES = {"epsilon_low": "epsilon"}


def read_by_trls_loss() -> set[str]:
    source = textwrap.dedent(inspect.getsource(inspect.unwrap(GRPOTrainer._compute_loss)))
    names = {
        node.attr
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("self", "self.args")
    }
    return {ALIASES.get(name, name) for name in names} & {entry.name for entry in fields(GRPOConfig)}


def test_no_field_that_trls_loss_reads_is_lost():
    read = read_by_trls_loss()
    assert {"beta", "delta", "epsilon", "entropy_target", "router_aux_loss_coef"} <= read
    assert read - READ_BY_OURS - REFUSED_BY_THE_TRAINER - set(TRL_ONLY) == set()


@pytest.mark.parametrize("name", TRL_ONLY)
def test_a_loss_of_ours_refuses_what_only_trls_read(name):
    default = next(entry.default for entry in fields(GRPOConfig) if entry.name == name)
    others = {"importance_sampling_level": "sequence", "use_adaptive_entropy": True}
    value = others[name] if name in others else (default or 0.25) / 2
    with pytest.raises(ValueError, match=f"loss_type='gmpo': {name}=.* is read by TRL's losses only"):
        GRPOPlusConfig("unused", use_cpu=True, bf16=False, loss_type="gmpo", **{name: value})
