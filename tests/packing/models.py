"""Tiny models of every kind that packing meets, with random weights."""

from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel
from trl.trainer import add_fused_lm_head

from grpo_plus.packing.forward import install_packed_forward

VOCABULARY = 97
WINDOW = 9  # shorter than the prompts of the tests
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
OLD_SHAPE = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2}
GATED_DELTA = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 16, "mamba_expand": 2}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", SHAPE),
    "qwen3": ("Qwen3Config", SHAPE),
    "mistral": ("MistralConfig", SHAPE | {"sliding_window": WINDOW}),
    "gemma2": ("Gemma2Config", SHAPE | {"sliding_window": WINDOW, "final_logit_softcapping": 0.1}),
    "gemma3": ("Gemma3TextConfig", SHAPE | {"num_hidden_layers": 6, "sliding_window": WINDOW}),
    "gpt_oss": (
        "GptOssConfig",
        SHAPE | {"sliding_window": WINDOW, "num_local_experts": 4, "num_experts_per_tok": 2, "rope_parameters": None},
    ),
    "phimoe": ("PhimoeConfig", SHAPE | {"num_local_experts": 4, "router_jitter_noise": 0.0, "sliding_window": WINDOW}),
    "qwen3_moe": ("Qwen3MoeConfig", SHAPE | EXPERTS),
    "qwen3_next": (
        "Qwen3NextConfig",
        SHAPE | GATED_DELTA | EXPERTS | {"num_hidden_layers": 4, "shared_expert_intermediate_size": 16},
    ),
    "qwen3_5": ("Qwen3_5TextConfig", SHAPE | GATED_DELTA | {"num_hidden_layers": 4}),
    "granite": ("GraniteConfig", SHAPE | {"logits_scaling": 4.0}),
    "cohere": ("CohereConfig", SHAPE | {"logit_scale": 0.3}),
    "lfm2": ("Lfm2Config", SHAPE | {"layer_types": ["conv", "full_attention"]}),
    "bamba": ("BambaConfig", SHAPE | MAMBA | {"attn_layer_indices": [1], "mamba_chunk_size": 16}),
    "gpt2": (
        "GPT2Config",
        OLD_SHAPE
        | {"n_positions": 512, "n_embd": 32, "n_layer": 2, "n_head": 4}
        | {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0},
    ),
    "bloom": ("BloomConfig", OLD_SHAPE | {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "mpt": ("MptConfig", OLD_SHAPE | {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 512}),
}
HYBRIDS = ("qwen3_next", "qwen3_5", "lfm2", "bamba")
OWN_ATTENTION = ("bloom", "mpt")


def tiny(name: str, *, checkpointing: bool = False, reentrant: bool = False, **changes: Any) -> PreTrainedModel:
    """The model in training mode, with TRL's fused head and the packed forward."""
    class_name, settings = CONFIGS[name]
    config = getattr(transformers, class_name)(**{k: v for k, v in (settings | changes).items() if v is not None})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).train()
    for parameter in model.parameters():  # so that attention is not nearly uniform and a wrong mask shows
        if parameter.dim() > 1:
            parameter.data.mul_(2.0)
    add_fused_lm_head(model, temperature=1.3, outputs=("log_probs", "entropy"))
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    install_packed_forward(model)
    return model
