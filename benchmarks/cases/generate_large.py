"""Tokens per second of a Llama of 1.1 G parameters: forms in memory beside dense bfloat16 and llama.cpp.

The weights are random, and the same everywhere but in int4: those that the checkpoint of 3 bits stands for. Every way
is checked before it is timed, and all take turns in one process.
"""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from benchmarks.case import Inputs, Row, require
from benchmarks.cases import generate
from benchmarks.cases.generate import DENSE, NEW, PROMPT, ROUNDED
from benchmarks.cases.spectral_matmul import THREADS
from benchmarks.judged import scratch_folder
from benchmarks.language_model import Size, prompt
from benchmarks.llama_files import installed, llama_runner, quantised, skipped
from spectral_surgery import export_model
from spectral_surgery.commands.export.gguf import GgufSettings
from spectral_surgery.hf.models import load_tokenizer

FULL = Size(2048, 5632, 22, 32_000, key_heads=4, tied=False)
QUICK = Size(1024, 2816, 2, 1024, key_heads=4, tied=False)
BITS = 3.0
TYPES = ("Q8_0", "Q4_0")  # of llama.cpp
_CONTEXT = 128  # tokens that llama.cpp has room for


def run(inputs: Inputs) -> list[Row]:
    """Tokens per second of every way to run the model, and bytes of its weights."""
    size = QUICK if inputs.quick else FULL
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    try:
        with scratch_folder(inputs) as scratch:
            ways = generate.prepare(scratch, size, BITS)
            models = generate.check(ways, size)
            tokenizer = load_tokenizer(ways[DENSE].folder)
            writers = generate.writers_of(models, tokenizer, size)
            held = {name: generate.held_bytes(model) for name, model in models.items()}
            rows: list[Row] = []
            if available():
                expected = models[DENSE](generate.few_tokens(size)[:1]).logits[0].detach()
                for name, file in llama_files(ways[DENSE].folder, scratch, size, expected).items():
                    ids = tokenizer(prompt(PROMPT, size.words))["input_ids"]
                    writers[name] = partial(_write, llama_runner(file, _CONTEXT, logits_all=False), ids)
                    held[name] = file.stat().st_size
            else:
                rows.append(skipped())
            return generate.speeds(writers, held) + rows
    finally:
        torch.set_num_threads(before)


def available() -> bool:
    """Whether llama.cpp is installed, and what writes its files."""
    return installed() and find_spec("gguf") is not None


def llama_files(dense: Path, scratch: Path, size: Size, expected: torch.Tensor) -> dict[str, Path]:
    """llama.cpp's files of the dense weights by name, once llama.cpp agrees on these themselves.

    Args:
        dense: folder of the model.
        scratch: folder for the files.
        size: of the model.
        expected: logits of the first of the few tokens, [T, V].

    Raises:
        CheckFailedError: when logits differ.
    """
    plain = scratch / "plain" / "model-BF16.gguf"
    if not plain.exists():
        export_model(dense, plain.parent, "gguf", GgufSettings("BF16"))
    runner = llama_runner(plain, _CONTEXT, logits_all=True)
    ids = generate.few_tokens(size)[0].tolist()
    runner.eval(ids)
    generate.require_close("llama.cpp", torch.from_numpy(runner.scores[: len(ids)]), expected.float(), ROUNDED)
    found = {}
    for name in TYPES:
        file = scratch / f"{name}.gguf"
        found[f"llama.cpp {name}"] = file if file.exists() else quantised(plain, file, name)
    return found


def _write(runner: Any, ids: list[int]) -> None:
    runner.reset()  # or it would keep the prompt
    tokens = list(islice(runner.generate(ids, temp=0.0), NEW))
    require(len(tokens) == NEW, f"llama.cpp: {len(tokens)} tokens came instead of {NEW}")
