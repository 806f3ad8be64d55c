"""Checkpoints of compressed-tensors (llm-compressor, Kimi K2): packed numbers are unpacked by that library.

All of its formats keep the rows of a matrix apart, so rows are cut before they are given to the library.
Source: compressed-tensors 0.20.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from spectral_surgery.errors import CheckpointError, required
from spectral_surgery.files.header import FLOATS8, TensorInfo, named
from spectral_surgery.files.reader import read_flat, read_tensor
from spectral_surgery.files.sources.base import Settings, SourceKind, Tensors, stands_for, wrong
from spectral_surgery.files.sources.scaled import scaled

_LIBRARY = "compressed_tensors"
_PACKED, _PLAIN, _SCALE, _ZERO, _SHAPE = (
    "weight_packed",
    "weight",
    "weight_scale",
    "weight_zero_point",
    "weight_shape",
)
_PARTS = (_PACKED, _PLAIN, _SCALE, _ZERO, _SHAPE, "weight_global_scale", "weight_g_idx")
_OF_ACTIVATIONS = re.compile(r"\.(input|output|k|v|q)_(global_)?(scale|zero_point)$")


@dataclass(frozen=True)
class Packed:
    """A matrix that the library unpacks.

    Attributes:
        parts: what is stored of it, by the names of the library.
        format: name of the library for the way of packing.
        scheme: settings of the quantisation, as JSON.
    """

    parts: tuple[tuple[str, TensorInfo], ...]
    shape: tuple[int, int]
    format: str
    scheme: str

    @property
    def stored_bytes(self) -> int:
        """Bytes of all parts."""
        return sum(info.nbytes for _, info in self.parts)

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows of the matrix: [R, I] bfloat16.

        Raises:
            BackendError: when the library is not installed.
            CheckpointError: when it refuses what is stored, or scales are not finite.
        """
        library = _library()
        scheme = library.quantization.QuantizationScheme.model_validate(json.loads(self.scheme))
        state = {name: self._cut(name, info, start, stop, scheme) for name, info in self.parts}
        state[_SHAPE] = torch.tensor([stop - start, self.shape[1]])
        compressor = library.compressors.BaseCompressor.get_value_from_registry(self.format)
        try:
            weight: Tensor = compressor.decompress(state, scheme)[_PLAIN]
        except (RuntimeError, ValueError, IndexError, TypeError, AttributeError, KeyError) as error:
            reason = " ".join(str(error).split())[:200]
            raise wrong(self.parts[0][1], f"is refused by compressed-tensors ({reason}).") from None
        return weight.bfloat16()

    def _cut(self, name: str, info: TensorInfo, start: int, stop: int, scheme: Any) -> Tensor:
        """The rows of a part; of zero points, which are packed along the rows, they are unpacked first."""
        if name == _ZERO and self.format == "pack-quantized":
            helpers = import_module(f"{_LIBRARY}.compressors.pack_quantized.helpers")
            bits, shape = scheme.weights.num_bits, (self.shape[0], info.shape[1])
            zeros = helpers.unpack_from_int32(read_tensor(info), bits, torch.Size(shape), packed_dim=0)
            cut = zeros[start:stop]
            padded = torch.cat((cut, cut.new_zeros(64, shape[1])))  # the library cannot unpack a single word
            packed: Tensor = helpers.pack_to_int32(padded, bits, packed_dim=0).contiguous()
            return packed
        if len(info.shape) < 2 or info.shape[0] != self.shape[0]:
            part = read_tensor(info)
        else:
            width = info.numel // info.shape[0]
            part = read_flat(info, start * width, stop * width).reshape(stop - start, *info.shape[1:])
        if name == _SCALE and not bool(torch.isfinite(part.float()).all()):
            raise wrong(info, "has NaN or infinite scales; expected finite ones.")
        return part


