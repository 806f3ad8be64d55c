"""Training the kept coefficients of a model: all of it at once, or block after block."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, distributed, nn

from spectral_surgery.checkpoint.compressed import CompressedCheckpoint
from spectral_surgery.checkpoint.index import CheckpointIndex, TensorInfo
from spectral_surgery.checkpoint.parts import part_record, write_part
from spectral_surgery.checkpoint.reader import DTYPES, read_tensor
from spectral_surgery.errors import CheckpointError, ConfigError
from spectral_surgery.integrations.tensor_names import StoredParameter, TensorNames, names_in
from spectral_surgery.memory import release_freed_memory
from spectral_surgery.models import load_model
from spectral_surgery.spectra.codec import Basis
from spectral_surgery.spectra.feedback import codes_of, encode_codes
from spectral_surgery.spectra.quantized import QuantizedSpectrum
from spectral_surgery.surgery.blocks import Held, Sample, captured_inputs, find_blocks, next_inputs
from spectral_surgery.surgery.held_rate import HeldRate
from spectral_surgery.surgery.kept import each_kept_spectrum, train_kept, train_vectors, trained_vectors
from spectral_surgery.surgery.recomputed import recomputed_weights
from spectral_surgery.workflows.distill import Batch, Course, Distillation, DistillSettings, distill
from spectral_surgery.workflows.heal_text import HealData, chosen, training_text
from spectral_surgery.workflows.lazy_model import Shelf, load_lazily
from spectral_surgery.workflows.objectives import Objective
from spectral_surgery.workflows.progress import Progress
from spectral_surgery.workflows.sequences import equal_lengths, padded

_TRAINED = {code: dtype for code, dtype in DTYPES.items() if code in ("F32", "BF16", "F16")}
_BLOCK_SEQUENCES = 512  # that wait between two blocks
_IN_MEMORY = 8 << 20  # bytes of activations; more go to files


@dataclass(frozen=True)
class Workplace:
    """What is healed, with what, and where unfinished work is kept.

    Attributes:
        checkpoint: the compressed one.
        index: of the teacher.
        teacher: its folder.
        data: text.
        device: models run on it.
        folder: for unfinished work.
        key: of this very work.
        threads: frames encoded at once.
    """

    checkpoint: CompressedCheckpoint
    index: CheckpointIndex
    teacher: Path
    data: HealData
    device: str
    folder: Path
    key: str
    threads: int

    @property
    def rounded(self) -> bool:
        """Whether codes are the original's coefficients, rounded: they were neither chosen by text nor trained."""
        options = self.checkpoint.manifest.options
        return not options.get("calibration") and not options.get("healing")

    def settle(self, student: nn.Module) -> Callable[[], None]:
        """What holds the rate of a student that is about to be trained, where a rate was asked for."""
        target: Any = self.checkpoint.manifest.options.get("target")
        return HeldRate(student) if target and target["kind"] == "bits" else lambda: None

    def spectra(
        self, names: TensorNames, shapes: Mapping[str, tuple[int, ...]]
    ) -> dict[str, tuple[str, list[QuantizedSpectrum]]]:
        """The compressed tensor behind each parameter, and its spectra; parameters without one are left out.

        Args:
            names: where parameters are stored.
            shapes: by name of the parameters.
        """
        found = {}
        manifest = self.checkpoint.manifest
        for name, shape in shapes.items():
            info = names.tensor(name)
            own = manifest.aliases.get(info.name, info.name) if info else ""
            record = manifest.tensors.get(own)
            if record is None or record.shape != shape:
                continue
            found[name] = own, [self.checkpoint.part(own, part).decode() for part in range(len(record.parts))]
        return found

    def vectors(self, names: TensorNames, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, TensorInfo]:
        """The biases and scales of norms that are stored as they are, by parameter name.

        Args:
            names: where parameters are stored.
            shapes: by name of the parameters.
        """
        found = {}
        for name, shape in shapes.items():
            info = names.tensor(name)
            if info is not None and len(shape) == 1 and info.shape == shape:
                own = self.checkpoint.index.tensors.get(self.checkpoint.manifest.aliases.get(info.name, info.name))
                if own is not None and own.dtype in _TRAINED and own.shape == shape:
                    found[name] = own
        return found

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
        for own, part in zip(spectra, record.parts, strict=True):
            basis = Basis(own.transform, own.tile, own.axes)
            codes = codes_of(own.codes, own.step, own.offset)
            made = encode_codes(basis.forward(matrix[slice(*part.rows)]), codes, basis, threads=self.threads)
            files.append(self.folder / f"{number:06d}-{len(files)}-{_rank()}.part")
            write_part(files[-1], self.key, made[0], part_record(part.rows, *made))
        return files


