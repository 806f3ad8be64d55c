"""Sizes that many tiny models share."""

from __future__ import annotations

from typing import Any

Settings = dict[str, Any]

TOKENS: Settings = {"vocab_size": 320, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
BLOCKS: Settings = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
DECODER = TOKENS | BLOCKS | {"num_key_value_heads": 2, "max_position_embeddings": 128}
ENCODER = TOKENS | BLOCKS | {"max_position_embeddings": 130}
IMAGES = BLOCKS | {"image_size": 32, "patch_size": 8}
GPT2 = TOKENS | {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}
EXPERTS: Settings = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
}
# attention of DeepSeek V2 and later
LATENT: Settings = {
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}
SHARED_EXPERT: Settings = {"n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}
SLIDING: Settings = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
LINEAR: Settings = {
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention"],
}
MAMBA2: Settings = {
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_d_state": 16,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 16,
}
BART = TOKENS | {
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
}
T5: Settings = {
    "vocab_size": 320,
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 128,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "pad_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 0,
}
OPT = TOKENS | {
    "hidden_size": 64,
    "ffn_dim": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "word_embed_proj_dim": 64,
    "max_position_embeddings": 128,
}
XLM = TOKENS | {"emb_dim": 64, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 128, "n_words": 320}
CLIP_TEXT = ENCODER | {"max_position_embeddings": 64, "projection_dim": 32, "eos_token_id": 299}
CLIP_IMAGES = IMAGES | {"projection_dim": 32}
WAVES = BLOCKS | {
    "vocab_size": 32,
    "conv_dim": [32, 32],
    "conv_stride": [5, 4],
    "conv_kernel": [10, 8],
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}
IMAGE_TOKEN: Settings = {"image_token_id": 300, "image_token_index": 300}
