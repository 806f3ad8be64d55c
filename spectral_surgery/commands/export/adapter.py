"""An adapter in another form: as a LoRA that every other tool reads, as another method, or as plain tensors."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from spectral_surgery.adapters.base import AdapterState
from spectral_surgery.adapters.foura import Foura
from spectral_surgery.adapters.from_update.fit_update import EXTRACTORS, Extractor, Fit, Size, Update, fit
from spectral_surgery.adapters.lora import Lora
from spectral_surgery.cards import card as cards
from spectral_surgery.cards.adapters import converted_card, delta_card, error_of
from spectral_surgery.cards.card import as_repository
from spectral_surgery.cards.command_line import BASE, command_line, setting_options, size_options
from spectral_surgery.codec.quality import relative_error
from spectral_surgery.commands.extract import LayerReport, Steps, delta_of, measure, room
from spectral_surgery.errors import CheckpointError, ConfigError
from spectral_surgery.files.atomic import publishing
from spectral_surgery.files.index import TensorInfo, read_index
from spectral_surgery.files.merge_record import Source
from spectral_surgery.files.peft.adapter_files import TENSOR_FILE, read_adapter, write_adapter
from spectral_surgery.files.reader import DTYPES
from spectral_surgery.files.sidecar_files import check_apart
from spectral_surgery.files.storage import Checkpoint
from spectral_surgery.files.writer import Entry, tensor_bytes, write_checkpoint
from spectral_surgery.hf.base_model import BaseModel, base_model
from spectral_surgery.live.merging import total_delta
from spectral_surgery.progress import Progress, silent
from spectral_surgery.targets import ModuleTargets

_LOW_RANK = ("lora", "foura")
DELTA = "delta"


@dataclass(frozen=True)
class AdapterTarget:
    """One row of TARGETS: a form of adapters, and what that is."""

    name: str
    help: str


ADAPTER_TARGETS = (
    *(AdapterTarget(name, f"an adapter of the method {name}") for name in EXTRACTORS),
    AdapterTarget(DELTA, "a checkpoint with ΔW under the name of each weight"),
)


@dataclass(frozen=True)
class ExportReport:
    """What was exported.

    Attributes:
        method: of the adapter.
        form: a method, or delta.
        unit: what a component is: rank or n_frequency.
        layers: with their errors, as measured.
        exact: whether nothing was approximated; what is left is rounding.
        left_out: tensors trained whole that the form has no place for.
        stored_bytes: of the files with the tensors.
        seconds: wall time.
    """

    method: str
    form: str
    unit: str
    layers: tuple[LayerReport, ...]
    exact: bool
    left_out: tuple[str, ...]
    stored_bytes: int
    seconds: float

    @property
    def relative_error(self) -> float:
        """Of all layers together."""
        return error_of(self.layers)

    def to_json(self) -> dict[str, object]:
        """Plain values for ``--json``."""
        return {
            "method": self.method,
            "format": self.form,
            "exact": self.exact,
            "relative_error": self.relative_error,
            "left_out": list(self.left_out),
            "stored_bytes": self.stored_bytes,
            "layers": [layer.to_json() for layer in self.layers],
            "seconds": self.seconds,
        }


def export(
    adapter: Path,
    out: Path,
    form: str,
    *,
    base: Checkpoint | None = None,
    size: Size | None = None,
    config: Any = None,
    dtype: str = "F32",
    overwrite: bool = False,
    origin: str | None = None,
    progress: Progress = silent,
) -> ExportReport:
    """Write an adapter in another form.

    FouRA without a gate, or with a frozen one, is a LoRA: nothing is lost. Other methods are approximated as
    `commands.extract` does it. Biases and modules_to_save are carried over.

    Args:
        adapter: folder with an adapter.
        out: folder to create.
        form: a row of EXTRACTORS, or ``delta`` for a checkpoint with ΔW under the name of each weight.
        base: the base model, whose headers give the shapes of layers where the adapter does not say them.
        size: of the result; None where no approximation is needed.
        config: settings of the new method; None for its defaults.
        dtype: of the stored floats: F32, BF16 or F16.
        overwrite: replace an existing folder.
        origin: the Hub repository of base, for the model card; None for the one the adapter names.
        progress: called after each layer.

    Returns:
        The report.

    Raises:
        CheckpointError: when something is damaged, does not fit, or out is taken.
        ConfigError: when a size or the base is needed, or is of no use.
        NotMergeableError: when the adapter is not one weight update, as with a gate that is not frozen.
    """
    started = time.perf_counter()
    check_apart(adapter, out)
    plan = plan_export(adapter, form, base=base, size=size)
    state, updates = plan.state, plan.updates
    work = _Work(state, updates, dtype, Steps(len(updates) if form == DELTA else 2 * len(updates), progress))
    known = as_repository(origin) or as_repository(state.spec.base_model)
    with publishing(out, overwrite=overwrite) as folder:
        if plan.base is not None and form == DELTA:
            layers, unit, left_out = _write_deltas(folder, work, plan.base), "weights", tuple(sorted(state.extra))
            card = delta_card(state.spec, read_index(folder), layers, known, _command(form, dtype, known or BASE))
        else:
            fitted = _converted(work, form, size, config)
            fresh = _as_method(state, form, fitted)
            layers, unit, left_out = measure(fresh, updates, fitted, work.steps.advance), EXTRACTORS[form].unit, ()
            write_adapter(fresh, folder)
            command = _command(form, dtype, None if base is None else known or BASE, size, config)
            source, headers = f"an adapter of the method {state.spec.method.name}", read_index(folder / TENSOR_FILE)
            card = converted_card(fresh.spec, headers, layers, unit, command=command, source=source)
        cards.write_derived(folder, card)
        stored = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    seconds = time.perf_counter() - started
    return ExportReport(state.spec.method.name, form, unit, layers, plan.exact, left_out, stored, seconds)


def _command(form: str, dtype: str, base: str | None, size: Size | None = None, config: Any = None) -> str:
    """The command that makes the same again, without paths of anybody's machine."""
    unit = "" if form == DELTA else EXTRACTORS[form].unit
    settings = [] if config is None else setting_options(config)
    options = {"to": form, "base": base, **size_options(size, unit, dtype), "o": settings}
    return command_line("export", ("ADAPTER", "OUT"), options)


