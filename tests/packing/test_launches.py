"""Kernel launches per decoder layer, which a GPU's host has to issue: bars, counted on a CPU."""

import pytest

from grpo_plus.packing.choice import Choice
from grpo_plus.packing.layout import group_rows
from grpo_plus.packing.packer import Packer
from grpo_plus.packing.padded import Layout, PaddedRows
from grpo_plus.packing.passes import CACHED
from grpo_plus.packing.rows import CASCADE, PADDING_FREE_FLASH, SEGMENTS
from tests.packing.counting import CopiesFromHost, launches
from tests.packing.layers import COMPLETION, launches_of_a_layer, rows
from tests.packing.models import tiny


@pytest.mark.parametrize("form", [CASCADE, PADDING_FREE_FLASH], ids=str)
def test_a_layer_without_adapters_launches_about_what_trls_does(form):
    stock = launches_of_a_layer(None, 1, lora=False)
    assert launches_of_a_layer(form, 8, lora=False) <= stock + 15


def test_a_prefix_tree_costs_a_layer_few_launches():
    plain, tree = (launches_of_a_layer(CASCADE, 1, lora=False, shared=shared) for shared in (0, 6))
    assert plain < tree <= plain + 6


def plain_head(model, hidden, targets):
    logps = model.lm_head(hidden).log_softmax(-1).gather(1, targets.unsqueeze(1)).squeeze(1)
    return logps, -logps.detach()


@pytest.mark.parametrize("form", [CASCADE, SEGMENTS, CACHED, PADDING_FREE_FLASH], ids=str)
def test_a_micro_batch_is_copied_to_the_device_once_and_never_read_there(form):
    """The model is on no device, where whoever reads a value ends in an error."""
    model = tiny("qwen3").to("meta")
    ids, mask = rows(groups=2)
    chosen = Packer("auto")
    chosen._choices[model] = Choice(form, plain_head)
    layout = Layout(group_rows(ids, mask, COMPLETION))
    padded = PaddedRows(ids.to("meta"), mask.to("meta"), COMPLETION, layout=layout)
    for copies in (1, 0):  # a second iteration finds the rows where they are
        with launches(), CopiesFromHost() as counted:
            chosen.logps(model, model, padded, None).logps.sum().backward()
        assert counted.non_blocking == [True] * copies
