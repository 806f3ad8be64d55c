"""Time series, decisions, and models that are put together of two others."""

from __future__ import annotations

from tests.zoo.entry import MODEL, Entry
from tests.zoo.inputs import fixed, noise, of, ones, pairs, tokens
from tests.zoo.settings import ENCODER, GPT2, IMAGES, T5, WAVES

OTHERS = (
    Entry(
        "encoder-decoder",
        "EncoderDecoderModel",
        pairs,
        {
            "encoder": {"model_type": "bert"} | ENCODER,
            "decoder": {"model_type": "bert"} | ENCODER | {"is_decoder": True, "add_cross_attention": True},
            "decoder_start_token_id": 1,
            "pad_token_id": 0,
            "eos_token_id": 2,
        },
    ),
    Entry(
        "patchtst",
        MODEL,
        of({"past_values": noise(1, 32, 2)}),
        {
            "num_input_channels": 2,
            "context_length": 32,
            "patch_length": 4,
            "patch_stride": 4,
            "d_model": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "ffn_dim": 128,
        },
    ),
    Entry(
        "decision_transformer",
        "DecisionTransformerModel",
        of(
            {
                "states": noise(1, 5, 6),
                "actions": noise(1, 5, 3),
                "rewards": noise(1, 5, 1),
                "returns_to_go": noise(1, 5, 1),
                "timesteps": fixed([[0, 1, 2, 3, 4]]),
                "attention_mask": ones(1, 5),
            }
        ),
        {
            "state_dim": 6,
            "act_dim": 3,
            "hidden_size": 64,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 128,
            "max_ep_len": 64,
            "n_inner": 128,
        },
    ),
    Entry(
        "perceiver",
        "PerceiverForMaskedLM",
        of({"inputs": tokens(16), "attention_mask": ones(2, 16)}),
        {
            "vocab_size": 320,
            "d_latents": 64,
            "d_model": 64,
            "num_latents": 8,
            "num_blocks": 1,
            "num_self_attends_per_block": 2,
            "num_self_attention_heads": 4,
            "num_cross_attention_heads": 4,
            "qk_channels": 64,
            "v_channels": 64,
            "max_position_embeddings": 16,
            "image_size": 32,
        },
        reads_text=True,
        short=True,
    ),
    Entry(
        "pop2piano",
        "Pop2PianoForConditionalGeneration",
        of({"inputs_embeds": noise(1, 6, 64), "decoder_input_ids": tokens(5, 1)}),
        T5,
    ),
    Entry(
        "speech-encoder-decoder",
        "SpeechEncoderDecoderModel",
        of({"input_values": noise(1, 2000), "decoder_input_ids": tokens(5, 1)}),
        {
            "encoder": {"model_type": "wav2vec2"} | WAVES,
            "decoder": {"model_type": "bert"} | ENCODER | {"is_decoder": True, "add_cross_attention": True},
            "decoder_start_token_id": 1,
            "pad_token_id": 0,
        },
    ),
    Entry(
        "vit-gpt2",
        "VisionEncoderDecoderModel",
        of({"pixel_values": noise(1, 3, 32, 32), "decoder_input_ids": tokens(6, 1)}),
        {
            "encoder": {"model_type": "vit"} | IMAGES,
            "decoder": {"model_type": "gpt2"} | GPT2 | {"is_decoder": True, "add_cross_attention": True},
            "decoder_start_token_id": 1,
            "pad_token_id": 0,
        },
        model_type="vision-encoder-decoder",
    ),
)
