"""FFTNet as models of transformers: a language model from left to right, and two encoders.

The classes inherit from transformers, which takes seconds to import; they are made when they are first asked for, here
by name or by an Auto class.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from spectral_surgery.errors import ConfigError
from spectral_surgery.hf.fftnet.parts import (
    FFTNetBlock,
    FFTNetCache,
    check_config,
    check_ids,
    empty_cache,
    mean_of_tokens,
    places,
    sinusoids,
    through_blocks,
)
from spectral_surgery.mixers import AdaptiveSpectralFilter, ModReLU

MODEL_TYPE = "fftnet"


def register_config() -> None:
    """Make AutoConfig know FFTNet; once more changes nothing."""
    from transformers.models.auto.configuration_auto import AutoConfig

    AutoConfig.register(MODEL_TYPE, _config(), exist_ok=True)


def register_models() -> None:
    """Make the other Auto classes know FFTNet; once more changes nothing."""
    from transformers.models.auto import modeling_auto

    register_config()
    for auto, make in (
        ("AutoModel", _model),
        ("AutoModelForCausalLM", _causal_lm),
        ("AutoModelForMaskedLM", _masked_lm),
        ("AutoModelForSequenceClassification", _classifier),
    ):
        getattr(modeling_auto, auto).register(_config(), make(), exist_ok=True)


def __getattr__(name: str) -> Any:
    if name not in _CLASSES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _CLASSES[name]()


def _at_top(cls: Any) -> Any:
    """Say that a class is found in this module, which pickle wants to know."""
    cls.__qualname__ = cls.__name__
    return cls


@cache
def _config() -> Any:
    from transformers import PretrainedConfig

    class FFTNetConfig(PretrainedConfig):  # type: ignore[misc]
        """Sizes and settings of an FFTNet.

        Attributes:
            d_model: width D.
            num_heads: groups of channels that share a filter.
            mlp_hidden_dim: width of the MLP that adapts the filters to the text.
            ff_hidden_dim: width of the MLP of a block; None for 4 D.
            max_seq_length: tokens of a sequence at most.
            kernel_length: tokens that a token sees in a layer; both ways in an encoder, at about that resolution.
            chunk: tokens after which the filters of a causal model adapt to what has been seen.
            dropout: in training.
            layer_norm: whether there are norms.
            sinusoidal_positions: whether positions are added to the embeddings, scaled by initializer_range.
            modrelu_bias: at the start.
            init_std: spread of the filters around 1 at the start.
            initializer_range: spread of embeddings and linear layers at the start.
            is_causal: set by the class of the model.
        """

        model_type = MODEL_TYPE
        attribute_map = {  # noqa: RUF012 - as transformers has it
            "hidden_size": "d_model",
            "num_hidden_layers": "num_layers",
            "num_attention_heads": "num_heads",
            "max_position_embeddings": "max_seq_length",
        }
        keys_to_ignore_at_inference = ["cache", "past_key_values"]  # noqa: RUF012 - transformers reads a plain attribute

        vocab_size: int = 32000
        d_model: int = 256
        num_layers: int = 4
        num_heads: int = 16
        mlp_hidden_dim: int = 64
        ff_hidden_dim: int | None = None
        max_seq_length: int = 512
        kernel_length: int = 128
        chunk: int = 64
        dropout: float = 0.1
        layer_norm: bool = True
        sinusoidal_positions: bool = True
        modrelu_bias: float = -0.1
        init_std: float = 0.02
        initializer_range: float = 0.02
        is_causal: bool | None = None
        tie_word_embeddings: bool = True
        pad_token_id: int | None = None
        bos_token_id: int | None = None
        eos_token_id: int | None = None

    return _at_top(FFTNetConfig)


@cache
def cache_name() -> str:
    """What transformers calls the cache, in the outputs of models and in what `generate` gives them."""
    from transformers.modeling_outputs import BaseModelOutputWithPast

    return "cache" if hasattr(BaseModelOutputWithPast, "cache") else "past_key_values"  # renamed in 5.24


@cache
def _base() -> Any:
    from transformers import PreTrainedModel
    from transformers import initialization as init

    class FFTNetPreTrainedModel(PreTrainedModel):  # type: ignore[misc]
        """What FFTNet models have in common: how they start."""

        config_class = _config()
        base_model_prefix = "model"
        supports_gradient_checkpointing = True
        _no_split_modules = ("FFTNetBlock",)
        _is_stateful = True  # the cache cannot forget a token again
        wants_causal: bool | None = None

        def __init__(self, config: Any) -> None:
            """Settle the direction.

            Raises ConfigError when a setting is out of range, or the model was made for the other direction.
            """
            if self.wants_causal is not None and config.is_causal not in (None, self.wants_causal):
                raise ConfigError(
                    f"{type(self).__name__}: expected is_causal {self.wants_causal} in the configuration, got"
                    f" {config.is_causal}. Use the class that the model was trained with."
                )
            check_config(config)
            if self.wants_causal is not None:
                config.is_causal = self.wants_causal
            super().__init__(config)

        @torch.no_grad()
        def _init_weights(self, module: nn.Module) -> None:
            if isinstance(module, ModReLU):
                init.constant_(module.bias, self.config.modrelu_bias)
            elif isinstance(module, AdaptiveSpectralFilter):
                spread = torch.randn_like(module.filter) * self.config.init_std
                init.copy_(module.filter, spread + torch.tensor([1.0, 0.0], device=spread.device))
                init.zeros_(module.down.weight)
                init.zeros_(module.down.bias)
            else:
                super()._init_weights(module)

    return _at_top(FFTNetPreTrainedModel)


@cache
def _model() -> Any:
    from transformers.modeling_outputs import BaseModelOutputWithPast

    class FFTNetModel(_base()):  # type: ignore[misc]
        """Embeddings, blocks and a norm; it reads both ways unless the configuration says ``is_causal``."""

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.embed_tokens = nn.Embedding(config.vocab_size, config.d_model)
            blocks = [FFTNetBlock(config, is_causal=bool(config.is_causal)) for _ in range(config.num_layers)]
            self.blocks = nn.ModuleList(blocks)
            self.norm = nn.LayerNorm(config.d_model) if config.layer_norm else nn.Identity()
            self.dropout = nn.Dropout(config.dropout)
            self.gradient_checkpointing = False
            self.post_init()

        def forward(
            self,
            input_ids: Tensor,
            attention_mask: Tensor | None = None,
            *,
            cache: FFTNetCache | None = None,
            past_key_values: FFTNetCache | None = None,
            use_cache: bool = False,
            output_hidden_states: bool = False,
            return_dict: bool | None = None,
            **_: Any,
        ) -> Any:
            """Token numbers [B, T] to vectors [B, T, D].

            Args:
                attention_mask: [B, T], zero at padding; with a cache also [B, all tokens so far].
                past_key_values: the name of cache before transformers 5.24.
                output_hidden_states: return what each block gives, too.
                return_dict: False for a tuple instead of names.

            Raises:
                SpectralSurgeryError: when shapes or tokens do not fit, a text is too long, or an encoder gets a cache.
            """
            memory = past_key_values if cache is None else cache
            if memory is not None and attention_mask is not None:
                attention_mask = attention_mask[:, -input_ids.shape[1] :]
            check_ids(input_ids, attention_mask, self.config.vocab_size)
            at = places(input_ids, attention_mask, getattr(memory, "lengths", None), self.config.max_seq_length)
            x = self.embed_tokens(input_ids)
            if self.config.sinusoidal_positions:  # about as strong as fresh embeddings
                x = x + self.config.initializer_range * sinusoids(at, self.config.d_model).to(x.dtype)
            if use_cache and memory is None:
                memory = empty_cache(self.blocks, x)
            run = self._gradient_checkpointing_func if self.gradient_checkpointing and self.training else None
            states = through_blocks(self.blocks, self.dropout(x), attention_mask, memory, run)
            last = self.norm(states[-1])
            hidden = (*states[:-1], last) if output_hidden_states else None
            out = BaseModelOutputWithPast(last_hidden_state=last, hidden_states=hidden, **{cache_name(): memory})
            return out.to_tuple() if return_dict is False else out

    return _at_top(FFTNetModel)


@cache
def _causal_lm() -> Any:
    from transformers import GenerationMixin
    from transformers.modeling_outputs import CausalLMOutputWithPast

    class FFTNetForCausalLM(_base(), GenerationMixin):  # type: ignore[misc]
        """A language model: logits of the next token."""

        wants_causal = True
        _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012 - transformers reads a plain attribute

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.model = _model()(config)
            self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
            self.post_init()

        @classmethod
        def _supports_default_dynamic_cache(cls) -> bool:
            return False  # keys and values are not what is remembered

        def forward(
            self,
            input_ids: Tensor,
            attention_mask: Tensor | None = None,
            *,
            cache: FFTNetCache | None = None,
            past_key_values: FFTNetCache | None = None,
            labels: Tensor | None = None,
            use_cache: bool = False,
            logits_to_keep: int = 0,
            output_hidden_states: bool = False,
            return_dict: bool | None = None,
            **of_loss: Any,
        ) -> Any:
            """Logits [B, T, vocabulary] of the tokens, or of the last `logits_to_keep` where that is not 0.

            With labels [B, T], the tokens themselves and -100 where they do not count, also their loss, to which
            the arguments of transformers go. For the other arguments see `FFTNetModel`.
            """
            states = self.model(
                input_ids,
                attention_mask,
                cache=past_key_values if cache is None else cache,
                use_cache=use_cache,
                output_hidden_states=output_hidden_states,
            )
            logits = self.lm_head(states.last_hidden_state[:, -logits_to_keep:])
            loss = None
            if labels is not None:
                loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **of_loss)
            out = CausalLMOutputWithPast(loss, logits, getattr(states, cache_name()), states.hidden_states)
            return out.to_tuple() if return_dict is False else out

    return _at_top(FFTNetForCausalLM)


@cache
def _masked_lm() -> Any:
    from transformers.modeling_outputs import MaskedLMOutput

    class FFTNetForMaskedLM(_base()):  # type: ignore[misc]
        """An encoder that fills in masked tokens."""

        wants_causal = False
        _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012 - transformers reads a plain attribute

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.model = _model()(config)
            self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
            self.post_init()

        def forward(
            self,
            input_ids: Tensor,
            attention_mask: Tensor | None = None,
            *,
            labels: Tensor | None = None,
            output_hidden_states: bool = False,
            return_dict: bool | None = None,
            **of_loss: Any,
        ) -> Any:
            """Logits [B, T, vocabulary]; with labels [B, T], -100 at tokens that were not masked, their loss."""
            states = self.model(input_ids, attention_mask, output_hidden_states=output_hidden_states)
            logits = self.lm_head(states.last_hidden_state)
            loss = None
            if labels is not None:
                loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **of_loss)
            out = MaskedLMOutput(loss, logits, states.hidden_states)
            return out.to_tuple() if return_dict is False else out

    return _at_top(FFTNetForMaskedLM)


@cache
def _classifier() -> Any:
    from transformers.modeling_outputs import SequenceClassifierOutput

    class FFTNetForSequenceClassification(_base()):  # type: ignore[misc]
        """An encoder that classifies texts, or scores them, by the mean of their tokens."""

        wants_causal = False

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.num_labels = config.num_labels
            self.model = _model()(config)
            self.score = nn.Linear(config.d_model, config.num_labels)
            self.post_init()

        def forward(
            self,
            input_ids: Tensor,
            attention_mask: Tensor | None = None,
            *,
            labels: Tensor | None = None,
            output_hidden_states: bool = False,
            return_dict: bool | None = None,
            **of_loss: Any,
        ) -> Any:
            """Logits [B, classes]; with labels [B] their loss, by the ``problem_type`` of the configuration."""
            states = self.model(input_ids, attention_mask, output_hidden_states=output_hidden_states)
            logits = self.score(mean_of_tokens(states.last_hidden_state, attention_mask))
            loss = None
            if labels is not None:
                loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config, **of_loss)
            out = SequenceClassifierOutput(loss, logits, states.hidden_states)
            return out.to_tuple() if return_dict is False else out

    return _at_top(FFTNetForSequenceClassification)


_CLASSES = {
    "FFTNetConfig": _config,
    "FFTNetPreTrainedModel": _base,
    "FFTNetModel": _model,
    "FFTNetForCausalLM": _causal_lm,
    "FFTNetForMaskedLM": _masked_lm,
    "FFTNetForSequenceClassification": _classifier,
}
