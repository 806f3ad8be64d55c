"""Segmentation, detection, depth and poses."""

from __future__ import annotations

from tests.zoo.entry import MODEL, Entry
from tests.zoo.inputs import fixed, noise, of, pixels, pixels_64, text_and_image
from tests.zoo.settings import CLIP_IMAGES, CLIP_TEXT, IMAGES, Settings

SWIN: Settings = {
    "model_type": "swin",
    "image_size": 64,
    "patch_size": 2,
    "embed_dim": 16,
    "depths": [1, 1, 1, 1],
    "num_heads": [1, 2, 4, 4],
    "window_size": 4,
    "out_features": ["stage1", "stage2", "stage3", "stage4"],
}
DETR: Settings = {
    "use_timm_backbone": False,
    "backbone": None,
    "use_pretrained_backbone": False,
    "d_model": 64,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "num_queries": 5,
    "num_labels": 5,
}

DENSE_PREDICTION = (
    Entry(
        "segformer",
        "AutoModelForSemanticSegmentation",
        pixels_64,
        {
            "num_encoder_blocks": 2,
            "depths": [1, 1],
            "sr_ratios": [2, 1],
            "hidden_sizes": [32, 64],
            "patch_sizes": [7, 3],
            "strides": [4, 2],
            "num_attention_heads": [1, 2],
            "mlp_ratios": [2, 2],
            "decoder_hidden_size": 64,
            "num_labels": 5,
        },
    ),
    Entry(
        "yolos",
        "AutoModelForObjectDetection",
        pixels,
        IMAGES | {"image_size": [32, 32], "num_detection_tokens": 5, "num_labels": 5},
    ),
    Entry(
        "detr",
        "AutoModelForObjectDetection",
        pixels_64,
        DETR
        | {
            "backbone_config": {
                "model_type": "resnet",
                "hidden_sizes": [32, 64],
                "depths": [1, 1],
                "embedding_size": 16,
                "out_features": ["stage2"],
            }
        },
    ),
    Entry(
        "dpt",
        "AutoModelForDepthEstimation",
        pixels,
        IMAGES
        | {
            "num_hidden_layers": 4,
            "neck_hidden_sizes": [16, 16, 32, 32],
            "fusion_hidden_size": 32,
            "backbone_out_indices": [0, 1, 2, 3],
            "reassemble_factors": [4, 2, 1, 0.5],
            "is_hybrid": False,
            "neck_ignore_stages": [0, 1],
            "num_labels": 5,
        },
    ),
    Entry(
        "sam",
        "AutoModelForMaskGeneration",
        of({"pixel_values": noise(1, 3, 64, 64), "input_points": fixed([[[[10.0, 20.0]]]])}),
        {
            "vision_config": {
                "hidden_size": 64,
                "output_channels": 32,
                "num_pos_feats": 16,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "image_size": 64,
                "patch_size": 8,
                "mlp_dim": 128,
                "global_attn_indexes": [1],
                "window_size": 4,
            },
            "prompt_encoder_config": {"hidden_size": 32, "image_size": 64, "patch_size": 8, "mask_input_channels": 4},
            "mask_decoder_config": {
                "hidden_size": 32,
                "mlp_dim": 64,
                "num_hidden_layers": 1,
                "num_attention_heads": 4,
                "iou_head_hidden_dim": 32,
            },
        },
    ),
    Entry(
        "clipseg",
        "CLIPSegForImageSegmentation",
        text_and_image,
        {
            "text_config": CLIP_TEXT,
            "vision_config": CLIP_IMAGES,
            "projection_dim": 32,
            "extract_layers": [0, 1],
            "reduce_dim": 16,
            "decoder_num_attention_heads": 2,
            "decoder_intermediate_size": 32,
            "conditional_layer": 0,
        },
    ),
    Entry(
        "groupvit",
        MODEL,
        text_and_image,
        {
            "text_config": CLIP_TEXT,
            "vision_config": IMAGES | {"depths": [1, 1], "num_group_tokens": [4, 0], "num_output_groups": [4, 4]},
            "projection_dim": 32,
            "projection_intermediate_dim": 64,
        },
    ),
    Entry(
        "depth_anything",
        "AutoModelForDepthEstimation",
        of({"pixel_values": noise(1, 3, 28, 28)}),
        {
            "backbone_config": {
                "model_type": "dinov2",
                "hidden_size": 64,
                "num_hidden_layers": 4,
                "num_attention_heads": 4,
                "mlp_ratio": 2,
                "image_size": 28,
                "patch_size": 14,
                "out_indices": [1, 2, 3, 4],
                "reshape_hidden_states": False,
                "apply_layernorm": True,
            },
            "reassemble_hidden_size": 64,
            "patch_size": 14,
            "neck_hidden_sizes": [16, 16, 32, 32],
            "fusion_hidden_size": 16,
            "head_hidden_size": 16,
        },
    ),
    Entry(
        "vitpose",
        "VitPoseForPoseEstimation",
        of({"pixel_values": noise(1, 3, 32, 32)}),
        {
            "backbone_config": {
                "model_type": "vitpose_backbone",
                "hidden_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "mlp_ratio": 2,
                "image_size": [32, 32],
                "patch_size": [8, 8],
                "out_indices": [2],
            },
            "num_labels": 5,
        },
    ),
    Entry(
        "mask2former",
        "AutoModelForUniversalSegmentation",
        pixels_64,
        {
            "backbone_config": SWIN,
            "hidden_dim": 32,
            "feature_size": 32,
            "mask_feature_size": 32,
            "encoder_feedforward_dim": 64,
            "dim_feedforward": 64,
            "encoder_layers": 1,
            "decoder_layers": 2,
            "num_attention_heads": 4,
            "num_queries": 5,
            "num_labels": 5,
        },
    ),
    Entry(
        "maskformer",
        "AutoModelForInstanceSegmentation",
        pixels_64,
        {
            "backbone_config": SWIN,
            "decoder_config": {"model_type": "detr"}
            | DETR
            | {"d_model": 32, "decoder_layers": 2, "backbone_config": None},
            "fpn_feature_size": 32,
            "mask_feature_size": 32,
            "num_labels": 5,
        },
    ),
)
