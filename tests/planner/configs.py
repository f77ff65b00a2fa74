"""config.json of published models, as on the hub in 2025, without the fields that say nothing about sizes."""

from typing import Any

QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "head_dim": 128,
    "model_type": "qwen3",
    "num_key_value_heads": 8,
    "sliding_window": None,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
QWEN3_1_7B: dict[str, Any] = QWEN3 | {
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "max_window_layers": 28,
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "tie_word_embeddings": True,
}
QWEN3_4B: dict[str, Any] = QWEN3 | {
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "max_window_layers": 36,
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "tie_word_embeddings": True,
}
QWEN3_8B: dict[str, Any] = QWEN3 | {
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "max_window_layers": 36,
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "tie_word_embeddings": False,
}
LLAMA_3_1_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "tie_word_embeddings": False,
    "vocab_size": 128256,
}
LLAMA_3_2_3B: dict[str, Any] = LLAMA_3_1_8B | {
    "head_dim": 128,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_attention_heads": 24,
    "num_hidden_layers": 28,
    "tie_word_embeddings": True,
}

# A tiny one of every architecture that the planner knows: model_type, what its config adds to `TINY`.
TINY: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
ARCHITECTURES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("llama", {"head_dim": None, "num_key_value_heads": None}),
    ("mistral", {"sliding_window": 16}),
    ("mixtral", {}),
    ("qwen2", {}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2}),
    ("qwen3", {}),
    ("qwen3", {"attention_bias": True}),
    ("qwen3_moe", {"num_experts": 6, "moe_intermediate_size": 24}),
    ("qwen3_moe", {"num_experts": 6, "moe_intermediate_size": 24, "decoder_sparse_step": 2}),
    ("qwen3_moe", {"num_experts": 6, "moe_intermediate_size": 24, "mlp_only_layers": [1]}),
    (
        "qwen3_5_text",
        {
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
        },
    ),
    ("gemma", {}),
    ("gemma2", {"sliding_window": 16}),
    ("gemma3_text", {"sliding_window": 16, "num_hidden_layers": 7}),
    ("phi3", {}),
    ("smollm3", {}),
    ("gpt_oss", {"num_local_experts": 6, "sliding_window": 16}),
]

# Architectures whose shape is read off the model that transformers builds: model_type, what its config adds to `TINY`.
GATED_DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
LATENT = {"q_lora_rank": 24, "kv_lora_rank": 20, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 16}
ROUTED = {"n_routed_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "n_group": 1, "topk_group": 1}
GRANITE_EXPERTS = {"num_local_experts": 6, "num_experts_per_tok": 2}
MAMBA = {"mamba_n_heads": 12, "mamba_d_head": 8, "mamba_d_state": 16, "mamba_expand": 2, "mamba_n_groups": 1}
PER_LAYER = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 96}
SIGLIP = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
}
QWEN_VISION = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 48}
TEXT = TINY | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SHARING = {"num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 16}


def mrope(*sections: int) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": list(sections)}}


def nested(text: dict[str, Any], vision: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"text_config": TEXT | text, "vision_config": vision, **more}


BUILT: list[tuple[str, dict[str, Any]]] = [
    (
        "deepseek_v3",
        ROUTED | LATENT | {"num_key_value_heads": 4, "first_k_dense_replace": 1, "n_shared_experts": 2, "head_dim": 8},
    ),
    ("gemma3", nested({"model_type": "gemma3_text", "sliding_window": 16, "num_hidden_layers": 7}, SIGLIP)),
    ("gemma3n_text", PER_LAYER | SHARING | {"laurel_rank": 8, "activation_sparsity_pattern": None}),
    (
        "gemma4_text",
        PER_LAYER | SHARING | {"num_kv_shared_layers": 0, "global_head_dim": 24, "num_global_key_value_heads": 1},
    ),
    (
        "gemma4_text",
        {"hidden_size_per_layer_input": 0, "sliding_window": 16, "enable_moe_block": True, "num_experts": 6}
        | {"top_k_experts": 2, "moe_intermediate_size": 24, "attention_k_eq_v": True, "num_kv_shared_layers": 0},
    ),
    ("gemma4", nested({"model_type": "gemma4_text"} | SHARING | PER_LAYER, SIGLIP)),
    ("glm4", {}),
    ("granite", {}),
    ("granitemoe", GRANITE_EXPERTS),
    (
        "granitemoehybrid",
        GRANITE_EXPERTS | MAMBA | {"shared_intermediate_size": 40, "layer_types": ["mamba", "attention"] * 2},
    ),
    ("lfm2", {"layer_types": ["conv", "full_attention"] * 2, "block_auto_adjust_ff_dim": False}),
    (
        "llama4",
        nested(
            {
                "model_type": "llama4_text",
                "num_local_experts": 6,
                "intermediate_size_mlp": 64,
                "interleave_moe_layer_step": 2,
            }
            | {"attention_chunk_size": 16},
            SIGLIP | {"vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32, "patch_size": 14},
        ),
    ),
    ("ministral3", {}),
    ("mistral3", nested({"model_type": "mistral"}, SIGLIP | {"model_type": "pixtral", "head_dim": 16})),
    ("olmo3", {"sliding_window": 16}),
    (
        "qwen3_next",
        GATED_DELTA
        | {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
        | {"shared_expert_intermediate_size": 32},
    ),
    ("qwen3_5", nested(GATED_DELTA | {"model_type": "qwen3_5_text"}, QWEN_VISION)),
    ("qwen2_5_vl", nested({"model_type": "qwen2_5_vl_text", "head_dim": 12} | mrope(2, 2, 2), QWEN_VISION)),
    (
        "qwen3_vl",
        nested({"model_type": "qwen3_vl_text"} | mrope(2, 3, 3), QWEN_VISION | {"deepstack_visual_indexes": [0]}),
    ),
]
