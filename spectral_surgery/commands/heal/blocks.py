"""Training the kept coefficients of a model block after block, in the memory of one block."""

from __future__ import annotations

import copy
import gc
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn

from spectral_surgery.calibration.block_streaming import ActivationStore, LazyModel, load_lazily
from spectral_surgery.commands.heal.gradient_checkpointing import recomputed_weights
from spectral_surgery.commands.heal.whole_model import Healed, HealSession, train_stored_vectors
from spectral_surgery.distributed import average
from spectral_surgery.errors import CheckpointError, ConfigError
from spectral_surgery.files.reader import read_tensor
from spectral_surgery.hf.models import load_outline
from spectral_surgery.hf.tensor_names import StoredParameter, TensorNames
from spectral_surgery.inputs.kinds import kind_of
from spectral_surgery.inputs.model_input import EqualShapes, equal_shapes
from spectral_surgery.inputs.training import inputs_of_step, train_and_held_out
from spectral_surgery.live.blocks import Held, Sample, next_inputs
from spectral_surgery.live.stacks import Prefixes
from spectral_surgery.live.trained_spectra import each_kept_spectrum, train_kept, trained_vectors
from spectral_surgery.memory import release_freed_memory
from spectral_surgery.progress import Progress
from spectral_surgery.text.objectives import Objective
from spectral_surgery.training.loop import Batch, Training, train, trained
from spectral_surgery.training.settings import DistillSettings

_BLOCK_INPUTS = 512  # that wait between two blocks
_LEAST = 1e-6  # minutes of a block: one step
_IN_MEMORY = 8 << 20  # bytes of activations; more go to files


def heal_blocks(session: HealSession, objective: Objective, settings: DistillSettings, progress: Progress) -> Healed:
    """Train block after block, each on what the healed blocks before it give, until it gives what the original gives.

    Raises:
        CheckpointError: when nothing can be trained, or the model has no list of blocks that can be read one by one.
        ConfigError: when the text does not do, a loss is not finite, or another device than the CPU is asked for.
    """
    if session.device != "cpu":
        raise ConfigError(f"heal --blocks: expected --device cpu, got {session.device}. Leave one of both out.")
    data, config = session.data, session.index.config
    loader, trust = kind_of(data.file, config).auto_class, data.trust_remote_code
    outline = load_outline(session.teacher, loader, trust_remote_code=trust)
    parts = train_and_held_out(data, session.teacher, config, outline, objective.seq_length)
    where = session.teacher, session.index, loader
    lazy = load_lazily(*where, trust_remote_code=trust, given=parts[0][0].shapes, outline=outline)
    if lazy.whole:
        raise CheckpointError(
            "heal --blocks: expected a list of blocks whose parameters are stored as they are, got none. Heal it"
            " without --blocks."
        )
    tokens = (data.batch_size or objective.batch_size) * max(one.tokens for one in parts[0])
    batches = [equal_shapes(part[:_BLOCK_INPUTS], tokens) for part in parts]
    both = EqualShapes([*batches[0].groups, *batches[1].groups])
    healed = _heal_stacks(session, lazy, both, len(batches[0]), settings=settings, progress=progress)
    if not healed.replaced:
        raise CheckpointError(
            "heal: expected compressed tensors in the blocks of the model, got none. Leave --blocks out."
        )
    sides = list(zip(*healed.blocks.values(), strict=True))
    before, after = (sum(side) / len(side) for side in sides)
    healed.curve.held_out = [(0, before), (healed.curve.step, after)]
    healed.curve.best_step = healed.curve.step
    return healed


def _heal_stacks(
    session: HealSession,
    lazy: LazyModel,
    batches: EqualShapes,
    first: int,
    *,
    settings: DistillSettings,
    progress: Progress,
) -> Healed:
    """Heal all blocks in turn; the first batches are to train on."""
    chain, healed, left = lazy.chain, Healed(), _TimeLeft(settings, session)
    count, done = sum(len(stack.blocks) for stack in chain.stacks), 0
    ends, given = list[list[Held]](), list[list[Held]]()  # what the original and the healed stacks end with
    with closing(ActivationStore(_IN_MEMORY, session.folder)) as store:
        for number, stack in enumerate(chain.stacks):
            with chain.outside(number):
                wanted = chain.enter(number, batches, ends, store.put)
                _put_stored(session, lazy.names, lazy.model, chain.prefixes)
                inputs = chain.enter(number, batches, given, store.put)
            for place, block in enumerate(stack.blocks):
                name = f"{stack.prefix}.{place}"
                with lazy.holding(f"{name}."):
                    wanted = next_inputs(block, wanted, store.put)
                    of_stage = _stage(progress, done, count)
                    turn = _Turn(
                        name,
                        block,
                        inputs,
                        [sample.hidden for sample in wanted],
                        first,
                        lazy.names,
                        count,
                        settings.minutes,
                    )
                    _heal_block(session, turn, left.share(count - done, healed), of_stage, healed)
                    inputs = next_inputs(turn.block, inputs, store.put)
                    del turn  # and the trained block with it, before the next one is read
                    gc.collect()  # optimizers refer to themselves
                done += 1
            ends.append([sample.hidden for sample in wanted])
            given.append([sample.hidden for sample in inputs])
    return healed


