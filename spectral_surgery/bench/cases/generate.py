"""Text from a compressed language model beside the dense bfloat16 one: speed in one process, memory in one for each."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from spectral_surgery.bench.case import Row, require
from spectral_surgery.bench.cases.engine import run_command
from spectral_surgery.bench.cases.spectral_matmul import THREADS
from spectral_surgery.bench.language_model import Size, prompt, write_model
from spectral_surgery.bench.timing import Timing, interleaved
from spectral_surgery.checkpoint.index import read_index
from spectral_surgery.checkpoint.plan import CompressOptions
from spectral_surgery.integrations.load import load_compressed
from spectral_surgery.models import Sampling, continue_text, load_model, load_tokenizer
from spectral_surgery.spectra.select import Target
from spectral_surgery.workflows.compress import compress
from spectral_surgery.workflows.decompress import decompress

FULL, QUICK, TINY = Size(1024, 2816, 4, 8192), Size(1024, 2816, 2, 1024), Size(64, 64, 1, 1024)
BITS = 4.0
NEW, PROMPT, ROUNDS = 32, 8, 5
LIMIT = 0.7  # of the dense bytes, asked for with --max-memory
LEAST = 50_000_000  # dense bytes: blocks of rows being decoded take 16 MB whatever the model
EXACT, ROUNDED = 1e-4, 5e-2  # of logits: rounding of a layer goes through all the others
_CLASS = "AutoModelForCausalLM"


@dataclass(frozen=True)
class Way:
    """A way to run a model.

    Attributes:
        folder: of it.
        resident: form of compressed weights; None for a dense model.
        max_memory: bytes that they may take.
    """

    folder: Path
    resident: str | None = None
    max_memory: int | None = None

    def load(self, dtype: torch.dtype) -> Any:
        """The model in memory."""
        if self.resident is None:
            return load_model(self.folder, _CLASS, dtype=dtype)[0]
        return load_compressed(self.folder, self.resident, auto_class=_CLASS, dtype=dtype, max_memory=self.max_memory)

    def arguments(self) -> list[str]:
        """Of the command `generate`."""
        resident = ["--resident", self.resident] if self.resident else []
        return [*resident, *(["--max-memory", str(self.max_memory)] if self.max_memory else [])]


def run(quick: bool) -> list[Row]:
    """Tokens per second, loading time and memory of each way, as multiples of the dense model."""
    size = QUICK if quick else FULL
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            ways = prepare(Path(scratch), size)
            exact = Path(scratch) / "exact"
            decompress(ways["coded"].folder, exact, dtype="float32")
            models = check(Way(exact), ways, size)
            shutil.rmtree(exact)
            timings = _speeds(models, load_tokenizer(ways["dense bfloat16"].folder), size)
            del models
            return _rows(ways, timings, write_model(Path(scratch) / "tiny", TINY), size)
    finally:
        torch.set_num_threads(before)


def prepare(scratch: Path, size: Size) -> dict[str, Way]:
    """A compressed model, and the dense one of the same weights."""
    ours, dense = scratch / "compressed", scratch / "dense"
    compress(write_model(scratch / "source", size), ours, CompressOptions(Target("bits", BITS)))
    decompress(ours, dense)
    nbytes = read_index(dense).nbytes
    ways = {"dense bfloat16": Way(dense), "int8": Way(ours, "int8"), "coded": Way(ours, "coded")}
    if nbytes > LEAST:
        limit = int(LIMIT * nbytes)
        ways[f"auto, --max-memory {limit / 1e6:.0f}MB"] = Way(ours, "auto", limit)
    return ways


def check(exact: Way, ways: Mapping[str, Way], size: Size) -> dict[str, Any]:
    """The models in bfloat16, once all logits agree with those of the decompressed model in float32."""
    ids = torch.arange(1, 25).reshape(2, 12) % size.words
    with torch.inference_mode():
        expected = exact.load(torch.float32)(ids).logits
        for name, way in ways.items():
            if way.resident is not None:
                _require_close(name, way.load(torch.float32)(ids).logits, expected, EXACT)
        models = {name: way.load(torch.bfloat16) for name, way in ways.items()}
        for name, model in models.items():
            _require_close(f"{name} in bfloat16", model(ids).logits, expected, ROUNDED)
    return models


def _require_close(name: str, logits: torch.Tensor, expected: torch.Tensor, limit: float) -> None:
    error = float((logits.float() - expected).norm() / expected.norm())
    require(error <= limit, f"{name}: relative error {error:.2g} of the logits")


def _speeds(models: Mapping[str, Any], tokenizer: Any, size: Size) -> dict[str, Timing]:
    text = prompt(PROMPT, size.words)

    def write(model: Any) -> None:
        _, tokens = continue_text(model, tokenizer, text, Sampling(NEW), lambda _: None)
        require(tokens == NEW, f"{tokens} tokens came instead of {NEW}")

    return interleaved({name: partial(write, model) for name, model in models.items()}, ROUNDS)


def _rows(ways: Mapping[str, Way], timings: Mapping[str, Timing], tiny: Path, size: Size) -> list[Row]:
    """Memory is that of the command, above what it takes with a model of no size."""
    text = prompt(PROMPT, size.words)
    imports = _memory(tiny, text, [])[0]
    rows = []
    dense = ways["dense bfloat16"]
    base, dense_bytes = timings["dense bfloat16"].median, read_index(dense.folder).nbytes
    for name, way in ways.items():
        peak, body = _memory(way.folder, text, way.arguments())
        above = peak - imports
        rows.append(
            {
                "model": name,
                "tokens/s": NEW / timings[name].median,
                "speed / dense": base / timings[name].median,
                "weights / dense": int(str(body["weight_bytes"])) / dense_bytes,
                "load, s": float(str(body["load_seconds"])),
                "peak memory, MB": peak / 1e6,
                "of the model, MB": above / 1e6,
                "target": f"< {dense_bytes / 1e6:.0f} MB" if way.max_memory else "",
                "met": above < dense_bytes if way.max_memory else "",
            }
        )
    return rows


def _memory(folder: Path, text: str, arguments: list[str]) -> tuple[int, dict[str, object]]:
    """Peak memory of `generate` in a process of its own, and what it says."""
    body = run_command("generate", str(folder), text, "--max-tokens", str(NEW), *arguments, quiet=False)
    return int(str(body["peak_rss_bytes"])), body
