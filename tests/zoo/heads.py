"""Other heads, ties and layouts of types that are in the zoo already, and parts that live in folders of their own."""

from __future__ import annotations

from tests.zoo.entry import CAUSAL, CLASSIFIER, MODEL, SEQ2SEQ, Entry
from tests.zoo.inputs import ending_in, masked_text, of, pairs, pixels, text, wave
from tests.zoo.settings import BART, CLIP_IMAGES, CLIP_TEXT, DECODER, ENCODER, GPT2, OPT, T5, TOKENS, WAVES, XLM

HEADS = (
    Entry("opt-350m", CAUSAL, text, OPT | {"word_embed_proj_dim": 32, "do_layer_norm_before": False}, model_type="opt"),
    Entry(
        "llama-tied", CAUSAL, text, DECODER | {"tie_word_embeddings": True}, model_type="llama", mixer="causal_fftnet"
    ),
    Entry(
        "falcon40b",
        CAUSAL,
        text,
        TOKENS
        | {
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_kv_heads": 2,
            "new_decoder_architecture": True,
        },
        model_type="falcon",
    ),
    Entry("bert-cls", CLASSIFIER, masked_text, ENCODER | {"num_labels": 3}, model_type="bert", mixer="fnet"),
    Entry("bert-model", MODEL, masked_text, ENCODER, model_type="bert"),
    Entry(
        "t5-gated",
        SEQ2SEQ,
        pairs,
        T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
        model_type="t5",
    ),
    Entry("xlm-mlm", "XLMWithLMHeadModel", masked_text, XLM, model_type="xlm"),
    Entry("flaubert-mlm", "FlaubertWithLMHeadModel", masked_text, XLM, model_type="flaubert"),
    Entry("gptj-tied", CAUSAL, text, GPT2 | {"rotary_dim": 8, "tie_word_embeddings": True}, model_type="gptj"),
    Entry("phi-tied", CAUSAL, text, DECODER | {"tie_word_embeddings": True}, model_type="phi"),
    Entry("t5-encoder", "T5EncoderModel", masked_text, T5, model_type="t5"),
    Entry("umt5-encoder", "UMT5EncoderModel", masked_text, T5, model_type="umt5"),
    Entry("clip-text", "CLIPTextModelWithProjection", masked_text, CLIP_TEXT, model_type="clip_text_model"),
    Entry("clip-vision", "CLIPVisionModelWithProjection", pixels, CLIP_IMAGES, model_type="clip_vision_model"),
    Entry("llama-cls", CLASSIFIER, masked_text, DECODER | {"num_labels": 3}, model_type="llama"),
    Entry(
        "qwen3-cls",
        CLASSIFIER,
        masked_text,
        DECODER | {"num_labels": 1, "head_dim": 16, "tie_word_embeddings": True},
        model_type="qwen3",
    ),
    Entry("gpt2-cls", CLASSIFIER, masked_text, GPT2 | {"num_labels": 3}, model_type="gpt2"),
    Entry("roberta-cls", CLASSIFIER, masked_text, ENCODER | {"num_labels": 3}, model_type="roberta"),
    Entry(
        "distilbert-cls",
        CLASSIFIER,
        masked_text,
        TOKENS
        | {"dim": 64, "hidden_dim": 128, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 128, "num_labels": 3},
        model_type="distilbert",
    ),
    Entry(
        "deberta-v2-cls",
        CLASSIFIER,
        masked_text,
        ENCODER
        | {
            "relative_attention": True,
            "position_buckets": 16,
            "pos_att_type": ["p2c", "c2p"],
            "share_att_key": True,
            "norm_rel_ebd": "layer_norm",
            "num_labels": 3,
        },
        model_type="deberta-v2",
    ),
    Entry(
        "modernbert-cls",
        CLASSIFIER,
        masked_text,
        ENCODER | {"global_attn_every_n_layers": 2, "local_attention": 8, "num_labels": 3},
        model_type="modernbert",
    ),
    Entry("bert-qa", "AutoModelForQuestionAnswering", masked_text, ENCODER, model_type="bert"),
    Entry(
        "bart-cls",
        CLASSIFIER,
        of({"input_ids": ending_in(2, 12)}),
        BART | {"num_labels": 3},
        model_type="bart",
        reads_text=True,
    ),
    Entry("qwen3-model", MODEL, masked_text, DECODER | {"head_dim": 16}, model_type="qwen3"),
    Entry("wav2vec2-cls", "AutoModelForAudioClassification", wave, WAVES | {"num_labels": 4}, model_type="wav2vec2"),
)
