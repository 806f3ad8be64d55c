"""A real language model of 4 bits where other programs run it: what rounding once more does to it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import torch

from benchmarks.case import Inputs, Row, chosen
from benchmarks.judged import scratch_folder
from benchmarks.llama_files import installed, llama_logits, skipped
from benchmarks.packaged import smollm2_folder
from benchmarks.reference_text import write_split
from benchmarks.token_judge import CLASS, Logits, TokenJudge, causal_logits, judged_columns
from spectral_surgery import (
    CompressOptions,
    EvalData,
    ModelExport,
    Target,
    compress,
    decompress,
    export_model,
    read_index,
)
from spectral_surgery.baselines import baseline
from spectral_surgery.commands.export.compressed_tensors import IntegerSettings
from spectral_surgery.commands.export.gguf import GgufSettings, Mixed
from spectral_surgery.errors import required
from spectral_surgery.files.header import TensorInfo
from spectral_surgery.files.reader import read_tensor
from spectral_surgery.hf.models import load_model
from spectral_surgery.run import Run

SEQUENCES, LENGTH = 16, 256  # of the text to judge on
BITS = 4.0
INTEGERS = {"compressed-tensors 4": IntegerSettings(4), "compressed-tensors 8": IntegerSettings(8)}
FILES = {f"gguf {kind}": GgufSettings(kind) for kind in ("Q8_0", "Q5_1", "Q4_0", "Q4_K_M")}
NAMES = (*INTEGERS, *FILES)
QUICK = ("compressed-tensors 4", "gguf Q8_0")
TAKES = ("only", "text", "scratch")
NOTES = (
    "perplexity and KL: against the decoded 4-bit model, on the same tokens.",
    "error: of the converted matrices, against the decoded ones; total: against the original.",
    "aims: the error of 4-bit integers at most that of nf4 on the original; the perplexity of Q8_0 at most 1.002 times"
    " that of the decoded model.",
    "run by: llama.cpp also rounds activations; transformers computes with the weights of the file in float32.",
)


@dataclass(frozen=True)
class _Bench:
    original: Path
    compressed: Path
    decoded: Path
    scratch: Path
    judge: TokenJudge

    def integers(self, name: str) -> Row:
        """An export to compressed-tensors, run by transformers."""
        report = export_model(
            self.compressed,
            self.scratch / name,
            "compressed-tensors",
            INTEGERS[name],
            original=self.original,
            overwrite=True,
        )
        model = load_model(self.scratch / name, CLASS, dtype=torch.float32)[0]
        row = self._row(name, report, causal_logits(model))
        if name != QUICK[0]:
            return row
        aim = self.nf4([tensor.name for tensor in report.tensors])
        return row | {"target": f"error <= {aim:.4g}", "met": report.export_error <= aim}

    def file(self, name: str) -> Row:
        """An export to GGUF, run by llama.cpp, or read back by transformers where that is not installed."""
        settings = FILES[name]
        report = export_model(
            self.compressed, self.scratch / name, "gguf", settings, original=self.original, overwrite=True
        )
        file = self.scratch / name / report.files[0]
        logits = llama_logits(file, self.judge.ids.shape[1]) if installed() else _read_back(file)
        row = self._row(name, report, logits) | {"run by": "llama.cpp" if installed() else "transformers"}
        if settings.type != "Q8_0":
            return row
        ratio = float(str(row["perplexity over decoded"]))
        return row | {"target": "perplexity <= 1.002 x", "met": ratio <= 1.002}

    def nf4(self, names: list[str]) -> float:
        """The relative error of nf4 on the same matrices of the original."""
        tensors: dict[str, TensorInfo] = read_index(self.original).tensors
        energy = error = 0.0
        for name in names:
            weight = read_tensor(tensors[name]).float()
            energy += float(weight.double().square().sum())
            error += float((baseline("nf4").apply(weight).weight - weight).double().square().sum())
        return math.sqrt(error / energy)

    def _row(self, name: str, report: ModelExport, logits: object) -> Row:
        found = self.judge.judge(logits)  # type: ignore[arg-type]
        return {
            "export": name,
            "bytes": report.stored_bytes,
            "error": report.export_error,
            "total": report.total_error,
            **judged_columns(found),
            "perplexity over decoded": found.perplexity / self.judge.perplexity,
        }


def run(inputs: Inputs) -> list[Row]:
    """Every export that is asked for.

    Raises:
        ConfigError: when a row is unknown, or the package that carries the weights is not installed.
    """
    names = chosen(inputs.only, NAMES, QUICK, inputs)
    with scratch_folder(inputs) as scratch:
        original = smollm2_folder(scratch)
        compressed, decoded = scratch / "export-4bit", scratch / "export-decoded"
        if not compressed.exists():
            compress(original, compressed, CompressOptions(Target("bits", BITS)), run=Run(overwrite=True))
        if not decoded.exists():
            decompress(compressed, decoded)
        text = EvalData(inputs.text or write_split(scratch)[1], samples=SEQUENCES, seq_length=LENGTH)
        bench = _Bench(original, compressed, decoded, scratch, TokenJudge(decoded, text, scratch))
        rows: list[Row] = [
            {"export": "decoded", "bytes": read_index(decoded).nbytes, "perplexity": bench.judge.perplexity}
        ]
        rows += [bench.integers(name) for name in names if name in INTEGERS]
        files = [name for name in names if name in FILES]
        left = [] if installed() else [name for name in files if FILES[name].type in get_args(Mixed)]
        rows += [bench.file(name) for name in files if name not in left]
        return rows + ([skipped()] if left else [])


def _read_back(file: Path) -> Logits:
    """Logits of the weights that a GGUF file stands for, in float32."""
    transformers = required("transformers", "read GGUF files")
    given = {"gguf_file": file.name, "local_files_only": True}
    return causal_logits(transformers.AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **given))
