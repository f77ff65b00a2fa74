"""What PEFT wraps is exported under the names and with the values of a model without adapters, buffers included."""

from typing import Any

import pytest
import torch
import transformers
from peft import get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from grpo_plus.qlora import save_merged
from grpo_plus.qlora.export import token_logps
from grpo_plus.qlora.precision import keep_gradients_on_the_cpu
from grpo_plus.qlora.unwrapped import dequantized, plain_tensors
from tests.qlora.models import NF4, lora

SHAPE: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ROUTED = SHAPE | {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
}
LATENT = {"q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16}
GPT_OSS = SHAPE | {"num_local_experts": 4, "num_experts_per_tok": 2, "rope_parameters": None}
TIED = SHAPE | {"tie_word_embeddings": True}
# name -> configuration, its settings, the adapters' settings
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "a router's biases": ("Glm4MoeConfig", ROUTED, {}),
    "a router's biases and latent attention": (
        "DeepseekV3Config",
        ROUTED | LATENT | {"num_key_value_heads": 4, "head_dim": None},
        {},
    ),
    "experts by all-linear": ("MixtralConfig", SHAPE | {"num_local_experts": 4, "num_experts_per_tok": 2}, {}),
    "two parameters of the experts": (
        "GptOssConfig",
        GPT_OSS,
        {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
    ),
    "one parameter of the experts": ("GptOssConfig", GPT_OSS, {"target_parameters": ["mlp.experts.down_proj"]}),
    "tokens": ("LlamaConfig", SHAPE, {"trainable_token_indices": [3, 5, 7]}),
    "tokens of tied embeddings": ("LlamaConfig", TIED, {"trainable_token_indices": [3, 5, 7]}),
    "one end of tied embeddings": ("LlamaConfig", TIED, {"target_modules": ["q_proj", "embed_tokens"]}),
    "a saved head of tied embeddings": ("LlamaConfig", TIED, {"modules_to_save": ["lm_head"]}),
    "replicated layers": ("LlamaConfig", SHAPE, {"layer_replication": [[0, 2], [1, 2]]}),
    "convolutions": ("Lfm2Config", SHAPE | {"layer_types": ["conv", "full_attention"]}, {}),
}
IDS = torch.randint(4, 90, (2, 12), generator=torch.Generator().manual_seed(1))


def trained(folder, name: str, quantization: Any = NF4) -> Any:
    """The model of a case, quantized, with adapters that have moved."""
    class_name, settings, adapters = CASES[name]
    torch.manual_seed(0)
    config = getattr(transformers, class_name)(**{key: value for key, value in settings.items() if value is not None})
    base = AutoModelForCausalLM.from_config(config)
    for key, buffer in base.named_buffers():
        if "correction_bias" in key:  # large enough to send tokens to other experts
            buffer.copy_(3 * torch.randn_like(buffer))
    base.save_pretrained(folder)
    loaded = AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantization, dtype=torch.bfloat16)
    model = get_peft_model(loaded, lora(init_lora_weights=False, **adapters))
    torch.manual_seed(1)
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data += (0.05 * torch.randn(weight.shape)).to(weight.dtype)
    keep_gradients_on_the_cpu(model)
    return model


@pytest.mark.parametrize("name", CASES)
def test_whatever_peft_wraps_is_exported_as_it_was_trained(tmp_path, name):
    result = save_merged(trained(tmp_path / "base", name), tmp_path / "merged", input_ids=IDS)
    assert result.kl < 3e-5 < 1e-2 < result.kl_without_adapter


def test_buffers_keep_their_values_and_their_dtype(tmp_path):
    """Without its biases the router would send tokens to other experts, which a small KL may hide."""
    model = trained(tmp_path, "a router's biases")
    expected = {name: tensor for name, tensor in model.named_buffers() if "correction_bias" in name}
    (bias,) = expected.values()
    dense = dict(dequantized(model).named_buffers())["model.layers.1.mlp.gate.e_score_correction_bias"]
    assert torch.equal(dense, bias)
    assert dense.dtype == bias.dtype == torch.float32


def test_a_weight_that_nothing_fills_is_refused_unless_it_is_tied(tmp_path, monkeypatch):
    tied = trained(tmp_path, "tokens of tied embeddings")
    from grpo_plus.qlora import unwrapped

    def without(last: str) -> None:
        everything = plain_tensors
        monkeypatch.setattr(
            unwrapped,
            "plain_tensors",
            lambda module, prefix="": (pair for pair in everything(module, prefix) if not pair[0].endswith(last)),
        )

    without("lm_head.weight")
    dequantized(tied)
    monkeypatch.undo()
    norm = dict(tied.named_modules())["base_model.model.model.norm"]
    norm.register_parameter("other", nn.Parameter(torch.ones(3)))
    with pytest.raises(ValueError, match=r"has no place for model.norm.other.*Use method='adapter'"):
        dequantized(tied)
    del norm._parameters["other"], norm._parameters["weight"]
    with pytest.raises(ValueError, match=r"would lack model.norm.weight.*Use method='adapter'"):
        dequantized(tied)


def test_a_base_in_8_bits_is_exported_and_works_afterwards(tmp_path):
    eight = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
    model = trained(tmp_path / "base", "tokens", eight)
    before = token_logps(model, IDS)
    result = save_merged(model, tmp_path / "merged", input_ids=IDS)
    assert result.kl < 1e-3 < result.kl_without_adapter
    assert torch.equal(token_logps(model, IDS), before)


def test_adapters_with_any_name_are_exported(tmp_path):
    base = trained(tmp_path / "base", "tokens").unload()
    model = get_peft_model(base, lora(init_lora_weights=False), adapter_name="mine")
    keep_gradients_on_the_cpu(model)
    for method in ("dequantize", "adapter"):
        assert save_merged(model, tmp_path / method, method=method, input_ids=IDS).kl < 1e-4
    model.add_adapter("other", lora())
    model.base_model.set_adapter(["mine", "other"])
    with pytest.raises(ValueError, match=r"2 adapters are active \(mine, other\)"):
        save_merged(model, tmp_path / "both", input_ids=IDS)
