"""eval: how far two checkpoints are apart, tensor by tensor and, with text, as models."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spectral_surgery.checkpoint.adapter_files import read_adapter
from spectral_surgery.checkpoint.compressed import CompressedCheckpoint, is_compressed, open_compressed
from spectral_surgery.checkpoint.index import CheckpointIndex, read_index
from spectral_surgery.checkpoint.reader import DTYPES, read_flat
from spectral_surgery.errors import CheckpointError, ConfigError
from spectral_surgery.integrations.tasks import spearman
from spectral_surgery.models import SentenceEncoder, compare_logits, load_model
from spectral_surgery.surgery.attach import load
from spectral_surgery.workflows.examples import read_examples
from spectral_surgery.workflows.progress import Progress, silent

_PIECE = 1 << 22  # elements compared at a time


@dataclass(frozen=True)
class TensorError:
    """How far one tensor is from another: relative error in the Frobenius norm."""

    name: str
    shape: tuple[int, ...]
    relative_error: float


@dataclass(frozen=True)
class EvalReport:
    """How far two checkpoints are apart.

    Attributes:
        tensors: those that differ, the worst first.
        equal: number of tensors with equal bits or values.
        relative_error: of all tensors that differ, together.
        only_in_one: names of tensors that one side lacks.
        measures: of A, B or both, by name: perplexity, kl, cosine, spearman.
        seconds: wall time.
    """

    tensors: tuple[TensorError, ...]
    equal: int
    relative_error: float
    only_in_one: tuple[str, ...]
    measures: dict[str, float]
    seconds: float

    def to_json(self) -> dict[str, object]:
        """Plain values for ``--json``."""
        return {
            "relative_error": self.relative_error,
            "equal_tensors": self.equal,
            "only_in_one": list(self.only_in_one),
            "tensors": [vars(tensor) for tensor in self.tensors],
            "measures": self.measures,
            "seconds": self.seconds,
        }


@dataclass(frozen=True)
class EvalData:
    """Text to judge models on.

    Attributes:
        text: for perplexity and KL of language models, or cosine of sentence embeddings, a line being a sentence.
        sts: CSV of sentence pairs with scores, for the rank correlation of a sentence encoder.
        samples: sequences, lines or pairs at most; 0 for all.
        seq_length: tokens of a sequence.
    """

    text: Path | None = None
    sts: Path | None = None
    samples: int = 0
    seq_length: int = 256


def evaluate(
    a: Path,
    b: Path | None,
    data: EvalData,
    *,
    adapter: Path | None = None,
    device: str = "cpu",
    progress: Progress = silent,
) -> EvalReport:
    """Compare two checkpoints, or a model without and with an adapter; with one model alone, judge it.

    Args:
        a: a checkpoint, plain or compressed.
        b: another one with the same tensors; None for A with the adapter, or for A alone.
        data: text to judge on.
        adapter: folder with an adapter that B has on it.
        device: models run on it.
        progress: called after each tensor.

    Returns:
        The report.

    Raises:
        ConfigError: when there is nothing to do.
        CheckpointError: when something cannot be read or loaded.
    """
    started = time.perf_counter()
    if b is None and data.text is None and data.sts is None:
        raise ConfigError("eval: one model and no text; a second model, --text or --sts is accepted.")
    errors, equal, apart, total = _compare(a, b, progress) if b is not None else ((), 0, (), 0.0)
    measures: dict[str, float] = {}
    if data.text is not None or data.sts is not None:
        other = b if b is not None else (a if adapter is not None else None)
        measures = _judge(a, other, data, adapter, device)
    return EvalReport(errors, equal, total, apart, measures, time.perf_counter() - started)


def _compare(a: Path, b: Path, progress: Progress) -> tuple[tuple[TensorError, ...], int, tuple[str, ...], float]:
    left, right = _Dense(a), _Dense(b)
    common = sorted(left.shapes.keys() & right.shapes.keys())
    if not common:
        raise CheckpointError(f"{a} and {b}: have no tensor of the same name; versions of one model are accepted.")
    wrong = [name for name in common if left.shapes[name] != right.shapes[name]]
    if wrong:
        name = wrong[0]
        raise CheckpointError(
            f"{name}: is {list(left.shapes[name])} in {a} and {list(right.shapes[name])} in {b}; equal shapes are"
            " accepted."
        )
    found, error, energy = [], 0.0, 0.0
    for place, name in enumerate(common, 1):
        own_error = own_energy = 0.0
        for x, y in zip(left.pieces(name), right.pieces(name), strict=True):
            own_error += float((x.double() - y.double()).square().sum())
            own_energy += float(x.double().square().sum())
        if own_error:
            relative = math.sqrt(own_error / own_energy) if own_energy else math.inf
            found.append(TensorError(name, left.shapes[name], relative))
            error, energy = error + own_error, energy + own_energy
        progress(place, len(common), name)
    found.sort(key=lambda tensor: -tensor.relative_error)
    total = math.sqrt(error / energy) if energy else 0.0
    return tuple(found), len(common) - len(found), tuple(sorted(left.shapes.keys() ^ right.shapes.keys())), total


class _Dense:
    """A checkpoint, plain or compressed, read in pieces of equal size on both sides."""

    def __init__(self, source: Path) -> None:
        compressed = source.is_dir() and is_compressed(source)
        self._compressed: CompressedCheckpoint | None = open_compressed(source) if compressed else None
        self._index: CheckpointIndex = self._compressed.index if self._compressed else read_index(source)
        self.shapes = {name: info.shape for name, info in self._index.tensors.items() if info.dtype in DTYPES}
        if self._compressed:
            manifest = self._compressed.manifest
            self.shapes = {name: shape for name, shape in self.shapes.items() if ".spectral_" not in name}
            self.shapes |= {name: record.shape for name, record in manifest.tensors.items()}
            self.shapes |= {alias: self.shapes[name] for alias, name in manifest.aliases.items()}

    def pieces(self, name: str) -> Iterator[Tensor]:
        manifest = self._compressed.manifest if self._compressed else None
        name = manifest.aliases.get(name, name) if manifest else name
        if self._compressed and manifest and name in manifest.tensors:
            rest = torch.empty(0)
            for part in range(len(manifest.tensors[name].parts)):
                rest = torch.cat([rest, self._compressed.part(name, part).to_dense().reshape(-1)])
                while len(rest) >= _PIECE:
                    yield rest[:_PIECE]
                    rest = rest[_PIECE:]
            if len(rest):
                yield rest
            return
        info = self._index.tensors[name]
        for start in range(0, info.numel, _PIECE):
            yield read_flat(info, start, min(start + _PIECE, info.numel))


def _judge(a: Path, b: Path | None, data: EvalData, adapter: Path | None, device: str) -> dict[str, float]:
    causal = data.text is not None and is_causal(read_index(a).config)
    auto_class = "AutoModelForCausalLM" if causal else "AutoModel"
    model, tokenizer = load_model(a, auto_class, dtype=torch.float32)
    other = load_model(b, auto_class, dtype=torch.float32)[0] if b is not None else None
    if other is not None and adapter is not None:
        load(other, read_adapter(adapter))
    return judge([own.to(device) for own in (model, other) if own is not None], tokenizer, data, causal=causal)


def judge(models: Sequence[Any], tokenizer: Any, data: EvalData, *, causal: bool) -> dict[str, float]:
    """Judge one or two models on text.

    Args:
        models: in eval mode, on one device.
        tokenizer: of both.
        data: text.
        causal: whether they are language models with their heads, and --text is for perplexity; else encoders.

    Returns:
        Measures by name, those of the models ending in ``_a`` and ``_b``.

    Raises:
        ConfigError: when the text cannot be read, or does not fit.
    """
    measures: dict[str, float] = {}
    if data.text is not None and causal:
        text = " ".join(example.texts[0] for example in read_examples(data.text))
        measures |= compare_logits(models, tokenizer, text, data.seq_length, data.samples)
    elif data.text is not None:
        lines = [line for e in read_examples(data.text) for line in e.texts[0].splitlines() if line.strip()]
        measures |= _cosines(models, tokenizer, lines[: data.samples or None])
    if data.sts is not None:
        measures |= _spearman(models, tokenizer, data)
    return measures


def is_causal(config: Mapping[str, object]) -> bool:
    """Whether a model predicts the next token.

    Args:
        config: content of config.json.
    """
    architectures = config.get("architectures")
    name = str(architectures[0]) if isinstance(architectures, list) and architectures else ""
    return name.endswith(("ForCausalLM", "LMHeadModel"))


def _cosines(models: Sequence[Any], tokenizer: Any, lines: list[str]) -> dict[str, float]:
    if len(models) < 2:
        raise ConfigError(
            "eval --text: one sentence encoder has nothing to be compared with; a second one is accepted."
        )
    first, second = (SentenceEncoder(model, tokenizer).embed(lines) for model in models)
    return {"cosine": float((first * second).sum(-1).mean())}


def _spearman(models: Sequence[Any], tokenizer: Any, data: EvalData) -> dict[str, float]:
    if data.sts is None:
        return {}
    pairs = read_examples(data.sts)[: data.samples or None]
    if any(len(pair.texts) != 2 or not isinstance(pair.label, float) for pair in pairs):
        raise ConfigError(f"{data.sts}: rows are not two sentences and a score; such rows are accepted.")
    scores = torch.tensor([float(pair.label or 0) for pair in pairs]).numpy()
    found = {}
    for name, model in zip(("spearman_a", "spearman_b"), models, strict=False):
        encoder = SentenceEncoder(model, tokenizer)
        sides = [encoder.embed([pair.texts[side] for pair in pairs]) for side in (0, 1)]
        found[name] = spearman((sides[0] * sides[1]).sum(-1).numpy(), scores)
    return found
