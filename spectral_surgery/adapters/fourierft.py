"""FourierFT: ΔW = scaling * Re ifft2(F), F a spectrum with a few trained real entries at fixed places.

Source: arXiv 2405.03003; places, tensors and setting names as in PEFT.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from spectral_surgery.adapters.base import AdapterMethod
from spectral_surgery.adapters.positions import check_count, register_positions
from spectral_surgery.errors import ConfigError
from spectral_surgery.fourier import Places, adapted_linear, delta_rows, delta_weight, fold, fourier_delta
from spectral_surgery.targets import pattern_value

AUTO_STD = 3e-3  # of the entries of ΔW that scaling="auto" gives coefficients ~ N(0, 1)


@dataclass(frozen=True)
class FourierFTConfig:
    """Settings of FourierFT."""

    n_frequency: int = field(default=1000, metadata={"help": "Trained coefficients of a layer."})
    scaling: float | Literal["auto"] = field(
        default=150.0, metadata={"help": "Factor of ΔW; auto fits it to the shapes of the layers."}
    )
    random_loc_seed: int = field(default=777, metadata={"help": "Seed of the places, the same for every layer."})
    init_weights: bool = field(
        default=True, metadata={"help": "true: start at zero, the base unchanged; false: N(0, 1), as PEFT does."}
    )
    n_frequency_pattern: Mapping[str, int] = field(
        default_factory=dict, metadata={"help": "n_frequency by layer name pattern."}
    )

    def for_layer(self, name: str) -> FourierFTConfig:
        """The settings of one layer, patterns resolved."""
        n_frequency = pattern_value(self.n_frequency_pattern, name, self.n_frequency)
        return replace(self, n_frequency=n_frequency, n_frequency_pattern={})


class FourierFT(nn.Module):
    """A FourierFT update of an [O, I] weight.

    Attributes:
        spectrum: [K] coefficients, the parameter.
        positions: [K] their places, row * I + column; folded once, and again when others are loaded.
    """

    def __init__(
        self, config: FourierFTConfig, out_features: int, in_features: int, positions: Tensor | None = None
    ) -> None:
        """Place n_frequency coefficients.

        Raises ConfigError when n_frequency does not fit the layer, or scaling is still "auto".
        """
        super().__init__()
        count = out_features * in_features
        check_count(config.n_frequency, count, (out_features, in_features))
        if config.scaling == "auto":
            raise ConfigError("scaling: expected a number here, got 'auto'. Use the method's resolve.")
        self.shape = (out_features, in_features)
        self.scaling = float(config.scaling)
        start = torch.zeros if config.init_weights else torch.randn
        self.spectrum = nn.Parameter(start(config.n_frequency))
        self.positions: Tensor
        self._indices: Tensor
        self._factors: Tensor
        if positions is None:
            drawn = random_positions(count, config.n_frequency, config.random_loc_seed)
            self.register_buffer("positions", drawn, persistent=False)
            places = _folded(self.shape, config.n_frequency, config.random_loc_seed)
        else:
            register_positions(self, positions, self.shape)
            places = _fold(self.positions, self.shape)
            self.register_load_state_dict_post_hook(_fold_loaded)  # type: ignore[no-untyped-call]
        self.register_buffer("_indices", places.indices, persistent=False)
        self.register_buffer("_factors", places.factors, persistent=False)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; transformers loads adapters so, and no hook tells of it."""
        super().__setattr__(name, value)
        if name == "positions":
            self._indices, self._factors = _fold(value, self.shape)

    def forward(self, x: Tensor) -> Tensor:
        """Residual of x [..., I]: [..., O] in its dtype."""
        return fourier_delta(x, self.spectrum, self._places, self.shape[0], self.scaling).to(x.dtype)

    def fused_linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        """Output of a linear with this update, in one pass over its activations.

        Returns [..., O] in the dtype of x; None where dtypes are mixed, as under autocast, or the weight is not plain.
        ``x`` is [..., I]; ``weight`` is [O, I] of the base; ``bias`` is [O] of the base, or None.
        """
        plain = type(weight) in (Tensor, nn.Parameter) and weight.dtype == x.dtype
        if not plain or torch.is_autocast_enabled(x.device.type):
            return None
        return adapted_linear(x, weight, bias, self.spectrum, self._places, self.scaling)

    def delta_weight(self) -> Tensor:
        """[O, I] float32; float64 where the module is, for merging."""
        wide = torch.promote_types(self.spectrum.dtype, torch.float32)
        return delta_weight(self.spectrum.to(wide), self._places, self.shape, self.scaling)

    @property
    def _places(self) -> Places:
        buffers = self._buffers  # not by attribute: nn.Module looks for others first
        return Places(cast(Tensor, buffers["_indices"]), cast(Tensor, buffers["_factors"]))

    def rows(self, ids: Tensor) -> Tensor:
        """Rows of delta_weight: [..., I] float32."""
        return delta_rows(ids, self.spectrum.float(), self._places, self.shape, self.scaling)


@lru_cache(maxsize=32)
def random_positions(count: int, n_frequency: int, seed: int) -> Tensor:
    """The places PEFT draws: row * I + column in an [O, I] spectrum.

    Returns [n_frequency] int64, all different; shared, not to be written to.
    """
    with torch.device("cpu"):
        drawn = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return drawn[:n_frequency].clone()


@lru_cache(maxsize=32)
def _folded(shape: tuple[int, int], n_frequency: int, seed: int) -> Places:
    return _fold(random_positions(shape[0] * shape[1], n_frequency, seed), shape)


def _fold(positions: Tensor, shape: tuple[int, int]) -> Places:
    with positions.device:  # not that of a context in which a model is built
        return fold(positions, *shape)


def _fold_loaded(adapter: FourierFT, _: object) -> None:
    """After load_state_dict, which writes into the positions."""
    adapter._indices, adapter._factors = _fold(adapter.positions, adapter.shape)


def auto_scaling(config: FourierFTConfig, shapes: list[tuple[int, int]]) -> FourierFTConfig:
    """Settings whose scaling is a number: coefficients ~ N(0, 1) make entries of ΔW of about AUTO_STD.

    One number serves all layers, since the files hold one: the geometric mean over them. ``shapes`` is [O, I] of the
    target layers.
    """
    if config.scaling != "auto":
        return config
    logs = [math.log(AUTO_STD * rows * columns / math.sqrt(config.n_frequency / 2)) for rows, columns in shapes]
    return replace(config, scaling=math.exp(sum(logs) / len(logs)))


FOURIERFT = AdapterMethod(
    name="fourierft",
    config=FourierFTConfig,
    build=FourierFT,
    peft_type="FOURIERFT",
    source="arXiv 2405.03003",
    file_names={"spectrum": "fourierft_spectrum"},
    resolve=auto_scaling,
    learning_rate=5e-2,
)
