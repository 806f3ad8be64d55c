"""llama.cpp's files of a language model, judged by llama.cpp on the tokens that the other methods are judged on."""

from __future__ import annotations

import ctypes
import math
import time
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.case import Row, require
from spectral_surgery.hf.models import load_model
from spectral_surgery.text.kl import kl
from spectral_surgery.text.sequences import cut_stream

PACKAGE = "llama_cpp"
TYPES = ("Q8_0", "Q4_K_M", "Q3_K_M", "Q4_0", "Q2_K")
_PLAIN = "F16"  # near enough to the dense model to show that both read the same tokens in the same way
_SAME = 1e-3  # nats per token


def llama_rows(file: Path, dense: Path, scratch: Path, text: str, *, sequences: int, length: int) -> list[Row]:
    """Size, perplexity and KL of a file of each type, or one row that says why there are none.

    Args:
        file: GGUF file with the weights of the dense model.
        dense: folder of the dense model.
        scratch: folder for the files.
        text: to judge on.
        sequences: of the text, at most.
        length: tokens of each.

    Raises:
        CheckFailedError: when a file cannot be written, or llama.cpp disagrees with transformers on the plain weights.
    """
    if find_spec(PACKAGE) is None:
        return [{"skipped": "llama.cpp", "reason": "not run: llama-cpp-python is not installed"}]
    model, tokenizer = load_model(dense, "AutoModelForCausalLM", dtype=torch.float32)
    ids = cut_stream(tokenizer, [text], length)[:sequences]
    written = {name: _quantised(file, scratch, name) for name in (_PLAIN, *TYPES)}
    runners = {name: _runner(path, length) for name, (path, _) in written.items()}
    lost, far = dict.fromkeys(written, 0.0), dict.fromkeys(written, 0.0)
    for row in ids:
        tokens = torch.tensor(row)
        with torch.inference_mode():
            expected = model(tokens[None]).logits[0, :-1].log_softmax(-1)
        for name, runner in runners.items():
            logs = _logits(runner, row)[:-1].log_softmax(-1)
            lost[name] -= float(logs.gather(-1, tokens[1:, None]).sum())
            far[name] += float(kl(expected, logs).sum())
    count = sum(len(row) - 1 for row in ids)
    require(far[_PLAIN] / count <= _SAME, f"llama.cpp: KL {far[_PLAIN] / count:.2g} of the plain weights")
    weights = sum(parameter.numel() for parameter in model.parameters())
    return [
        {
            "method": "llama.cpp",
            "setting": name,
            "bytes": path.stat().st_size,
            "bits per weight": 8 * path.stat().st_size / weights,
            "perplexity": math.exp(lost[name] / count),
            "kl": far[name] / count,
            "minutes": seconds / 60,
        }
        for name, (path, seconds) in written.items()
        if name != _PLAIN
    ]


def _quantised(file: Path, folder: Path, name: str) -> tuple[Path, float]:
    """Write a file of a type; how many seconds that took."""
    library: Any = import_module(PACKAGE)
    started = time.perf_counter()
    out = folder / f"{name}.gguf"
    settings = library.llama_model_quantize_default_params()
    settings.ftype = getattr(library, f"LLAMA_FTYPE_MOSTLY_{name}")
    settings.allow_requantize = True
    settings.nthread = torch.get_num_threads()
    failed = library.llama_model_quantize(str(file).encode(), str(out).encode(), ctypes.byref(settings))
    require(not failed and out.is_file(), f"llama.cpp: {name} was not written, code {failed}")
    return out, time.perf_counter() - started


def _runner(file: Path, length: int) -> Any:
    threads = torch.get_num_threads()
    settings = {"n_ctx": length, "n_batch": length, "n_threads": threads, "n_threads_batch": threads}
    return import_module(PACKAGE).Llama(str(file), logits_all=True, verbose=False, **settings)


def _logits(runner: Any, ids: list[int]) -> Tensor:
    """Logits after every token: [T, V] float32."""
    runner.reset()
    runner.eval(ids)
    return torch.from_numpy(runner.scores[: len(ids)]).float()