@dataclass(frozen=True)
class ExportPlan:
    """An export, checked.

    Attributes:
        state: the adapter.
        base: its base, where that is known.
        updates: of its layers.
        exact: whether nothing is approximated.
    """

    state: AdapterState
    base: BaseModel | None
    updates: list[Update]
    exact: bool

    def to_json(self) -> dict[str, object]:
        """Plain values for ``--json``."""
        return {"exact": self.exact, "layers": {update.layer: list(update.shape) for update in self.updates}}


def plan_export(adapter: Path, form: str, *, base: Checkpoint | None = None, size: Size | None = None) -> ExportPlan:
    """Read an adapter and the headers of its base, and see whether it can be written in another form.

    Raises:
        CheckpointError: as `export`.
        ConfigError: as `export`.
        NotMergeableError: as `export`.
    """
    state = read_adapter(adapter)
    if state.only_merged:
        raise ConfigError(
            f"{adapter}: has {state.only_merged}, which other forms have no place for; expected an adapter without."
            " Merge it, or use it with PEFT."
        )
    model = base_model(read_index(base)) if base is not None else None
    if model is None and needs_base(state, form):
        raise ConfigError(
            f"{state.spec.method.name} to {form}: names and shapes of the base model are needed, for which headers are"
            " enough; expected a folder or a repository. Use --base."
        )
    updates = [_update(state, layer, model) for layer in state.layers]
    updates[0].delta()  # a gate is refused before anything is computed
    name = state.spec.method.name
    if form == DELTA:
        return ExportPlan(state, model, updates, exact=True)
    exact = size is None and EXTRACTORS[form].unit == "rank" and name in _LOW_RANK
    if size is None and not exact:
        raise ConfigError(
            f"{name} to {form}: is an approximation, and no size was given; expected bytes, an error or a"
            f" {EXTRACTORS[form].unit}. Only foura and lora become each other exactly."
        )
    return ExportPlan(state, model, updates, exact)


@dataclass(frozen=True)
class _Work:
    state: AdapterState
    updates: list[Update]
    dtype: str
    steps: Steps


def needs_base(state: AdapterState, form: str) -> bool:
    """Whether the base model must say the shapes of the layers, or the names of its weights."""
    return form == DELTA or any(_own_shape(state, layer) is None for layer in state.layers)


def _own_shape(state: AdapterState, layer: str) -> tuple[int, int] | None:
    """(O, I) where the tensors of an adapter tell: low rank, except complex factors."""
    tensors = state.layers[layer]
    told = {"A", "B"} <= tensors.keys() and tensors["A"].dim() == tensors["B"].dim() == 2
    return (tensors["B"].shape[0], tensors["A"].shape[1]) if told else None


