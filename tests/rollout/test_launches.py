"""Kernel launches of a decoder layer in one decoding step, which a GPU's host has to issue for every token."""

from contextlib import nullcontext

import pytest
import torch
from peft import LoraConfig, get_peft_model

from grpo_plus.models.caches import CACHE
from grpo_plus.qlora.lora_layers import fused_lora
from grpo_plus.rollout.cache import Expanded
from grpo_plus.rollout.loop import decode
from grpo_plus.rollout.prefix import SharedPrompts
from grpo_plus.rollout.prompts import Prompts
from tests.launches import Launches, launches_per_layer
from tests.packing.models import tiny

BF16 = torch.bfloat16
STEPS = 3  # of which the last is counted: before it, autocast casts weights once


def counting(kind, counted):
    """The keeper, which counts the launches of its last step."""

    class Counting(kind):
        def forward(self, **inputs):
            with Launches() as launches:
                outputs = super().forward(**inputs)
            counted.append(launches.counts.total())
            return outputs

    return Counting


def of_a_step(layers, kind, *, lora, padded):
    """Launches of the last step of a rollout of two prompts with two rows each."""
    model = tiny("qwen3", num_hidden_layers=layers).to(BF16)
    wrapped = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear")) if lora else model
    counted = []

    def loop(model, input_ids, **kwargs):
        prompts = Prompts.of(input_ids, kwargs.get("attention_mask"))
        keeper = counting(kind, counted)(model, kwargs[CACHE])
        return decode(model, input_ids, prompts=prompts, keeper=keeper, **kwargs)[0]

    ids = torch.arange(5, 29).view(2, 12).repeat_interleave(2, 0)
    mask = torch.ones_like(ids)
    mask[:2, : 4 * padded] = 0
    length = {"max_new_tokens": STEPS + 1, "min_new_tokens": STEPS + 1, "do_sample": False}
    fuses = lora == "ours"
    with fused_lora(wrapped) if fuses else nullcontext() as products, torch.autocast("cpu", BF16):
        for _ in range(1 + fuses):  # layers know after one hold which of them share an input
            with products.held() if fuses else nullcontext():
                wrapped.generate(input_ids=ids, attention_mask=mask, custom_generate=loop, **length)
    return counted[-1]


# Attention is one launch. A mask for padded prompts makes it four, since sdpa wants the mask in another layout. Shared
# prompts make it ten, padded or not. Adapters take eleven with our layers, and forty-two with PEFT's.
@pytest.mark.parametrize(
    ("kind", "lora", "padded", "launches"),
    [
        (Expanded, None, False, 56),
        (Expanded, None, True, 59),
        (SharedPrompts, None, True, 65),
        (Expanded, "peft", False, 98),
        (SharedPrompts, "peft", False, 107),
        (Expanded, "ours", False, 67),
        (SharedPrompts, "ours", False, 76),
    ],
)
def test_launches_of_a_layer(kind, lora, padded, launches):
    found = launches_per_layer(lambda layers: of_a_step(layers, kind, lora=lora, padded=padded), (1, 2))
    assert found <= launches
