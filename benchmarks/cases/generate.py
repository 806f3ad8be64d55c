"""Text from a compressed language model beside the dense bfloat16 one: speed, loading and memory of each way to run it.

Ways take turns in one process. Loading maps a dense file and reads none of it, so the time to the first token, for
which all of a model must be in memory, stands beside it.
"""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.case import Row, require
from benchmarks.cases.engine import run_command
from benchmarks.cases.spectral_matmul import THREADS
from benchmarks.language_model import Size, prompt, write_model
from benchmarks.peak import peak_bytes
from benchmarks.timing import Timing, interleaved
from spectral_surgery.codec.rate import Target
from spectral_surgery.commands.compress import compress
from spectral_surgery.commands.decompress import decompress
from spectral_surgery.files.compressed.settings import CompressOptions
from spectral_surgery.files.index import read_index
from spectral_surgery.hf.models import continue_text, load_model, load_tokenizer
from spectral_surgery.hf.quantizer.load_compressed import load_compressed
from spectral_surgery.hf.settings import Sampling
from spectral_surgery.run import Run

FULL, QUICK, TINY = Size(1024, 2816, 4, 8192), Size(1024, 2816, 2, 1024), Size(64, 64, 1, 1024)
BITS, NARROW, FIVE = 4.0, 2.0, 3.25  # codes of files of NARROW fit int4, and of up to FIVE int5
NEW, FEW, PROMPT, ROUNDS = 16, 4, 8, 3
DENSE = "dense bfloat16"
LIMIT = 0.7  # of the dense bytes, asked for with --max-memory
LEAST = 50_000_000  # dense bytes: blocks of rows being decoded take 16 MB whatever the model
LOADING = 2.0  # times the dense model
EXACT, ROUNDED = 1e-4, 5e-2  # of logits: rounding of a layer goes through all the others
CLASS, _PEAK = "AutoModelForCausalLM", "peak_rss_bytes"


@dataclass(frozen=True)
class Way:
    """A way to run a model.

    Attributes:
        folder: of it.
        exact: folder of the dense float32 model that it must agree with.
        resident: form of compressed weights; None for a dense model.
        max_memory: bytes that they may take.
    """

    folder: Path
    exact: Path
    resident: str | None = None
    max_memory: int | None = None

    def load(self, dtype: torch.dtype) -> Any:
        """The model in memory."""
        if self.resident is None:
            return load_model(self.folder, CLASS, dtype=dtype)[0]
        return load_compressed(self.folder, self.resident, auto_class=CLASS, dtype=dtype, max_memory=self.max_memory)


def run(quick: bool) -> list[Row]:
    """Tokens per second, loading time and memory of each way, as multiples of the dense model."""
    size = QUICK if quick else FULL
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            ways = prepare(Path(scratch), size)
            ways |= limited(ways)
            models = check(ways, size)
            tokenizer = load_tokenizer(ways[DENSE].folder)
            held = {name: held_bytes(model) for name, model in models.items()}
            rows = speeds(writers_of(models, tokenizer, size), held)
            del models
            memory(ways, tokenizer, size, rows)
            if not quick:
                _limits(ways, write_model(Path(scratch) / "tiny", TINY), size, rows)
            return rows
    finally:
        torch.set_num_threads(before)


def prepare(scratch: Path, size: Size, bits: float = BITS) -> dict[str, Way]:
    """Compressed models at a rate and at NARROW, and a dense one of the former; what is in the folder stays."""
    source, dense = scratch / "source", scratch / "dense"
    folders = {}
    for rate in (bits, NARROW):
        ours, exact = scratch / f"{rate:g} bits", scratch / f"{rate:g} bits, exact"
        if not ours.exists():
            given = source if source.exists() else write_model(source, size)
            compress(given, ours, CompressOptions(Target("bits", rate)), run=Run(threads=THREADS))
        if not exact.exists():
            decompress(ours, exact, dtype="float32", threads=THREADS)
        folders[rate] = (ours, exact)
    if not dense.exists():
        decompress(folders[bits][0], dense, threads=THREADS)
    five = {"int5": Way(*folders[bits], "int5")} if bits <= FIVE else {}
    return {
        DENSE: Way(dense, folders[bits][1]),
        "int8": Way(*folders[bits], "int8"),
        **five,
        "int4, 2 bits stored": Way(*folders[NARROW], "int4"),
        "coded": Way(*folders[bits], "coded"),
    }


def limited(ways: Mapping[str, Way]) -> dict[str, Way]:
    """A way with a limit on memory, where the model is large enough for one."""
    nbytes, coded = read_index(ways[DENSE].folder).nbytes, ways["coded"]
    limit = int(LIMIT * nbytes)
    if nbytes <= LEAST:
        return {}
    return {f"auto, --max-memory {limit / 1e6:.0f}MB": Way(coded.folder, coded.exact, "auto", limit)}


