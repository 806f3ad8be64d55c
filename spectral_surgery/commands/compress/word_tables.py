"""compress --calibrate: the tables of words, which are a large part of small language models.

In an output layer, which is the embedding too in many models, rounding errors are fed forward as in any other layer. Of
what is dropped, every word is a row, and most words are rare: the largest coefficients of all rows together are those
of rare words as often as of others; what is kept counts by how often a word is read, and how likely it is written.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from spectral_surgery.calibration.block_streaming import ActivationStore, LazyModel
from spectral_surgery.calibration.kept_set import in_domain, kept_codes
from spectral_surgery.calibration.layer_moments import IN_MEMORY
from spectral_surgery.calibration.word_tables import TableCosts, output_costs, read_costs
from spectral_surgery.codec.encoded import Basis
from spectral_surgery.codec.feedback import Codes, feedback_factor, output_error
from spectral_surgery.codec.feedback_rate import codes_at
from spectral_surgery.commands.compress.coverage import Calibrated
from spectral_surgery.commands.compress.job import Job
from spectral_surgery.commands.compress.spread_bits import HEADS
from spectral_surgery.files.compressed.plan import PlannedTensor
from spectral_surgery.files.compressed.units import finished_codes, leave_codes
from spectral_surgery.files.peft.task import is_causal
from spectral_surgery.files.reader import read_tensor
from spectral_surgery.inputs.model_input import ModelInput, spaced
from spectral_surgery.live.blocks import UnchainedError
from spectral_surgery.live.heads import word_table
from spectral_surgery.memory import release_freed_memory

_TOKENS = 1 << 13  # of text that say how likely words are
_ROWS = 4096  # at a time


@dataclass(frozen=True)
class Tables:
    """The tables of words of a job, as they were compressed.

    Attributes:
        lazy: the model without an output layer.
        restored: [V, D] by name of the tensor.
    """

    lazy: LazyModel
    done: list[Calibrated]
    restored: dict[str, Tensor]

    def put(self, model: nn.Module) -> None:
        """Give a model its embeddings; their parameters are in memory."""
        with torch.no_grad():
            for name, module in model.named_modules():
                info = self.lazy.names.tensor(f"{name}.weight") if isinstance(module, nn.Embedding) else None
                if info is not None and info.name in self.restored:
                    module.weight.copy_(self.restored[info.name])


def calibrated_tables(job: Job, lazy: LazyModel, inputs: Sequence[ModelInput]) -> Tables:
    """Choose the codes of an output layer and, with a density, of embeddings, and leave them as finished units."""
    planned = {tensor.info.name: tensor for tensor in job.plan.tensors}
    tables = Tables(lazy, [], {})
    for name, costs in _costs(job, lazy, inputs, planned):
        tensor, options = planned[name], job.plan.options
        basis = Basis(options.transform, options.tile, tensor.axes)
        coefficients = basis.forward(read_tensor(tensor.info).float())
        codes = finished_codes(job.store, job.plan, tensor)
        if codes is None:
            codes = _chosen(job, tensor, coefficients, costs, basis)
            leave_codes(job.store, job.plan, tensor, coefficients, codes, threads=job.run.threads)
        restored = codes.coefficients()
        root = costs.rows.sqrt()[:, None]
        error = output_error(coefficients * root, restored * root, in_domain(costs.moment, basis))
        tables.done.append(Calibrated(name, error, "words", (0, tensor.rows)))
        tables.restored[name] = basis.inverse(restored)
        release_freed_memory()
    return tables


def _chosen(job: Job, tensor: PlannedTensor, coefficients: Tensor, costs: TableCosts, basis: Basis) -> Codes:
    """Codes [V, D], of the best kept set or with error feedback."""
    options = job.plan.options
    target = tensor.target or options.target
    if target.kind == "density":
        return kept_codes(coefficients, in_domain(costs.moment, basis), target.value, costs.rows)
    factor, threads = feedback_factor(costs.moment, basis), job.run.threads
    return codes_at(coefficients, factor, target.value, basis, quantizer=options.quantizer, threads=threads)


def _costs(
    job: Job, lazy: LazyModel, inputs: Sequence[ModelInput], planned: Mapping[str, PlannedTensor]
) -> Iterator[tuple[str, TableCosts]]:
    """Of each table that is compressed as a matrix with a row for each word."""
    words = word_table(lazy.model)
    paths = (path for path, module in lazy.model.named_modules() if module is words)
    info = lazy.names.tensor(f"{next(paths, '')}.weight")
    read = info.name if info else ""
    written = next((name for name in HEADS if name in job.index.tensors), read)
    written = job.plan.aliases.get(written, written)
    if written in planned and is_causal(job.index.config) and lazy.chain.stacks:
        head = partial(read_tensor, planned[written].info)
        with suppress(UnchainedError), closing(ActivationStore(IN_MEMORY, job.store.folder)) as store:
            yield written, output_costs(lazy, spaced(inputs, _TOKENS), store, head, read=written == read)
    kept = job.plan.options.target.kind == "density"  # rows that count differently have no steps of their own
    if kept and read in planned and (read != written or not is_causal(job.index.config)):
        yield read, read_costs(inputs, (planned[read].rows, planned[read].columns))
