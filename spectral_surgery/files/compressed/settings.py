"""What a compression is asked for; light to import, since the command line makes options of the fields."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Literal

from spectral_surgery.codec.rate import Target
from spectral_surgery.errors import ConfigError

if TYPE_CHECKING:
    from spectral_surgery.codec.encoded import Basis

AUTO = "auto"
DEFAULT_TRANSFORM = "dct"
MAX_TILE = 4096


@dataclass(frozen=True)
class CompressOptions:
    """Everything that decides the bytes of a compressed checkpoint."""

    target: Target = field(metadata={"help": "Density, bits or error of every tensor."})
    transform: str = field(
        default=DEFAULT_TRANSFORM,
        metadata={
            "help": "A transform (see methods), or auto: the best of each tensor by rate and error of its first part."
        },
    )
    tile: int = field(default=64, metadata={"help": "Side of the transform tiles."})
    quantizer: Literal["lattice", "scalar"] | None = field(
        default=None,
        metadata={
            "help": "Round 32 coefficients together, to a point of a lattice, or each by itself.",
            "unset": "lattice; scalar with --sparsity, which keeps exactly what it is asked to",
        },
    )
    include: tuple[str, ...] = field(
        default=(),
        metadata={"help": "Compress only tensors that match; repeatable.", "metavar": "GLOB", "repeatable": True},
    )
    exclude: tuple[str, ...] = field(
        default=(), metadata={"help": "Copy tensors that match; repeatable.", "metavar": "GLOB", "repeatable": True}
    )
    min_weights: int = field(default=4096, metadata={"help": "Copy smaller tensors."})
    copy: Literal["coded", "plain"] = field(
        default="coded",
        metadata={"help": "Store what is copied coded without loss, where that saves bytes, or as it is."},
    )
    copy_nonfinite: bool = field(
        default=False, metadata={"help": "Copy tensors with NaN or infinite values instead of refusing them."}
    )
    calibration: str | None = field(
        default=None, metadata={"help": "The text that codes were chosen by, in words and a checksum."}
    )
    importance: str | None = field(
        default=None, metadata={"help": "The text that says which coefficients are kept, in words and a checksum."}
    )
    base: str | None = field(
        default=None,
        metadata={"help": "Name of the checkpoint that differences are to; its checksum is added when it is read."},
    )
    allocation: Literal["even", "slope"] | None = field(
        default=None,
        metadata={
            "help": "With text: the same rate for every tensor, or more where one more bit or coefficient helps more.",
            "unset": "slope; even of --sparsity with --calibrate",
        },
    )

    def __post_init__(self) -> None:
        from spectral_surgery.transforms import TRANSFORMS  # which imports torch

        if self.quantizer == "lattice" and self.target.kind == "density":
            raise ConfigError(
                "quantizer: expected scalar with a density, got lattice, which chooses its zeros itself. Use --bits,"
                " or leave out --quantizer."
            )
        if not 1 <= self.tile <= MAX_TILE:
            raise ConfigError(f"tile: expected 1 to {MAX_TILE}, got {self.tile}.")
        if self.transform != AUTO and not TRANSFORMS[self.transform].accepts(self.tile):
            fitting = ", ".join(t.name for t in TRANSFORMS.values() if t.accepts(self.tile))
            raise ConfigError(
                f"tile: expected one that {self.transform} accepts, got {self.tile}, which {fitting} accept. "
                "Change --tile or --transform."
            )

    def to_json(self) -> dict[str, object]:
        """Plain values, for the manifest and for recognising unfinished work."""
        return asdict(self)

    def candidates(self, axes: tuple[int, ...]) -> list[Basis]:
        """Bases to choose from for a matrix transformed along ``axes``; the default transform comes first."""
        from spectral_surgery.codec.encoded import Basis
        from spectral_surgery.transforms import TRANSFORMS

        if self.transform != AUTO:
            return [Basis(self.transform, self.tile, axes)]
        names = [DEFAULT_TRANSFORM, *(name for name in TRANSFORMS if name != DEFAULT_TRANSFORM)]
        return [Basis(name, self.tile, axes) for name in names if TRANSFORMS[name].accepts(self.tile)]
