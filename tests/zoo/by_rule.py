"""Entries whose settings follow from the defaults of their type, by the rule in `shrink` and the changes here."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from tests.zoo.entry import Entry
from tests.zoo.inputs import Inputs
from tests.zoo.settings import Settings
from tests.zoo.shrink import tiny_settings

CHANGES: dict[str, Settings] = {
    "roc_bert": {
        "shape_embed_dim": 32,
        "shape_vocab_size": 50,
        "pronunciation_embed_dim": 32,
        "pronunciation_vocab_size": 50,
    },
    "luke": {"entity_vocab_size": 50, "entity_emb_size": 32},
    "rt_detr_resnet": {
        "hidden_sizes": [16, 32, 64, 128],
        "depths": [1, 1, 1, 1],
        "embedding_size": 16,
        "layer_type": "basic",
    },
    "grounding-dino": {
        "backbone_config": {
            "embed_dim": 16,
            "depths": [1, 1, 1, 1],
            "num_heads": [1, 2, 4, 4],
            "window_size": 4,
            "image_size": 64,
            "patch_size": 2,
        }
    },
    "mm-grounding-dino": {
        "backbone_config": {
            "embed_dim": 16,
            "depths": [1, 1, 1, 1],
            "num_heads": [1, 2, 4, 4],
            "window_size": 4,
            "image_size": 64,
            "patch_size": 2,
        }
    },
    "convnextv2": {"hidden_sizes": [16, 32], "depths": [1, 1], "num_stages": 2},
    "dinov3_convnext": {"hidden_sizes": [16, 32, 64, 64], "depths": [1, 1, 1, 1]},
    "pvt": {
        "hidden_sizes": [16, 32, 64, 64],
        "num_attention_heads": [1, 2, 4, 4],
        "depths": [1, 1, 1, 1],
        "image_size": 64,
    },
    "bit": {"hidden_sizes": [32, 64], "depths": [1, 1], "embedding_size": 32, "num_groups": 4},
    "conditional_detr": {
        "use_timm_backbone": False,
        "backbone": None,
        "use_pretrained_backbone": False,
        "backbone_config": {
            "model_type": "resnet",
            "hidden_sizes": [32, 64],
            "depths": [1, 1],
            "embedding_size": 16,
            "out_features": ["stage2"],
        },
    },
    "table-transformer": {
        "use_timm_backbone": False,
        "backbone": None,
        "use_pretrained_backbone": False,
        "backbone_config": {
            "model_type": "resnet",
            "hidden_sizes": [32, 64],
            "depths": [1, 1],
            "embedding_size": 16,
            "out_features": ["stage2"],
        },
    },
    "dab-detr": {
        "use_timm_backbone": False,
        "backbone": None,
        "use_pretrained_backbone": False,
        "backbone_config": {
            "model_type": "resnet",
            "hidden_sizes": [32, 64],
            "depths": [1, 1],
            "embedding_size": 16,
            "out_features": ["stage2"],
        },
    },
    "deformable_detr": {
        "use_timm_backbone": False,
        "backbone": None,
        "use_pretrained_backbone": False,
        "backbone_config": {
            "model_type": "resnet",
            "hidden_sizes": [16, 32, 64],
            "depths": [1, 1, 1],
            "embedding_size": 16,
            "out_features": ["stage1", "stage2", "stage3"],
        },
    },
    "longcat_flash": {"zero_expert_num": 2, "ffn_hidden_size": 128, "expert_ffn_hidden_size": 64, "moe_topk": 2},
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "mamba_dt_rank": 8,
        "use_mamba_kernels": False,
    },
    "reformer": {
        "is_decoder": True,
        "axial_pos_embds": False,
        "attn_layers": ["local", "lsh"],
        "lsh_attn_chunk_length": 4,
        "local_attn_chunk_length": 4,
        "attention_head_size": 16,
        "num_buckets": 2,
        "feed_forward_size": 128,
    },
    "donut-swin": {
        "embed_dim": 16,
        "depths": [1, 1, 1, 1],
        "num_heads": [1, 2, 4, 4],
        "window_size": 4,
        "image_size": 64,
        "patch_size": 2,
    },
    "maskformer-swin": {
        "embed_dim": 16,
        "depths": [1, 1, 1, 1],
        "num_heads": [1, 2, 4, 4],
        "window_size": 4,
        "image_size": 64,
        "patch_size": 2,
    },
    "hgnet_v2": {
        "stem_channels": [3, 8, 16],
        "stage_in_channels": [16, 16, 32, 32],
        "stage_mid_channels": [8, 8, 16, 16],
        "stage_out_channels": [16, 32, 32, 64],
        "stage_num_blocks": [1, 1, 1, 1],
        "stage_numb_of_layers": [2, 2, 2, 2],
        "embedding_size": 16,
        "hidden_sizes": [16, 32, 32, 64],
        "depths": [1, 1, 1, 1],
    },
    "cohere2_vision": {"alignment_intermediate_size": 64, "downsample_factor": 2},
    "esmc": {"num_key_value_heads": 4},
    "florence2": {
        "vision_config": {
            "embed_dim": [16, 32, 32, 64],
            "num_heads": [2, 2, 2, 4],
            "num_groups": [2, 2, 2, 4],
            "depths": [1, 1, 1, 1],
            "patch_size": [7, 3, 3, 3],
        }
    },
    "dia": {
        "decoder_config": {
            "cross_hidden_size": 64,
            "cross_num_attention_heads": 4,
            "cross_num_key_value_heads": 4,
            "cross_head_dim": 16,
        },
        "encoder_config": {},
    },
    "mimi": {
        "upsample_groups": 16,
        "vector_quantization_hidden_dimension": 16,
        "codebook_dim": 16,
        "num_filters": 8,
        "upsampling_ratios": [4, 4],
    },
    "csm": {
        "text_vocab_size": 320,
        "codec_config": {
            "upsample_groups": 16,
            "vector_quantization_hidden_dimension": 16,
            "codebook_dim": 16,
            "num_filters": 8,
            "upsampling_ratios": [4, 4],
        },
    },
    "lxmert": {"l_layers": 1, "x_layers": 1, "r_layers": 1, "visual_feat_dim": 32},
    "qwen2_vl_text": {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}},
    "qwen2_5_vl_text": {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}},
    "glm4v_text": {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}},
    "glm_ocr_text": {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}},
    "glm_image_text": {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}},
    "glm4v_moe_text": {
        "rope_parameters": {
            "rope_type": "default",
            "mrope_section": [2, 3, 3],
            "rope_theta": 10000.0,
            "partial_rotary_factor": 1.0,
        }
    },
    "colqwen2": {
        "vlm_config": {
            "text_config": {
                "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
            }
        }
    },
    "glm46v": {
        "text_config": {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}}
    },
    "glm4v": {
        "text_config": {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}}
    },
    "glm_image": {
        "text_config": {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}}
    },
    "glm_ocr": {
        "text_config": {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}}
    },
    "glmga": {
        "text_config": {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}}
    },
    "paddleocr_vl": {
        "text_config": {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}}
    },
    "qwen2_5_omni_thinker": {
        "text_config": {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}}
    },
    "glm4v_moe": {
        "text_config": {
            "rope_parameters": {
                "rope_type": "default",
                "mrope_section": [2, 3, 3],
                "rope_theta": 10000.0,
                "partial_rotary_factor": 1.0,
            }
        }
    },
    "swin2sr": {
        "embed_dim": 32,
        "depths": [1, 1],
        "num_heads": [2, 4],
        "window_size": 4,
        "image_size": 32,
        "patch_size": 1,
    },
    "textnet": {
        "conv_layer_kernel_sizes": [[[3, 3]], [[3, 3]], [[3, 3]], [[3, 3]]],
        "conv_layer_strides": [[1], [2], [2], [2]],
        "hidden_sizes": [16, 16, 32, 32, 64],
        "stem_out_channels": 16,
    },
    "lilt": {"hidden_size": 96},
    "sam3_lite_text_text_model": {"num_hidden_layers": 3},  # the first and the last have no attention
    "shieldgemma2": {"yes_token_index": 5, "no_token_index": 7},
    "speech_to_text": {"input_feat_per_channel": 16, "num_mel_bins": 16},
    "vjepa2": {
        "pred_hidden_size": 64,
        "pred_num_attention_heads": 4,
        "pred_num_hidden_layers": 2,
        "crop_size": 32,
        "frames_per_clip": 4,
        "patch_size": 8,
    },
    "zoedepth": {
        "neck_hidden_sizes": [16, 16, 32, 32],
        "reassemble_factors": [4, 2, 1, 0.5],
        "fusion_hidden_size": 32,
        "bottleneck_features": 32,
        "num_relative_features": 16,
        "backbone_config": {
            "model_type": "beit",
            "num_hidden_layers": 4,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_attention_heads": 4,
            "image_size": 32,
            "patch_size": 8,
            "use_relative_position_bias": True,
            "reshape_hidden_states": False,
            "out_features": ["stage1", "stage2", "stage3", "stage4"],
        },
    },
    "timesfm": {"patch_length": 8, "context_length": 32, "horizon_length": 8},
}


ONLY_FLOAT32 = ("fastspeech2_conformer",)


def by_rule(inputs: Inputs, classes: Mapping[str, str]) -> tuple[Entry, ...]:
    """An entry for each type, built and loaded by the class beside it."""
    return tuple(
        Entry(name, own, inputs, partial(tiny_config, name), only_float32=name in ONLY_FLOAT32)
        for name, own in classes.items()
    )


def tiny_config(model_type: str) -> Any:
    """The configuration of a tiny model of that type."""
    from transformers import AutoConfig

    return AutoConfig.for_model(model_type, **tiny_settings(model_type, CHANGES.get(model_type)))
