"""Images and text in, text out."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.zoo.entry import CAUSAL, IMAGE_TEXT, Entry
from tests.zoo.inputs import fixed, image_text, noise, of, ones, tokens
from tests.zoo.settings import (
    BLOCKS,
    CLIP_IMAGES,
    DECODER,
    ENCODER,
    IMAGE_TOKEN,
    IMAGES,
    OPT,
    SLIDING,
    TOKENS,
    Settings,
)

QWEN_IMAGES: Settings = {
    "depth": 2,
    "embed_dim": 64,
    "hidden_size": 64,
    "num_heads": 4,
    "mlp_ratio": 2,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "in_channels": 3,
    "in_chans": 3,
}
QWEN_TOKENS: Settings = {
    "image_token_id": 300,
    "video_token_id": 303,
    "vision_start_token_id": 301,
    "vision_end_token_id": 302,
}
ROPE: Settings = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0, "type": "default"}
QWEN_INPUTS = image_text(
    16,
    3,
    4,
    {
        "pixel_values": noise(16, 96),
        "image_grid_thw": fixed([[1, 4, 4]]),
        "mm_token_type_ids": fixed([[0] * 3 + [1] * 4 + [0] * 9]),
    },
)
IDEFICS_INPUTS = image_text(16, 2, 4, {"pixel_values": noise(1, 1, 3, 32, 32)})


def patches() -> Tensor:
    """Eight patches of an image: row, column, 32 numbers."""
    return torch.cat([torch.randint(1, 4, (1, 8, 2)).float(), torch.randn(1, 8, 32)], dim=-1)


VISION_LANGUAGE = (
    Entry(
        "llava",
        IMAGE_TEXT,
        image_text(24, 2, 16),
        IMAGE_TOKEN
        | {
            "text_config": {"model_type": "llama"} | DECODER,
            "vision_config": {"model_type": "clip_vision_model"} | CLIP_IMAGES,
            "vision_feature_layer": -1,
            "image_seq_length": 16,
        },
    ),
    Entry(
        "paligemma",
        IMAGE_TEXT,
        image_text(24, 0, 16),
        IMAGE_TOKEN
        | {
            "text_config": {"model_type": "gemma"} | DECODER | {"head_dim": 16},
            "vision_config": {"model_type": "siglip_vision_model"} | CLIP_IMAGES | {"projection_dim": 64},
            "projection_dim": 64,
            "hidden_size": 64,
            "vocab_size": 320,
        },
    ),
    Entry(
        "gemma3",
        IMAGE_TEXT,
        image_text(
            24, 2, 4, {"pixel_values": noise(1, 3, 32, 32), "token_type_ids": fixed([[0] * 2 + [1] * 4 + [0] * 18])}
        ),
        IMAGE_TOKEN
        | {
            "text_config": {"model_type": "gemma3_text"} | DECODER | SLIDING | {"head_dim": 16},
            "vision_config": {"model_type": "siglip_vision_model"} | IMAGES | {"vision_use_head": False},
            "mm_tokens_per_image": 4,
            "boi_token_index": 301,
            "eoi_token_index": 302,
        },
    ),
    Entry(
        "qwen2_vl",
        IMAGE_TEXT,
        QWEN_INPUTS,
        QWEN_TOKENS
        | {
            "text_config": DECODER | QWEN_TOKENS | {"rope_parameters": ROPE, "rope_scaling": ROPE},
            "vision_config": QWEN_IMAGES,
        },
    ),
    Entry(
        "qwen2_5_vl",
        IMAGE_TEXT,
        QWEN_INPUTS,
        QWEN_TOKENS
        | {
            "text_config": DECODER | QWEN_TOKENS | {"rope_parameters": ROPE, "rope_scaling": ROPE},
            "vision_config": QWEN_IMAGES
            | {"intermediate_size": 128, "out_hidden_size": 64, "window_size": 16, "fullatt_block_indexes": [1]},
        },
    ),
    Entry(
        "blip-2",
        "Blip2ForConditionalGeneration",
        image_text(16, 0, 4),
        IMAGE_TOKEN
        | {
            "vision_config": IMAGES,
            "qformer_config": ENCODER | {"encoder_hidden_size": 64},
            "text_config": {"model_type": "opt"} | OPT,
            "num_query_tokens": 4,
        },
    ),
    Entry(
        "idefics3",
        IMAGE_TEXT,
        IDEFICS_INPUTS,
        {
            "text_config": {"model_type": "llama"} | DECODER,
            "vision_config": IMAGES,
            "image_token_id": 300,
            "scale_factor": 2,
        },
    ),
    Entry(
        "smolvlm",
        IMAGE_TEXT,
        IDEFICS_INPUTS,
        {
            "text_config": {"model_type": "llama"} | DECODER,
            "vision_config": IMAGES,
            "image_token_id": 300,
            "scale_factor": 2,
        },
    ),
    Entry(
        "internvl",
        IMAGE_TEXT,
        image_text(16, 2, 4),
        {
            "text_config": {"model_type": "qwen2"} | DECODER,
            "vision_config": BLOCKS | {"image_size": [32, 32], "patch_size": [8, 8]},
            "image_token_id": 300,
            "downsample_ratio": 0.5,
            "image_seq_length": 4,
        },
    ),
    Entry(
        "mistral3",
        IMAGE_TEXT,
        image_text(16, 2, 4, {"pixel_values": noise(1, 3, 32, 32), "image_sizes": fixed([[32, 32]])}),
        IMAGE_TOKEN
        | {
            "text_config": {"model_type": "mistral"} | DECODER | {"head_dim": 16},
            "vision_config": {"model_type": "pixtral"} | IMAGES | {"head_dim": 16},
            "spatial_merge_size": 2,
            "vision_feature_layer": -1,
        },
    ),
    Entry(
        "mllama",
        IMAGE_TEXT,
        of(
            {
                "input_ids": tokens(10, 1),
                "attention_mask": ones(1, 10),
                "pixel_values": noise(1, 1, 2, 3, 32, 32),
                "aspect_ratio_ids": fixed([[1]]),
                "aspect_ratio_mask": fixed([[[1, 0]]]),
                "cross_attention_mask": ones(1, 10, 1, 2),
            }
        ),
        {
            "text_config": DECODER | {"cross_attention_layers": [1]},
            "vision_config": {
                "hidden_size": 64,
                "intermediate_size": 128,
                "num_hidden_layers": 2,
                "image_size": 32,
                "patch_size": 8,
                "attention_heads": 4,
                "num_global_layers": 1,
                "max_num_tiles": 2,
                "vision_output_dim": 128,
                "intermediate_layers_indices": [0],
                "supported_aspect_ratios": [[1, 1], [1, 2]],
            },
            "image_token_index": 300,
        },
    ),
    Entry(
        "git",
        CAUSAL,
        of({"input_ids": tokens(8, 1), "attention_mask": ones(1, 8), "pixel_values": noise(1, 3, 32, 32)}),
        ENCODER | {"vision_config": IMAGES},
    ),
    Entry(
        "pix2struct",
        IMAGE_TEXT,
        of({"flattened_patches": patches, "attention_mask": ones(1, 8), "decoder_input_ids": tokens(5, 1)}),
        {
            "text_config": TOKENS
            | {
                "hidden_size": 64,
                "d_kv": 16,
                "d_ff": 128,
                "num_layers": 2,
                "num_heads": 4,
                "decoder_start_token_id": 0,
            },
            "vision_config": {
                "hidden_size": 64,
                "patch_embed_hidden_size": 32,
                "d_ff": 128,
                "d_kv": 16,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "seq_len": 16,
            },
        },
    ),
    Entry(
        "vipllava",
        IMAGE_TEXT,
        image_text(24, 2, 16),
        IMAGE_TOKEN
        | {
            "text_config": {"model_type": "llama"} | DECODER,
            "vision_config": {"model_type": "clip_vision_model"} | CLIP_IMAGES | {"num_hidden_layers": 6},
            "vision_feature_layers": [-1, -2],
            "image_seq_length": 16,
        },
    ),
    Entry(
        "aya_vision",
        IMAGE_TEXT,
        image_text(16, 2, 4),
        IMAGE_TOKEN
        | {
            "text_config": {"model_type": "cohere2"} | DECODER | SLIDING | {"head_dim": 16},
            "vision_config": {"model_type": "siglip_vision_model"} | IMAGES | {"vision_use_head": False},
            "downsample_factor": 2,
            "adapter_layer_norm_eps": 1e-06,
            "alignment_intermediate_size": 128,
        },
    ),
)
