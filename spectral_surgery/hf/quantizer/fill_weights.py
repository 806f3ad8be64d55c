"""How the tensors of a compressed folder get into a model of transformers.

transformers renames stored names, ties parameters and decides devices and dtypes; all of that is kept. Of the three
tensors of a spectrum it reads the smallest, the step, as a messenger: when the step of a weight arrives, on the device
and in the dtype that the weight should have, the weight is read from the files by our reader, and put where
`loading_plan` says. What is held dense is decoded one at a time.
Source: transformers 5.24, `core_model_loading.py` and `modeling_utils.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn

from spectral_surgery import matmul
from spectral_surgery.codec.encoded import EncodedSpectrum
from spectral_surgery.codec.quantized import QuantizedSpectrum
from spectral_surgery.errors import ConfigError, SpectralSurgeryError
from spectral_surgery.files.compressed.checkpoint import CompressedCheckpoint
from spectral_surgery.files.reader import read_tensor
from spectral_surgery.hf.quantizer.class_swap import stand_in
from spectral_surgery.hf.quantizer.fused_experts import install_matrices
from spectral_surgery.hf.quantizer.loading_plan import Plan, row_ranges
from spectral_surgery.hf.quantizer.prefetch import Prefetcher
from spectral_surgery.layers import SpectralWeight
from spectral_surgery.matmul import RESIDENTS, Form, Spectrum

AUTO, NARROW, STREAMED = "auto", "narrow", "streamed"
UNREAD = r"\.(spectral_(codes|frames)|lossless_codes)$"  # tensors that transformers never reads
Resident = tuple[list[Form], str]  # forms of row ranges, and the name in RESIDENTS
Names = tuple[str, ...]  # of stored tensors, one below the other
_Piece = tuple[str, int, slice | None]  # tensor, part, and rows of the part; None for all
_TRIED = {
    AUTO: ("int8", "int12", "coded"),
    NARROW: ("int4", "int5", "coded"),
    STREAMED: (STREAMED, "coded"),
}  # in this order
_LOW_RATE, _HIGH_RATE = 2.25, 6  # stored bits of a weight: up to them hardly any code is beyond int4, and int8


@dataclass
class Loading:
    """One load: the folder, the plan, and what is left to do.

    Attributes:
        residents: resident form by stored name; ``auto`` for others.
        ties: those that transformers had, before `untie`: of the whole model, and of its models by name, where one
            has some.
        conversions: of transformers alone, that were used; what save_pretrained reverts.
        renaming: ours, by which messengers reach converters of transformers.
        prefetched: the forms of matrices by stored names, made on all cores before they are installed.
        error: the first one. transformers would go on and report it as one of many; it is raised in the end.
    """

    checkpoint: CompressedCheckpoint
    residents: Mapping[str, str]
    plan: Plan | None = None
    ties: tuple[dict[str, str], dict[str, Any]] = field(default_factory=lambda: ({}, {}))
    conversions: list[Any] = field(default_factory=list)
    renaming: Any = None
    prefetched: Prefetcher[Names, Resident] | None = None
    error: SpectralSurgeryError | None = None

    def fill(
        self, model: nn.Module, target: str, tensors: Mapping[str, list[Tensor]], missing: set[str]
    ) -> dict[str, list[Tensor]]:
        """Load the weight whose messenger has arrived.

        Returns the same with steps replaced by decoded tensors; nothing when spectra took the place.

        Args:
            tensors: what transformers read for it by pattern, steps in the place of what is compressed.
            missing: parameters that have no value yet; those that get one here are taken out.
        """
        plan = cast(Plan, self.plan)
        missing.difference_update(plan.slots.get(target, plan.made[target]))
        if self.error is not None:
            return {}
        try:
            if target in plan.dense:
                return {
                    pattern: self._decoded(plan.sources[target][pattern], read) for pattern, read in tensors.items()
                }
            self._install(model, plan, target, next(iter(tensors.values()))[0])
        except SpectralSurgeryError as error:
            self.error = error
        return {}

    def _decoded(self, names: Sequence[str], read: Sequence[Tensor]) -> list[Tensor]:
        """Weights in the place of messengers, on their devices and in their dtypes."""
        manifest, index = self.checkpoint.manifest, self.checkpoint.index
        return [
            decoded(self.checkpoint, name).to(tensor)
            if name in manifest.tensors
            else _like(read_tensor(index.tensors[name]), tensor)
            if name in manifest.lossless
            else tensor
            for name, tensor in zip(names, read, strict=True)
        ]

    def _install(self, model: nn.Module, plan: Plan, target: str, like: Tensor) -> None:
        take = self.prefetched.take if self.prefetched else self._forms
        taken = [take(names) for names in plan.matrices(target)]
        if target in plan.experts:
            install_matrices(model, target, taken, like)
            return
        forms, resident = taken[0]
        groups, rows = [plan.slots.get(target, ())], [(0, sum(form.shape[0] for form in forms))]
        if target in plan.divided:
            groups, rows = [(name,) for name in plan.made[target]], list(row_ranges(plan, target, rows[0][1]))
        for group, between in zip(groups, rows, strict=True):
            weight = SpectralWeight(_within(forms, between), resident, like.dtype)
            weight = weight if like.is_cpu else weight.to(like.device)
            for parameter in group:
                stand_in(model.get_submodule(parameter.removesuffix(".weight")), weight)

    def begin(self) -> None:
        """Expect what the plan will install, in the order in which transformers asks for it."""
        plan = cast(Plan, self.plan)
        spectral = [target for target in plan.sources if target not in plan.dense]
        names = [names for target in spectral for names in plan.matrices(target)]
        self.checkpoint = self.checkpoint.with_tables()
        self.prefetched = Prefetcher(self._forms, names, torch.get_num_threads())

    def _forms(self, names: Names) -> Resident:
        cuts = cast(Plan, self.plan).cuts(names, self.checkpoint.manifest.tensors[names[0]])
        return resident_forms(self.checkpoint, names, self.residents.get(names[0], AUTO), cuts)


def _like(tensor: Tensor, messenger: Tensor) -> Tensor:
    """Whole numbers stay what they are, as transformers before 5.20 names the dtype of the model for them too."""
    floating = tensor.is_floating_point() and messenger.is_floating_point()
    return tensor.to(messenger) if floating else tensor.to(messenger.device)


def _within(forms: Sequence[Form], between: tuple[int, int]) -> list[Form]:
    """The forms of a range of rows; they are cut at its ends."""
    ends = [0, *accumulate(form.shape[0] for form in forms)]
    return [form for form, first in zip(forms, ends, strict=False) if between[0] <= first < between[1]]


def untie(model: Any, load: Loading, plan: Plan) -> None:
    """Take ties between spectral layers, which share their weight itself, from transformers, and tell it of others.

    ``model``: a PreTrainedModel, changed in place.
    """
    from transformers import PreTrainedModel

    ours = {*plan.apart, *(name for group in plan.slots.values() for name in group)}
    every = {one: other for one, other in model.all_tied_weights_keys.items() if one not in plan.apart}
    load.ties = every, {}
    for prefix, part in model.named_modules(remove_duplicate=False):
        # those without ties keep their None: a dictionary, even an empty one, makes PEFT look for input embeddings
        if isinstance(part, PreTrainedModel) and part._tied_weights_keys is not None:
            dot = f"{prefix}." if prefix else ""
            load.ties[1][prefix] = vars(part).get("_tied_weights_keys")
            ties = part.get_expanded_tied_weights_keys(all_submodels=False)
            part._tied_weights_keys = {one: other for one, other in ties.items() if f"{dot}{one}" not in ours}
    rest = {one: other for one, other in every.items() if one not in ours}
    model.all_tied_weights_keys = {**plan.tied, **rest}


def retie(model: Any, load: Loading) -> None:
    """Give transformers the ties back that it had. ``load``: what `untie` filled."""
    model.all_tied_weights_keys, parts = dict(load.ties[0]), load.ties[1]
    for name, keys in reversed(parts.items()):  # of a model with two names, the first one has those before `untie`
        part = model.get_submodule(name)
        if keys is None:
            vars(part).pop("_tied_weights_keys", None)  # those of its class hold again
        else:
            part._tied_weights_keys = keys


def decoded(checkpoint: CompressedCheckpoint, name: str) -> Tensor:
    """A compressed tensor as it was: float32, in its original shape."""
    record = checkpoint.manifest.tensors[name]
    parts = [checkpoint.part(name, part).to_dense() for part in range(len(record.parts))]
    return torch.cat(parts).reshape(record.shape)


def resident_forms(checkpoint: CompressedCheckpoint, names: Names, resident: str, cuts: Sequence[int] = ()) -> Resident:
    """Compressed tensors, one below the other, in memory; one part of them is read at a time.

    Returns forms, one for each matrix where that is possible (see `matmul.resident_forms`), and the name in RESIDENTS.

    Args:
        resident: name in RESIDENTS, or ``auto``: int8 where codes fit, else int12, else coded; ``narrow`` is int4,
            int5 or coded. Where they do not fit what is streamed, they are coded too.
        cuts: first rows of matrices.

    Raises:
        ConfigError: when the codes do not fit the resident form.
    """
    *tried, last = _tried(checkpoint, names[0], resident)
    for wanted in tried:
        with suppress(ConfigError):
            return _held(checkpoint, names, wanted, cuts)
    try:
        return _held(checkpoint, names, last, cuts)
    except ConfigError as error:
        raise ConfigError(f"{' and '.join(names)}: {error}") from None


def _held(checkpoint: CompressedCheckpoint, names: Names, resident: str, cuts: Sequence[int]) -> Resident:
    matrices = _matrices(checkpoint, names, cuts)
    return [form for outlines, read in matrices for form in matmul.resident_forms(outlines, resident, read)], resident


def _matrices(
    checkpoint: CompressedCheckpoint, names: Names, cuts: Sequence[int]
) -> Iterator[tuple[list[Spectrum], Callable[[int], Spectrum]]]:
    """What is known of the spectra of each matrix before their codes are read, and how to read one of them."""

    @lru_cache(maxsize=1)
    def codes(name: str, number: int) -> QuantizedSpectrum:
        return checkpoint.part(name, number).decode()

    def read(piece: _Piece) -> Spectrum:
        name, number, rows = piece
        if rows is None:
            return checkpoint.part(name, number)
        return replace(codes(name, number), codes=codes(name, number).codes[rows])

    matrices: list[list[_Piece]] = [[]]
    for name in names:
        for number, part in enumerate(checkpoint.manifest.tensors[name].parts):
            first, last = part.rows
            ends = [first, *(row for row in cuts if first < row < last), last]
            for start, stop in pairwise(ends):
                if start in cuts and matrices[-1]:
                    matrices.append([])
                matrices[-1].append((name, number, slice(start - first, stop - first) if len(ends) > 2 else None))
    for pieces in matrices:
        outlines = [_outline(checkpoint.outline(name, number), rows) for name, number, rows in pieces]
        yield outlines, lambda number, pieces=pieces: read(pieces[number])  # type: ignore[misc]


def _outline(part: EncodedSpectrum, rows: slice | None) -> Spectrum:
    if rows is None:
        return part
    nothing, basis = torch.zeros(1, 1, dtype=torch.int8), part.basis
    codes = nothing.expand(rows.stop - rows.start, part.shape[1])
    return QuantizedSpectrum(codes, part.step, part.offset, basis.transform, basis.tile, basis.axes)


def resident_bytes(checkpoint: CompressedCheckpoint, name: str, resident: str) -> int:
    """Bytes of a compressed tensor where it computes, in a resident form, or in the largest of those that are tried."""
    report = checkpoint.manifest.tensors[name].report
    forms = {STREAMED} if resident == STREAMED else {*_tried(checkpoint, name, resident)}
    if resident == AUTO and report.bits_per_weight < _HIGH_RATE:
        forms -= {"int12"}
    return max(RESIDENTS[form].most_bytes(report.weights, report.stored_bytes) for form in forms)


def _tried(checkpoint: CompressedCheckpoint, name: str, resident: str) -> list[str]:
    """Names in RESIDENTS; int5 only where codes of int4 are likely to be too narrow."""
    low = checkpoint.manifest.tensors[name].report.bits_per_weight <= _LOW_RATE
    return [form for form in _TRIED.get(resident, (resident,)) if not (resident == NARROW and low and form == "int5")]


def bytes_per_weight(load: Loading, name: str, parameter: Tensor) -> float:
    """What a parameter will take in memory, for the map of devices."""
    plan = load.plan
    if plan is None:
        return parameter.element_size()
    groups = {target: plan.slots.get(target, made) for target, made in plan.made.items() if target not in plan.dense}
    target = next((target for target, group in groups.items() if name in group), None)
    if target is None:
        return parameter.element_size()
    stored = plan.stored(target)
    weights = sum(load.checkpoint.manifest.tensors[part].report.weights for part in stored)
    return sum(resident_bytes(load.checkpoint, part, load.residents.get(part, AUTO)) for part in stored) / weights


def residents_for(checkpoint: CompressedCheckpoint, resident: str) -> dict[str, str]:
    """The resident form of every compressed tensor. Raises ConfigError when there is no such form."""
    if resident != AUTO:
        RESIDENTS[resident]
    return dict.fromkeys(checkpoint.manifest.tensors, resident)
