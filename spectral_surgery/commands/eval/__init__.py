"""eval: how far checkpoints are apart, tensor by tensor and, with text, as models; beside baselines if asked for."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from spectral_surgery.commands.eval.scores import Scores
from spectral_surgery.commands.eval.table import Measures, ModelRow, model_table
from spectral_surgery.commands.eval.weights import Distance, TensorError, distance
from spectral_surgery.commands.settings import Reference
from spectral_surgery.errors import ConfigError
from spectral_surgery.files.storage import Checkpoint, here
from spectral_surgery.progress import Progress, silent
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
    """

    tensors: tuple[TensorError, ...]
    equal: int
    relative_error: float
    only_in_one: tuple[str, ...]
    measures: Measures
    models: tuple[ModelRow, ...] = ()
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
    progress: Progress = silent,
) -> EvalReport:
    """Compare two checkpoints, or a model without and with an adapter; with one model alone, judge it.

    Args:
        b: another one with the same tensors; None for A with the adapter, or for A alone.
        adapter: folder with an adapter that B has on it.

    Raises:
        ConfigError: when there is nothing to do, or a baseline cannot be made.
        CheckpointError: when something cannot be read or loaded.
    """
    started = time.perf_counter()
    reference = reference or Reference()
    if b is None and not data.has_text and not reference.has_models:
        raise ConfigError("eval: expected a second model, --text, --sts or --baseline, got one model alone.")
    if reference.has_models:
        if adapter is not None:
            raise ConfigError("eval --adapter: expected at most one B and no baselines with it, got more.")
        others = [here(source) for source in (b, *reference.others) if source is not None]
        models, apart, measures = model_table(here(a), others, data, reference, device=device, progress=progress)
        return EvalReport(**vars(apart), measures=measures, models=models, seconds=time.perf_counter() - started)
    apart = distance(a, b, progress) if b is not None else Distance()
    measures = {}
    if data.has_text:
        other = b if b is not None else (a if adapter is not None else None)
        measures = Scores(here(a), data, device).measures(here(other) if other else None, adapter)
    return EvalReport(**vars(apart), measures=measures, seconds=time.perf_counter() - started)