@dataclass
class Healed:
    """What came out of it.

    Attributes:
        course: how it went; of blocks, the sums and means.
        replaced: files of the parts of every trained tensor.
        vectors: trained biases and scales.
        coefficients: trained.
        blocks: held-out error of each block before and after.
    """

    course: Course = field(default_factory=Course)
    replaced: dict[str, list[Path]] = field(default_factory=dict)
    vectors: dict[str, Tensor] = field(default_factory=dict)
    coefficients: int = 0
    blocks: dict[str, tuple[float, float]] = field(default_factory=dict)


def heal_whole(place: Workplace, objective: Objective, settings: DistillSettings, progress: Progress) -> Healed:
    """Train all weights together, end to end.

    Args:
        place: what and where.
        objective: what the student takes over.
        settings: how.
        progress: called after each step.

    Raises:
        CheckpointError: when nothing can be trained.
        ConfigError: when the text does not do, or the loss is not finite.
    """
    trust = place.data.trust_remote_code
    teacher, tokenizer = load_model(place.teacher, objective.auto_class, dtype=torch.float32, trust_remote_code=trust)
    teacher.requires_grad_(requires_grad=False).to(place.device)
    student = copy.deepcopy(teacher)
    names = names_in(teacher, place.index)
    spectra = place.spectra(names, {name: tuple(own.shape) for name, own in student.named_parameters()})
    if not spectra:
        raise CheckpointError("heal: no compressed tensor is a parameter of the model; nothing can be trained.")
    _put_rest(place, student, spectra, objective.auto_class)
    values = train_kept(student, {name: parts for name, (_, parts) in spectra.items()}, rounded=place.rounded)
    vectors = _train_vectors(place, names, student)
    train, held = training_text(place.data, tokenizer, teacher, objective)
    size = min(place.data.batch_size or objective.batch_size, len(train))
    lengths = list(map(len, train))

    def batch(step: int, rank: int) -> Batch:
        return padded(tokenizer, [train[i] for i in chosen(settings.seed, step, rank, lengths, size)])

    held = sorted(held, key=len)
    batches = [padded(tokenizer, held[i : i + size]) for i in range(0, len(held), size)]
    work = Distillation(
        objective.run,
        objective.loss,
        student,
        teacher,
        batch,
        batches,
        place.folder / "all.safetensors",
        place.key,
        place.settle(student),
    )
    healed = Healed(distill(work, settings, progress), coefficients=sum(own.numel() for own in values))
    for name, own in each_kept_spectrum(student):
        tensor = spectra[name][0]
        healed.replaced[tensor] = place.leave(tensor, own, teacher.get_parameter(name))
    healed.vectors = {vectors[name]: own for name, own in trained_vectors(student).items()}
    return healed


def _put_rest(place: Workplace, student: Any, trained: Mapping[str, tuple[str, object]], auto_class: str) -> None:
    """Give a student what is stored where it is not trained, as fused experts are not: that is what will run."""
    if place.checkpoint.manifest.tensors.keys() == {tensor for tensor, _ in trained.values()}:
        return
    trust = place.data.trust_remote_code
    stored = load_model(place.checkpoint.index.root, auto_class, dtype=torch.float32, trust_remote_code=trust)[0]
    stored.dequantize()
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if name not in trained:
                parameter.copy_(stored.get_parameter(name))


