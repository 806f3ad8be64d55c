"""FourierFT with places drawn near a chosen frequency: the frequency bias of its paper.

A separate method, since PEFT would draw other places for a FOURIERFT file; here they are stored with it.

Source: arXiv 2405.03003, equation 5; corrected in that frequencies are fractions of the sampling rate (the paper's 200
bins of 768 are 0.26), so that one setting fits all shapes, and that of two places with the same basis function, (j, k)
and (-j, -k), one is drawn at most. The authors' program draws other places than the equation says.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from spectral_surgery.adapters.base import AdapterMethod
from spectral_surgery.adapters.fourierft import FourierFT, FourierFTConfig, auto_scaling
from spectral_surgery.adapters.positions import check_count
from spectral_surgery.errors import ConfigError
from spectral_surgery.targets import pattern_value

_BLOCK = 1 << 20  # places weighed at a time


@dataclass(frozen=True)
class FourierFTBiasedConfig:
    """Settings of FourierFT with frequency bias."""

    n_frequency: int = field(default=1000, metadata={"help": "Trained coefficients of a layer."})
    scaling: float | Literal["auto"] = field(
        default=150.0, metadata={"help": "Factor of ΔW; auto fits it to the shapes of the layers."}
    )
    center_frequency: float = field(
        default=0.0, metadata={"help": "Favoured distance from zero frequency, in cycles per weight: 0 to 0.71."}
    )
    bandwidth: float = field(default=0.26, metadata={"help": "How far from it places still are, in the same unit."})
    random_loc_seed: int = field(default=777, metadata={"help": "Seed of the places, the same for every layer."})
    init_weights: bool = field(
        default=True, metadata={"help": "true: start at zero, the base unchanged; false: N(0, 1)."}
    )
    n_frequency_pattern: Mapping[str, int] = field(
        default_factory=dict, metadata={"help": "n_frequency by layer name pattern."}
    )

    def for_layer(self, name: str) -> FourierFTBiasedConfig:
        """The settings of one layer, patterns resolved."""
        n_frequency = pattern_value(self.n_frequency_pattern, name, self.n_frequency)
        return replace(self, n_frequency=n_frequency, n_frequency_pattern={})


def build(config: FourierFTBiasedConfig, out_features: int, in_features: int) -> FourierFT:
    """A FourierFT update of an [O, I] weight whose places are drawn in the band, and stored.

    Raises ConfigError when a setting does not fit the layer, or scaling is still "auto".
    """
    band = Band(config.center_frequency, config.bandwidth)
    positions = draw((out_features, in_features), config.n_frequency, band, config.random_loc_seed)
    plain = FourierFTConfig(config.n_frequency, config.scaling, init_weights=config.init_weights)
    return FourierFT(plain, out_features, in_features, positions)


@dataclass(frozen=True)
class Band:
    """A ring of frequencies, in cycles per weight.

    Attributes:
        center: the distance D from zero frequency that is favoured, fc.
        width: how far from it places still are, W.

    Raises:
        ConfigError: when they are none.
    """

    center: float
    width: float

    def __post_init__(self) -> None:
        if self.center < 0:
            raise ConfigError(f"center_frequency: expected 0 or more, got {self.center:g}.")
        if not self.width > 0:
            raise ConfigError(f"bandwidth: expected above 0, got {self.width:g}. Use 0.26 as the paper.")

    def log_weights(self, rows: Tensor, shape: tuple[int, int]) -> Tensor:
        """Log of the sampling weights exp(-((D² - fc²) / (D W))²) of some rows of a spectrum.

        Returns [n, I] float32, at most 0. ``rows`` is [n] integers.
        """
        vertical, horizontal = (torch.fft.fftfreq(size, dtype=torch.float64, device="cpu") for size in shape)
        distance = torch.hypot(vertical[rows][:, None], horizontal)
        # D - fc²/D; at D = 0 that is 0 for fc = 0, else minus infinity: never drawn
        offset = distance - self.center**2 / distance if self.center else distance
        return -(offset / self.width).square().float()


@lru_cache(maxsize=32)
def draw(shape: tuple[int, int], n_frequency: int, band: Band, seed: int) -> Tensor:
    """Draw places without replacement, by the n largest of log weight + Gumbel noise.

    Returns [n_frequency] int64, increasing; shared, not to be written to. Raises ConfigError when there are fewer basis
    functions.
    """
    rows, columns = shape
    check_count(n_frequency, basis_functions(shape), shape)
    generator = torch.Generator("cpu").manual_seed(seed)
    scores, positions = torch.empty(0, device="cpu"), torch.empty(0, dtype=torch.int64, device="cpu")
    step = max(1, _BLOCK // columns)
    for start in range(0, rows, step):
        block = torch.arange(start, min(start + step, rows), device="cpu")
        noise = torch.empty(len(block), columns, device="cpu").exponential_(generator=generator)
        score = band.log_weights(block, shape) - noise.log()
        row, column = block[:, None], torch.arange(columns, device="cpu")
        place = row * columns + column
        first = place <= (-row % rows) * columns + (-column % columns)  # of a place and its mirror image
        scores = torch.cat([scores, score[first]])
        positions = torch.cat([positions, place[first]])
        best = scores.topk(min(n_frequency, len(scores))).indices
        scores, positions = scores[best], positions[best]
    return positions.sort().values


def basis_functions(shape: tuple[int, int]) -> int:
    """How many different functions cos(2 pi (p j / O + q k / I)) there are: places and mirror images are one."""
    rows, columns = shape
    own_mirrors = (2 - rows % 2) * (2 - columns % 2)
    return (rows * columns + own_mirrors) // 2


def _resolve(config: FourierFTBiasedConfig, shapes: list[tuple[int, int]]) -> FourierFTBiasedConfig:
    plain = FourierFTConfig(n_frequency=config.n_frequency, scaling=config.scaling)
    return replace(config, scaling=auto_scaling(plain, shapes).scaling)


FOURIERFT_BIASED = AdapterMethod(
    name="fourierft_biased",
    config=FourierFTBiasedConfig,
    build=build,
    peft_type="FOURIERFT_BIASED",
    source="arXiv 2405.03003, equation 5",
    resolve=_resolve,
    learning_rate=5e-2,
)