def check(ways: Mapping[str, Way], size: Size) -> dict[str, Any]:
    """The models in bfloat16, once all logits agree with those of the decompressed models in float32."""
    ids = few_tokens(size)
    models = {}
    with torch.inference_mode():
        exact = {way.exact for way in ways.values()}
        expected = {own: load_model(own, CLASS, dtype=torch.float32)[0](ids).logits for own in exact}
        for name, way in ways.items():
            if way.resident is not None:
                require_close(name, way.load(torch.float32)(ids).logits, expected[way.exact], EXACT)
            models[name] = way.load(torch.bfloat16)
            require_close(f"{name} in bfloat16", models[name](ids).logits, expected[way.exact], ROUNDED)
    return models


def few_tokens(size: Size) -> torch.Tensor:
    """To check models on: [2, 12]."""
    return torch.arange(1, 25).reshape(2, 12) % size.words


def require_close(name: str, logits: torch.Tensor, expected: torch.Tensor, limit: float) -> None:
    """Refuse logits whose relative error exceeds a limit."""
    error = float((logits.float() - expected).norm() / expected.norm())
    require(error <= limit, f"{name}: relative error {error:.2g} of the logits")


def write_tokens(model: Any, tokenizer: Any, size: Size, count: int) -> None:
    """Let a model continue the prompt by some tokens.

    Raises:
        CheckFailedError: when fewer come.
    """
    _, tokens = continue_text(model, tokenizer, prompt(PROMPT, size.words), Sampling(count), lambda _: None)
    require(tokens == count, f"{tokens} tokens came instead of {count}")


def speeds(writers: Mapping[str, Callable[[], None]], nbytes: Mapping[str, int]) -> list[Row]:
    """Tokens per second, and bytes.

    Args:
        writers: each writes NEW tokens; one of them is DENSE.
        nbytes: of the weights of each.
    """
    timings = interleaved(writers, ROUNDS)
    base = timings[DENSE].median
    return [
        {
            "model": name,
            "tokens/s": NEW / timing.median,
            "speed / dense": base / timing.median,
            "weights, MB": nbytes[name] / 1e6,
        }
        for name, timing in timings.items()
    ]


def writers_of(models: Mapping[str, Any], tokenizer: Any, size: Size) -> dict[str, Callable[[], None]]:
    """What writes NEW tokens with each model."""
    return {name: partial(write_tokens, model, tokenizer, size, NEW) for name, model in models.items()}


def held_bytes(model: Any) -> int:
    """Bytes of everything that a model holds."""
    return sum({own.data_ptr(): own.nbytes for own in (*model.parameters(), *model.buffers())}.values())


def memory(ways: Mapping[str, Way], tokenizer: Any, size: Size, rows: list[Row]) -> None:
    """Add what it takes to load each model, and to have its first tokens, to its row.

    Peak memory is what the process grows by; what it has freed before and uses again does not count.
    """

    def first(way: Way, count: int) -> None:
        write_tokens(way.load(torch.bfloat16), tokenizer, size, count)

    loading = interleaved({name: partial(way.load, torch.bfloat16) for name, way in ways.items()}, ROUNDS)
    ready = interleaved({name: partial(first, way, 1) for name, way in ways.items()}, ROUNDS)
    for row, (name, way) in zip(rows, ways.items(), strict=True):
        gc.collect()  # models refer to themselves: those before would be freed on the way, and hide what this one takes
        peak = peak_bytes(partial(first, way, FEW), torch.device("cpu"))
        row["load, s"] = loading[name].median
        row["load / dense"] = _ratio(loading, name)
        row["to the first token, s"] = ready[name].median
        row["first token / dense"] = _ratio(ready, name)
        row["peak memory, MB"] = "" if peak is None else peak / 1e6
        row["target"] = f"load <= {LOADING:g}x" if name == "int8" else ""
        row["met"] = _ratio(loading, name) <= LOADING if name == "int8" else ""


def _ratio(timings: Mapping[str, Timing], name: str) -> float:
    return timings[name].median / timings[DENSE].median


def _limits(ways: Mapping[str, Way], tiny: Path, size: Size, rows: list[Row]) -> None:
    """Whether the command stays below the dense bytes: its process, above what it takes with a model of no size.

    Where that model is compressed, the process has numba, LLVM and the kernels in it, whatever the model.
    """
    dense, text = read_index(ways[DENSE].folder).nbytes, prompt(PROMPT, size.words)
    compressed = tiny.with_name("tiny compressed")
    compress(tiny, compressed, CompressOptions(Target("bits", BITS)), run=Run(threads=THREADS))
    for row, way in zip(rows, ways.values(), strict=True):
        row["of the command, MB"] = row["of these, kernels, MB"] = ""
        if way.max_memory is not None:
            limit = ["--resident", str(way.resident), "--max-memory", str(way.max_memory)]
            nothing, kernels, whole = (
                int(str(run_command("generate", str(own), text, "--max-tokens", str(FEW), *more, quiet=False)[_PEAK]))
                for own, more in ((tiny, []), (compressed, []), (way.folder, limit))
            )
            above = whole - nothing
            row["of the command, MB"], row["of these, kernels, MB"] = above / 1e6, (kernels - nothing) / 1e6
            row["target"], row["met"] = f"< {dense / 1e6:.0f} MB", above < dense
