"""Training the kept coefficients of a model, all of it at once."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spectral_surgery.codec.encoded import Basis
from spectral_surgery.codec.feedback import codes_of, encode_codes
from spectral_surgery.codec.quantized import QuantizedSpectrum
from spectral_surgery.commands.heal.held_rate import HeldRate
from spectral_surgery.distributed import rank
from spectral_surgery.errors import CheckpointError, ConfigError
from spectral_surgery.files.compressed.checkpoint import CompressedCheckpoint
from spectral_surgery.files.compressed.parts import part_record, write_part
from spectral_surgery.files.index import CheckpointIndex, TensorInfo
from spectral_surgery.files.reader import DTYPES, read_tensor
from spectral_surgery.hf.models import load_any
from spectral_surgery.hf.tensor_names import TensorNames, names_in
from spectral_surgery.inputs.kinds import kind_of
from spectral_surgery.inputs.model_input import padded
from spectral_surgery.inputs.training import inputs_of_step, train_and_held_out
from spectral_surgery.live.blocks import find_blocks, has_blocks
from spectral_surgery.live.hooks import hooked
from spectral_surgery.live.trained_spectra import (
    each_kept_spectrum,
    is_trainable,
    train_kept,
    train_vectors,
    trained_vectors,
)
from spectral_surgery.progress import Progress
from spectral_surgery.text.objectives import Objective
from spectral_surgery.text.settings import TextData
from spectral_surgery.training.loop import Batch, Clock, LossCurve, Pace, Training, distillation, train, trained
from spectral_surgery.training.settings import DistillSettings

_KEPT, _ENOUGH = 1.1, 1.2  # times the minutes may take; times what is known to be needed is enough
_REHEARSED = 0.05  # of all weights are left once before, to learn what that takes
_TRAINED = {code: dtype for code, dtype in DTYPES.items() if code in ("F32", "BF16", "F16")}


@dataclass(frozen=True)
class HealSession:
    """What is healed, with what, and where unfinished work is kept.

    Attributes:
        index: of the teacher.
        teacher: its folder.
        folder: for unfinished work.
        threads: frames encoded at once.
        told: called with the pace of the first steps, and the number of blocks that are trained one by one.
        began: on the clock, when the minutes began.
    """

    checkpoint: CompressedCheckpoint
    index: CheckpointIndex
    teacher: Path
    data: TextData
    device: str
    folder: Path
    key: str
    threads: int
    clock: Clock
    told: Callable[[Pace, int], None]
    began: float

    def ready(self, minutes: float, gone: float, least: float) -> None:
        """Refuse minutes that cannot be kept.

        Args:
            gone: seconds of them that are gone.
            least: seconds that are needed at least from now on.

        Raises:
            ConfigError: when they are exceeded by more than a tenth.
        """
        if gone + least > _KEPT * 60 * minutes:
            enough = math.ceil(_ENOUGH * (gone + least) / 6) / 10
            raise ConfigError(
                f"--minutes: expected {enough:g} or more for this model on this machine, got {minutes:g}: reading and"
                f" judging took {gone:.0f} s, and a step, judging and writing take about {least:.0f} s. Give it more,"
                " or a smaller --batch-size or --seq-length."
            )

    @property
    def rounded(self) -> bool:
        """Whether codes are the original's coefficients, rounded: they were neither chosen by text nor trained."""
        options = self.checkpoint.manifest.options
        return not options.get("calibration") and not options.get("healing")

    @property
    def fitted(self) -> bool:
        """Whether text chose what is kept and fitted its values: what is lost by rounding them is little then."""
        return not self.rounded and self._kind == "density"

    @property
    def _kind(self) -> str | None:
        target: Any = self.checkpoint.manifest.options.get("target")
        return target["kind"] if target else None

    def hold_rate(self, student: nn.Module) -> Callable[[], None]:
        """What holds the rate of a student that is about to be trained, where a rate was asked for."""
        return HeldRate(student) if self._kind == "bits" else lambda: None

    def spectra(
        self, names: TensorNames, shapes: Mapping[str, tuple[int, ...]]
    ) -> dict[str, tuple[str, list[QuantizedSpectrum]]]:
        """The compressed tensor behind each parameter, and its spectra; parameters without one are left out."""
        spectra = {}
        manifest = self.checkpoint.manifest
        for name, shape in shapes.items():
            info = names.tensor(name)
            tensor = manifest.aliases.get(info.name, info.name) if info else ""
            record = manifest.tensors.get(tensor)
            if record is None or record.shape != shape:
                continue
            spectra[name] = tensor, [self.checkpoint.part(tensor, part).decode() for part in range(len(record.parts))]
        return spectra

    def vectors(self, names: TensorNames, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, TensorInfo]:
        """The biases and scales of norms that are stored as they are, by parameter name."""
        vectors = {}
        for name, shape in shapes.items():
            info = names.tensor(name)
            if info is not None and len(shape) == 1 and info.shape == shape:
                stored = self.checkpoint.index.tensors.get(self.checkpoint.manifest.aliases.get(info.name, info.name))
                if stored is not None and stored.dtype in _TRAINED and stored.shape == shape:
                    vectors[name] = stored
        return vectors

    def stored(self, info: TensorInfo) -> Tensor:
        """What the compressed checkpoint has of a tensor of the teacher, decoded."""
        manifest = self.checkpoint.manifest
        name = manifest.aliases.get(info.name, info.name)
        record = manifest.tensors.get(name)
        if record is None:
            return read_tensor(self.checkpoint.index.tensors[name])
        parts = [self.checkpoint.part(name, part).to_dense() for part in range(len(record.parts))]
        return torch.cat(parts).reshape(record.shape)

    def leave(self, tensor: str, spectra: Sequence[QuantizedSpectrum], original: Tensor) -> list[Path]:
        """Files of the parts of a trained weight, with their distance from the original; see `write_part`."""
        record = self.checkpoint.manifest.tensors[tensor]
        number = list(self.checkpoint.manifest.tensors).index(tensor)
        matrix = original.detach().cpu().float().reshape(record.matrix)
        files: list[Path] = []
        for spectrum, part in zip(spectra, record.parts, strict=True):
            basis = Basis(spectrum.transform, spectrum.tile, spectrum.axes)
            codes = codes_of(spectrum.codes, spectrum.step, spectrum.offset)
            encoded = encode_codes(basis.forward(matrix[slice(*part.rows)]), codes, basis, threads=self.threads)
            files.append(self.folder / f"{number:06d}-{len(files)}-{rank()}.part")
            write_part(files[-1], self.key, encoded[0], part_record(part.rows, *encoded))
        return files


