"""extract: the difference of two checkpoints as an adapter, tensor by tensor, with the error it leaves."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from spectral_surgery.adapters.base import Adapter, AdapterSpec, AdapterState
from spectral_surgery.adapters.from_update.expansion import energy_of
from spectral_surgery.adapters.from_update.fit_update import EXTRACTORS, Fit, Size, Update, fit
from spectral_surgery.cards import card as cards
from spectral_surgery.cards.adapters import converted_card, error_of
from spectral_surgery.cards.command_line import BASE, command_line, setting_options, size_options, target_options
from spectral_surgery.commands.extract.plan import ExtractPlan, plan_extraction
from spectral_surgery.commands.extract.whole_tensors import Rest, save_rest
from spectral_surgery.errors import ConfigError
from spectral_surgery.files.atomic import publishing
from spectral_surgery.files.index import read_index
from spectral_surgery.files.peft.adapter_files import TENSOR_FILE, write_adapter
from spectral_surgery.files.peft.task import task_of
from spectral_surgery.files.reader import DTYPES
from spectral_surgery.files.sidecar_files import check_apart
from spectral_surgery.files.storage import Checkpoint
from spectral_surgery.memory import peak_rss_bytes
from spectral_surgery.progress import Progress, silent
from spectral_surgery.targets import ModuleTargets

SAVED = "saved whole"
_ENTRY_BYTES = 128  # in a header, beside the name: at least what a tensor takes there


@dataclass(frozen=True)
class ExtractOptions:
    """What is asked.

    Attributes:
        config: settings of the method; None for its defaults.
        targets: which modules get an adapter; target_modules None for all that differ and can.
        dtype: of the stored floats: F32, BF16 or F16.
        max_count: no layer has more components; saves time where a few are enough.
        save_rest: store whole what differs and carries no adapter.
        base_model: how the adapter names its base; None for the path.
    """

    method: str
    size: Size
    config: Any = None
    targets: ModuleTargets = field(default_factory=ModuleTargets)
    dtype: str = "F32"
    max_count: int | None = None
    save_rest: bool = False
    base_model: str | None = None
    revision: str | None = None


@dataclass(frozen=True)
class LayerReport:
    """One layer: its name, (O, I), components kept, bytes they take, error left (measured), and the least possible."""

    layer: str
    shape: tuple[int, int]
    components: int
    stored_bytes: int
    relative_error: float
    energy: float
    floor: float

    def to_json(self) -> dict[str, object]:
        """Plain values for ``--json``."""
        return {
            "layer": self.layer,
            "shape": list(self.shape),
            "components": self.components,
            "stored_bytes": self.stored_bytes,
            "relative_error": self.relative_error,
            "energy_kept": self.energy_kept,
            "floor": self.floor,
        }

    @property
    def energy_kept(self) -> float:
        """Share of ‖ΔW‖² in the adapter."""
        return max(0.0, 1 - self.relative_error**2)


@dataclass(frozen=True)
class ExtractReport:
    """What was extracted.

    Attributes:
        unit: what a component is: rank or n_frequency.
        layers: every matrix that differs.
        rest: what becomes of other tensors that differ, by name: ``saved whole``, or the reason it is not covered.
        tied: name -> name of parameters that are one, and of which the adapter changes the second: merging changes
            both, in a live model of PEFT the first stays as it is.
        stored_bytes: of the file with the tensors.
    """

    method: str
    unit: str
    layers: tuple[LayerReport, ...]
    rest: dict[str, str]
    tied: dict[str, str]
    stored_bytes: int
    seconds: float
    peak_rss_bytes: int

    @property
    def relative_error(self) -> float:
        """Of all matrices together."""
        return error_of(self.layers)

    def to_json(self) -> dict[str, object]:
        """Plain values for ``--json``."""
        layers = [layer.to_json() for layer in self.layers]
        return vars(self) | {"layers": layers, "relative_error": self.relative_error}


def extract(
    base: Checkpoint,
    tuned: Checkpoint,
    out: Path,
    options: ExtractOptions,
    *,
    overwrite: bool = False,
    progress: Progress = silent,
) -> ExtractReport:
    """Write an adapter that turns one checkpoint into another; no model is built.

    Raises:
        CheckpointError: when a checkpoint is damaged or quantised, or out is taken.
        ConfigError: when nothing differs, or settings, error or budget cannot be kept.
        TargetError: when the targets match nothing.
    """
    started = time.perf_counter()
    for source in (base, tuned):
        check_apart(source, out)
    extractor = EXTRACTORS[options.method]
    plan = plan_extraction(base, tuned, options.method, options.targets)
    steps = Steps(2 * len(plan.pairs), progress)
    updates = [pair.update for pair in plan.pairs]
    fitted = fit(
        extractor,
        extractor.method.config() if options.config is None else options.config,
        updates,
        _room(plan, options),
        dtype=DTYPES[options.dtype],
        max_count=options.max_count,
        report=steps.advance,
    )
    rest = _rest(plan, list(fitted.layers), options)
    name = options.base_model or str(base)
    task = task_of(plan.tuned.index.config)
    spec = AdapterSpec(extractor.method, fitted.config, rest.targets, name, options.revision, task)
    extra = {name: found.read() for name, found in rest.tensors.items()}
    state = AdapterState(spec, fitted.layers, extra, plan.embeddings & fitted.layers.keys(), _kernels(plan, fitted))
    layers = measure(state, updates, fitted, steps.advance)
    with publishing(out, overwrite=overwrite) as folder:
        stored = _write(folder, state, layers, options)
    seconds = time.perf_counter() - started
    left = {name: rest.missing.get(name, SAVED) for name in plan.rest} if options.save_rest else plan.rest
    tied = _tied(plan, fitted)
    return ExtractReport(options.method, extractor.unit, layers, left, tied, stored, seconds, peak_rss_bytes())


def _kernels(plan: ExtractPlan, fitted: Fit) -> dict[str, tuple[int, ...]]:
    return {layer: kernel for layer, kernel in plan.kernels.items() if layer in fitted.layers}


def _tied(plan: ExtractPlan, fitted: Fit) -> dict[str, str]:
    """Parameters that are one with that of a layer."""
    names = [f"{layer}.weight" for layer in plan.embeddings & fitted.layers.keys()]
    return {other: name for name in names for other in plan.tuned.tied_with(name) if other != name}


def _write(folder: Path, state: AdapterState, layers: Sequence[LayerReport], options: ExtractOptions) -> int:
    """Write the adapter and its card; the bytes of its tensors."""
    write_adapter(state, folder)
    index, unit, command = read_index(folder, adapters=True), EXTRACTORS[options.method].unit, _command(options)
    source = "the difference of two checkpoints"
    cards.write_derived(folder, converted_card(state.spec, index, layers, unit, command=command, source=source))
    return (folder / TENSOR_FILE).stat().st_size


def _command(options: ExtractOptions) -> str:
    """The command that makes the same again, without paths of anybody's machine."""
    asked = {
        "method": options.method,
        **size_options(options.size, EXTRACTORS[options.method].unit, options.dtype),
        "o": [] if options.config is None else setting_options(options.config),
        **target_options(options.targets),
        "max_rank": options.max_count,
        "save_rest": options.save_rest,
    }
    return command_line("extract", (cards.as_repository(options.base_model) or BASE, "TUNED", "OUT"), asked)


