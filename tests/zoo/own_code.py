"""A model whose code is saved beside its weights, as repositories with auto_map have it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class TinyConfig(PreTrainedConfig):
    model_type = "zoo_own_code"
    vocab_size: int = 320
    hidden_size: int = 64
    num_hidden_layers: int = 2
    pad_token_id: int = 0


class TinyForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = TinyConfig

    def __init__(self, config: TinyConfig) -> None:
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(nn.Linear(config.hidden_size, config.hidden_size) for _ in range(2))
        self.head = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def forward(
        self, input_ids: Tensor | None = None, inputs_embeds: Tensor | None = None, **_others: object
    ) -> CausalLMOutput:
        hidden = self.embed(input_ids) if inputs_embeds is None else inputs_embeds
        for layer in self.layers:
            hidden = hidden + torch.relu(layer(hidden))
        return CausalLMOutput(logits=self.head(hidden))


TinyConfig.register_for_auto_class()
TinyForCausalLM.register_for_auto_class("AutoModelForCausalLM")
