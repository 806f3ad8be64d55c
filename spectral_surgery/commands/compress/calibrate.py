"""compress --calibrate: codes chosen so that the outputs of a model stay right, judged on some text.

The blocks of the model are visited in order. The inputs of its linear layers are collected with the blocks before it
already compressed; then every weight is quantised with error feedback at the asked rate, and left as a finished unit
of the compression, which does the rest as without text.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from spectral_surgery.calibration.layer_moments import CalibrationData, LayerMoment, layer_moments, model_and_text
from spectral_surgery.codec.encoded import Basis
from spectral_surgery.codec.feedback import Codes, feedback_factor, output_error
from spectral_surgery.codec.feedback_rate import codes_at
from spectral_surgery.codec.rate import Target
from spectral_surgery.commands.compress import CompressReport, choosing_codes, compress, plan_compression
from spectral_surgery.commands.compress.coverage import Calibrated, Coverage, coverage_of, reasons_of, seen_by_expert
from spectral_surgery.commands.compress.spread_bits import spread_targets
from spectral_surgery.errors import ConfigError
from spectral_surgery.files.compressed.plan import AUTO, DEFAULT_TRANSFORM, CompressOptions, Plan, PlannedTensor
from spectral_surgery.files.compressed.units import Workshop, finished_codes, leave_codes
from spectral_surgery.files.index import CheckpointIndex
from spectral_surgery.memory import release_freed_memory
from spectral_surgery.pool import Team
from spectral_surgery.progress import Progress, silent


def compress_calibrated(
    source: Path,
    out: Path,
    options: CompressOptions,
    data: CalibrationData,
    *,
    workers: int | Team = 1,
    threads: int = 1,
    resume: bool = False,
    overwrite: bool = False,
    origin: str | None = None,
    progress: Progress = silent,
) -> tuple[CompressReport, list[Calibrated]]:
    """Compress a checkpoint with text to judge by.

    Args:
        source: a checkpoint folder with a tokenizer.
        out: folder to create.
        options: what is asked, in bits or density.
        data: text.
        workers: processes for what is compressed without text, such as embeddings.
        threads: frames at once.
        resume: go on with unfinished work of the same source, options and text.
        overwrite: replace an existing folder, and discard unfinished work.
        origin: the Hub repository that source is a copy of.
        progress: called after each weight.

    Returns:
        (the report, with what was reached; what was calibrated).

    Raises:
        ConfigError: when the target is an error, there is no text, or nothing to calibrate.
        CheckpointError: as `compress`, and when the model cannot be loaded.
        TargetError: when the model cannot be run on text alone.
    """
    started = time.perf_counter()
    if options.target.kind == "max_error":
        raise ConfigError("--calibrate: minimises the error itself; --bits or --sparsity is accepted with it.")
    if not data.file.is_file():
        raise ConfigError(f"--calibrate {data.file}: no such file; a text, .csv or .jsonl file is accepted.")
    transform = DEFAULT_TRANSFORM if options.transform == AUTO else options.transform
    options = replace(options, transform=transform, calibration=data.digest())
    index, plan = plan_compression(source, options)
    targets: dict[str, Target] = {}
    with choosing_codes(out, index, options, resume=resume, overwrite=overwrite) as workshop:
        if options.allocation == "slope":
            targets = spread_targets(source, index, plan, data, workshop)
        own = _Calibration(index, plan.with_targets(targets), workshop, threads, progress)
        done, coverage = own.run(source, data)
    common: dict[str, Any] = {"workers": workers, "threads": threads, "overwrite": overwrite, "origin": origin}
    report = compress(source, out, options, resume=True, targets=targets, **common)
    seconds = time.perf_counter() - started
    return replace(cast(CompressReport, report), calibration=coverage, seconds=seconds), done


@dataclass(frozen=True)
class _Calibration:
    index: CheckpointIndex
    plan: Plan
    workshop: Workshop
    threads: int
    progress: Progress

    def run(self, source: Path, data: CalibrationData) -> tuple[list[Calibrated], Coverage]:
        """Calibrate block after block."""
        planned = {own.info.name: own for own in self.plan.tensors}
        lazy, sequences = model_and_text(source, self.index, data)
        reasons = reasons_of(lazy.model, lazy.names, self.plan)
        wanted = [name for name, own in planned.items() if seen_by_expert(own)]
        turns = layer_moments(lazy, sequences, wanted, folder=self.workshop.folder, progress=self.progress)
        done = [self._calibrated(turn, planned[turn.tensor]) for turn in turns]
        if not done:
            told = "; ".join(
                f"{reason} ({name})" for reason, name in {own: name for name, own in reasons.items()}.items()
            )
            raise ConfigError(
                f"calibrate: none of {len(planned)} matrices is in a linear layer that this text is multiplied by:"
                f" {told}. Compress it without text."
            )
        return done, coverage_of(self.plan, done, reasons)

    def _calibrated(self, turn: LayerMoment, tensor: PlannedTensor) -> Calibrated:
        release_freed_memory()
        basis = Basis(self.plan.options.transform, self.plan.options.tile, tensor.axes)
        weight = turn.matrix.weight.float()
        codes = finished_codes(self.workshop, self.plan, tensor, turn.rows) or self._chosen(turn, tensor, weight, basis)
        restored = basis.inverse(codes.coefficients())
        del codes
        release_freed_memory()
        sides = (weight.T, restored.T) if turn.transposed else (weight, restored)
        done = Calibrated(tensor.info.name, output_error(*sides, turn.moment), turn.block, turn.rows)
        turn.matrix.put(restored)
        return done

    def _chosen(self, turn: LayerMoment, tensor: PlannedTensor, weight: Tensor, basis: Basis) -> Codes:
        """Codes with error feedback, which are left in the workshop too."""
        coefficients = basis.forward(weight)
        own = coefficients.T.contiguous() if turn.transposed else coefficients
        target = tensor.target or self.plan.options.target
        factor = feedback_factor(turn.moment, basis)
        release_freed_memory()
        found = codes_at(own, factor, target, basis, column_steps=not turn.transposed)
        codes = found.T if turn.transposed else found
        leave_codes(self.workshop, self.plan, tensor, coefficients, codes, first=turn.rows[0], threads=self.threads)
        return codes