@dataclass
class Healed:
    """What came out of it.

    Attributes:
        curve: how it went; of blocks, the sums and means.
        replaced: files of the parts of every trained tensor.
        blocks: held-out error of each block before and after.
    """

    curve: LossCurve = field(default_factory=LossCurve)
    replaced: dict[str, list[Path]] = field(default_factory=dict)
    vectors: dict[str, Tensor] = field(default_factory=dict)
    coefficients: int = 0
    blocks: dict[str, tuple[float, float]] = field(default_factory=dict)


def heal_whole(session: HealSession, objective: Objective, settings: DistillSettings, progress: Progress) -> Healed:
    """Train all weights together, end to end. Raises CheckpointError when nothing can be trained."""
    data, trust = session.data, session.data.trust_remote_code
    loader = objective.auto_class if kind_of(data.file, session.index.config).by_objective else ""
    teacher = load_any(session.teacher, loader, dtype=torch.float32, trust_remote_code=trust)
    teacher.requires_grad_(requires_grad=False).to(session.device)
    student = copy.deepcopy(teacher)
    names = names_in(teacher, session.index)
    inputs, held_out = train_and_held_out(data, session.teacher, session.index.config, teacher, objective.seq_length)
    reached = _reached(teacher, objective, padded(inputs[:1]))
    spectra = session.spectra(names, {name: tuple(parameter.shape) for name, parameter in reached.items()})
    if not spectra:
        raise CheckpointError(
            "heal: expected compressed tensors that the data comes to, got none to be trained. Check the data."
        )
    _put_rest(session, student, spectra, loader)
    values = train_kept(student, {name: parts for name, (_, parts) in spectra.items()}, rounded=session.rounded)
    vectors = train_stored_vectors(session, names, student)
    size = min(data.batch_size or objective.batch_size, len(inputs))
    lengths = [one.tokens for one in inputs]

    def batch(step: int, process: int) -> Batch:
        return padded([inputs[i] for i in inputs_of_step(settings.seed, step, process, lengths, size)])

    held_out = sorted(held_out, key=lambda one: one.tokens)
    batches = [padded(held_out[i : i + size]) for i in range(0, len(held_out), size)]
    order = torch.randperm(len(batches), generator=torch.Generator().manual_seed(0))  # the first ones stand for all
    work = Training(
        trained(student),
        distillation(objective.run, objective.loss, student, teacher),
        batch,
        [batches[place] for place in order],
        session.folder / "all.safetensors",
        session.key,
        session.fitted,
        session.hold_rate(student),
        _in_blocks(teacher, dict(zip(spectra, values, strict=True))),
        lambda pace: session.told(pace, 1),
        session.began,
        _seconds_to_leave(session, student, spectra, teacher) if settings.minutes else 0.0,
        lambda gone, least: session.ready(settings.minutes, gone, least),
    )
    healed = Healed(train(work, settings, progress, session.clock), coefficients=sum(value.numel() for value in values))
    for name, parts in each_kept_spectrum(student):
        tensor = spectra[name][0]
        healed.replaced[tensor] = session.leave(tensor, parts, teacher.get_parameter(name))
    healed.vectors = {vectors[name]: vector for name, vector in trained_vectors(student).items()}
    return healed


