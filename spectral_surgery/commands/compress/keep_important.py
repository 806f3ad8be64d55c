"""compress --sparsity --heal: the coefficients kept, and then trained, are those that count most on some text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from spectral_surgery.calibration.curvature import importance_of
from spectral_surgery.calibration.stored_layers import matrices_of
from spectral_surgery.codec.encoded import Basis
from spectral_surgery.codec.importance import Importance, Threshold, threshold_at
from spectral_surgery.commands.compress.job import Job
from spectral_surgery.errors import ConfigError
from spectral_surgery.files.atomic import replace_file
from spectral_surgery.files.compressed.plan import Plan, PlannedTensor
from spectral_surgery.files.compressed.settings import CompressOptions
from spectral_surgery.files.compressed.units import UnitStore, leave_codes
from spectral_surgery.files.index import read_index
from spectral_surgery.files.reader import read_tensor
from spectral_surgery.files.storage import here
from spectral_surgery.hf.models import load_any
from spectral_surgery.hf.tensor_names import names_in
from spectral_surgery.inputs.kinds import kind_of, objective_on
from spectral_surgery.inputs.model_input import ModelInput, padded
from spectral_surgery.inputs.training import inputs_of_step, train_and_held_out
from spectral_surgery.progress import Progress, silent
from spectral_surgery.text.objectives import Objective
from spectral_surgery.text.settings import TextData

_BATCHES = 48
_FILE = "importance.safetensors"


def keep_important(job: Job, data: TextData) -> None:
    """Keep a fraction of the coefficients, and leave their codes as finished units.

    Of linear layers those are kept whose loss changes the model most. With an allocation of ``slope`` a layer has as
    many of them as its coefficients count, with ``even`` all have as many.
    """
    store, plan, progress = job.store, job.plan, job.run.progress
    planned = {tensor.info.name: tensor for tensor in plan.tensors}
    importances = _remembered(store)
    if importances is None:
        importances = measure_importance(here(job.source), plan, data, progress)
        _remember(store, importances)
    cuts = _cuts(planned, importances, plan.options)
    for done, (name, importance) in enumerate(importances.items()):
        coefficients = _coefficients(planned[name], plan.options)
        codes = cuts[name].codes(coefficients, importance)
        leave_codes(store, plan, planned[name], coefficients, codes, threads=job.run.threads)
        progress(done + 1, len(importances), name)


def measure_importance(source: Path, plan: Plan, data: TextData, progress: Progress = silent) -> dict[str, Importance]:
    """How much the coefficients of the linear layers of a model count on some text.

    Returns:
        By name of the tensor, in the order of the layers; none for a layer that the text never reaches.

    Raises:
        ConfigError: when there is too little text, the model does not know its tokens, or weights are not finite.
    """
    index = read_index(source)
    objective = objective_on(data.file, index.config)
    trust = data.trust_remote_code
    loader = objective.auto_class if kind_of(data.file, index.config).by_objective else ""
    model = load_any(source, loader, dtype=torch.float32, trust_remote_code=trust)
    model.requires_grad_(requires_grad=False)
    planned = {tensor.info.name: tensor for tensor in plan.tensors}
    weights = {}
    for matrix in matrices_of(names_in(model, index), planned, "", model):
        name, layers = matrix.tensor, list[Any](matrix.modules.values())
        if len(layers) != 1 or layers[0].weight.shape != planned[name].info.shape:
            continue  # importance is measured by the gradient of one parameter
        basis = Basis(plan.options.transform, plan.options.tile, planned[name].axes)
        if not torch.isfinite(layers[0].weight).all():
            raise ConfigError(f"{name}: expected finite weights, got NaN or infinite values. Repair it.")
        weights[name] = layers[0].weight.requires_grad_(), basis
    inputs, _ = train_and_held_out(data, source, index.config, model, objective.seq_length)
    return importance_of(weights, _Projections(model, objective, inputs, data, progress)) if weights else {}


@dataclass(frozen=True)
class _Projections:
    model: Any
    objective: Objective
    inputs: list[ModelInput]
    data: TextData
    progress: Progress

    def __iter__(self) -> Iterator[Callable[[], Tensor]]:
        generator, lengths = torch.Generator().manual_seed(0), [one.tokens for one in self.inputs]
        size = min(self.data.batch_size or self.objective.batch_size, len(self.inputs))
        for step in range(_BATCHES):
            batch = padded([self.inputs[i] for i in inputs_of_step(0, step, 0, lengths, size)])

            def projection(batch: dict[str, Tensor] = batch) -> Tensor:
                return self.objective.project(self.objective.run(self.model, batch), batch, generator)

            yield projection
            self.progress(step + 1, _BATCHES, "importance of coefficients")


def _cuts(
    planned: Mapping[str, PlannedTensor], importances: Mapping[str, Importance], options: CompressOptions
) -> dict[str, Threshold]:
    """By name; the same for all of them, or that of each alone."""

    def costs(name: str) -> Tensor:
        return importances[name].costs(_coefficients(planned[name], options))

    if options.allocation == "even":
        return {name: threshold_at([costs(name)], options.target.value) for name in importances}
    return (
        dict.fromkeys(importances, threshold_at(map(costs, importances), options.target.value)) if importances else {}
    )


def _coefficients(tensor: PlannedTensor, options: CompressOptions) -> Tensor:
    weight = read_tensor(tensor.info).float().reshape(tensor.rows, tensor.columns)
    return Basis(options.transform, options.tile, tensor.axes).forward(weight)


def _remember(store: UnitStore, importances: Mapping[str, Importance]) -> None:
    tensors = {f"{name}.rows": importance.rows for name, importance in importances.items()}
    tensors |= {f"{name}.columns": importance.columns for name, importance in importances.items()}
    replace_file(store.folder / _FILE, save(tensors, {"key": store.key}))


def _remembered(store: UnitStore) -> dict[str, Importance] | None:
    file = store.folder / _FILE
    if not file.exists():
        return None
    with safe_open(file, "pt") as state:
        if (state.metadata() or {}).get("key") != store.key:
            return None
        names = [key.removesuffix(".rows") for key in state.keys() if key.endswith(".rows")]  # noqa: SIM118 - no dict
        return {
            name: Importance(*(state.get_tensor(f"{name}.{side}") for side in ("rows", "columns"))) for name in names
        }
