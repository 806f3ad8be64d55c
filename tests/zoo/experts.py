"""Decoders with mixtures of experts: one tensor an expert, fused, or transposed."""

from __future__ import annotations

from tests.zoo.entry import CAUSAL, Entry
from tests.zoo.inputs import text
from tests.zoo.settings import DECODER, EXPERTS, LATENT, LINEAR, SHARED_EXPERT, SLIDING, TOKENS

EXPERTS_OF_TEXT = (
    Entry("mixtral", CAUSAL, text, DECODER | EXPERTS),
    Entry(
        "qwen2_moe", CAUSAL, text, DECODER | EXPERTS | {"shared_expert_intermediate_size": 64, "decoder_sparse_step": 1}
    ),
    Entry(
        "qwen3_moe",
        CAUSAL,
        text,
        DECODER | EXPERTS | {"head_dim": 16, "decoder_sparse_step": 1, "norm_topk_prob": True},
    ),
    Entry(
        "qwen3_next",
        CAUSAL,
        text,
        DECODER | LINEAR | EXPERTS | {"head_dim": 16, "shared_expert_intermediate_size": 64, "decoder_sparse_step": 1},
    ),
    Entry("phimoe", CAUSAL, text, DECODER | EXPERTS),
    Entry("olmoe", CAUSAL, text, DECODER | EXPERTS),
    Entry("flex_olmo", CAUSAL, text, DECODER | EXPERTS),
    Entry("deepseek_v2", CAUSAL, text, DECODER | LATENT | SHARED_EXPERT | EXPERTS | {"topk_method": "greedy"}),
    Entry(
        "deepseek_v3",
        CAUSAL,
        text,
        DECODER | LATENT | EXPERTS | {"n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1},
    ),
    Entry(
        "deepseek_v32",
        CAUSAL,
        text,
        DECODER
        | LATENT
        | EXPERTS
        | {
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "n_group": 2,
            "topk_group": 1,
            "index_n_heads": 2,
            "index_head_dim": 16,
            "index_topk": 8,
        },
    ),
    Entry("glm4_moe", CAUSAL, text, DECODER | SHARED_EXPERT | EXPERTS | {"head_dim": 16}),
    Entry("granitemoe", CAUSAL, text, DECODER | EXPERTS),
    Entry("granitemoeshared", CAUSAL, text, DECODER | EXPERTS | {"shared_intermediate_size": 64}),
    Entry("gpt_oss", CAUSAL, text, DECODER | SLIDING | EXPERTS | {"head_dim": 16}),
    Entry(
        "llama4_text",
        CAUSAL,
        text,
        DECODER
        | EXPERTS
        | {
            "head_dim": 16,
            "intermediate_size_mlp": 128,
            "interleave_moe_layer_step": 1,
            "moe_layers": None,
            "no_rope_layers": [1, 0],
            "attention_chunk_size": 16,
            "num_experts_per_tok": 1,
        },
    ),
    Entry("minimax_m2", CAUSAL, text, DECODER | EXPERTS | {"head_dim": 16}),
    Entry(
        "ernie4_5_moe",
        CAUSAL,
        text,
        DECODER
        | {
            "head_dim": 16,
            "moe_num_experts": 4,
            "moe_k": 2,
            "moe_intermediate_size": 64,
            "moe_num_shared_experts": 1,
            "moe_layer_start_index": 1,
        },
    ),
    Entry("hunyuan_v1_moe", CAUSAL, text, DECODER | {"head_dim": 16, "num_experts": 4, "moe_topk": 2}),
    Entry(
        "lfm2_moe", CAUSAL, text, DECODER | EXPERTS | {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1}
    ),
    Entry("jetmoe", CAUSAL, text, DECODER | EXPERTS | {"kv_channels": 16}),
    Entry(
        "dbrx",
        CAUSAL,
        text,
        TOKENS
        | {
            "d_model": 64,
            "n_heads": 4,
            "n_layers": 2,
            "max_seq_len": 128,
            "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 64},
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        },
    ),
    Entry("dots1", CAUSAL, text, DECODER | SHARED_EXPERT | EXPERTS | {"head_dim": 16}),
    Entry(
        "kimi_linear",
        CAUSAL,
        text,
        DECODER
        | EXPERTS
        | {
            "num_key_value_heads": 4,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_head_dim": 16,
            "linear_num_heads": 4,
            "head_dim": 16,
            "kv_lora_rank": 32,
            "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 8,
            "v_head_dim": 16,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
        },
    ),
    Entry(
        "qwen3_5_moe_text",
        CAUSAL,
        text,
        DECODER | LINEAR | EXPERTS | {"head_dim": 16, "shared_expert_intermediate_size": 64},
    ),
    Entry(
        "afmoe",
        CAUSAL,
        text,
        DECODER
        | SLIDING
        | {
            "head_dim": 16,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "num_shared_experts": 1,
            "num_dense_layers": 1,
        },
    ),
    Entry(
        "mimo_v2_flash",
        CAUSAL,
        text,
        DECODER
        | EXPERTS
        | {
            "head_dim": 16,
            "v_head_dim": 16,
            "swa_head_dim": 16,
            "swa_v_head_dim": 16,
            "swa_num_attention_heads": 4,
            "swa_num_key_value_heads": 2,
            "sliding_window": 8,
            "n_group": 1,
            "topk_group": 1,
        },
    ),
    Entry("zaya", CAUSAL, text, DECODER | EXPERTS | {"head_dim": 16, "num_experts_per_tok": 1}),
    Entry("solar_open", CAUSAL, text, DECODER | SHARED_EXPERT | EXPERTS | {"head_dim": 16}),
    Entry("mellum", CAUSAL, text, DECODER | EXPERTS | {"head_dim": 16}),
)