def read_compressed_tensors(tensors: Tensors, settings: Settings) -> dict[str, TensorInfo]:
    """The plain tensors of a checkpoint of compressed-tensors.

    Raises:
        BackendError: when the library is needed and is not installed.
        CheckpointError: when something of a weight is missing or does not fit, or the settings say nothing of it.
    """
    plain: dict[str, TensorInfo] = {}
    used: set[str] = set()
    for name, info in tensors.items():
        stem, _, part = name.rpartition(".")
        quantised = part == _PACKED or (part == _PLAIN and info.dtype in (*FLOATS8, "I8"))
        if quantised:
            parts = {part: tensors[f"{stem}.{part}"] for part in _PARTS if f"{stem}.{part}" in tensors}
            if _SCALE not in parts:
                raise wrong(info, f"is quantised and has no scales; expected {named([f'{stem}.{_SCALE}'])} beside it.")
            plain[f"{stem}.{_PLAIN}"] = _weight(f"{stem}.{_PLAIN}", info, parts, *_scheme_of(stem, settings))
            used |= {f"{stem}.{part}" for part in parts}
    others = {name: info for name, info in tensors.items() if name not in used and not _OF_ACTIVATIONS.search(name)}
    orphans = [info for name, info in others.items() if name.endswith(f".{_SCALE}")]
    if orphans:
        raise wrong(orphans[0], "is the scale of a weight that is missing or not quantised; expected that weight.")
    return plain | others


def _weight(
    name: str, info: TensorInfo, parts: Mapping[str, TensorInfo], form: str, scheme: Mapping[str, Any]
) -> TensorInfo:
    weights = scheme["weights"]
    if _PLAIN in parts and _ZERO not in parts:
        block = weights.get("block_structure")
        if weights.get("strategy") == "group":
            block = (1, weights["group_size"])
        return stands_for(info, scaled(info, parts[_SCALE], tuple(block) if block else None), name=name)
    if "weight_g_idx" in parts:
        raise wrong(info, "has columns in another order (weight_g_idx), which compressed-tensors 0.20 does not read.")
    if len(info.shape) != 2:
        raise wrong(info, f"has the shape {list(info.shape)}; expected rows and columns.")
    library, shape = _library(), (info.shape[0], _columns(info, parts, weights))
    _check_scales(parts[_SCALE], shape, weights)
    if form not in library.compressors.BaseCompressor.registered_names():
        raise wrong(
            info, f"is {form}; expected one of {', '.join(library.compressors.BaseCompressor.registered_names())}."
        )
    if _PLAIN in parts and weights.get("strategy") == "block":
        raise wrong(info, "has zero points for blocks; expected them for rows or groups.")
    return stands_for(
        info, Packed(tuple(parts.items()), shape, form, json.dumps(scheme, sort_keys=True)), name=name, shape=shape
    )


def _columns(info: TensorInfo, parts: Mapping[str, TensorInfo], weights: Mapping[str, Any]) -> int:
    """Columns of the matrix; only where padding could hide them are they read."""
    if _PLAIN in parts:
        return info.shape[1]
    if weights.get("group_size") and weights["group_size"] > 0:
        return int(parts[_SCALE].shape[-1] * weights["group_size"])
    if _SHAPE in parts:
        return int(read_tensor(parts[_SHAPE])[-1])
    return info.shape[1] * 8 * info.nbytes // info.numel // int(weights["num_bits"])


def _check_scales(scales: TensorInfo, shape: tuple[int, int], weights: Mapping[str, Any]) -> None:
    group = weights.get("group_size") or 0
    fits = [(shape[0], math.ceil(shape[1] / group))] if group > 0 else [(shape[0], 1), (shape[0],), (1,), (), (1, 1)]
    if scales.shape not in fits:
        raise wrong(
            scales, f"has the shape {list(scales.shape)} for a weight of {list(shape)}; expected {list(fits[0])}."
        )


def _scheme_of(module: str, settings: Settings) -> tuple[str, Mapping[str, Any]]:
    """The name of the format of a module, and its scheme: the group that names it, else the first of its kind."""
    groups = settings.get("config_groups")
    schemes = list(groups.values()) if isinstance(groups, Mapping) else []
    schemes = [
        scheme for scheme in schemes if isinstance(scheme, Mapping) and isinstance(scheme.get("weights"), Mapping)
    ]
    scheme = next((one for one in schemes if _names(one.get("targets"), module)), schemes[0] if schemes else None)
    if scheme is None:
        raise CheckpointError("config.json: quantization_config has no config_groups with weights; expected some.")
    return str(scheme.get("format") or settings.get("format")), scheme


def _names(targets: object, module: str) -> bool:
    if not isinstance(targets, list):
        return False
    return any(
        re.match(target[3:], module) if target.startswith("re:") else module == target or module.endswith(f".{target}")
        for target in map(str, targets)
    )


def _library() -> Any:
    for part in ("compressors", "quantization"):
        required(f"{_LIBRARY}.{part}", "unpack the weights", "'spectral-surgery[compressed-tensors]'")
    return import_module(_LIBRARY)


COMPRESSED_TENSORS = SourceKind("compressed-tensors", read_compressed_tensors)