def measure(
    state: AdapterState, updates: Sequence[Update], fitted: Fit, done: Callable[[str], None] = lambda _: None
) -> tuple[LayerReport, ...]:
    """Compare adapters as they are stored with the updates they stand for."""
    reports = []
    for update in updates:
        if update.layer in fitted.counts:
            delta = update.delta()
            energy = energy_of(delta)
            if update.layer in state.layers:
                delta -= delta_of(state, update.layer, update.shape)
            stored = sum(tensor.nbytes for tensor in state.layers.get(update.layer, {}).values())
            error = math.sqrt(energy_of(delta) / energy) if energy else 0.0
            layer = update.layer
            reports.append(
                LayerReport(layer, update.shape, fitted.counts[layer], stored, error, energy, fitted.floors[layer])
            )
        done(update.layer)
    return tuple(reports)


def delta_of(state: AdapterState, layer: str, shape: tuple[int, int]) -> Tensor:
    """The weight update of a stored layer, [O, I] float32.

    Raises:
        NotMergeableError: when it is not one weight update.
        CheckpointError: when the adapter does not fit the shape.
    """
    with torch.no_grad():
        return cast(Adapter, state.build(layer, *shape)).delta_weight().float()


def _rest(plan: ExtractPlan, layers: list[str], options: ExtractOptions) -> Rest:
    targets = ModuleTargets(tuple(layers), fan_in_fan_out=plan.transposed)
    if not options.save_rest:
        return Rest(targets)
    return save_rest(plan.tuned, plan.rest, layers, targets, options.method)


def room(size: Size, names: Collection[str], whole: int) -> Size:
    """A size of which, in bytes, only what is left for the numbers of adapters.

    Args:
        size: as asked; other kinds are given back.
        whole: bytes of tensors that are stored as they are.

    Raises:
        ConfigError: when nothing is left.
    """
    if size.kind != "bytes":
        return size
    header = sum(_ENTRY_BYTES + len(name) for name in names)
    left = int(size.value) - header - whole
    if left < 1:
        raise ConfigError(
            f"bytes: expected more than {header + whole}, of which {header} go to names and shapes and {whole} to"
            f" tensors saved whole, got {size.value:g}. Choose fewer layers or more bytes."
        )
    return replace(size, value=left)


def _room(plan: ExtractPlan, options: ExtractOptions) -> Size:
    names = [f"{pair.layer}.{options.method}_adapter.positions" for pair in plan.pairs]  # at most two for each layer
    rest = _rest(plan, [pair.layer for pair in plan.pairs], options).tensors
    return room(options.size, [*names, *names, *rest], sum(info.nbytes for info in rest.values()))


@dataclass
class Steps:
    """Counts what is done for the progress of a workflow."""

    total: int
    progress: Progress
    done: int = 0

    def advance(self, layer: str) -> None:
        """One more layer is done."""
        self.done += 1
        self.progress(self.done, self.total, layer)
