import json
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PretrainedConfig, PreTrainedModel

from grpo_plus.planner import load_shape, read_config, shape_of
from grpo_plus.planner.families import FAMILIES
from tests.planner.configs import ARCHITECTURES, LLAMA_3_1_8B, QWEN3_1_7B, QWEN3_4B, QWEN3_8B, TINY

CASES = [pytest.param(model_type, extra, id="-".join([model_type, *extra])[:60]) for model_type, extra in ARCHITECTURES]


def config_of(model_type: str, extra: dict[str, Any], **more: Any) -> PretrainedConfig:
    values = TINY | extra | more
    if model_type in ("qwen2", "phi3"):  # whose head_dim is always hidden_size / heads
        del values["head_dim"]
    return AutoConfig.for_model(model_type, **values)


def model_of(config: PretrainedConfig) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def test_every_architecture_is_tested():
    assert {model_type for model_type, _ in ARCHITECTURES} == set(FAMILIES)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("model_type", "extra"), CASES)
def test_the_counts_are_those_of_the_model_that_transformers_builds(tmp_path, model_type, extra, tied):
    config = config_of(model_type, extra, tie_word_embeddings=tied)
    config.save_pretrained(tmp_path)
    shape, model = load_shape(tmp_path), model_of(config)
    head = model.get_output_embeddings()
    linears = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head]
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    assert shape.linear == sum(m.weight.numel() for m in linears)
    assert shape.experts == sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)
    assert shape.head == (0 if tied else head.weight.numel())


@pytest.mark.parametrize(("model_type", "extra"), CASES)
def test_lora_counts_are_those_of_peft(model_type, extra):
    config = config_of(model_type, extra)
    adapted = get_peft_model(model_of(config), LoraConfig(r=4, target_modules="all-linear"))
    trainable = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert shape_of(config.to_dict()).lora(4) == trainable


@pytest.mark.parametrize(("model_type", "extra"), CASES)
def test_windows_are_those_of_the_cache(model_type, extra):
    config = config_of(model_type, extra)
    layers = shape_of(json.loads(config.to_json_string())).layers
    for layer, cached in zip(layers, DynamicCache(config=config).layers, strict=True):
        assert layer.window == getattr(cached, "sliding_window", None)


@pytest.mark.parametrize(("model_type", "extra"), CASES)
def test_an_older_config_without_layer_types_describes_the_same_layers(model_type, extra):
    config = json.loads(config_of(model_type, extra).to_json_string())
    older = {name: value for name, value in config.items() if name != "layer_types"}
    assert shape_of(older).layers == shape_of(config).layers


@pytest.mark.parametrize(
    ("config", "parameters", "published"),
    [
        # Arithmetic for Qwen3-4B: per layer 2560 * (4096 + 2 * 1024) + 4096 * 2560 + 3 * 2560 * 9728 = 100 925 440 in linear
        # layers and 2 * 2560 + 2 * 128 = 5 376 in norms; 36 of them, the embedding 151 936 * 2560, the last norm 2560.
        (QWEN3_4B, 36 * (100_925_440 + 5_376) + 151_936 * 2560 + 2560, 4.0e9),
        (QWEN3_1_7B, 1_720_574_976, 1.7e9),
        (QWEN3_8B, 8_190_735_360, 8.2e9),
        (LLAMA_3_1_8B, 8_030_261_248, 8.0e9),
    ],
    ids=["Qwen3-4B", "Qwen3-1.7B", "Qwen3-8B", "Llama-3.1-8B"],
)
def test_published_models_have_their_published_size(config, parameters, published):
    shape = shape_of(config)
    assert shape.parameters == parameters
    assert abs(shape.parameters - published) < 0.05e9
    assert shape.parameters == sum(p.numel() for p in model_of(AutoConfig.for_model(**config)).parameters())


def test_a_file_is_read_as_its_folder_is(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_4B))
    assert load_shape(tmp_path / "config.json").layers == load_shape(tmp_path).layers


def test_a_name_is_fetched_from_the_hub(tmp_path, monkeypatch):
    path, asked = tmp_path / "config.json", []
    path.write_text(json.dumps(QWEN3_4B))

    def download(repo: str, filename: str, *, revision: str | None, local_files_only: bool = False) -> str:
        from huggingface_hub.errors import LocalEntryNotFoundError

        asked.append((repo, filename, revision, local_files_only))
        if local_files_only:
            raise LocalEntryNotFoundError("not cached")
        return str(path)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert read_config("Qwen/Qwen3-4B", revision="v1") == QWEN3_4B
    name = ("Qwen/Qwen3-4B", "config.json", "v1")
    assert asked == [(*name, True), (*name, False)]


def test_an_unreachable_hub_is_a_clear_error(monkeypatch):
    def download(repo: str, filename: str, **_: Any) -> str:
        from huggingface_hub.errors import LocalEntryNotFoundError

        raise LocalEntryNotFoundError("no network")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    with pytest.raises(ValueError, match=r"'nobody/nothing' is no local folder.*no network.*name a folder"):
        load_shape("nobody/nothing")


def test_a_path_that_cannot_be_a_hub_name_is_a_clear_error(tmp_path):
    with pytest.raises(ValueError, match="is neither a local folder nor a name on the hub"):
        load_shape(tmp_path / "not" / "there")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "has no config.json"),
        ("{", "is not JSON"),
        ("[1]", "holds list, not a JSON object"),
        ("{}", "has no model_type"),
        (
            '{"model_type": "qwen4"}',
            r"model_type='qwen4', an architecture that neither the planner nor.*Did you mean 'qwen3'",
        ),
        ('{"model_type": "gemma3", "text_config": {"num_hidden_layers": 0}}', "cannot build from this config"),
        ('{"model_type": "cohere", "hidden_size": "wide"}', "model_type='cohere', which transformers .* cannot build"),
        ('{"model_type": "vit"}', "no class of transformers generates text from a ViTConfig"),
        (json.dumps(QWEN3_4B | {"num_hidden_layers": -36}), "num_hidden_layers is -36, not a positive whole number"),
        (json.dumps(QWEN3_4B | {"vocab_size": "many"}), "vocab_size is 'many'"),
        (json.dumps(QWEN3_4B | {"layer_types": ["full_attention"]}), "does not name 36 layers"),
        (json.dumps(QWEN3_4B | {"layer_types": ["strange"] * 36}), "each one of full_attention"),
    ],
)
def test_an_unusable_config_says_what_is_wrong_with_it(tmp_path, content, message):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        load_shape(tmp_path)
