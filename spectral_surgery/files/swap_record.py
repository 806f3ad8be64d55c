"""What config.json of a swapped model says, so that loading rebuilds it: which layers, and which mixer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from spectral_surgery.errors import CheckpointError, FormatVersionError

SWAP_METHOD = "spectral_surgery_swap"  # transformers calls whatever changes modules before loading a quantisation
SWAP_VERSION = 1


@dataclass(frozen=True)
class SwapRecord:
    """How a model was swapped. ``settings``: of the mixer, all of them."""

    mixer: str
    layers: tuple[int, ...]
    settings: Mapping[str, Any]

    def to_json(self) -> dict[str, object]:
        """Content of ``quantization_config``."""
        return {
            "quant_method": SWAP_METHOD,
            "format_version": SWAP_VERSION,
            "mixer": self.mixer,
            "layers": list(self.layers),
            "settings": dict(self.settings),
        }


def read_record(body: Mapping[str, Any]) -> SwapRecord:
    """Read what `SwapRecord.to_json` made.

    Raises:
        FormatVersionError: when a newer release wrote it.
        CheckpointError: when something is missing or of another kind.
    """
    version = body.get("format_version")
    if version != SWAP_VERSION:
        raise FormatVersionError(
            f"config.json: expected a swap in format version {SWAP_VERSION}, got {version!r}. Upgrade"
            " spectral-surgery to read newer files."
        )
    mixer, layers, settings = body.get("mixer"), body.get("layers"), body.get("settings")
    numbers = isinstance(layers, list) and all(type(number) is int for number in layers)
    if not isinstance(mixer, str) or not numbers or not isinstance(settings, Mapping):
        raise CheckpointError(
            f"config.json: expected a name, a list of numbers and an object, got mixer {mixer!r}, layers {layers!r}"
            f" and settings {settings!r}. Swap again, or fetch it again."
        )
    return SwapRecord(mixer, tuple(layers or ()), settings)
