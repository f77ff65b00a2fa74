"""Kernel launches per decoder layer, which a GPU's host has to issue: bars, counted on a CPU."""

from contextlib import nullcontext
from functools import partial

import pytest
import torch
from peft import LoraConfig, get_peft_model

from grpo_plus.packing.layout import group_rows
from grpo_plus.packing.packer import Choice, Packer
from grpo_plus.packing.padded import Layout, PaddedRows
from grpo_plus.packing.passes import CACHED
from grpo_plus.packing.rows import CASCADE, PADDING_FREE_FLASH, SEGMENTS
from grpo_plus.qlora.lora_layers import fused_lora
from tests.launches import launches_per_layer
from tests.packing.counting import CopiesFromHost, launches
from tests.packing.models import VOCABULARY, tiny

PROMPT, COMPLETION, GENERATIONS = 16, 8, 8


def rows(groups: int, shared: int = 0):
    """Prompts with completions of 1 to 8 tokens, the first of which may be the same."""
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(3, VOCABULARY, (groups, PROMPT), generator=generator).repeat_interleave(GENERATIONS, 0)
    lengths = torch.arange(1, GENERATIONS + 1).repeat(groups)
    mask = torch.cat([torch.ones_like(prompts), (torch.arange(COMPLETION) < lengths.unsqueeze(1)).long()], dim=1)
    completions = torch.randint(3, VOCABULARY, (len(prompts), COMPLETION), generator=generator)
    completions[:, :shared] = completions[0, :shared]
    ids = torch.cat([prompts, completions], dim=1)
    return ids * mask, mask


def forward(model, form, groups, shared):
    ids, mask = rows(groups, shared)
    if form is None:
        labels = ids.masked_fill(mask == 0, -100)
        labels[:, :-COMPLETION] = -100
        return model(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True).log_probs
    cuda = torch.device("cuda")  # whose costs the layout minds; nothing is copied there
    ready = form.lay_out(form.arrange(group_rows(ids, mask, COMPLETION)), cuda)
    return model(packed=partial(form.run, ready.call, None))[0]


def per_layer(monkeypatch, form, groups, *, lora, shared=0):
    def count(layers):
        model = tiny("qwen3", num_hidden_layers=layers).to(torch.bfloat16)
        if lora:
            model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))

        def step():
            forward(model, form, groups, shared).sum().backward()

        with fused_lora(model) if lora else nullcontext() as products, torch.autocast("cpu", torch.bfloat16):
            for _ in range(2):  # then gradients are there, and siblings known
                with products.held() if lora else nullcontext(), launches(monkeypatch):
                    step()
            with products.held() if lora else nullcontext(), launches(monkeypatch) as counted:
                step()
        return counted.counts.total()

    return launches_per_layer(count, layers=(1, 3))


@pytest.mark.parametrize("groups", [1, 8])
@pytest.mark.parametrize(("form", "most"), [(CASCADE, 203), (PADDING_FREE_FLASH, 190), (CACHED, 398)], ids=str)
def test_a_layer_with_adapters_launches_few_kernels(monkeypatch, form, groups, most):
    assert per_layer(monkeypatch, form, groups, lora=True) <= most


@pytest.mark.parametrize("form", [CASCADE, PADDING_FREE_FLASH], ids=str)
def test_a_layer_without_adapters_launches_about_what_trls_does(monkeypatch, form):
    stock = per_layer(monkeypatch, None, 1, lora=False)
    assert per_layer(monkeypatch, form, 8, lora=False) <= stock + 15


def test_a_prefix_tree_costs_a_layer_few_launches(monkeypatch):
    plain, tree = (per_layer(monkeypatch, CASCADE, 1, lora=False, shared=shared) for shared in (0, 6))
    assert plain < tree <= plain + 6


def plain_head(model, hidden, targets):
    logps = model.lm_head(hidden).log_softmax(-1).gather(1, targets.unsqueeze(1)).squeeze(1)
    return logps, -logps.detach()


@pytest.mark.parametrize("form", [CASCADE, SEGMENTS, CACHED, PADDING_FREE_FLASH], ids=str)
def test_a_micro_batch_is_copied_to_the_device_once_and_never_read_there(monkeypatch, form):
    """The model is on no device, where whoever reads a value ends in an error."""
    model = tiny("qwen3").to("meta")
    ids, mask = rows(groups=2)
    chosen = Packer("auto")
    chosen._choices[model] = Choice(form, plain_head)
    layout = Layout(group_rows(ids, mask, COMPLETION))
    padded = PaddedRows(ids.to("meta"), mask.to("meta"), COMPLETION, layout=layout)
    for copies in (1, 0):  # a second iteration finds the rows where they are
        with launches(monkeypatch), CopiesFromHost() as counted:
            chosen.logps(model, model, padded, None).logps.sum().backward()
        assert counted.non_blocking == [True] * copies
