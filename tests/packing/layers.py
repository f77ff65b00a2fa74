"""Kernel launches of a decoder layer in each form of rows, as a GPU's host would issue them, counted on a CPU."""

from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from grpo_plus.packing.forward import Form
from grpo_plus.packing.layout import group_rows
from grpo_plus.qlora.lora_layers import fused_lora
from tests.launches import launches_per_layer
from tests.packing.counting import launches
from tests.packing.models import VOCABULARY, tiny

PROMPT, COMPLETION, GENERATIONS = 16, 8, 8


def rows(groups: int, shared: int = 0) -> tuple[Tensor, Tensor]:
    """Prompts with completions of 1 to 8 tokens, the first of which may be the same."""
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(3, VOCABULARY, (groups, PROMPT), generator=generator).repeat_interleave(GENERATIONS, 0)
    lengths = torch.arange(1, GENERATIONS + 1).repeat(groups)
    mask = torch.cat([torch.ones_like(prompts), (torch.arange(COMPLETION) < lengths.unsqueeze(1)).long()], dim=1)
    completions = torch.randint(3, VOCABULARY, (len(prompts), COMPLETION), generator=generator)
    completions[:, :shared] = completions[0, :shared]
    ids = torch.cat([prompts, completions], dim=1)
    return ids * mask, mask


def launches_of_a_layer(form: Form | None, groups: int, *, lora: bool, shared: int = 0) -> float:
    """Launches of forward and backward, per layer.

    Args:
        form: None is TRL's padded forward.
        shared: tokens that all completions begin with.
    """

    def count(layers: int) -> int:
        model: Any = tiny("qwen3", num_hidden_layers=layers).to(torch.bfloat16)
        if lora:
            model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))

        def step() -> None:
            _forward(model, form, groups, shared).sum().backward()

        with fused_lora(model) if lora else nullcontext() as products, torch.autocast("cpu", torch.bfloat16):
            for _ in range(2):  # then gradients are there, and siblings known
                with products.held() if lora else nullcontext(), launches():
                    step()
            with products.held() if lora else nullcontext(), launches() as counted:
                step()
        return counted.counts.total()

    return launches_per_layer(count, layers=(1, 3))


def _forward(model: Any, form: Form | None, groups: int, shared: int) -> Tensor:
    ids, mask = rows(groups, shared)
    if form is None:
        labels = ids.masked_fill(mask == 0, -100)
        labels[:, :-COMPLETION] = -100
        return model(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True).log_probs
    cuda = torch.device("cuda")  # whose costs the layout minds; nothing is copied there
    ready = form.lay_out(form.arrange(group_rows(ids, mask, COMPLETION)), cuda)
    return model(packed=partial(form.run, ready.call, None))[0]
