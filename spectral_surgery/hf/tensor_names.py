"""Which rows of which stored tensors the parameters of a model are.

transformers renames tensors when it loads them, stacks experts, splits fused matrices and permutes rows. Its tables
say how; this is the one place that asks them. A conversion is understood by running it on labels of rows in the place
of weights: what comes out says where each row of a parameter was stored. Where a conversion does more than move rows,
the parameter has no pieces, and whoever asks has to say so.
Source: transformers 5.24, `core_model_loading.py` and `conversion_mapping.py`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from spectral_surgery.files.index import CheckpointIndex, TensorInfo
from spectral_surgery.files.reader import DTYPES, read_tensor

Span = tuple[int, int, int]  # first row of the parameter, first row of the stored tensor, number of rows
ANY = ""  # the pattern of a tensor that is renamed at most
_LABELS = 1 << 62  # random ones below: no arithmetic on labels gives another label


@dataclass(frozen=True)
class Piece:
    """Rows of a parameter that are in one stored tensor.

    Rows are those of the matrix [numel / columns, columns], where columns are the last dimension, or 1 of a vector.

    Attributes:
        spans: runs of rows.
        transposed: whether the rows are those of the stored tensor with its last two dimensions exchanged.
    """

    info: TensorInfo
    spans: tuple[Span, ...]
    transposed: bool = False


@dataclass(frozen=True)
class StoredParameter:
    """A parameter, and where it is stored. ``pieces``: cover all its rows."""

    name: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]

    @property
    def whole(self) -> TensorInfo | None:
        """The stored tensor that the parameter is, bit by bit; None when it is made of parts."""
        only = self.pieces[0]
        rows = rows_of(self.shape)
        same = len(self.pieces) == 1 and only.info.shape == self.shape and not only.transposed
        return only.info if same and only.spans == ((0, 0, rows),) else None

    @property
    def dtype(self) -> str:
        """As files name it: F32."""
        return self.pieces[0].info.dtype

    @property
    def numel(self) -> int:
        """Numbers in it."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes that it takes in files."""
        info = self.pieces[0].info
        return self.numel * info.nbytes // max(info.numel, 1)

    def read(self, stored: Callable[[TensorInfo], Tensor] = read_tensor) -> Tensor:
        """The parameter, put together from the files."""
        if self.whole is not None:
            return stored(self.whole)
        made = torch.empty(self.shape, dtype=DTYPES[self.pieces[0].info.dtype])
        matrix = as_rows(made)
        for piece in self.pieces:
            tensor = stored(piece.info)
            rows = as_rows(tensor.mT if piece.transposed else tensor)
            for row, source, count in piece.spans:
                matrix[row : row + count] = rows[source : source + count]
        return made


def rows_of(shape: Sequence[int]) -> int:
    """Rows of the matrix that a tensor of this shape is taken for."""
    count = 1
    for size in shape[:-1] if len(shape) > 1 else shape:
        count *= size
    return count


def as_rows(tensor: Tensor) -> Tensor:
    """[rows, columns], a view where that is possible."""
    return tensor.reshape(rows_of(tensor.shape), -1)


