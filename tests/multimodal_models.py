"""Small random folders of multimodal models, as fields of their configs."""

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PreTrainedModel

from nvfp4_train.data.tokenizer import byte_tokenizer

TEXT: dict[str, Any] = {
    "vocab_size": 272,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 256,
    "eos_token_id": 256,
}
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
QWEN_VISION: dict[str, Any] = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 2,
    "patch_size": 4,
    "out_hidden_size": 64,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0],
}
MROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
LINEAR_ATTENTION: dict[str, Any] = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "rope_parameters": MROPE | {"mrope_section": [1, 1, 0], "partial_rotary_factor": 0.25},
}
QWEN_TOKENS = {"image_token_id": 260, "video_token_id": 261, "vision_start_token_id": 262, "vision_end_token_id": 263}
MULTIMODAL: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma3": (
        "Gemma3ForConditionalGeneration",
        {
            "text_config": TEXT | {"sliding_window": 32},
            "vision_config": VISION,
            "mm_tokens_per_image": 1,
            "image_token_index": 260,
            "boi_token_index": 261,
            "eoi_token_index": 262,
        },
    ),
    "gemma4": (
        "Gemma4ForConditionalGeneration",
        {
            "text_config": TEXT
            | {
                "vocab_size_per_layer_input": 272,
                "hidden_size_per_layer_input": 16,
                "global_head_dim": 16,
                "num_global_key_value_heads": 2,
                "layer_types": ["sliding_attention", "full_attention"],
                "num_kv_shared_layers": 0,
                "sliding_window": 32,
            },
            "vision_config": VISION | {"num_key_value_heads": 2, "head_dim": 16, "position_embedding_size": 64},
            "image_token_id": 260,
            "video_token_id": 263,
            "audio_token_id": 264,
        },
    ),
    "qwen3_vl": (
        "Qwen3VLForConditionalGeneration",
        {"text_config": TEXT | {"rope_parameters": MROPE}, "vision_config": QWEN_VISION, **QWEN_TOKENS},
    ),
    "qwen3_5": (
        "Qwen3_5ForConditionalGeneration",
        {"text_config": TEXT | LINEAR_ATTENTION, "vision_config": QWEN_VISION, **QWEN_TOKENS},
    ),
    "qwen3_5_moe": (
        "Qwen3_5MoeForConditionalGeneration",
        {
            "text_config": TEXT
            | LINEAR_ATTENTION
            | {
                "moe_intermediate_size": 32,
                "num_experts": 4,
                "num_experts_per_tok": 2,
                "shared_expert_intermediate_size": 32,
            },
            "vision_config": QWEN_VISION,
            **QWEN_TOKENS,
        },
    ),
    "mistral3": (
        "Mistral3ForConditionalGeneration",
        {
            "text_config": TEXT | {"model_type": "ministral3"},
            "vision_config": VISION | {"model_type": "pixtral", "head_dim": 16},
            "image_token_index": 260,
        },
    ),
    "llama4": (
        "Llama4ForConditionalGeneration",
        {
            "text_config": TEXT
            | {
                "intermediate_size": 32,
                "intermediate_size_mlp": 64,
                "num_local_experts": 4,
                "num_experts_per_tok": 1,
                "interleave_moe_layer_step": 2,
                "attention_chunk_size": 64,
            },
            "vision_config": VISION
            | {"vision_output_dim": 64, "projector_input_dim": 64, "projector_output_dim": 64, "pixel_shuffle_ratio": 0.5},
            "image_token_index": 260,
            "boi_token_index": 261,
            "eoi_token_index": 262,
        },
    ),
    "internvl": (
        "InternVLForConditionalGeneration",
        {
            "text_config": TEXT | {"model_type": "qwen3"},
            "vision_config": VISION | {"image_size": [28, 28], "patch_size": [14, 14]},
            "image_token_id": 260,
        },
    ),
    "glm4v": (
        "Glm4vForConditionalGeneration",
        {
            "text_config": TEXT | {"rope_parameters": MROPE | {"partial_rotary_factor": 0.5, "mrope_section": [1, 1, 2]}},
            "vision_config": QWEN_VISION | {"image_size": 16, "attention_bias": False},
            **QWEN_TOKENS,
        },
    ),
    "paligemma": (
        "PaliGemmaForConditionalGeneration",
        {
            "text_config": TEXT | {"model_type": "gemma2"},
            "vision_config": VISION | {"projection_dim": 64},
            "projection_dim": 64,
            "image_token_index": 260,
        },
    ),
    "llava": (
        "LlavaForConditionalGeneration",
        {
            "text_config": TEXT | {"model_type": "llama"},
            "vision_config": VISION | {"model_type": "clip_vision_model", "projection_dim": 32},
            "image_token_index": 260,
        },
    ),
    # Its towers are inside the text model, and its config has no text config.
    "phi4_multimodal": (
        "Phi4MultimodalForCausalLM",
        TEXT
        | {
            "vision_config": VISION | {"num_hidden_layers": 2, "crop_size": 28, "image_token_id": 260},
            "audio_config": {
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_blocks": 1,
                "num_attention_heads": 2,
                "ext_pw_out_channel": 32,
                "nemo_conv_channels": 32,
                "depthwise_separable_out_channel": 32,
                "audio_token_id": 261,
            },
        },
    ),
}
"""Model type -> class of the folder, and fields of its config. Token ids of images lie above those of the byte tokenizer."""


def save_multimodal(folder: Path, model_type: str, **fields: Any) -> PreTrainedModel:
    """Write a folder as a user downloads it: bf16 weights, a tokenizer and processor files. Returns the model."""
    class_name, config_fields = MULTIMODAL[model_type]
    torch.manual_seed(0)
    cls = getattr(transformers, class_name)
    model = cls._from_config(AutoConfig.for_model(model_type, **config_fields | fields), dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        # A projector of zeros would hide images.
        if not name.endswith("bias") and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text('{"image_processor_type": "SiglipImageProcessor"}\n')
    (folder / "chat_template.jinja").write_text("{% for message in messages %}{{ message.content }}{% endfor %}\n")
    return model.eval()
