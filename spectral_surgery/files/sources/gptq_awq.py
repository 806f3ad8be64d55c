"""GPTQ and AWQ: integers of few bits, packed in words, with a scale and a zero for each group of inputs of an output.

A weight is ``scale * (integer - zero)``. Both store a matrix with inputs before outputs.
Sources: GPTQ, arXiv 2210.17323, as GPTQModel packs it; AWQ, arXiv 2306.00978, as AutoAWQ packs it for its gemm.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from spectral_surgery.errors import CheckpointError
from spectral_surgery.files.header import TensorInfo, named
from spectral_surgery.files.reader import read_tensor
from spectral_surgery.files.sources.base import Settings, SourceKind, Tensors, stands_for, wrong

_CODES, _ZEROS, _SCALES, _ORDER = "qweight", "qzeros", "scales", "g_idx"
_WORD = 32  # bits
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # which of eight outputs each part of a word is of, the lowest first


@dataclass(frozen=True)
class Grouped:
    """A matrix as integers, zeros and scales.

    Attributes:
        codes: I32, [I * bits / 32, O] of GPTQ, and [I, O * bits / 32] of AWQ.
        zeros: I32 [G, O * bits / 32].
        scales: [G, O].
        order: I32 [I], the group of each input; None where groups are inputs in order.
        awq: whether AWQ has packed it.
        add: to zeros: GPTQ's first format has them less by one.
    """

    codes: TensorInfo
    zeros: TensorInfo
    scales: TensorInfo
    order: TensorInfo | None
    bits: int
    awq: bool
    add: int

    @property
    def stored_bytes(self) -> int:
        """Bytes of all parts."""
        return sum(info.nbytes for info in (self.codes, self.zeros, self.scales, self.order) if info)

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs."""
        return self.scales.shape[1], self.codes.shape[0] * (1 if self.awq else _WORD // self.bits)

    def rows(self, start: int, stop: int) -> Tensor:
        """Outputs, for which all of the integers are read: [R, I] bfloat16.

        Raises CheckpointError when a scale is not finite, or an input has no group.
        """
        words = read_tensor(self.codes)
        if self.awq:
            codes = self._along_outputs(words, start, stop)
        else:
            codes = self._unpacked(words[:, start:stop].mT).reshape(stop - start, -1).mT
        zeros = self._along_outputs(read_tensor(self.zeros) + self.add, start, stop)
        scales = read_tensor(self.scales)[:, start:stop].float()
        if not bool(torch.isfinite(scales).all()):
            raise wrong(self.scales, "has NaN or infinite scales; expected finite ones.")
        group = self._groups(len(codes), len(scales))
        return ((codes - zeros[group]).float() * scales[group]).mT.bfloat16()

    def _unpacked(self, words: Tensor) -> Tensor:
        """[..., n] int32 to [..., n, 32 / bits], the lowest part of a word first."""
        return (words[..., None] >> torch.arange(0, _WORD, self.bits, dtype=torch.int32)) & ((1 << self.bits) - 1)

    def _along_outputs(self, words: Tensor, start: int, stop: int) -> Tensor:
        """Some outputs of what is packed along them: [n, O * bits / 32] to [n, R]."""
        each = _WORD // self.bits
        first = start // each
        parts = self._unpacked(words[:, first : -(-stop // each)])
        if self.awq:
            parts = parts[..., torch.tensor(_AWQ_ORDER).argsort()]
        return parts.flatten(1)[:, start - first * each : stop - first * each]

    def _groups(self, inputs: int, groups: int) -> Tensor:
        """[I] int64, the group of each input."""
        if self.order is None:
            return torch.arange(inputs) // -(-inputs // groups)
        order = read_tensor(self.order).long()
        if bool(((order < 0) | (order >= groups)).any()):
            raise wrong(self.order, f"has groups beyond the {groups} that have scales; expected groups of these.")
        return order


def read_gptq(tensors: Tensors, settings: Settings) -> dict[str, TensorInfo]:
    """The plain tensors of a checkpoint of GPTQ.

    Raises CheckpointError when something of a weight is missing or does not fit, or it is packed in another way.
    """
    form = str(settings.get("checkpoint_format") or settings.get("format") or "gptq")
    if form not in ("gptq", "gptq_v2"):
        raise _other("gptq", f"the checkpoint_format gptq or gptq_v2, got {form}")
    return _read(tensors, awq=False, less_by_one=form == "gptq")


def read_awq(tensors: Tensors, settings: Settings) -> dict[str, TensorInfo]:
    """The plain tensors of a checkpoint of AWQ. Raises CheckpointError as `read_gptq`."""
    form = str(settings.get("version") or settings.get("format") or "gemm").lower()
    if form != "gemm":
        raise _other("awq", f"the version gemm, got {form}")
    return _read(tensors, awq=True, less_by_one=False)


def _other(method: str, what: str) -> CheckpointError:
    return CheckpointError(f"config.json: expected {method} with {what}. Start from the unquantised checkpoint.")


def _read(tensors: Tensors, *, awq: bool, less_by_one: bool) -> dict[str, TensorInfo]:
    plain = dict(tensors)
    for name in [name for name in tensors if name.endswith(f".{_CODES}")]:
        stem = name.removesuffix(_CODES)
        parts = {part: plain.pop(stem + part) for part in (_CODES, _ZEROS, _SCALES, _ORDER) if stem + part in plain}
        matrix = _matrix(parts, stem, awq=awq, less_by_one=less_by_one)
        plain[f"{stem}weight"] = stands_for(parts[_CODES], matrix, name=f"{stem}weight", shape=matrix.shape)
    orphans = [info for name, info in plain.items() if name.endswith((f".{_ZEROS}", f".{_SCALES}"))]
    if orphans:
        raise wrong(orphans[0], f"belongs to a weight that is missing; expected its {_CODES}.")
    return plain


def _matrix(parts: Mapping[str, TensorInfo], stem: str, *, awq: bool, less_by_one: bool) -> Grouped:
    codes, missing = parts[_CODES], [stem + part for part in (_ZEROS, _SCALES) if part not in parts]
    if missing:
        raise wrong(codes, f"is quantised; expected {named(missing)} beside it.")
    zeros, scales, order = parts[_ZEROS], parts[_SCALES], parts.get(_ORDER)
    if any(info.dtype != "I32" or len(info.shape) != 2 for info in (codes, zeros)) or len(scales.shape) != 2:
        raise wrong(codes, f"is {codes.dtype} {list(codes.shape)}; expected I32 matrices of it and of its zeros.")
    groups, outputs = scales.shape
    bits = _WORD * zeros.shape[1] // max(outputs, 1)
    if bits not in ((4,) if awq else (2, 4, 8)):
        raise wrong(zeros, f"has integers of {bits} bits; expected {'4' if awq else '2, 4 or 8'}.")
    each = _WORD // bits
    add = sum(1 << shift for shift in range(0, _WORD, bits)) if less_by_one else 0
    made = Grouped(codes, zeros, scales, order, bits, awq, add)
    wide = outputs // each if awq else outputs
    fits = codes.shape[1] == wide and zeros.shape == (groups, outputs // each) and outputs % each == 0 < groups
    if not fits or (order is not None and (order.dtype, order.shape) != ("I32", (made.shape[1],))):
        shapes = [list(info.shape) for info in parts.values()]
        raise wrong(codes, f"and what is beside it have the shapes {shapes}, which do not fit; expected those of one.")
    return made


GPTQ = SourceKind("gptq", read_gptq)
AWQ = SourceKind("awq", read_awq)