def _put_stored(session: HealSession, names: TensorNames, model: nn.Module, without: Prefixes) -> None:
    """What is stored of the parameters outside the blocks, such as embeddings: it is what the blocks will be given."""
    outside = {name: parameter for name, parameter in model.named_parameters() if not name.startswith(without)}
    shapes = {name: tuple(parameter.shape) for name, parameter in outside.items()}
    with torch.no_grad():
        for name, info in session.vectors(names, shapes).items():
            outside[name].copy_(read_tensor(info))
        for name, (_, parts) in session.spectra(names, shapes).items():
            outside[name].copy_(torch.cat([part.to_dense() for part in parts]).reshape(outside[name].shape))


def _put_parts(session: HealSession, names: TensorNames, block: nn.Module, prefix: str) -> None:
    """Give a block what is stored of parameters that are made of parts, as fused experts are: they are not trained."""
    for name, parameter in list(block.named_parameters()):
        stored = names.find(f"{prefix}{name}")
        if stored is not None and stored.whole is None:
            path, _, leaf = name.rpartition(".")
            value = stored.read(session.stored).to(parameter.dtype)
            block.get_submodule(path)._parameters[leaf] = nn.Parameter(value, requires_grad=False)


@dataclass
class _Turn:
    """A block of several, what it is given, and what it should give; the first samples are to train on."""

    name: str
    block: nn.Module
    inputs: Sequence[Sample]
    targets: Sequence[Held]
    train: int
    names: TensorNames
    blocks: int
    minutes: float


def _heal_block(
    session: HealSession, turn: _Turn, settings: DistillSettings, progress: Progress, healed: Healed
) -> None:
    """Heal the block of a turn, which holds the healed one afterwards; the original lends it what is not trained."""
    name, first, began = turn.name, turn.train, session.clock()
    spectra = session.spectra(
        turn.names, {f"{name}.{leaf}": tuple(p.shape) for leaf, p in turn.block.named_parameters()}
    )
    if not spectra or turn.inputs[0].skipped:
        return
    tensors = {path.removeprefix(f"{name}."): tensor for path, (tensor, _) in spectra.items()}
    turn.block = student = copy.deepcopy(
        turn.block, {id(parameter): parameter for parameter in turn.block.parameters()}
    )
    inside = {path.removeprefix(f"{name}."): parts for path, (_, parts) in spectra.items()}
    _put_parts(session, turn.names, student, f"{name}.")
    values = train_kept(student, inside, rounded=session.rounded)
    del spectra, inside  # all codes of a block
    release_freed_memory()
    vectors = train_stored_vectors(session, turn.names, student, f"{name}.")

    def batch(step: int, process: int) -> Batch:
        return {"number": torch.tensor(inputs_of_step(settings.seed, step, process, [1] * first, 1)[0])}

    def loss(batch: Batch) -> Tensor:
        number = int(batch["number"])
        wanted = turn.targets[number]()
        with recomputed_weights(student):
            return (turn.inputs[number].through(student) - wanted).square().sum() / wanted.square().sum()

    def ready(_: float, least: float) -> None:
        """All blocks need at least what the first one needs."""
        now = session.clock()
        session.ready(turn.minutes, now - session.began, least + (turn.blocks - 1) * (now - began + least))

    work = Training(
        trained(student),
        loss,
        batch,
        [{"number": torch.tensor(number)} for number in range(first, len(turn.inputs))],
        session.folder / f"{name}.safetensors",
        f"{session.key} {name}",
        session.fitted,
        session.hold_rate(student),
        told=(lambda _: None) if healed.blocks else (lambda pace: session.told(pace, turn.blocks)),
        ready=(lambda *_: None) if healed.blocks else ready,
    )
    curve = train(work, settings, progress, session.clock)
    for path, parts in each_kept_spectrum(student):
        healed.replaced[tensors[path]] = session.leave(tensors[path], parts, _original(turn.names, f"{name}.{path}"))
    healed.vectors |= {vectors[path]: vector for path, vector in trained_vectors(student).items()}
    healed.blocks[name] = (curve.held_out[0][1], curve.best)
    healed.coefficients += sum(value.numel() for value in values)
    healed.curve.train += [(healed.curve.step + step, loss) for step, loss in curve.train]
    healed.curve.step += curve.step
    healed.curve.steps += curve.steps
    healed.curve.seconds += curve.seconds


def _original(names: TensorNames, name: str) -> Tensor:
    """A parameter that the teacher has, read once more: it had to make room for the training."""
    return cast(StoredParameter, names.find(name)).read()


class _TimeLeft:
    """Shares of the minutes for the blocks that are left, so that all together take what was asked for."""

    def __init__(self, settings: DistillSettings, session: HealSession) -> None:
        self._settings, self._clock, self._began = settings, session.clock, session.began
        self._last, self._trained, self._earlier = session.clock(), 0.0, 0.0  # seconds of runs before this one

    def share(self, blocks: int, healed: Healed) -> DistillSettings:
        """Settings of the next block, of those that are left; what surrounds a training takes as long as before."""
        if self._settings.steps:
            return self._settings
        now, trained = self._clock(), healed.curve.seconds
        around = now - self._last - (trained - self._trained)
        self._earlier += max(0.0, -around)
        self._last, self._trained = now, trained
        left = 60 * self._settings.minutes - (now - self._began + self._earlier)
        seconds = float(average(torch.tensor(left / blocks - max(0.0, around), dtype=torch.float64)))
        return replace(self._settings, minutes=max(seconds / 60, _LEAST))


def _stage(progress: Progress, number: int, count: int) -> Progress:
    def report(done: int, total: int, what: str) -> None:
        progress(number * total + done, count * total, f"block {number + 1}, {what}")

    return report