def heal_blocks(place: Workplace, objective: Objective, settings: DistillSettings, progress: Progress) -> Healed:
    """Train block after block, each on what the healed blocks before it give, until it gives what the original gives.

    Args:
        place: what and where.
        objective: says how long sequences are.
        settings: of each block.
        progress: called after each step of each block.

    Raises:
        CheckpointError: when nothing can be trained, or the model has no list of blocks that can be read one by one.
        ConfigError: when the text does not do, a loss is not finite, or another device than the CPU is asked for.
    """
    if place.device != "cpu":
        raise ConfigError(f"heal --blocks --device {place.device}: blocks run on the cpu. Leave one of both out.")
    lazy = load_lazily(place.teacher, place.index, "AutoModel", trust_remote_code=place.data.trust_remote_code)
    if lazy.whole:
        raise CheckpointError(
            "heal --blocks: the model has no list of blocks, or computes parameters from what is stored; other models"
            " are accepted. Heal it without --blocks."
        )
    train, held = training_text(place.data, lazy.tokenizer, lazy.model, objective)
    prefix, blocks = find_blocks(lazy.model)
    tokens = (place.data.batch_size or objective.batch_size) * max(map(len, train))
    batches = [equal_lengths(own[:_BLOCK_SEQUENCES], tokens) for own in (train, held)]
    first, healed = len(batches[0]), Healed()
    with closing(Shelf(_IN_MEMORY, place.folder)) as shelf:
        with lazy.holding("", f"{prefix}."), lazy.holding(f"{prefix}.0."):
            wanted = [captured_inputs(lazy.model, blocks, own, shelf.put) for part in batches for own in part]
            _put_stored(place, lazy.names, lazy.model, f"{prefix}.")
            given = [captured_inputs(lazy.model, blocks, own, shelf.put) for part in batches for own in part]
        for number, block in enumerate(blocks):
            name = f"{prefix}.{number}"
            with lazy.holding(f"{name}."):
                wanted = next_inputs(block, wanted, shelf.put)
                told = _stage(progress, number, len(blocks))
                turn = _Turn(name, block, given, [own.hidden for own in wanted], first, lazy.names)
                _heal_block(place, turn, settings, told, healed)
                given = next_inputs(turn.block, given, shelf.put)
                del turn  # and the trained block with it, before the next one is read
                gc.collect()  # optimizers refer to themselves
    if not healed.replaced:
        raise CheckpointError("heal: no compressed tensor is in a block of the model; nothing can be trained.")
    sides = list(zip(*healed.blocks.values(), strict=True))
    before, after = (sum(side) / len(side) for side in sides)
    healed.course.held_out = [(0, before), (healed.course.step, after)]
    healed.course.best_step = healed.course.step
    return healed


def _train_vectors(place: Workplace, names: TensorNames, student: nn.Module, prefix: str = "") -> dict[str, str]:
    """Train biases and scales of norms from what is stored; returns their tensors by parameter name."""
    shapes = {f"{prefix}{name}": tuple(own.shape) for name, own in student.named_parameters()}
    found = {name.removeprefix(prefix): info for name, info in place.vectors(names, shapes).items()}
    with torch.no_grad():
        for name, info in found.items():
            student.get_parameter(name).copy_(read_tensor(info))
    train_vectors(student, {name: _TRAINED[info.dtype] for name, info in found.items()})
    return {name: info.name for name, info in found.items()}


def _put_stored(place: Workplace, names: TensorNames, model: nn.Module, without: str) -> None:
    """What is stored of the parameters outside the blocks, such as embeddings: it is what the blocks will be given."""
    outside = {name: own for name, own in model.named_parameters() if not name.startswith(without)}
    shapes = {name: tuple(own.shape) for name, own in outside.items()}
    with torch.no_grad():
        for name, info in place.vectors(names, shapes).items():
            outside[name].copy_(read_tensor(info))
        for name, (_, parts) in place.spectra(names, shapes).items():
            outside[name].copy_(torch.cat([part.to_dense() for part in parts]).reshape(outside[name].shape))


