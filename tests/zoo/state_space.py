"""State space models, linear recurrences, and decoders that mix them with attention."""

from __future__ import annotations

from tests.zoo.entry import CAUSAL, Entry
from tests.zoo.inputs import text
from tests.zoo.settings import DECODER, EXPERTS, MAMBA2, TOKENS

RECURRENT = (
    Entry(
        "recurrent_gemma",
        CAUSAL,
        text,
        DECODER
        | {
            "num_hidden_layers": 3,
            "lru_width": 64,
            "attention_window_size": 16,
            "block_types": ["recurrent", "recurrent", "attention"],
            "conv1d_width": 4,
        },
    ),
    Entry(
        "granitemoehybrid",
        CAUSAL,
        text,
        DECODER
        | MAMBA2
        | EXPERTS
        | {"shared_intermediate_size": 64, "layer_types": ["mamba", "attention"], "mamba_expand": 2},
    ),
    Entry("mamba", CAUSAL, text, TOKENS | {"hidden_size": 64, "state_size": 8, "num_hidden_layers": 2, "expand": 2}),
    Entry(
        "mamba2",
        CAUSAL,
        text,
        TOKENS
        | {
            "hidden_size": 64,
            "state_size": 16,
            "num_hidden_layers": 2,
            "expand": 2,
            "num_heads": 8,
            "head_dim": 16,
            "n_groups": 2,
            "chunk_size": 16,
        },
    ),
    Entry(
        "falcon_mamba", CAUSAL, text, TOKENS | {"hidden_size": 64, "state_size": 8, "num_hidden_layers": 2, "expand": 2}
    ),
    Entry("falcon_h1", CAUSAL, text, DECODER | MAMBA2 | {"head_dim": 16, "mamba_d_ssm": 128}),
    Entry("bamba", CAUSAL, text, DECODER | MAMBA2 | {"attn_layer_indices": [1]}),
    Entry(
        "zamba2",
        CAUSAL,
        text,
        TOKENS
        | {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "max_position_embeddings": 128,
            "num_mem_blocks": 1,
            "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
            "mamba_d_state": 16,
            "n_mamba_heads": 8,
            "mamba_headdim": 16,
            "mamba_ngroups": 1,
            "chunk_size": 16,
            "adapter_rank": 16,
            "attention_hidden_size": 128,
            "attention_head_dim": 32,
        },
    ),
    Entry(
        "nemotron_h",
        CAUSAL,
        text,
        DECODER
        | EXPERTS
        | {
            "num_hidden_layers": 3,
            "layers_block_type": ["mamba", "attention", "moe"],
            "head_dim": 16,
            "mamba_num_heads": 8,
            "mamba_head_dim": 16,
            "ssm_state_size": 16,
            "n_groups": 2,
            "chunk_size": 16,
            "n_shared_experts": 1,
            "moe_shared_expert_intermediate_size": 64,
            "n_group": 1,
            "topk_group": 1,
        },
    ),
    Entry(
        "rwkv",
        CAUSAL,
        text,
        TOKENS | {"hidden_size": 64, "attention_hidden_size": 64, "num_hidden_layers": 2, "context_length": 128},
        only_float32=True,
    ),
    Entry(
        "xlstm",
        CAUSAL,
        text,
        TOKENS
        | {
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_hidden_layers_": 2,
            "num_blocks": 2,
            "num_heads": 4,
            "embedding_dim": 64,
            "chunk_size": 16,
            "qk_dim_factor": 1.0,
            "v_dim_factor": 1.0,
            "mlstm_round_up_to_multiple_of": 1,
        },
    ),
)
