"""Models compressed for a benchmark: none is judged before it is verified."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from benchmarks.case import Inputs, require
from spectral_surgery import (
    CompressOptions,
    CompressReport,
    EvalReport,
    Healing,
    Run,
    Target,
    TextData,
    compress,
    decompress,
)

_CLOSE = 1e-3  # relative: the same error, measured on coefficients and on decoded weights


@dataclass(frozen=True)
class Setting:
    """A compression to be judged.

    Attributes:
        name: how users choose it.
        target: what is asked for.
        calibrated: whether codes are chosen with text.
        quantizer: that is asked for; None for the usual one.
    """

    name: str
    target: Target
    calibrated: bool = False
    quantizer: Literal["lattice", "scalar"] | None = None

    @property
    def method(self) -> str:
        """What it belongs to, in a plot."""
        return ", ".join(filter(None, ("spectral", "calibrated" if self.calibrated else "", self.quantizer or "")))

    @property
    def label(self) -> str:
        """The options that ask for it."""
        option = "--bits" if self.target.kind == "bits" else "--sparsity"
        return f"{option} {self.target.value:g}" + (f" --quantizer {self.quantizer}" if self.quantizer else "")

    @property
    def options(self) -> CompressOptions:
        """What `compress` is given."""
        return CompressOptions(self.target, quantizer=self.quantizer)


def settings(
    bits: tuple[float, ...], *, calibrated: bool, quantizer: Literal["lattice", "scalar"] | None = None
) -> list[Setting]:
    """Settings at several rates, in bits per weight."""
    before, after = "calibrated-" if calibrated else "", f"-{quantizer}" if quantizer else ""
    return [Setting(f"{before}{value:g}{after}", Target("bits", value), calibrated, quantizer) for value in bits]


def verified(
    source: Path,
    out: Path,
    options: CompressOptions,
    *,
    calibrate: TextData | None = None,
    heal: Healing | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> CompressReport:
    """Compress a checkpoint, and check that `decompress` gives back what was encoded.

    Args:
        source: plain checkpoint.
        out: folder to be written; one that is there is replaced.
        options: the target is that of every matrix, or of all of them where text decides what each gets.
        calibrate: text to choose codes with.
        heal: how to train what is kept.
        clock: tells the time that healing may take.

    Raises:
        CheckFailedError: when a tensor came back as something else.
    """
    run = Run(threads=torch.get_num_threads(), overwrite=True)
    report = compress(source, out, options, calibrate=calibrate, heal=heal, run=run, clock=clock)
    plain = out.with_name(f"{out.name}-plain")
    failures = decompress(out, plain, verify=True, overwrite=True, threads=run.threads).failures
    shutil.rmtree(plain, ignore_errors=True)
    require(not failures, f"{out.name}: {'; '.join(failures[:3])}")
    return report


def cpu_time() -> float:
    """Seconds that all cores of this process together had, over their number: other work on the machine counts not."""
    return time.process_time() / torch.get_num_threads()


def require_same_errors(report: CompressReport, judged: EvalReport) -> None:
    """Check the error that a compression reported of every tensor against one measured on the decoded weights.

    Raises:
        CheckFailedError: when they differ.
    """
    measured = {tensor.name: tensor.relative_error for tensor in judged.tensors}
    for name, record in report.manifest.tensors.items():
        reported, error = record.report.relative_error, measured.get(name, 0.0)
        require(abs(error - reported) <= _CLOSE * reported, f"{name}: error {error:g} where {reported:g} is reported")


@contextmanager
def scratch_folder(inputs: Inputs) -> Iterator[Path]:
    """The folder for models: the user's, or one that is removed."""
    if inputs.scratch is None:
        with tempfile.TemporaryDirectory() as name:
            yield Path(name)
        return
    inputs.scratch.mkdir(parents=True, exist_ok=True)
    yield inputs.scratch
