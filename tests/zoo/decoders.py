"""Decoders of text without experts and without recurrence."""

from __future__ import annotations

from tests.zoo.entry import CAUSAL, Entry
from tests.zoo.inputs import text
from tests.zoo.settings import DECODER, ENCODER, GPT2, OPT, SLIDING, TOKENS

DECODERS = (
    Entry("gpt2", CAUSAL, text, GPT2, mixer="causal_fftnet"),
    Entry("gpt_bigcode", CAUSAL, text, GPT2),
    Entry("openai-gpt", CAUSAL, text, GPT2),
    Entry("gptj", CAUSAL, text, GPT2 | {"rotary_dim": 8}),
    Entry(
        "gpt_neo",
        CAUSAL,
        text,
        TOKENS
        | {
            "hidden_size": 64,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 8,
            "max_position_embeddings": 128,
        },
    ),
    Entry("gpt_neox", CAUSAL, text, DECODER | {"tie_word_embeddings": False}),
    Entry("opt", CAUSAL, text, OPT),
    Entry("bloom", CAUSAL, text, TOKENS | {"hidden_size": 64, "n_layer": 2, "n_head": 4}),
    Entry("llama", CAUSAL, text, DECODER | {"tie_word_embeddings": False}, mixer="causal_spectral_mixing"),
    Entry("ministral", CAUSAL, text, DECODER | {"head_dim": 16}),
    Entry("qwen2", CAUSAL, text, DECODER | {"tie_word_embeddings": True}, mixer="causal_fnet"),
    Entry("qwen3", CAUSAL, text, DECODER | {"head_dim": 16, "tie_word_embeddings": True}, mixer="causal_hybrid"),
    Entry("gemma", CAUSAL, text, DECODER | {"head_dim": 16}),
    Entry("gemma2", CAUSAL, text, DECODER | {"head_dim": 16, "sliding_window": 8}),
    Entry("gemma3_text", CAUSAL, text, DECODER | SLIDING | {"head_dim": 16}),
    Entry(
        "gemma3n_text",
        CAUSAL,
        text,
        TOKENS
        | {
            "hidden_size": 64,
            "intermediate_size": [128, 128, 128, 128],
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
            "head_dim": 16,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
            "num_kv_shared_layers": 0,
            "hidden_size_per_layer_input": 32,
            "vocab_size_per_layer_input": 320,
            "laurel_rank": 16,
            "altup_num_inputs": 2,
            "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
        },
    ),
    Entry(
        "gemma4_text",
        CAUSAL,
        text,
        DECODER
        | SLIDING
        | {
            "head_dim": 16,
            "global_head_dim": 16,
            "num_kv_shared_layers": 0,
            "hidden_size_per_layer_input": 32,
            "vocab_size_per_layer_input": 320,
        },
    ),
    Entry("vaultgemma", CAUSAL, text, DECODER | {"head_dim": 16, "sliding_window": 8}),
    Entry("phi3", CAUSAL, text, DECODER | {"tie_word_embeddings": False}),
    Entry("persimmon", CAUSAL, text, DECODER),
    Entry(
        "falcon",
        CAUSAL,
        text,
        TOKENS
        | {
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "new_decoder_architecture": False,
            "multi_query": True,
        },
    ),
    Entry(
        "mpt",
        CAUSAL,
        text,
        TOKENS | {"d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 128, "expansion_ratio": 2},
    ),
    Entry("stablelm", CAUSAL, text, DECODER),
    Entry("olmo", CAUSAL, text, DECODER),
    Entry("olmo2", CAUSAL, text, DECODER),
    Entry("olmo3", CAUSAL, text, DECODER | SLIDING),
    Entry("glm", CAUSAL, text, DECODER | {"head_dim": 16}),
    Entry("glm4", CAUSAL, text, DECODER | {"head_dim": 16}),
    Entry("granite", CAUSAL, text, DECODER),
    Entry("cohere2", CAUSAL, text, DECODER | SLIDING | {"head_dim": 16}),
    Entry("starcoder2", CAUSAL, text, DECODER),
    Entry("nemotron", CAUSAL, text, DECODER),
    Entry("smollm3", CAUSAL, text, DECODER | {"head_dim": 16}),
    Entry("ernie4_5", CAUSAL, text, DECODER | {"head_dim": 16}),
    Entry("exaone4", CAUSAL, text, DECODER | SLIDING | {"head_dim": 16}),
    Entry("hunyuan_v1_dense", CAUSAL, text, DECODER | {"head_dim": 16}),
    Entry("helium", CAUSAL, text, DECODER | {"head_dim": 16}),
    Entry("seed_oss", CAUSAL, text, DECODER | {"head_dim": 16}),
    Entry("apertus", CAUSAL, text, DECODER),
    Entry("bitnet", CAUSAL, text, DECODER),
    Entry("diffllama", CAUSAL, text, DECODER),
    Entry("doge", CAUSAL, text, DECODER),
    Entry("nanochat", CAUSAL, text, DECODER),
    Entry("biogpt", CAUSAL, text, ENCODER),
    Entry(
        "xglm",
        CAUSAL,
        text,
        TOKENS | {"d_model": 64, "num_layers": 2, "attention_heads": 4, "ffn_dim": 128, "max_position_embeddings": 128},
    ),
    Entry("ctrl", CAUSAL, text, GPT2 | {"dff": 128}),
    Entry(
        "xlnet", CAUSAL, text, TOKENS | {"d_model": 64, "n_layer": 2, "n_head": 4, "d_inner": 128}, only_float32=True
    ),
    Entry(
        "cpmant",
        CAUSAL,
        text,
        TOKENS
        | {
            "hidden_size": 64,
            "num_attention_heads": 4,
            "dim_head": 16,
            "dim_ff": 128,
            "num_hidden_layers": 2,
            "prompt_types": 4,
            "prompt_length": 4,
            "segment_types": 4,
        },
    ),
    Entry("bert-generation", "BertGenerationDecoder", text, ENCODER | {"is_decoder": True}),
    Entry("internlm3", CAUSAL, text, DECODER | {"head_dim": 16}),
    Entry(
        "minicpm3",
        CAUSAL,
        text,
        DECODER
        | {
            "num_key_value_heads": 4,
            "q_lora_rank": 32,
            "kv_lora_rank": 32,
            "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 8,
        },
    ),
    Entry("exaone", CAUSAL, text, DECODER),
    Entry("gpt_neox_japanese", CAUSAL, text, ENCODER | {"intermediate_multiple_size": 2}),
    Entry("jais2", CAUSAL, text, DECODER | {"num_key_value_heads": 4}),
)
