"""FouRA: a low-rank update between transforms, ΔW = alpha / r * T_outᵀ B diag(m) A T_in, with m chosen by token or 1.

Source: arXiv 2406.08798. The transform is orthonormal and fixed, so (A T_in) and (T_outᵀ B) are the factors of a LoRA:
transforming the r rows of A and columns of B gives the same result as transforming every token, and costs less as
soon as there are more tokens than that. It is done so in training too; gradients pass through.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor, nn

from spectral_surgery.adapters import on_gpu
from spectral_surgery.adapters.base import AdapterMethod
from spectral_surgery.adapters.low_rank import BASES, LowRankBasis
from spectral_surgery.adapters.one_token import update
from spectral_surgery.adapters.rank_gate import RankGate
from spectral_surgery.errors import ConfigError, NotMergeableError
from spectral_surgery.targets import pattern_value
from spectral_surgery.transforms.base import as_real


@dataclass(frozen=True)
class FouraConfig:
    """Settings of FouRA."""

    r: int = field(default=8, metadata={"help": "Rank; of complex factors for dft, which are worth 2 r real ones."})
    alpha: float = field(default=16.0, metadata={"help": "ΔW is scaled by alpha / r."})
    transform: Literal["dct", "hartley", "dft"] = field(
        default="dct", metadata={"help": "dct; hartley, the real form of the DFT; or dft, with complex factors."}
    )
    init_weights: bool = field(
        default=True, metadata={"help": "true: B starts at zero, the base unchanged; false: B is drawn as A is."}
    )
    use_gate: bool = field(
        default=False, metadata={"help": "Choose components for each token; freeze the gate before merging."}
    )
    gate_threshold: float = field(
        default=0.5, metadata={"help": "Share of the even entropy, 0 to 1, below which a component is closed."}
    )
    gate_sharpness: float = field(default=4.0, metadata={"help": "Slope of the surrogate gradient of the gate."})
    rank_pattern: Mapping[str, int] = field(default_factory=dict, metadata={"help": "Rank by layer name pattern."})
    alpha_pattern: Mapping[str, float] = field(default_factory=dict, metadata={"help": "alpha by layer name pattern."})

    def for_layer(self, name: str) -> FouraConfig:
        """The settings of one layer, patterns resolved."""
        return replace(
            self,
            r=pattern_value(self.rank_pattern, name, self.r),
            alpha=pattern_value(self.alpha_pattern, name, self.alpha),
            rank_pattern={},
            alpha_pattern={},
        )


class Foura(nn.Module):
    """A FouRA update of an [O, I] weight; zero at the start. Per token it costs r (O + I) multiplications."""

    def __init__(self, config: FouraConfig, out_features: int, in_features: int) -> None:
        """Draw A, and set B to zero unless init_weights is false.

        Raises ConfigError when a setting does not fit the layer.
        """
        super().__init__()
        self.transform = config.transform
        largest = min(out_features, in_features) // self.basis.parts
        if not 0 < config.r <= largest:
            raise ConfigError(
                f"r {config.r}: expected 1 to {largest} for {config.transform} and a layer of {out_features} x"
                f" {in_features}. Change r, or rank_pattern for some layers."
            )
        self.shape = (out_features, in_features)
        self.r = config.r
        self.scaling = config.alpha / config.r
        self.A = nn.Parameter(torch.empty(self.basis.down_shape(config.r, in_features)))
        self.B = nn.Parameter(torch.zeros(self.basis.up_shape(config.r, out_features)))
        bound = 1 / math.sqrt(in_features * self.basis.parts)  # as LoRA; the parts of a complex number share a variance
        nn.init.uniform_(self.A, -bound, bound)
        if not config.init_weights:
            nn.init.uniform_(self.B, -bound, bound)
        self.gate: RankGate | None = None
        if config.use_gate:
            self.gate = RankGate(config.r, config.gate_threshold, config.gate_sharpness)

    @property
    def basis(self) -> LowRankBasis:
        """What the factors mean."""
        return BASES[self.transform]

    def forward(self, x: Tensor) -> Tensor:
        """Residual of x [..., I]: [..., O] in its dtype."""
        if x.numel() == self.shape[1] and (y := self._one_token(x)) is not None:
            return y.to(x.dtype)
        frozen = self.gate is None or self.gate.is_frozen
        if frozen and x.is_cuda and (few := on_gpu.update(x, self, self.lora_factors, self.scaling)) is not None:
            return few
        a, b = as_real(self.A), as_real(self.B)
        inputs = x.to(a.dtype)
        if inputs.numel() // self.shape[1] < self.r * self.basis.parts:
            return self._transform_tokens(inputs, a, b).to(x.dtype)
        low = self._masked(nn.functional.linear(inputs, self.basis.fold_down(a, self.shape[1])))  # [..., R]
        return nn.functional.linear(low, self.basis.fold_up(b, self.shape[0])).to(x.dtype)

    def train(self, mode: bool = True) -> Foura:
        """See nn.Module."""
        on_gpu.forget(self)
        return super().train(mode)

    def delta_weight(self) -> Tensor:
        """[O, I] float32. Raises NotMergeableError while the gate is dynamic."""
        down, up = self.lora_factors()
        return up @ down

    def rows(self, ids: Tensor) -> Tensor:
        """Rows of delta_weight: [..., I] float32. Raises NotMergeableError while the gate is dynamic."""
        down, up = self.lora_factors()
        return nn.functional.embedding(ids, up) @ down

    def lora_factors(self) -> tuple[Tensor, Tensor]:
        """The same update as a LoRA of rank R, r or for dft 2 r, with nothing left out of the factors.

        Returns a [R, I] and B [O, R] float32, with ΔW = B A; columns of B are zero for components closed by the gate.

        Raises:
            NotMergeableError: while the gate is dynamic.
        """
        if self.gate is not None and not self.gate.is_frozen:
            raise NotMergeableError(
                "foura: expected a frozen gate or none, got one that depends on the input, so no one weight update"
                " has its effect. Call freeze_gate() after training, or train with use_gate false."
            )
        down = self.basis.fold_down(as_real(self.A), self.shape[1])
        up = self.basis.fold_up(as_real(self.B), self.shape[0])
        return down, self._masked(up)

    def freeze_gate(self) -> None:
        """Make the gate one mask for all tokens: the components that most tokens opened. No gate stays none.

        Raises ConfigError when the gate has seen no tokens in training mode.
        """
        if self.gate is not None:
            self.gate.freeze()

    def _one_token(self, x: Tensor) -> Tensor | None:
        """The residual from a kernel, where it can be had: not with a gate that looks at the token."""
        if torch.compiler.is_compiling() or (self.gate is not None and not self.gate.is_frozen):
            return None
        mask = None if self.gate is None else self.gate.frozen_mask
        return update(x, (self.A, self.B), mask, self.scaling, self.transform, out_features=self.shape[0])

    def _transform_tokens(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        # the definition, and the cheaper way for a few tokens
        low = self.basis.down(x, a)
        return self.basis.up(self._masked(low), b, self.shape[0])

    def _masked(self, low: Tensor) -> Tensor:
        """Components that the gate lets through, scaled: [..., R]. ``low`` is [..., R]."""
        if self.gate is None:
            return low * self.scaling
        mask = self.gate(self.basis.magnitudes(low))
        return low * (torch.cat([mask] * self.basis.parts, -1) * self.scaling)


FOURA = AdapterMethod(name="foura", config=FouraConfig, build=Foura, peft_type="FOURA", source="arXiv 2406.08798")
