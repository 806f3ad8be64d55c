"""Encoders of text and of documents."""

from __future__ import annotations

from tests.zoo.entry import MASKED, MODEL, Entry
from tests.zoo.inputs import between, fixed, masked_text, noise, of, ones, text, tokens
from tests.zoo.settings import BLOCKS, ENCODER, TOKENS, XLM

ENCODERS = (
    Entry("bert", MASKED, masked_text, ENCODER, mixer="spectral_mixing"),
    Entry("roberta", MASKED, masked_text, ENCODER, mixer="fftnet"),
    Entry("xlm-roberta-xl", MASKED, masked_text, ENCODER),
    Entry("camembert", MASKED, masked_text, ENCODER),
    Entry(
        "distilbert",
        MASKED,
        masked_text,
        TOKENS | {"dim": 64, "hidden_dim": 128, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 128},
    ),
    Entry("albert", MASKED, masked_text, ENCODER | {"embedding_size": 32}),
    Entry("electra", MASKED, masked_text, ENCODER | {"embedding_size": 32}),
    Entry(
        "deberta",
        MASKED,
        masked_text,
        ENCODER | {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
        only_float32=True,
    ),
    Entry(
        "deberta-v2",
        MASKED,
        masked_text,
        ENCODER
        | {
            "relative_attention": True,
            "position_buckets": 16,
            "pos_att_type": ["p2c", "c2p"],
            "share_att_key": True,
            "norm_rel_ebd": "layer_norm",
        },
    ),
    Entry("modernbert", MASKED, masked_text, ENCODER | {"global_attn_every_n_layers": 2, "local_attention": 8}),
    Entry(
        "longformer",
        MASKED,
        of(
            {
                "input_ids": tokens(16),
                "attention_mask": ones(2, 16),
                "global_attention_mask": fixed([[1] + [0] * 15] * 2),
            }
        ),
        ENCODER | {"attention_window": [8, 8]},
        reads_text=True,
    ),
    Entry(
        "funnel",
        MASKED,
        masked_text,
        TOKENS
        | {"d_model": 64, "n_head": 4, "d_head": 16, "d_inner": 128, "block_sizes": [1, 1], "num_decoder_layers": 1},
    ),
    Entry("nomic_bert", MASKED, masked_text, ENCODER),
    Entry("eurobert", MASKED, masked_text, ENCODER),
    Entry("gte", MODEL, masked_text, ENCODER),
    Entry("jina_embeddings_v3", MODEL, masked_text, ENCODER),
    Entry("big_bird", MASKED, masked_text, ENCODER | {"attention_type": "original_full"}),
    Entry("convbert", MASKED, masked_text, ENCODER | {"embedding_size": 64, "head_ratio": 2}),
    Entry(
        "mobilebert",
        MASKED,
        masked_text,
        ENCODER | {"embedding_size": 32, "intra_bottleneck_size": 32, "num_feedforward_networks": 1},
    ),
    Entry("squeezebert", MASKED, masked_text, ENCODER | {"embedding_size": 64}),
    Entry("fnet", MASKED, text, ENCODER, only_float32=True),
    Entry("esm", MASKED, masked_text, ENCODER),
    Entry(
        "nystromformer",
        MASKED,
        of({"input_ids": tokens(16)}),
        ENCODER | {"num_landmarks": 4, "segment_means_seq_len": 16},
        only_float32=True,
        reads_text=True,
        short=True,
    ),
    Entry("megatron-bert", MASKED, masked_text, ENCODER),
    Entry("ibert", MASKED, masked_text, ENCODER),
    Entry("flaubert", MODEL, masked_text, XLM),
    Entry("xlm", MODEL, masked_text, XLM),
    Entry("xmod", MASKED, masked_text, ENCODER | {"languages": ["en_XX"], "default_language": "en_XX"}),
    Entry("layoutlm", MASKED, masked_text, ENCODER),
    Entry(
        "canine",
        MODEL,
        of({"input_ids": tokens(16), "attention_mask": ones(2, 16)}),
        BLOCKS
        | {
            "max_position_embeddings": 128,
            "num_hash_buckets": 64,
            "num_hash_functions": 4,
            "local_transformer_stride": 8,
        },
        reads_text=True,
        short=True,
    ),
    Entry("dpr", "DPRQuestionEncoder", masked_text, ENCODER | {"projection_dim": 32}),
    Entry(
        "visual_bert",
        "VisualBertForPreTraining",
        of(
            {
                "input_ids": tokens(8),
                "attention_mask": ones(2, 8),
                "visual_embeds": noise(2, 3, 32),
                "visual_attention_mask": ones(2, 3),
            }
        ),
        ENCODER | {"visual_embedding_dim": 32},
        reads_text=True,
    ),
    Entry("splinter", "SplinterForQuestionAnswering", masked_text, ENCODER),
    Entry("roberta-prelayernorm", MASKED, masked_text, ENCODER),
    Entry("data2vec-text", MASKED, masked_text, ENCODER),
    Entry("ernie", MASKED, masked_text, ENCODER),
    Entry(
        "bros",
        MODEL,
        of({"input_ids": tokens(8), "attention_mask": ones(2, 8), "bbox": noise(2, 8, 4)}),
        ENCODER,
        reads_text=True,
    ),
    Entry(
        "layoutlmv3",
        MODEL,
        of(
            {
                "input_ids": tokens(8),
                "attention_mask": ones(2, 8),
                "bbox": between(0, 100, 2, 8, 4),
                "pixel_values": noise(2, 3, 32, 32),
            }
        ),
        ENCODER | {"coordinate_size": 8, "shape_size": 16, "input_size": 32, "patch_size": 8},
        reads_text=True,
    ),
    Entry(
        "markuplm",
        MODEL,
        of({"input_ids": tokens(8), "attention_mask": ones(2, 8)}),
        ENCODER | {"max_depth": 4, "xpath_unit_hidden_size": 16},
        reads_text=True,
    ),
    Entry(
        "vilt",
        MODEL,
        of(
            {
                "input_ids": tokens(8),
                "attention_mask": ones(2, 8),
                "pixel_values": noise(2, 3, 32, 32),
                "pixel_mask": ones(2, 32, 32),
            }
        ),
        ENCODER | {"image_size": 32, "patch_size": 8},
        reads_text=True,
    ),
)
