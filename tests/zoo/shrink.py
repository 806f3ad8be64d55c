"""A tiny configuration of a type, from the type's own defaults: sizes by name, tokens into a small vocabulary."""

from __future__ import annotations

from typing import Any

from tests.zoo.settings import Settings

VOCABULARY = 320
FIRST_SPECIAL = 300  # tokens that stand for images, sounds and the like start here
KEPT_TYPES = 3  # kinds of layers that one model holds at most

# a size has the same name in most types
SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "embed_dim", "embedding_size", "decoder_hidden_size"), 64),
    **dict.fromkeys(("encoder_hidden_size", "cross_attention_hidden_size", "text_hidden_size", "out_hidden_size"), 64),
    **dict.fromkeys(("backbone_hidden_size", "projector_hidden_size", "projection_size", "embedding_dim"), 64),
    **dict.fromkeys(("hidden_dim", "lru_width", "attention_hidden_size", "word_embed_proj_dim", "decoder_dim"), 64),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "dim_feedforward", "encoder_ffn_dim", "decoder_ffn_dim"), 128),
    **dict.fromkeys(("mlp_dim", "d_ff", "n_inner", "decoder_intermediate_size", "intermediate_size_mlp"), 128),
    **dict.fromkeys(
        ("feed_forward_size", "feedforward_dim", "encoder_feedforward_dim", "dense_intermediate_size"), 128
    ),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 64),
    **dict.fromkeys(("shared_intermediate_size", "moe_shared_expert_intermediate_size"), 64),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "depth", "encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(
        ("num_encoder_layers", "num_decoder_layers", "num_blocks", "layers", "decoder_num_hidden_layers"), 2
    ),
    **dict.fromkeys(("encoder_num_hidden_layers", "decoder_num_layers", "resampler_depth", "n_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "num_heads", "n_head", "n_heads", "attention_heads", "resampler_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads", "decoder_num_attention_heads"), 4),
    **dict.fromkeys(("encoder_num_attention_heads", "resampler_n_heads", "decoder_self_attention_heads"), 4),
    **dict.fromkeys(("decoder_cross_attention_heads", "swa_num_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads", "index_n_heads"), 2),
    **dict.fromkeys(("encoder_num_key_value_heads", "decoder_num_key_value_heads"), 4),
    **dict.fromkeys(("head_dim", "qk_nope_head_dim", "v_head_dim", "index_head_dim", "d_kv", "swa_head_dim"), 16),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim", "swa_v_head_dim"), 16),
    **dict.fromkeys(("global_head_dim", "resampler_head_dim", "attention_head_dim", "dim_head"), 16),
    **dict.fromkeys(("linear_num_key_heads",), 2),
    **dict.fromkeys(("linear_num_value_heads", "linear_num_heads"), 4),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "projection_dim", "o_lora_rank"), 32),
    **dict.fromkeys(("qk_rope_head_dim", "rotary_dim", "index_topk", "max_source_positions_per_chunk"), 8),
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "decoder_sparse_step_"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "num_shared_experts", "first_k_dense_replace"), 1),
    **dict.fromkeys(("sliding_window", "attention_window_size", "attention_chunk_size", "sliding_window_size"), 8),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_source_positions", "max_target_positions"), 128),
    **dict.fromkeys(("context_length", "max_seq_len", "n_ctx"), 128),
    "vocab_size": VOCABULARY,
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 32,
    "image_size": 32,
    "patch_size": 8,
    "num_mel_bins": 16,
    "codebook_size": 64,
    "num_queries": 5,
    "num_query_tokens": 4,
    "mamba_d_state": 16,
    "mamba_d_head": 16,
    "mamba_n_heads": 8,
    "mamba_d_ssm": 128,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 16,
    "num_buckets": 8,
}
# a kind for every layer: cut to one of each
PER_LAYER = ("layer_types", "mlp_layer_types", "layers_block_type", "indexer_types", "block_types", "ffn_layer_types")
DEPTHS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "depth")


