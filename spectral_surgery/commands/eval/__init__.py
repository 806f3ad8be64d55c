"""eval: how far checkpoints are apart, tensor by tensor and, with text, as models; beside baselines if asked for."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from spectral_surgery.commands.eval.scores import Scores
from spectral_surgery.commands.eval.table import Judge, Measures, ModelRow, model_table
from spectral_surgery.commands.eval.weights import Distance, TensorError, distance
from spectral_surgery.commands.settings import Reference
from spectral_surgery.errors import ConfigError
from spectral_surgery.files.storage import Checkpoint, here
from spectral_surgery.run import Run
from spectral_surgery.text.settings import EvalData

__all__ = ["EvalData", "EvalReport", "ModelRow", "Reference", "evaluate"]


@dataclass(frozen=True)
class EvalReport:
    """How far two checkpoints are apart.

    Attributes:
        tensors: those that differ, the worst first.
        relative_error: of all tensors that differ, together.
        measures: of A, B or both, by name, such as perplexity_a, kl, cosine or accuracy_b.
        models: A, B and what is beside them, if anything is.
        failed: those of several B that could not be judged, and why.
    """

    tensors: tuple[TensorError, ...]
    equal: int
    relative_error: float
    only_in_one: tuple[str, ...]
    measures: Measures
    models: tuple[ModelRow, ...] = ()
    failed: Mapping[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    def to_json(self) -> dict[str, object]:
        """Plain values for ``--json``."""
        return {
            "relative_error": self.relative_error,
            "equal_tensors": self.equal,
            "only_in_one": list(self.only_in_one),
            "tensors": [vars(tensor) for tensor in self.tensors],
            "measures": self.measures,
            "models": [row.to_json() for row in self.models],
            "failed": dict(self.failed),
            "seconds": self.seconds,
        }


def evaluate(
    a: Checkpoint,
    b: Checkpoint | None,
    data: EvalData,
    *,
    reference: Reference | None = None,
    adapter: Path | None = None,
    device: str = "cpu",
    run: Run = Run(),  # noqa: B008 - frozen
) -> EvalReport:
    """Compare two checkpoints, or a model without and with an adapter; with one model alone, judge it.

    Args:
        b: another one with the same tensors; None for A with the adapter, or for A alone.
        adapter: folder with an adapter that B has on it.
        run: where each of several B is judged.

    Raises:
        ConfigError: when there is nothing to do, or a baseline cannot be made.
        CheckpointError: when something cannot be read or loaded.
    """
    started = time.perf_counter()
    reference = reference or Reference()
    if b is None and not data.has_text and not reference.has_models:
        raise ConfigError("eval: expected a second model, --text, --sts or --baseline, got one model alone.")
    if run.engine != "local" and not reference.others:
        raise ConfigError(f"eval --engine {run.engine}: expected several B, got {1 if b else 'none'}. Leave it out.")
    if run.engine != "local" and device != "cpu":
        raise ConfigError(f"eval --engine {run.engine}: expected --device cpu, got {device}. Leave one of them out.")
    if reference.has_models:
        if adapter is not None:
            raise ConfigError("eval --adapter: expected at most one B and no baselines with it, got more.")
        others = [here(source) for source in (b, *reference.others) if source is not None]
        table = model_table(Judge(here(a), data, device), others, reference, run=run)
        found = EvalReport(**vars(table.apart), measures=table.measures, models=table.rows, failed=table.failed)
        return replace(found, seconds=time.perf_counter() - started)
    apart = distance(a, b, run.progress) if b is not None else Distance()
    measures = {}
    if data.has_text:
        other = b if b is not None else (a if adapter is not None else None)
        measures = Scores(here(a), data, device).measures(here(other) if other else None, adapter)
    return EvalReport(**vars(apart), measures=measures, seconds=time.perf_counter() - started)
