"""A batch of prompts, and the same generation by transformers' own loop and by the grouped loop."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from grpo_plus.rollout import Rollouts, Statistics

EOS = [2, 3, 50, 60]
PROMPT, NEW, GROUPS, ROWS = 23, 12, 3, 4
SAMPLED = {"do_sample": True, "temperature": 1.3, "top_k": 0, "top_p": 0.95, "repetition_penalty": 1.05}
GREEDY = {"do_sample": False}


@dataclass(frozen=True)
class Generated:
    """What a loop gave, and the state in which it left the generator."""

    ids: Tensor
    state: Tensor
    statistics: list[Statistics]


def batch(*, padded: bool, groups: int = GROUPS, rows: int = ROWS, length: int = PROMPT) -> dict[str, Tensor]:
    """Ids and mask (groups * rows, length): each prompt for `rows` rows."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.zeros(groups, length, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for number in range(groups):
        tokens = length - 5 * number * padded
        ids[number, -tokens:] = torch.randint(5, 97, (tokens,), generator=generator)
        mask[number, -tokens:] = 1
    return {"input_ids": ids.repeat_interleave(rows, 0), "attention_mask": mask.repeat_interleave(rows, 0)}


def config(**settings: Any) -> GenerationConfig:
    """TRL's kind of configuration."""
    known = {"max_new_tokens": NEW, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": EOS}
    return GenerationConfig(disable_compile=True, **(known | settings))


def generated(model: Any, inputs: dict[str, Tensor], rollouts: Rollouts | None = None, **arguments: Any) -> Generated:
    """By the grouped loop, or by transformers' own without `rollouts`."""
    torch.manual_seed(1)
    if rollouts is None:
        ids = model.generate(**inputs, **arguments)
        return Generated(ids, torch.get_rng_state(), [])
    with rollouts.decoding(model):
        ids = model.generate(**inputs, **arguments)
    return Generated(ids, torch.get_rng_state(), list(rollouts.statistics))


def assert_equal(found: Generated, expected: Generated) -> None:
    """The same tokens and the same state."""
    assert found.ids.tolist() == expected.ids.tolist()
    assert torch.equal(found.state, expected.state)
