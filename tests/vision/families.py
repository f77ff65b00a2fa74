"""Vision-language models of two small layers, each with the processor of its family; nothing is downloaded.

The sizes follow the tiny models of TRL's tests, except for the pictures: a picture becomes 4 to 40 tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from tests.vision.processors import Turns

PATCH = 4


@dataclass(frozen=True)
class Family:
    """One architecture and its processor.

    Attributes:
        model_type: of the model's config.
        processor: name of the processor's class in transformers.
        images: image processor.
        turns: what the chat template writes.
        text: fields of `text_config`, beside those of `TEXT`.
        vision: fields of `vision_config`.
        config: other fields of the config.
        token_ids: fields of the config that are ids, each with its token.
        named: tokens that the tokenizer gives out as attributes.
        tokens: further special tokens.
        settings: further arguments of the processor.
    """

    model_type: str
    processor: str
    images: Callable[[], Any]
    turns: Turns
    text: dict[str, Any]
    vision: dict[str, Any]
    token_ids: dict[str, str]
    config: dict[str, Any] = field(default_factory=dict)
    named: dict[str, str] = field(default_factory=dict)
    tokens: tuple[str, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)


TEXT = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
TOWER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
CHATML = Turns(
    "<|im_start|>{}\n", "<|vision_start|><|image_pad|><|vision_end|>", "<|im_end|>\n", "<|im_start|>assistant\n"
)
QWEN_TOKENS = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
QWEN_IDS = {
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}
QWEN_TOWER = {
    "depth": 2,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_heads": 4,
    "out_hidden_size": 16,
    "patch_size": PATCH,
}
TILES = tuple(f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5))
SPLIT = {"size": {"longest_edge": 32}, "max_image_size": {"longest_edge": 16}, "do_image_splitting": True}


def rotary(*sections: int, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": list(sections), **more}}


def qwen_images() -> Qwen2VLImageProcessorPil:
    return Qwen2VLImageProcessorPil(patch_size=PATCH, size={"shortest_edge": 64, "longest_edge": 48 * 48})


HYBRID = {
    "head_dim": 12,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
} | rotary(1, 1, 1, mrope_interleaved=True, partial_rotary_factor=0.5)

IDEFICS3 = Family(
    model_type="idefics3",
    processor="Idefics3Processor",
    images=lambda: Idefics3ImageProcessorPil(**SPLIT),
    turns=Turns("<|im_start|>{}:", "<image>", "<end_of_utterance>\n", "Assistant:"),
    text={"model_type": "llama"},
    vision=TOWER | {"image_size": 16, "patch_size": PATCH},
    token_ids={"image_token_id": "<image>"},
    config={"scale_factor": 2},
    tokens=("<|im_start|>", "<end_of_utterance>", "<fake_token_around_image>", "<image>", "<global-img>", *TILES),
    settings={"image_seq_len": 4},
)

FAMILIES = {
    "qwen2_vl": Family(
        model_type="qwen2_vl",
        processor="Qwen2VLProcessor",
        images=qwen_images,
        turns=CHATML,
        text={"model_type": "qwen2_vl_text"} | rotary(1, 1, 0),
        vision={"depth": 2, "embed_dim": 16, "hidden_size": 16, "num_heads": 4, "mlp_ratio": 2, "patch_size": PATCH},
        token_ids=QWEN_IDS,
        tokens=QWEN_TOKENS,
    ),
    "qwen2_5_vl": Family(
        model_type="qwen2_5_vl",
        processor="Qwen2_5_VLProcessor",
        images=qwen_images,
        turns=CHATML,
        text={"model_type": "qwen2_5_vl_text"} | rotary(1, 1, 0),
        # Windows of 2 x 2 merged patches, so that the first layer of the tower does not see a whole picture.
        vision=QWEN_TOWER | {"fullatt_block_indexes": [1], "window_size": 4 * PATCH},
        token_ids=QWEN_IDS,
        tokens=QWEN_TOKENS,
    ),
    "qwen3_vl": Family(
        model_type="qwen3_vl",
        processor="Qwen3VLProcessor",
        images=qwen_images,
        turns=CHATML,
        text={"model_type": "qwen3_vl_text", "head_dim": 12, "tie_word_embeddings": True}
        | rotary(2, 2, 2, mrope_interleaved=True),
        vision=QWEN_TOWER | {"deepstack_visual_indexes": [1], "num_position_embeddings": 64},
        token_ids=QWEN_IDS,
        tokens=QWEN_TOKENS,
    ),
    "qwen3_5": Family(
        model_type="qwen3_5",
        processor="Qwen3VLProcessor",
        images=qwen_images,
        turns=CHATML,
        text={"model_type": "qwen3_5_text"} | HYBRID,
        vision=QWEN_TOWER | {"num_position_embeddings": 64},
        token_ids=QWEN_IDS,
        tokens=QWEN_TOKENS,
    ),
    "qwen3_5_moe": Family(
        model_type="qwen3_5_moe",
        processor="Qwen3VLProcessor",
        images=qwen_images,
        turns=CHATML,
        text={"model_type": "qwen3_5_moe_text", "num_experts": 4, "num_experts_per_tok": 2}
        | {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
        | HYBRID,
        vision=QWEN_TOWER | {"num_position_embeddings": 64},
        token_ids=QWEN_IDS,
        tokens=QWEN_TOKENS,
    ),
    "gemma3": Family(
        model_type="gemma3",
        processor="Gemma3Processor",
        images=lambda: Gemma3ImageProcessorPil(size={"height": 24, "width": 24}),
        turns=Turns("<start_of_turn>{}\n", "<start_of_image>", "<end_of_turn>\n", "<start_of_turn>model\n"),
        # A window shorter than the prompt, so that the first layer does not see a whole picture.
        text={
            "model_type": "gemma3_text",
            "head_dim": 4,
            "query_pre_attn_scalar": 4,
            "tie_word_embeddings": True,
            "layer_types": ["sliding_attention", "full_attention"],
            "sliding_window": 16,
        },
        vision=TOWER
        | {"model_type": "siglip_vision_model", "image_size": 24, "patch_size": PATCH, "vision_use_head": False},
        config={"mm_tokens_per_image": 9},
        token_ids={
            "boi_token_index": "<start_of_image>",
            "eoi_token_index": "<end_of_image>",
            "image_token_index": "<image_soft_token>",
        },
        named={
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
            "image_token": "<image_soft_token>",
        },
        tokens=("<start_of_turn>", "<end_of_turn>"),
        settings={"image_seq_length": 9},
    ),
    "gemma4": Family(
        model_type="gemma4",
        processor="Gemma4Processor",
        images=lambda: Gemma4ImageProcessorPil(patch_size=2, max_soft_tokens=70),
        turns=Turns("<|turn>{}\n", "<|image|>", "<turn|>\n", "<|turn>model\n"),
        text={
            "model_type": "gemma4_text",
            "head_dim": 4,
            "global_head_dim": 8,
            "layer_types": ["sliding_attention", "full_attention"],
            "sliding_window": 16,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": 128,
        },
        vision=TOWER | {"head_dim": 4, "num_key_value_heads": 4, "patch_size": 2, "position_embedding_size": 630},
        config={"audio_config": None},
        token_ids={
            "boi_token_id": "<|image>",
            "eoi_token_id": "<image|>",
            "image_token_id": "<|image|>",
            "video_token_id": "<|video|>",
            "audio_token_id": "<|audio|>",
        },
        named={
            "boi_token": "<|image>",
            "eoi_token": "<image|>",
            "image_token": "<|image|>",
            "boa_token": "<|audio>",
            "eoa_token": "<audio|>",
            "audio_token": "<|audio|>",
        },
        tokens=("<|turn>", "<turn|>", "<|video|>"),
        settings={"image_seq_length": 70},
    ),
    "smolvlm": replace(
        IDEFICS3,
        model_type="smolvlm",
        processor="SmolVLMProcessor",
        images=lambda: SmolVLMImageProcessorPil(**SPLIT),
        config={},
    ),
    "idefics3": IDEFICS3,
    "llava_next": Family(
        model_type="llava_next",
        processor="LlavaNextProcessor",
        images=lambda: LlavaNextImageProcessorPil(
            size={"shortest_edge": 12},
            crop_size={"height": 12, "width": 12},
            image_grid_pinpoints=[[12, 24], [24, 12], [24, 24]],
        ),
        turns=Turns("[{}] ", "<image>\n", " [/INST]", ""),
        text={"model_type": "mistral", "head_dim": 4, "sliding_window": None},
        # The language model reads the second of three layers, as vision_feature_layer=-2 says.
        vision=TOWER
        | {"model_type": "clip_vision_model", "image_size": 12, "patch_size": PATCH, "num_hidden_layers": 3},
        config={"image_grid_pinpoints": [[12, 24], [24, 12], [24, 24]], "image_seq_length": 9},
        token_ids={"image_token_index": "<image>"},
        tokens=("<image>",),
        settings={"patch_size": PATCH, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1},
    ),
    "llava": Family(
        model_type="llava",
        processor="LlavaProcessor",
        images=lambda: LlavaImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}),
        turns=Turns("{}: ", "<image>\n", " ", "ASSISTANT:"),
        text={"model_type": "llama"},
        vision=TOWER
        | {"model_type": "clip_vision_model", "image_size": 16, "patch_size": PATCH, "num_hidden_layers": 3},
        config={"image_seq_length": 16},
        token_ids={"image_token_index": "<image>"},
        tokens=("<image>",),
        settings={"patch_size": PATCH, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1},
    ),
    "internvl": Family(
        model_type="internvl",
        processor="InternVLProcessor",
        images=lambda: GotOcr2ImageProcessorPil(size={"height": 16, "width": 16}, crop_to_patches=True, max_patches=4),
        turns=Turns("<|im_start|>{}\n", "<IMG_CONTEXT>\n", "<|im_end|>\n", "<|im_start|>assistant\n"),
        text={"model_type": "qwen2"},
        vision=TOWER | {"model_type": "internvl_vision", "image_size": [16, 16], "patch_size": [PATCH, PATCH]},
        config={"image_seq_length": 4},
        token_ids={"image_token_id": "<IMG_CONTEXT>"},
        named={
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
        tokens=("<|im_start|>", "<|im_end|>"),
        settings={"image_seq_length": 4},
    ),
}
