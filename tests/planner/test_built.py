"""Shapes that are read off transformers' own models: every count against the model, what layers remember against a run."""

import copy
import json
import re
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import CONFIG_MAPPING, BitsAndBytesConfig, PreTrainedModel
from transformers.integrations.bitsandbytes import replace_with_bnb_linear
from transformers.quantizers.base import HfQuantizer

from grpo_plus.models.caches import CACHE
from grpo_plus.planner import Run, plan, shape_of
from grpo_plus.planner.built import TESTED, built_shape
from grpo_plus.planner.shapes import ModelShape
from tests.planner.configs import ARCHITECTURES, BUILT, TEXT, TINY
from tests.planner.test_shapes import config_of

LENGTH = 24
CASES = [pytest.param(number, id=f"{model_type}-{number}") for number, (model_type, _) in enumerate(BUILT)]


def config_at(number: int) -> Any:
    model_type, extra = BUILT[number]
    values = extra if "text_config" in extra else TEXT | extra
    return CONFIG_MAPPING[model_type].from_dict(values)


def model_of(config: Any, device: str) -> PreTrainedModel:
    from transformers.models.auto import modeling_auto as auto

    order = [auto.MODEL_FOR_CAUSAL_LM_MAPPING, auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING]
    if config.get_text_config() is not config:
        order.reverse()
    kind = next(mapping[type(config)] for mapping in order if type(config) in mapping)
    torch.manual_seed(0)
    with torch.device(device):
        return kind._from_config(config)


@pytest.fixture(scope="module", params=CASES)
def case(request) -> tuple[ModelShape, PreTrainedModel, Any]:
    config = config_at(request.param)
    return shape_of(json.loads(config.to_json_string(use_diff=False))), model_of(config, "meta"), config


def test_every_architecture_that_is_called_tested_is_tested():
    assert {config_at(number).get_text_config().model_type for number in range(len(BUILT))} >= TESTED


def test_the_counts_are_those_of_the_model(case):
    shape, model, _ = case
    assert shape.parameters == sum(weight.numel() for weight in model.parameters())
    head = model.get_output_embeddings()
    assert shape.head == (0 if head.weight is model.get_input_embeddings().weight else head.weight.numel())
    assert [note for note in shape.notes if "not tested" in note] == []


def test_what_4_bits_quantize_is_what_bitsandbytes_replaces(case):
    shape, model, _ = case
    kept = HfQuantizer.get_modules_to_not_convert(model, None, getattr(model, "_keep_in_fp32_modules", None))
    linears = {name: module.weight.numel() for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    replaced = replace_with_bnb_linear(copy.deepcopy(model), kept, BitsAndBytesConfig(load_in_4bit=True))
    names = {name for name, module in replaced.named_modules() if type(module).__name__ == "Linear4bit"}
    assert shape.linear == sum(linears[name] for name in names)


def test_lora_counts_are_those_of_peft(case):
    shape, model, _ = case
    adapted = get_peft_model(copy.deepcopy(model), LoraConfig(r=3, target_modules="all-linear"), low_cpu_mem_usage=True)
    assert shape.lora(3) == sum(weight.numel() for weight in adapted.parameters() if weight.requires_grad)


def test_what_the_layers_remember_is_what_transformers_caches(case):
    shape, _, config = case
    model = model_of(config, "cpu").eval()
    with torch.no_grad():
        cache = model(input_ids=torch.randint(5, 90, (1, LENGTH)), use_cache=True)[CACHE]
    for layer, cached in zip(shape.layers, cache.layers, strict=False):
        kept = LENGTH if layer.window is None else min(LENGTH, layer.window - 1)
        tensors = [value for value in vars(cached).values() if isinstance(value, torch.Tensor)]
        for value in vars(cached).values():
            tensors += list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []
        held = sum(value.numel() for value in tensors if isinstance(value, torch.Tensor) and value.numel() > 1)
        assert held == layer.cached_per_token * kept + layer.state, type(cached).__name__


@pytest.mark.parametrize(("model_type", "extra"), ARCHITECTURES)
def test_a_row_and_the_model_give_the_same_shape(model_type, extra):
    """What a layer computes is read off names of modules; the rows of FAMILIES say it by hand."""
    config = json.loads(config_of(model_type, extra).to_json_string())
    row, built = shape_of(config), built_shape(config, "config")
    assert (built.parameters, built.linear, built.experts, built.lora(3)) == (
        row.parameters,
        row.linear,
        row.experts,
        row.lora(3),
    )
    assert (built.eager, built.float_norms, built.tied, built.heads) == (
        row.eager,
        row.float_norms,
        row.tied,
        row.heads,
    )
    for mine, theirs in zip(built.layers, row.layers, strict=True):
        linear_attention = theirs.query == 0  # whose gate and small projections the row leaves out
        names = ("query", "keys", "cached_per_token", "window", "feed_forward", "routed", "experts", "small", "state")
        assert [getattr(mine, name) for name in names] == [getattr(theirs, name) for name in names]
        assert linear_attention or sorted(mine.norms) == sorted(theirs.norms)


def test_an_architecture_that_nobody_tested_is_planned_with_a_line_that_says_so():
    shape = shape_of({**TINY, "model_type": "cohere2", "sliding_window": 16})
    assert re.search(r"not tested on model_type='cohere2'.*transformers' Cohere2ForCausalLM", shape.notes[0])
    assert plan(shape, Run(lora_r=4)).peak > 0


def test_a_class_that_cannot_be_read_is_an_error_that_names_it(monkeypatch):
    monkeypatch.setattr("grpo_plus.planner.built._kinds", lambda *_: {}["anything"])
    with pytest.raises(
        ValueError, match=r"cannot read the shape of 'x' off transformers' Cohere2ForCausalLM \(KeyError"
    ):
        shape_of({**TINY, "model_type": "cohere2", "sliding_window": 16}, name="x")


def test_sizes_that_a_config_leaves_out_are_those_of_its_class():
    """Gemma 3's text_config, for one, names neither its vocabulary nor its heads."""
    shape = shape_of({"model_type": "qwen3", "num_hidden_layers": 2})
    config = CONFIG_MAPPING["qwen3"](num_hidden_layers=2)
    assert shape.parameters == sum(weight.numel() for weight in model_of(config, "meta").parameters())
    assert (shape.hidden, shape.vocab) == (config.hidden_size, config.vocab_size)
    assert shape.notes == ()


def test_towers_are_named_and_planned_as_weights():
    config = config_at(next(number for number, (model_type, _) in enumerate(BUILT) if model_type == "gemma3"))
    shape, model = shape_of(config.to_dict()), model_of(config, "meta")
    tower = sum(weight.numel() for name, weight in model.named_parameters() if "vision_tower" in name)
    assert shape.notes == (
        f"The model's part 'vision_tower' has {tower / 1e6:,.0f} M parameters, which are planned as weights. What images "
        "and sound take beside them is not planned.",
    )
    assert sum(linear.weights for linear in shape.outside) > 0


def test_every_built_shape_is_planned_in_every_precision(case):
    shape, *_ = case
    for settings in ({}, {"lora_r": 8}, {"lora_r": 8, "load_in_4bit": True}, {"lora_r": 8, "load_in_8bit": True}):
        planned = plan(shape, Run(**settings, beta=0.1))
        assert 0 < planned.phases["load"]["weights"] <= shape.parameters * 4
    assert plan(shape, Run(lora_r=8)).phases["load"]["adapters"] == 4 * shape.lora(8)
