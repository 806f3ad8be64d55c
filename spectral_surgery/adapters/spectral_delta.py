"""SpectralDelta: ΔW = scaling * T_outᵀ C T_in, C a spectrum with a few trained entries at places that are stored.

The basis is real, orthonormal and complete, so that any ΔW can be had with enough coefficients, and the error of
keeping the largest is the energy of the others. (FourierFT's real coefficients reach half of all matrices.)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor, nn

from spectral_surgery.adapters.base import AdapterMethod
from spectral_surgery.adapters.fourierft import random_positions
from spectral_surgery.adapters.positions import check_count, register_positions
from spectral_surgery.errors import ConfigError
from spectral_surgery.targets import pattern_value
from spectral_surgery.transforms.base import as_real
from spectral_surgery.transforms.fast import FAST

# steps of forming ΔW, per weight, and of its product, per weight and token, in those of one multiply-add of a GEMM;
# then of the operator, per token: of a transform, per point, and of the spectrum, per coefficient. Measured on a CPU.
_FORM, _PRODUCT = 1200, 1
_TRANSFORM, _COEFFICIENT = 800, 40


@dataclass(frozen=True)
class SpectralDeltaConfig:
    """Settings of SpectralDelta."""

    n_frequency: int = field(default=1000, metadata={"help": "Trained coefficients of a layer."})
    transform: Literal["dct", "hartley"] = field(
        default="dct", metadata={"help": "Orthonormal basis of both axes: dct or hartley."}
    )
    scaling: float = field(default=1.0, metadata={"help": "Factor of ΔW, whose norm is that of the coefficients."})
    random_loc_seed: int = field(default=777, metadata={"help": "Seed of the first places, the same for every layer."})
    init_weights: bool = field(
        default=True, metadata={"help": "true: start at zero, the base unchanged; false: N(0, 1)."}
    )
    n_frequency_pattern: Mapping[str, int] = field(
        default_factory=dict, metadata={"help": "n_frequency by layer name pattern."}
    )

    def for_layer(self, name: str) -> SpectralDeltaConfig:
        """The settings of one layer, patterns resolved."""
        n_frequency = pattern_value(self.n_frequency_pattern, name, self.n_frequency)
        return replace(self, n_frequency=n_frequency, n_frequency_pattern={})


class SpectralDelta(nn.Module):
    """A SpectralDelta update of an [O, I] weight.

    Attributes:
        spectrum: [K] coefficients, the parameter.
        positions: [K] their places, row * I + column, increasing; stored with the adapter.
    """

    def __init__(
        self, config: SpectralDeltaConfig, out_features: int, in_features: int, positions: Tensor | None = None
    ) -> None:
        """Place n_frequency coefficients.

        Raises:
            ConfigError: when n_frequency does not fit the layer or the positions, or the transform is unknown.
            CheckpointError: when the positions are not increasing places of the spectrum.
        """
        super().__init__()
        count = out_features * in_features
        check_count(config.n_frequency, count, (out_features, in_features))
        if positions is None:
            positions = random_positions(count, config.n_frequency, config.random_loc_seed).sort().values
        if positions.shape != (config.n_frequency,):
            raise ConfigError(
                f"positions: expected [{config.n_frequency}], one for each coefficient, got shape"
                f" {tuple(positions.shape)}. Set n_frequency to their number."
            )
        self.shape = (out_features, in_features)
        self.scaling = config.scaling
        self.transform = FAST[config.transform]
        self.spectrum = nn.Parameter((torch.zeros if config.init_weights else torch.randn)(config.n_frequency))
        self.positions: Tensor
        register_positions(self, positions, self.shape)

    def forward(self, x: Tensor) -> Tensor:
        """Residual of x [..., I]: [..., O] in its dtype; few tokens never meet an [O, I] tensor."""
        spectrum = as_real(self.spectrum)
        inputs = x.to(spectrum.dtype)
        tokens = inputs.numel() // self.shape[1]
        if self._dense_is_cheaper(tokens):
            return nn.functional.linear(inputs, self._delta(spectrum)).to(x.dtype)
        inputs = self.transform.forward(inputs).reshape(tokens, self.shape[1])
        product = self._multiply(spectrum * self.scaling, inputs)
        return self.transform.inverse(product).reshape(*x.shape[:-1], self.shape[0]).to(x.dtype)

    def delta_weight(self) -> Tensor:
        """[O, I] float32."""
        return self._delta(as_real(self.spectrum))

    def rows(self, ids: Tensor) -> Tensor:
        """Rows of delta_weight: [..., I] float32."""
        spectrum = as_real(self.spectrum)
        if ids.numel() * len(spectrum) > self.shape[0] * self.shape[1]:
            return nn.functional.embedding(ids, self._delta(spectrum))
        rows, columns = self._places()
        basis = self.transform.entries(rows, ids[..., None], self.shape[0]).to(spectrum.dtype)  # [..., K]
        frequencies = basis.new_zeros(*ids.shape, self.shape[1])
        frequencies = frequencies.index_add(-1, columns, basis * (spectrum * self.scaling))
        return self.transform.inverse(frequencies)

    def _multiply(self, spectrum: Tensor, x: Tensor) -> Tensor:
        # a bag of columns of C for each of its rows: [T, I] -> [T, O]
        starts = torch.arange(self.shape[0], device=x.device) * self.shape[1]
        starts = torch.searchsorted(self.positions, starts.to(self.positions.dtype))
        _, columns = self._places()
        bags = nn.functional.embedding_bag(
            columns, x.T.contiguous(), starts, mode="sum", per_sample_weights=spectrum
        )  # [O, T]
        return bags.T

    def _delta(self, spectrum: Tensor) -> Tensor:
        full = spectrum.new_zeros(self.shape[0] * self.shape[1])
        full = full.index_put((self.positions.long(),), spectrum * self.scaling)
        return self.transform.inverse2(full.reshape(self.shape))

    def _places(self) -> tuple[Tensor, Tensor]:
        positions = self.positions.long()
        return positions // self.shape[1], positions % self.shape[1]

    def _dense_is_cheaper(self, tokens: int) -> bool:
        rows, columns = self.shape
        operator = tokens * (_TRANSFORM * (rows + columns) + _COEFFICIENT * len(self.spectrum))
        return operator > rows * columns * (_FORM + _PRODUCT * tokens)


SPECTRAL_DELTA = AdapterMethod(
    name="spectral_delta",
    config=SpectralDeltaConfig,
    build=SpectralDelta,
    peft_type="SPECTRAL_DELTA",
    source="2-D DCT-II or Hartley transform, orthonormal; transforms/dct.py and transforms/hartley.py",
    learning_rate=1e-2,
)
