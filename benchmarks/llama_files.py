"""llama.cpp's files of a language model, judged by llama.cpp on the tokens that the other methods are judged on."""

from __future__ import annotations

import time
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.case import Row, require
from benchmarks.token_judge import Judged, Logits, TokenJudge, judged_columns
from spectral_surgery.commands.export.gguf import quantize_file

PACKAGE = "llama_cpp"
TYPES = ("Q8_0", "Q4_K_M", "Q4_1", "Q4_0", "Q3_K_M", "Q2_K")
_PLAIN = "F16"  # near enough to the dense model to show that both read the same tokens in the same way
_SAME = 1e-3  # nats per token


def installed() -> bool:
    """Whether llama.cpp is there."""
    return find_spec(PACKAGE) is not None


def skipped() -> Row:
    """The row in the place of llama.cpp's, where it is not."""
    return {"skipped": "llama.cpp", "reason": "not run: llama-cpp-python is not installed"}


def llama_rows(file: Path, scratch: Path, judge: TokenJudge) -> list[Row]:
    """Size, perplexity and KL of a file of each type, or one row that says why there are none.

    Args:
        file: GGUF file with the weights of the dense model.
        scratch: folder for the files, which are removed.
        judge: of the dense model.

    Raises:
        BackendError: when a file cannot be written.
        CheckFailedError: when llama.cpp disagrees with transformers on the plain weights.
    """
    if not installed():
        return [skipped()]
    plain, _, _ = _measured(file, scratch, _PLAIN, judge)
    require(plain.kl <= _SAME, f"llama.cpp: KL {plain.kl:.2g} of the plain weights")
    rows: list[Row] = []
    for name in TYPES:
        found, nbytes, seconds = _measured(file, scratch, name, judge)
        rows.append(
            {
                "method": "llama.cpp",
                "setting": name,
                "bytes": nbytes,
                "bits per weight": 8 * nbytes / judge.weights,
                **judged_columns(found),
                "minutes": seconds / 60,
            }
        )
    return rows


def _measured(file: Path, scratch: Path, name: str, judge: TokenJudge) -> tuple[Judged, int, float]:
    """What a file of a type does, its bytes, and the seconds that writing it took."""
    started = time.perf_counter()
    out = quantised(file, scratch / f"{name}.gguf", name)
    seconds = time.perf_counter() - started
    nbytes = out.stat().st_size
    found = judge.judge(llama_logits(out, judge.ids.shape[1]))
    out.unlink()
    return found, nbytes, seconds


def quantised(file: Path, out: Path, name: str) -> Path:
    """Write a GGUF file as one of another type.

    Args:
        file: of any type.
        out: to be written.
        name: of the type, as llama.cpp has it: ``Q4_K_M``.

    Raises:
        BackendError: when llama.cpp refuses.
    """
    quantize_file(file, out, name)
    return out


def llama_runner(file: Path, length: int, *, logits_all: bool) -> Any:
    """A model of llama.cpp with as many threads as torch has.

    Args:
        file: GGUF file.
        length: tokens at most.
        logits_all: of every token, and not of the last alone.
    """
    threads = torch.get_num_threads()
    settings = {"n_ctx": length, "n_batch": length, "n_threads": threads, "n_threads_batch": threads}
    return import_module(PACKAGE).Llama(str(file), logits_all=logits_all, verbose=False, **settings)


def llama_logits(file: Path, length: int) -> Logits:
    """Logits of a GGUF file by llama.cpp, for sequences of that length."""
    runner = llama_runner(file, length, logits_all=True)
    return lambda ids: torch.stack([_logits(runner, row) for row in ids.tolist()])


def _logits(runner: Any, ids: list[int]) -> Tensor:
    """Logits after every token: [T, V] float32."""
    runner.reset()
    runner.eval(ids)
    return torch.from_numpy(runner.scores[: len(ids)].copy())
