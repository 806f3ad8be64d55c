"""compress --calibrate: codes chosen so that the outputs of a model stay right, judged on some text.

The blocks of the model are visited in order. The inputs of its linear layers are collected with the blocks before it
already compressed; then every weight is quantised with error feedback at the asked bits, or gets the best kept set of
the asked density, and is left as a finished unit of the compression, which then encodes the rest as without text. With
a density, a layer also makes up for what those before it lost. Tables of words come first.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from torch import Tensor

from spectral_surgery.calibration.block_streaming import LazyModel
from spectral_surgery.calibration.kept_set import in_domain, kept_codes
from spectral_surgery.calibration.layer_moments import LayerMoment, layer_moments, model_and_inputs
from spectral_surgery.calibration.matched_layers import matched_layers
from spectral_surgery.calibration.shares import sharing
from spectral_surgery.codec.encoded import Basis
from spectral_surgery.codec.feedback import Codes, feedback_factor, output_error
from spectral_surgery.codec.feedback_rate import codes_at
from spectral_surgery.commands.compress.coverage import Calibrated, Coverage, coverage_of, reasons_of, seen_by_expert
from spectral_surgery.commands.compress.job import Job
from spectral_surgery.commands.compress.spread_bits import spread_targets
from spectral_surgery.commands.compress.word_tables import Tables, calibrated_tables
from spectral_surgery.engines import ENGINES
from spectral_surgery.errors import ConfigError
from spectral_surgery.files.compressed.plan import PlannedTensor
from spectral_surgery.files.compressed.units import finished_codes, leave_codes
from spectral_surgery.files.storage import here, size_of
from spectral_surgery.inputs.model_input import ModelInput
from spectral_surgery.live.blocks import UnchainedError
from spectral_surgery.memory import release_freed_memory
from spectral_surgery.text.settings import TextData


def calibrated(job: Job, data: TextData, device: str = "cpu") -> tuple[Job, Coverage]:
    """Choose codes with text to judge by, and leave them as finished units.

    Args:
        device: blocks run on it; codes are chosen on the CPU.

    Returns:
        The job, with a rate for each tensor when rates are spread; and what was reached.

    Raises:
        ConfigError: when the target is an error, there is too little text, or nothing to calibrate.
    """
    if job.plan.options.target.kind == "max_error":
        raise ConfigError(
            "--calibrate: expected --bits or --sparsity with it, got --max-error, which it minimises itself."
        )
    if job.plan.options.allocation == "slope":
        targets = spread_targets(here(job.source), job.index, job.plan, data, job.store, device=device)
        job = replace(job, plan=job.plan.with_targets(targets))
    return job, _Calibration(job).run(data, device)


@dataclass(frozen=True)
class _Calibration:
    job: Job

    def run(self, data: TextData, device: str) -> Coverage:
        """Calibrate block after block."""
        job, plan = self.job, self.job.plan
        planned = {tensor.info.name: tensor for tensor in plan.tensors}
        lazy, inputs = model_and_inputs(here(job.source), job.index, data, device)
        reasons = reasons_of(lazy, plan)
        wanted = [name for name, tensor in planned.items() if seen_by_expert(tensor)]
        tables = calibrated_tables(job, lazy, inputs)
        with closing(self._turns(lazy, inputs, wanted, tables)) as turns:
            layers = [self._calibrated(turn, planned[turn.tensor]) for turn in turns]
        done = [*tables.done, *layers]
        if not layers:
            examples = {reason: name for name, reason in reasons.items()}
            causes = "; ".join(f"{reason} ({name})" for reason, name in examples.items())
            raise ConfigError(
                f"calibrate: expected matrices of linear layers that this data comes to, got none among {len(planned)}:"
                f" {causes}. Compress it without text."
            )
        return coverage_of(plan, done, reasons)

    def _turns(
        self, lazy: LazyModel, inputs: Sequence[ModelInput], wanted: Sequence[str], tables: Tables
    ) -> Generator[LayerMoment]:
        """The layers in their order; with tables of which something was dropped, also with what to make up for."""
        folder, progress = self.job.store.folder, self.job.run.progress
        if self.job.plan.options.target.kind == "density" and lazy.chain.stacks:
            with suppress(UnchainedError):  # before the first layer
                yield from matched_layers(lazy, inputs, wanted, outside=tables.put, folder=folder, progress=progress)
                return
        shares, infos = ENGINES[self.job.run.engine].shares, self.job.index.tensors.values()
        sizes = {info.file: size_of(info.file) for info in infos if isinstance(info.file, Path)}
        shared = sharing(lazy, wanted, sizes, partial(shares, self.job.run)) if shares else None
        yield from layer_moments(lazy, inputs, wanted, folder=folder, progress=progress, sharing=shared)

    def _calibrated(self, turn: LayerMoment, tensor: PlannedTensor) -> Calibrated:
        release_freed_memory()
        job, options = self.job, self.job.plan.options
        basis = Basis(options.transform, options.tile, tensor.axes)
        weight = (turn.matrix.weight if turn.target is None else turn.target).float().cpu()
        codes = finished_codes(job.store, job.plan, tensor, turn.rows) or self._chosen(turn, tensor, weight, basis)
        restored = basis.inverse(codes.coefficients())
        del codes
        release_freed_memory()
        sides = (weight.T, restored.T) if turn.transposed else (weight, restored)
        done = Calibrated(tensor.info.name, output_error(*sides, turn.moment), turn.block, turn.rows)
        turn.matrix.put(restored)
        return done

    def _chosen(self, turn: LayerMoment, tensor: PlannedTensor, weight: Tensor, basis: Basis) -> Codes:
        """Codes with error feedback, or of the best kept set, which are left in the store too."""
        coefficients = basis.forward(weight)
        job, turned = self.job, coefficients.T.contiguous() if turn.transposed else coefficients
        target = tensor.target or job.plan.options.target
        if target.kind == "density":
            codes = kept_codes(turned, in_domain(turn.moment, basis), target.value)
        else:
            factor = feedback_factor(turn.moment, basis)
            release_freed_memory()
            quantizer = job.plan.options.quantizer
            codes = codes_at(
                turned,
                factor,
                target.value,
                basis,
                quantizer=quantizer,
                column_steps=not turn.transposed,
                threads=job.run.threads,
            )
        codes = codes.T if turn.transposed else codes
        stored = coefficients if turn.target is None else basis.forward(turn.matrix.weight.float().cpu())
        leave_codes(job.store, job.plan, tensor, stored, codes, first=turn.rows[0], threads=job.run.threads)
        return codes
