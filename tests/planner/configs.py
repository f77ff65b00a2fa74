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
