"""Checkpoints that another tool has quantised, read as the plain ones that they stand for.

`SOURCES` is the table of them, by the name in their configuration.
"""

from __future__ import annotations

from collections.abc import Mapping

from spectral_surgery.files.header import TensorInfo
from spectral_surgery.files.sources.base import Settings, SourceKind
from spectral_surgery.files.sources.bitsandbytes import BITSANDBYTES
from spectral_surgery.files.sources.compressed_tensors import COMPRESSED_TENSORS
from spectral_surgery.files.sources.fp8 import FBGEMM_FP8, FP8, looks_fp8
from spectral_surgery.files.sources.gptq_awq import AWQ, GPTQ
from spectral_surgery.files.sources.mxfp4 import MXFP4
from spectral_surgery.registry import Table

__all__ = ["SOURCES", "SourceKind", "is_read_as_plain", "quantisation_of", "read_as_plain"]

SOURCES: Table[SourceKind] = Table("source", (FP8, FBGEMM_FP8, MXFP4, COMPRESSED_TENSORS, BITSANDBYTES, GPTQ, AWQ))

_KEY = "quantization_config"
_PLACES = ((), ("text_config",), ("language_config",))  # where a configuration may have its settings


def quantisation_of(config: Mapping[str, object]) -> Settings | None:
    """The settings of the quantisation that a configuration names; None when it names none."""
    for place in _PLACES:
        inner: object = config
        for key in place:
            inner = inner.get(key) if isinstance(inner, Mapping) else None
        found = inner.get(_KEY) if isinstance(inner, Mapping) else None
        if found is not None:
            return found if isinstance(found, Mapping) else {"quant_method": found}
    return None


def is_read_as_plain(config: Mapping[str, object]) -> bool:
    """Whether a configuration is of another tool's quantisation that is read as what it stands for."""
    settings = quantisation_of(config)
    return settings is not None and str(settings.get("quant_method")) in SOURCES


def read_as_plain(
    tensors: dict[str, TensorInfo], config: dict[str, object]
) -> tuple[dict[str, TensorInfo], dict[str, object], tuple[str, ...]]:
    """The plain tensors and configuration of a checkpoint, and a sentence about it where it is another's.

    What is plain, and what no row of SOURCES reads, stays as it is.

    Raises CheckpointError when a tensor that is needed is missing or damaged.
    """
    settings = quantisation_of(config)
    if settings is None:
        if not looks_fp8(tensors):
            return tensors, config, ()
        settings = {"quant_method": FP8.name}
    kind = SOURCES.get(str(settings.get("quant_method")))
    if kind is None:
        return tensors, config, ()
    plain = dict(sorted(kind.read(tensors, settings).items()))
    made = sum(info.decoder is not None for info in plain.values())
    note = f"{made} of its tensors are quantised ({kind.name}), and are read as the bfloat16 that they stand for."
    return plain, _without(config), (note,)


def _without(config: Mapping[str, object]) -> dict[str, object]:
    """A configuration that names no quantisation."""
    return {
        key: _without(value) if (key,) in _PLACES and isinstance(value, Mapping) else value
        for key, value in config.items()
        if key != _KEY
    }
