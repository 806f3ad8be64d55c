"""Models with an encoder and a decoder of text."""

from __future__ import annotations

from tests.zoo.entry import SEQ2SEQ, Entry
from tests.zoo.inputs import pairs
from tests.zoo.settings import BART, DECODER, T5, TOKENS

ENCODER_DECODERS = (
    Entry("t5", SEQ2SEQ, pairs, T5),
    Entry("mt5", SEQ2SEQ, pairs, T5),
    Entry("umt5", SEQ2SEQ, pairs, T5),
    Entry("longt5", SEQ2SEQ, pairs, T5 | {"local_radius": 4}),
    Entry(
        "switch_transformers",
        SEQ2SEQ,
        pairs,
        T5 | {"num_experts": 4, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1, "expert_capacity": 64},
    ),
    Entry("mbart", SEQ2SEQ, pairs, BART),
    Entry("pegasus", SEQ2SEQ, pairs, BART),
    Entry("marian", SEQ2SEQ, pairs, BART | {"share_encoder_decoder_embeddings": True}),
    Entry("m2m_100", SEQ2SEQ, pairs, BART),
    Entry(
        "nllb-moe",
        SEQ2SEQ,
        pairs,
        BART | {"num_experts": 4, "encoder_sparse_step": 2, "decoder_sparse_step": 2, "expert_capacity": 32},
    ),
    Entry("blenderbot", SEQ2SEQ, pairs, BART),
    Entry("plbart", SEQ2SEQ, pairs, BART),
    Entry("bigbird_pegasus", SEQ2SEQ, pairs, BART | {"attention_type": "original_full"}),
    Entry(
        "prophetnet",
        SEQ2SEQ,
        pairs,
        TOKENS
        | {
            "hidden_size": 64,
            "encoder_ffn_dim": 128,
            "decoder_ffn_dim": 128,
            "num_encoder_layers": 2,
            "num_decoder_layers": 2,
            "num_encoder_attention_heads": 4,
            "num_decoder_attention_heads": 4,
            "max_position_embeddings": 128,
            "decoder_start_token_id": 1,
        },
    ),
    Entry(
        "t5gemma",
        SEQ2SEQ,
        pairs,
        {
            "encoder": DECODER | {"head_dim": 16, "sliding_window": 8},
            "decoder": DECODER | {"head_dim": 16, "sliding_window": 8, "is_decoder": True},
        },
    ),
    Entry(
        "fsmt",
        SEQ2SEQ,
        pairs,
        {
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "d_model": 64,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 128,
            "decoder_ffn_dim": 128,
            "max_position_embeddings": 128,
            "decoder_start_token_id": 2,
            "forced_eos_token_id": 2,
            "langs": ["en", "de"],
            "src_vocab_size": 320,
            "tgt_vocab_size": 320,
        },
    ),
)