def _seconds_to_leave(
    session: HealSession, student: nn.Module, spectra: Mapping[str, tuple[str, object]], teacher: nn.Module
) -> float:
    """What leaving all weights takes, at the pace of some from middle size on; the smallest one warms up."""
    sizes = {name: teacher.get_parameter(name).numel() for name in spectra}
    names, whole = sorted(sizes, key=sizes.__getitem__), sum(sizes.values())
    began, left = session.clock(), 0
    for name in [names[0], *names[len(names) // 2 :]]:
        for _, parts in each_kept_spectrum(student, {name}):
            session.leave(spectra[name][0], parts, teacher.get_parameter(name))
        if name == names[0]:
            began = session.clock()
        else:
            left += sizes[name]
        if left > _REHEARSED * whole:
            break
    return (session.clock() - began) * whole / max(left, 1)


def _in_blocks(model: nn.Module, values: Mapping[str, nn.Parameter]) -> list[nn.Parameter]:
    """Those of the trained weights that are in the blocks of a model; all of them where there are none."""
    prefix = f"{find_blocks(model)[0]}." if has_blocks(model) else ""
    return [value for name, value in values.items() if name.startswith(prefix)] or list(values.values())


def _reached(model: nn.Module, objective: Objective, batch: Batch) -> dict[str, nn.Parameter]:
    """The parameters of the modules that are run on text: not those that look at images."""
    run: set[nn.Module] = set()
    device = next(model.parameters()).device
    with hooked({module: module for module in model.modules()}, lambda module, *_: run.add(module)), torch.no_grad():
        objective.run(model, {name: tensor.to(device) for name, tensor in batch.items()})
    owners = {name: model.get_submodule(name.rpartition(".")[0]) for name, _ in model.named_parameters()}
    return {name: parameter for name, parameter in model.named_parameters() if owners[name] in run}


def _put_rest(session: HealSession, student: Any, trained: Mapping[str, tuple[str, object]], loader: str) -> None:
    """Give a student what is stored where it is not trained, as fused experts are not: that is what will run."""
    if session.checkpoint.manifest.tensors.keys() == {tensor for tensor, _ in trained.values()}:
        return
    trust = session.data.trust_remote_code
    stored = load_any(session.checkpoint.index.root, loader, dtype=torch.float32, trust_remote_code=trust)
    stored.dequantize()
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if name not in trained:
                parameter.copy_(stored.get_parameter(name))


def train_stored_vectors(
    session: HealSession, names: TensorNames, student: nn.Module, prefix: str = ""
) -> dict[str, str]:
    """Train biases and scales of norms from what is stored; returns their tensors by parameter name."""
    shapes = {f"{prefix}{name}": tuple(parameter.shape) for name, parameter in student.named_parameters()}
    vectors = {name.removeprefix(prefix): info for name, info in session.vectors(names, shapes).items()}
    vectors = {name: info for name, info in vectors.items() if is_trainable(student, name)}
    with torch.no_grad():
        for name, info in vectors.items():
            student.get_parameter(name).copy_(read_tensor(info))
    train_vectors(student, {name: _TRAINED[info.dtype] for name, info in vectors.items()})
    return {name: info.name for name, info in vectors.items()}