def _weight(state: AdapterState, layer: str, base: BaseModel) -> tuple[TensorInfo, bool]:
    """The stored matrix of a layer, and whether it is [I, O]."""
    found = base.find(f"{layer}.weight")
    info = found.whole if found else None
    if info is None or len(info.shape) < 2:
        raise CheckpointError(
            f"{base.index.root}: has no matrix {layer}.weight; expected the base of the adapter. Use --base."
        )
    return info, base.is_transposed(state, layer, info.shape)


def _update(state: AdapterState, layer: str, base: BaseModel | None) -> Update:
    shape = _own_shape(state, layer)
    if base is not None:
        info, transposed = _weight(state, layer, base)
        shape = Source(0, layer, info.shape, transposed=transposed).out_in
    if shape is None:
        raise CheckpointError(f"{layer}: the shape of the layer is not known. Use --base.")
    return Update(layer, shape, lambda: delta_of(state, layer, shape))


def _converted(work: _Work, form: str, size: Size | None, config: Any) -> Fit:
    extractor = EXTRACTORS[form]
    settings = extractor.method.config() if config is None else config
    extractor.check(settings)
    dtype = DTYPES[work.dtype]
    if size is None:
        return _rewritten(work, extractor, settings, dtype)
    names = [f"{layer}.{form}_adapter.positions" for layer in work.state.layers]
    extra = work.state.extra
    size = room(size, [*names, *names, *extra], sum(tensor.nbytes for tensor in extra.values()))
    return fit(extractor, settings, work.updates, size, dtype=dtype, report=work.steps.advance)


def _rewritten(work: _Work, extractor: Extractor, config: Any, dtype: torch.dtype) -> Fit:
    """The factors themselves, without components that a frozen gate has closed."""
    parts = {}
    for update in work.updates:
        with torch.no_grad():
            down, up = _factors(work.state.build(update.layer, *update.shape))
        used = up.abs().amax(0) > 0
        used = used if bool(used.any()) else ~used
        parts[update.layer] = {"down": down[used], "up": up[:, used].T}
        work.steps.advance(update.layer)
    counts = {layer: len(factors["down"]) for layer, factors in parts.items()}
    settled = extractor.settle(config, counts)
    layers = {}
    for update in work.updates:
        tensors = extractor.tensors(parts[update.layer], update.shape, settled)
        layers[update.layer] = {key: tensor.to(dtype) for key, tensor in tensors.items()}
    return Fit(settled, layers, counts, dict.fromkeys(counts, 0.0), ())


def _factors(adapter: nn.Module) -> tuple[Tensor, Tensor]:
    if isinstance(adapter, Foura):
        return adapter.lora_factors()
    lora = cast(Lora, adapter)
    return lora.A.detach(), lora.scaling * lora.B.detach()


def _as_method(state: AdapterState, form: str, fitted: Fit) -> AdapterState:
    """The same adapter with other numbers: what is trained beside it is kept."""
    old = state.spec.targets
    bias = f"{form}_only" if old.bias.endswith("_only") else old.bias
    layers = tuple(fitted.layers)
    targets = ModuleTargets(layers, modules_to_save=old.modules_to_save, bias=bias, fan_in_fan_out=old.fan_in_fan_out)
    spec = replace(state.spec, method=EXTRACTORS[form].method, config=fitted.config, targets=targets)
    return replace(state, spec=spec, layers=fitted.layers)


def _write_deltas(folder: Path, work: _Work, base: BaseModel) -> tuple[LayerReport, ...]:
    reports: dict[str, LayerReport] = {}

    def entry(update: Update) -> Entry:
        info, transposed = _weight(work.state, update.layer, base)

        def chunks() -> Iterator[memoryview]:
            adapter = work.state.build(update.layer, *update.shape)
            delta = total_delta([(adapter, 1.0)], info.shape, transposed=transposed)
            stored = delta.to(DTYPES[work.dtype])
            energy = float(delta.square().sum())
            error = relative_error(delta, stored)
            size = (update.shape, delta.numel(), stored.nbytes)
            reports[update.layer] = LayerReport(update.layer, *size, error, energy, 0.0)
            yield tensor_bytes(stored)
            work.steps.advance(update.layer)

        return Entry(info.name, work.dtype, info.shape, chunks)

    write_checkpoint(folder, [entry(update) for update in work.updates])
    return tuple(reports[update.layer] for update in work.updates)
