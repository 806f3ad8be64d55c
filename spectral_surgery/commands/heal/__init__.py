"""heal: the kept coefficients of a compressed checkpoint are trained until it does what the original does.

Positions and steps stay, and the quantiser is in the loop, so the result is as small as it was, and what is stored is
what was trained.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from spectral_surgery.cards import card as cards
from spectral_surgery.cards.checkpoints import compressed_card
from spectral_surgery.cards.command_line import healed_command
from spectral_surgery.commands.heal.blocks import heal_blocks
from spectral_surgery.commands.heal.forecast import Forecast
from spectral_surgery.commands.heal.recode import recoded
from spectral_surgery.commands.heal.whole_model import Healed, HealSession, heal_whole
from spectral_surgery.distributed import rank, wait_for_all, world
from spectral_surgery.errors import CheckpointError
from spectral_surgery.files.atomic import clear_folder, discard_unfinished, partial_folder, publishing, writing_to
from spectral_surgery.files.compressed.checkpoint import CompressedCheckpoint, open_compressed
from spectral_surgery.files.compressed.manifest import FILE_NAME, Manifest
from spectral_surgery.files.compressed.units import source_digest
from spectral_surgery.files.index import CheckpointIndex, read_index
from spectral_surgery.files.lock import LOCK_FILE, hold
from spectral_surgery.files.sidecar_files import copy_companions
from spectral_surgery.files.writer import Entry, weights_metadata, write_checkpoint
from spectral_surgery.inputs.kinds import objective_on
from spectral_surgery.memory import peak_rss_bytes
from spectral_surgery.run import Run
from spectral_surgery.text.settings import TextData
from spectral_surgery.training.loop import Clock, LossCurve, Pace
from spectral_surgery.training.plot import plot_training
from spectral_surgery.training.settings import DistillSettings

STATE = "healing"  # folder of unfinished work
METRICS_FILE = "heal.json"
PLOT_FILE = "heal.png"


@dataclass(frozen=True)
class HealReport:
    """What healing did.

    Attributes:
        trained: weights, and coefficients in them.
        untrained: compressed tensors that no parameter of the model (or of its blocks) holds, or that text does not
            reach, such as those that look at images; left as they were.
        blocks: of block-wise healing, the held-out relative error of every block before and after.
        forecast: what was expected after the first steps; None when none were left to do.
    """

    manifest: Manifest
    objective: str
    curve: LossCurve
    trained: tuple[int, int]
    untrained: tuple[str, ...]
    seconds: float
    peak_rss_bytes: int
    blocks: dict[str, tuple[float, float]] = field(default_factory=dict)
    forecast: Forecast | None = None

    def to_json(self) -> dict[str, object]:
        """Plain values for ``--json`` and the file of metrics."""
        total = self.manifest.report
        return {
            "objective": self.objective,
            "held_out_before": self.curve.held_out[0][1],
            "held_out_after": self.curve.best,
            "best_step": self.curve.best_step,
            "curve": asdict(self.curve),
            "forecast": self.forecast.to_json() if self.forecast else None,
            "blocks": self.blocks,
            "trained_weights": self.trained[0],
            "trained_coefficients": self.trained[1],
            "untrained": list(self.untrained),
            "bits_per_weight": total.bits_per_weight,
            "relative_error": total.relative_error,
            "density": total.density,
            "seconds": self.seconds,
            "peak_rss_bytes": self.peak_rss_bytes,
        }


def heal(
    compressed: Path,
    teacher: Path,
    out: Path,
    data: TextData,
    settings: DistillSettings | None = None,
    *,
    blocks: bool = False,
    device: str = "cpu",
    run: Run = Run(),  # noqa: B008 - frozen
    clock: Clock = time.perf_counter,
) -> HealReport:
    """Train the kept coefficients of a compressed checkpoint, biases and scales of norms by distillation.

    Under torch.distributed, processes take different batches, and the first one writes.

    Args:
        compressed: a folder written by compress.
        teacher: the checkpoint that it was made from, with a tokenizer.
        out: folder to create, of the same format, with the metrics and a plot beside.
        data: text; a held-out part decides which step is kept.
        settings: how; None for 400 steps.
        blocks: one block after the other, in the memory of one; steps are those of each, minutes those of all.

    Raises:
        ConfigError: when there is too little text, or the loss is not finite.
        CheckpointError: when the folder is not a compression of the teacher, or out is taken.
    """
    checkpoint, index = _opened(compressed, teacher)
    partial = partial_folder(out, overwrite=run.overwrite)
    if not run.resume:
        discard_unfinished(partial, overwrite=run.overwrite)
    with writing_to(out):
        (partial / STATE).mkdir(parents=True, exist_ok=True)
    with hold(partial, exclusive=world() == 1, wait=False):
        entries, report = heal_checkpoint(
            checkpoint,
            index,
            teacher,
            data=data,
            settings=settings or DistillSettings(),
            state=partial / STATE,
            run=run,
            blocks=blocks,
            device=device,
            clock=clock,
        )
        wait_for_all()  # the first one is about to clear away what they read
    if rank() == 0:
        with publishing(out, overwrite=run.overwrite, keep_partial=True) as folder:
            clear_folder(folder, keep=(STATE,))
            write_healed(folder, checkpoint, entries, report, run.origin)
    return report


def heal_checkpoint(
    checkpoint: CompressedCheckpoint,
    index: CheckpointIndex,
    teacher: Path,
    *,
    data: TextData,
    settings: DistillSettings,
    state: Path,
    run: Run,
    blocks: bool = False,
    device: str = "cpu",
    clock: Clock = time.perf_counter,
) -> tuple[list[Entry], HealReport]:
    """Heal without writing the result.

    Returns what to write, which reads from the checkpoint and the folder; and the report.
    """
    started, began = time.perf_counter(), clock()
    objective = objective_on(data.file, index.config)
    state.mkdir(parents=True, exist_ok=True)
    key, forecasts = _key(checkpoint, data, settings, blocks=blocks), list[Forecast]()

    def told(pace: Pace, count: int) -> None:
        forecasts.append(Forecast(pace, session.rounded, objective.name == "tokens", count))
        for sentence in forecasts[0].sentences() if rank() == 0 else ():
            run.note(sentence)

    session = HealSession(checkpoint, index, teacher, data, device, state, key, run.threads, clock, told, began)
    healed = (heal_blocks if blocks else heal_whole)(session, objective, settings, run.progress)
    if not blocks and healed.curve.best_step == 0:
        run.note("warning: no step was better than none on held-out text; what was there before is kept")
    entries, report = _result(session, healed, objective.name, time.perf_counter() - started)
    return entries, replace(report, forecast=forecasts[0] if forecasts else None)


def write_healed(
    folder: Path, checkpoint: CompressedCheckpoint, entries: Sequence[Entry], report: HealReport, origin: str | None
) -> int:
    """Write what healing made, and remove its unfinished work; returns the bytes of weights and manifest."""
    curve = report.curve
    copy_companions(checkpoint.index, folder, checkpoint.index.config, without=FILE_NAME)
    files = write_checkpoint(folder, entries, metadata=weights_metadata(checkpoint.index))
    (folder / FILE_NAME).write_text(report.manifest.to_json(), encoding="utf-8")
    (folder / METRICS_FILE).write_text(json.dumps(report.to_json(), indent=2) + "\n", encoding="utf-8")
    losses = [(step, {"loss": loss}) for step, loss in curve.held_out]
    plot_training(curve.train, losses, "loss", curve.best_step, folder / PLOT_FILE)
    cards.write_derived(folder, compressed_card(open_compressed(folder), origin))
    (folder / LOCK_FILE).unlink(missing_ok=True)
    shutil.rmtree(folder / STATE)
    return sum(path.stat().st_size for path in [*files, folder / FILE_NAME])


def _opened(compressed: Path, teacher: Path) -> tuple[CompressedCheckpoint, CheckpointIndex]:
    """The student, and the headers of the teacher that it was made from."""
    checkpoint, index = open_compressed(compressed), read_index(teacher)
    if checkpoint.manifest.source != source_digest(index):
        raise CheckpointError(f"{compressed}: expected the checkpoint that it was made from, got {teacher}.")
    return checkpoint, index


def _result(session: HealSession, healed: Healed, objective: str, seconds: float) -> tuple[list[Entry], HealReport]:
    curve, replaced, tensors = healed.curve, healed.replaced, session.checkpoint.manifest.tensors
    options = {"healing": f"{session.data.digest()}, step {curve.best_step} of {curve.steps}"}
    entries, manifest = recoded(session.checkpoint, replaced, session.key, healed.vectors, options)
    manifest = replace(manifest, command=healed_command(session.checkpoint.manifest.command))
    untrained = tuple(name for name in tensors if name not in replaced)
    trained = (len(replaced), healed.coefficients)
    return entries, HealReport(manifest, objective, curve, trained, untrained, seconds, peak_rss_bytes(), healed.blocks)


def _key(checkpoint: CompressedCheckpoint, data: TextData, settings: DistillSettings, *, blocks: bool) -> str:
    read = [data.digest(), data.samples, data.batch_size, data.seq_length]
    body = [checkpoint.manifest.to_json(), read, blocks, asdict(settings)]
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