def _put_parts(place: Workplace, names: TensorNames, block: nn.Module, prefix: str) -> None:
    """Give a block what is stored of parameters that are made of parts, as fused experts are: they are not trained."""
    for name, parameter in list(block.named_parameters()):
        stored = names.find(f"{prefix}{name}")
        if stored is not None and stored.whole is None:
            path, _, leaf = name.rpartition(".")
            value = stored.read(place.stored).to(parameter.dtype)
            block.get_submodule(path)._parameters[leaf] = nn.Parameter(value, requires_grad=False)


@dataclass
class _Turn:
    """A block, what it is given, and what it should give; the first samples are to train on."""

    name: str
    block: nn.Module
    given: Sequence[Sample]
    targets: Sequence[Held]
    train: int
    names: TensorNames


def _heal_block(place: Workplace, turn: _Turn, settings: DistillSettings, progress: Progress, healed: Healed) -> None:
    """Heal the block of a turn, which holds the healed one afterwards; the original lends it what is not trained."""
    name, first = turn.name, turn.train
    spectra = place.spectra(turn.names, {f"{name}.{own}": tuple(p.shape) for own, p in turn.block.named_parameters()})
    if not spectra or turn.given[0].skipped:
        return
    tensors = {own.removeprefix(f"{name}."): tensor for own, (tensor, _) in spectra.items()}
    turn.block = student = copy.deepcopy(turn.block, {id(own): own for own in turn.block.parameters()})
    inside = {own.removeprefix(f"{name}."): parts for own, (_, parts) in spectra.items()}
    _put_parts(place, turn.names, student, f"{name}.")
    values = train_kept(student, inside, rounded=place.rounded)
    del spectra, inside  # all codes of a block
    release_freed_memory()
    vectors = _train_vectors(place, turn.names, student, f"{name}.")

    def batch(step: int, rank: int) -> Batch:
        return {"place": torch.tensor(chosen(settings.seed, step, rank, [1] * first, 1)[0])}

    work = Distillation(
        lambda module, own: module(own["place"]),
        lambda own, wanted, _: (own - wanted).square().sum() / wanted.square().sum(),
        _Fed(student, turn.given),
        _Known(turn.targets),
        batch,
        [{"place": torch.tensor(i)} for i in range(first, len(turn.given))],
        place.folder / f"{name}.safetensors",
        f"{place.key} {name}",
        place.settle(student),
    )
    course = distill(work, settings, progress)
    for own, parts in each_kept_spectrum(student):
        healed.replaced[tensors[own]] = place.leave(tensors[own], parts, _original(turn.names, f"{name}.{own}"))
    healed.vectors |= {vectors[own]: vector for own, vector in trained_vectors(student).items()}
    healed.blocks[name] = (course.held_out[0][1], course.best)
    healed.coefficients += sum(own.numel() for own in values)
    healed.course.train += [(healed.course.step + step, loss) for step, loss in course.train]
    healed.course.step += course.step
    healed.course.steps += course.steps
    healed.course.seconds += course.seconds


def _original(names: TensorNames, name: str) -> Tensor:
    """A parameter that the teacher has, read once more: it had to make room for the training."""
    return cast(StoredParameter, names.find(name)).read()


class _Fed(nn.Module):
    """A block with the arguments of every sample."""

    def __init__(self, block: nn.Module, given: Sequence[Sample]) -> None:
        super().__init__()
        self.block, self._given = block, given

    def forward(self, place: Tensor) -> Tensor:
        with recomputed_weights(self.block):
            return self._given[int(place)].through(self.block)


class _Known(nn.Module):
    """The outputs of a block, instead of a block."""

    def __init__(self, outputs: Sequence[Held]) -> None:
        super().__init__()
        self._outputs = outputs

    def forward(self, place: Tensor) -> Tensor:
        return self._outputs[int(place)]()


def _rank() -> int:
    """Of this process: each leaves files of its own."""
    return distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else 0


def _stage(progress: Progress, number: int, count: int) -> Progress:
    def report(done: int, total: int, what: str) -> None:
        progress(number * total + done, count * total, f"block {number + 1}, {what}")

    return report