@dataclass(frozen=True)
class TensorNames:
    """The parameters of a model, found in a checkpoint.

    Attributes:
        parameters: by name in the model; without a model, none.
        unclear: stored names by parameter, where a conversion does more than move rows.
    """

    index: CheckpointIndex
    parameters: Mapping[str, StoredParameter] = field(default_factory=dict)
    unclear: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Sort names by what is behind their first part."""
        shorter: dict[str, list[str]] = {}
        for name in (*self.parameters, *self.index.tensors):
            rest = shorter.setdefault(name.partition(".")[2], [])
            if name not in rest:
                rest.append(name)
        object.__setattr__(self, "_shorter", shorter)

    def find(self, name: str) -> StoredParameter | None:
        """Where a parameter is stored; None when it is not, or not as rows.

        ``name``: in the model, or in the same model with a head more or less, which has one prefix more or less; or the
        stored name.
        """
        for spelling in self._spellings(name):
            if spelling in self.parameters:
                return self.parameters[spelling]
            if spelling in self.index.tensors and spelling not in self.unclear:
                return as_stored(spelling, self.index.tensors[spelling])
        return None

    def tensor(self, name: str) -> TensorInfo | None:
        """The stored tensor that a parameter is as a whole; None when there is none."""
        parameter = self.find(name)
        return parameter.whole if parameter else None

    def _spellings(self, name: str) -> Iterable[str]:
        yield name
        inner = name.partition(".")[2]
        if inner.count(".") >= 2:
            yield inner
        outer = cast("dict[str, list[str]]", self._shorter).get(name, [])  # type: ignore[attr-defined]  # set above
        known = [spelling for spelling in outer if spelling in self.parameters] or outer
        if len(known) == 1:
            yield known[0]


def names_in(model: nn.Module, index: CheckpointIndex) -> TensorNames:
    """Find the parameters of a model in a checkpoint.

    ``model``: a PreTrainedModel, with or without numbers; any other module has the stored names.
    """
    from transformers import PreTrainedModel
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    if not isinstance(model, PreTrainedModel):
        return TensorNames(index)
    conversions = get_model_conversion_mapping(model)
    expected = model.state_dict()
    whole: dict[str, StoredParameter] = {}
    groups: dict[str, dict[str, list[str]]] = {}
    for target, by in sources_of(model, index.tensors, conversions).items():
        for name in by.pop(ANY, ()):
            if index.tensors[name].shape == tuple(expected[target].shape):
                whole[target] = as_stored(target, index.tensors[name])
        groups |= {target: by} if by else {}
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    unclear: dict[str, tuple[str, ...]] = {}
    for first, stored in groups.items():
        results = _converted(model, index, converters, first, stored)
        whole |= results
        if not results:
            unclear[first] = tuple(name for names in stored.values() for name in names)
    for alias, name in model.all_tied_weights_keys.items():
        one = whole.get(name) or whole.get(alias)
        if one is not None:
            whole.setdefault(alias, one)
            whole.setdefault(name, one)
    return TensorNames(index, whole, unclear)


def as_stored(name: str, info: TensorInfo) -> StoredParameter:
    """A parameter that is a stored tensor."""
    return StoredParameter(name, info.shape, (Piece(info, ((0, 0, rows_of(info.shape)),)),))


def placing(model: Any, conversions: Sequence[Any]) -> Callable[[str], tuple[str, str]]:
    """How transformers renames stored tensors.

    Returns a function: stored name -> (parameter, or the first of those that a converter makes; pattern of the
    converter, or ANY).
    """
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    expected, prefix = model.state_dict(), model.base_model_prefix

    def place(name: str) -> tuple[str, str]:
        renamed, pattern = rename_source_key(name, renamings, converters, prefix, expected)
        if renamed not in expected and name in expected:
            renamed, pattern = rename_source_key(name, [], [], prefix, expected)
        return renamed, pattern or ANY

    return place


def sources_of(model: Any, names: Iterable[str], conversions: Sequence[Any]) -> dict[str, dict[str, list[str]]]:
    """Parameter -> pattern of the converter that makes it -> stored names, in the order of transformers.

    Of several parameters that one converter makes it is the first; the pattern is ANY for a mere renaming. Names that
    the model does not have are left out.
    """
    from transformers.core_model_loading import dot_natural_key

    place, expected = placing(model, conversions), model.state_dict()
    sources: dict[str, dict[str, list[str]]] = {}
    for name in sorted(names, key=dot_natural_key):
        target, pattern = place(name)
        if target in expected:
            sources.setdefault(target, {}).setdefault(pattern, []).append(name)
    return sources


def _converted(
    model: Any, index: CheckpointIndex, converters: Sequence[Any], first: str, stored: Mapping[str, Sequence[str]]
) -> dict[str, StoredParameter]:
    """Parameters that a converter makes of stored tensors; none when it does more than move rows."""
    infos = [index.tensors[name] for names in stored.values() for name in names]
    patterns = [pattern for pattern, names in stored.items() for _ in names]
    for transposed in (False, True):
        probes = _Probes(infos, transposed)
        converter = copy.deepcopy(next(entry for entry in converters if patterns[0] in entry.source_patterns))
        for pattern, info, probe in zip(patterns, infos, probes.tensors(), strict=True):
            converter.add_tensor(first, info.name, pattern, probe)
        try:
            results = converter.convert(first, model=model, config=model.config)
            parameters = {name: probes.parameter(model, name, value) for name, value in results.items()}
        except (RuntimeError, ValueError, IndexError, KeyError, AttributeError):  # it is not made for such probes
            continue
        if all(parameters.values()):
            return cast("dict[str, StoredParameter]", parameters)
    return {}


class _Probes:
    """Stored tensors with the label of its row in the place of each row, one column wide."""

    def __init__(self, infos: Sequence[TensorInfo], transposed: bool) -> None:
        self._infos, self._transposed = infos, transposed
        self._counts = [rows_of(self._turned(info.shape)) for info in infos]
        generator = torch.Generator().manual_seed(0)
        self._labels = torch.randint(_LABELS, (sum(self._counts),), generator=generator)
        self._sorted, self._order = self._labels.sort()

    def tensors(self) -> list[Tensor]:
        parts = self._labels.split(self._counts)
        shapes = [self._turned(info.shape) for info in self._infos]
        tensors = [
            part if len(shape) < 2 else part.reshape(*shape[:-1], 1) for part, shape in zip(parts, shapes, strict=True)
        ]
        return [part.mT if self._transposed and part.ndim > 1 else part for part in tensors]

    def parameter(self, model: Any, name: str, made: Any) -> StoredParameter | None:
        """What came out, as rows of the stored tensors; None when it is anything else."""
        probe = made[0] if isinstance(made, list) else made
        shape = tuple(model.get_parameter_or_buffer(name).shape)
        if tuple(probe.shape) != (shape if len(shape) < 2 else (*shape[:-1], 1)):
            return None
        place = torch.searchsorted(self._sorted, probe.reshape(-1)).clamp_max(len(self._sorted) - 1)
        if not torch.equal(self._sorted[place], probe.reshape(-1)):
            return None
        pieces = self._pieces(self._order[place])
        stored = [self._turned(piece.info.shape) for piece in pieces]
        widths = {shape[-1] if len(shape) > 1 else 1 for shape in stored}
        alike = widths == {shape[-1] if len(shape) > 1 else 1} and len({piece.info.dtype for piece in pieces}) == 1
        return StoredParameter(name, shape, pieces) if alike else None

    def _pieces(self, rows: Tensor) -> tuple[Piece, ...]:
        """Runs of consecutive rows, by tensor."""
        ends_of = torch.tensor(self._counts).cumsum(0)
        tensors = torch.searchsorted(ends_of, rows, right=True)
        breaks = (rows.diff() != 1) | (tensors.diff() != 0)
        starts = torch.cat([torch.zeros(1, dtype=torch.long), breaks.nonzero().flatten() + 1])
        counts = torch.cat([starts, torch.tensor([len(rows)])]).diff()
        spans: dict[int, list[Span]] = {}
        for start, count in zip(starts.tolist(), counts.tolist(), strict=True):
            number = int(tensors[start])
            first = int(rows[start]) - int(ends_of[number]) + self._counts[number]
            spans.setdefault(number, []).append((start, first, count))
        return tuple(
            Piece(self._infos[number], tuple(runs), self._transposed and len(self._infos[number].shape) > 1)
            for number, runs in spans.items()
        )

    def _turned(self, shape: Sequence[int]) -> tuple[int, ...]:
        return (*shape[:-2], shape[-1], shape[-2]) if self._transposed and len(shape) > 1 else tuple(shape)