def _kinds(given: list[str], layers: int) -> list[str]:
    """Each kind once, in order of appearance, then the last again until there are as many as layers."""
    kinds = [*dict.fromkeys(given)][:KEPT_TYPES]
    return (kinds + [kinds[-1]] * layers)[: max(layers, len(kinds))]


def _sized(name: str, value: Any) -> Any:
    """The size of that name if the type has it as one number, or as equal numbers for every side."""
    if isinstance(value, bool) or value is None or name not in SIZES:
        return value
    if isinstance(value, int):
        return SIZES[name]
    if name in ("image_size", "patch_size") and isinstance(value, (list, tuple)):
        return [SIZES[name]] * len(value)
    return value


def _turned(value: Settings) -> Settings:
    """Rotary settings for heads of 16: the parts of an angle that stand for time, height and width."""
    inner = {name: _turned(own) if isinstance(own, dict) else own for name, own in value.items()}
    return inner | {"mrope_section": [2, 3, 3]} if "mrope_section" in inner else inner


class Shrinker:
    """Numbers tokens beyond the vocabulary anew, the same number for the same token in all parts of a model."""

    def __init__(self) -> None:
        self._tokens: dict[int, int] = {}

    def token(self, name: str, value: int) -> int:
        """A token within the vocabulary: 0, 1 and 2 for padding, start and end, others from FIRST_SPECIAL on."""
        if value < FIRST_SPECIAL and value >= 0:
            return value
        plain = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
        if name in plain:
            return plain[name]
        return self._tokens.setdefault(value, FIRST_SPECIAL + len(self._tokens))

    def settings(self, config: Any) -> Settings:
        """What to give the class of ``config`` for a tiny one: only what differs from its defaults."""
        defaults = {name: value for name, value in vars(config).items() if not name.startswith("_")}
        found = {name: self._tiny(name, value) for name, value in defaults.items()}
        _fit_layers(found)
        if "kv_lora_rank" in found:  # latent attention: as many keys as queries, and heads that turn as a whole
            found["num_key_value_heads"] = SIZES["num_attention_heads"]
            found |= {"head_dim": SIZES["qk_rope_head_dim"]} if "head_dim" in found else {}
        return {name: value for name, value in found.items() if value != defaults.get(name)}

    def _tiny(self, name: str, value: Any) -> Any:
        from transformers import PreTrainedConfig

        if isinstance(value, PreTrainedConfig):
            return {"model_type": value.model_type} | self.settings(value)
        if isinstance(value, dict):
            return _turned(value)
        if isinstance(value, list) and name == "eos_token_id":
            return 2
        if isinstance(value, int) and name.endswith(("token_id", "token_index")):
            return self.token(name, value)
        return _sized(name, value)


def _fit_layers(found: Settings) -> None:
    """One layer of each kind at least; all lists of kinds as long as the longest, and as many layers."""
    lists = [name for name in PER_LAYER if isinstance(found.get(name), (list, tuple)) and found[name]]
    layers = next((found[name] for name in DEPTHS if isinstance(found.get(name), int)), 2)
    for _ in range(2):  # the second time all have the length of the longest
        for name in lists:
            found[name] = _kinds(list(found[name]), layers)
            layers = len(found[name])
    if lists:
        found |= {name: layers for name in DEPTHS if name in found}


def tiny_settings(model_type: str, changes: Settings | None = None) -> Settings:
    """Settings for ``AutoConfig.for_model(model_type, ...)``: by rule, then ``changes``, which may be nested."""
    from transformers import CONFIG_MAPPING

    return _changed(Shrinker().settings(CONFIG_MAPPING[model_type]()), changes or {})


def _changed(settings: Settings, changes: Settings) -> Settings:
    nested = {
        name: _changed(settings[name], own)
        for name, own in changes.items()
        if isinstance(own, dict) and isinstance(settings.get(name), dict)
    }
    return settings | changes | nested
