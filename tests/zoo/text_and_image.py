"""Two towers: text and images into one space."""

from __future__ import annotations

from tests.zoo.entry import MODEL, Entry
from tests.zoo.inputs import clip_pair, fixed, noise, of, ones, text_and_image, tokens
from tests.zoo.settings import CLIP_IMAGES, CLIP_TEXT, ENCODER, IMAGES

TEXT_AND_IMAGE = (
    Entry("clip", MODEL, clip_pair, {"text_config": CLIP_TEXT, "vision_config": CLIP_IMAGES, "projection_dim": 32}),
    Entry("siglip", MODEL, clip_pair, {"text_config": CLIP_TEXT | {"projection_size": 64}, "vision_config": IMAGES}),
    Entry(
        "siglip2",
        MODEL,
        of(
            {
                "input_ids": tokens(10),
                "pixel_values": noise(2, 16, 192),
                "pixel_attention_mask": ones(2, 16),
                "spatial_shapes": fixed([[4, 4], [4, 4]]),
            }
        ),
        {"text_config": CLIP_TEXT | {"projection_size": 64}, "vision_config": IMAGES | {"num_patches": 16}},
    ),
    Entry(
        "chinese_clip", MODEL, clip_pair, {"text_config": ENCODER, "vision_config": CLIP_IMAGES, "projection_dim": 32}
    ),
    Entry(
        "owlvit", MODEL, text_and_image, {"text_config": CLIP_TEXT, "vision_config": CLIP_IMAGES, "projection_dim": 32}
    ),
    Entry(
        "aimv2", MODEL, text_and_image, {"text_config": CLIP_TEXT, "vision_config": CLIP_IMAGES, "projection_dim": 32}
    ),
)
