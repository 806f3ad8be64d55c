"""LoRA, the control that every comparison needs: ΔW = lora_alpha / rank * B A.

Source: arXiv 2106.09685; tensors and setting names as in PEFT.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from spectral_surgery.adapters.base import AdapterMethod
from spectral_surgery.errors import ConfigError
from spectral_surgery.targets import pattern_value


@dataclass(frozen=True)
class LoraConfig:
    """Settings of LoRA."""

    r: int = field(default=8, metadata={"help": "Rank."})
    lora_alpha: float = field(default=16.0, metadata={"help": "ΔW is scaled by lora_alpha / r."})
    rank_pattern: Mapping[str, int] = field(default_factory=dict, metadata={"help": "Rank by layer name pattern."})
    alpha_pattern: Mapping[str, float] = field(default_factory=dict, metadata={"help": "lora_alpha by pattern."})

    def for_layer(self, name: str) -> LoraConfig:
        """The settings of one layer, patterns resolved."""
        return replace(
            self,
            r=pattern_value(self.rank_pattern, name, self.r),
            lora_alpha=pattern_value(self.alpha_pattern, name, self.lora_alpha),
            rank_pattern={},
            alpha_pattern={},
        )


class Lora(nn.Module):
    """A low-rank update of an [O, I] weight; zero at the start. The rank may be above O and I."""

    def __init__(self, config: LoraConfig, out_features: int, in_features: int) -> None:
        super().__init__()
        if config.r < 1:
            raise ConfigError(f"r {config.r}: expected 1 or more.")
        self.scaling = config.lora_alpha / config.r
        self.A = nn.Parameter(torch.empty(config.r, in_features))
        self.B = nn.Parameter(torch.zeros(out_features, config.r))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        """Residual of x [..., I]: [..., O] in its dtype."""
        low = nn.functional.linear(x.to(self.A.dtype), self.A)  # [..., R]
        return (nn.functional.linear(low, self.B) * self.scaling).to(x.dtype)

    def delta_weight(self) -> Tensor:
        """[O, I] float32."""
        return self.scaling * (self.B @ self.A)

    def rows(self, ids: Tensor) -> Tensor:
        """Rows of delta_weight: [..., I] float32."""
        return self.scaling * (nn.functional.embedding(ids, self.B) @ self.A)


LORA = AdapterMethod(
    name="lora",
    config=LoraConfig,
    build=Lora,
    peft_type="LORA",
    source="arXiv 2106.09685",
    file_names={
        "A": "lora_A.weight",
        "B": "lora_B.weight",
        "bias": "lora_B.bias",
        "magnitude": "lora_magnitude_vector",
        "embedding_A": "lora_embedding_A",
        "embedding_B": "lora_embedding_B",
    },
)
