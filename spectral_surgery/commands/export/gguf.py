"""A model for llama.cpp: one GGUF file with weights, sizes, tokenizer and chat template, through the package gguf."""

from __future__ import annotations

import ctypes
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from spectral_surgery.commands.export.gguf_architectures import (
    Architecture,
    Config,
    architecture_of,
    key_heads,
    rotation_factors,
)
from spectral_surgery.commands.export.gguf_tokenizer import UNUSED, GgufTokenizer, read_tokenizer
from spectral_surgery.commands.export.model import Measure, ModelTarget
from spectral_surgery.errors import BackendError, CheckpointError, ConfigError, required
from spectral_surgery.files.atomic import writing_to
from spectral_surgery.files.compressed.dense import DenseCheckpoint, DenseTensor
from spectral_surgery.hf.models import outline_model
from spectral_surgery.hf.tensor_names import names_in
from spectral_surgery.hf.tokenizer_json import settled_config
from spectral_surgery.progress import Progress

Simple = Literal["Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0", "BF16", "F16", "F32"]
Mixed = Literal["Q6_K", "Q5_K_M", "Q4_K_M", "Q4_K_S", "Q3_K_M", "Q2_K"]
_COARSE = ("Q5_1", "Q5_0", "Q4_1", "Q4_0")  # with them, embeddings and the output layer are Q8_0
_PRECISE = re.compile(r"^(token_types|position_embd)\.")  # float32, whatever else is asked for
_ENDS = (".weight", ".bias")
_EMBEDDING, _OUTPUT = "token_embd.weight", "output.weight"
_LLAMA = "llama_cpp"
_BLOCK = 32  # columns that share a scale
_WHOLE = ("llama", "qwen2", "qwen3")
_MIXED = get_args(Mixed)
_quiet = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None)  # must outlive its use


@dataclass(frozen=True)
class GgufSettings:
    """How weights are stored."""

    type: Simple | Mixed = field(
        default="Q8_0",
        metadata={"help": "Of the matrices; those with _K are made by llama-cpp-python, which has to be installed."},
    )


@dataclass(frozen=True)
class GgufTensor:
    """A tensor on its way.

    Attributes:
        name: in the checkpoint.
        there: in the file.
        kind: of its numbers, a name in GGMLQuantizationType.
        shape: sizes.
        heads: of queries or keys whose rows are put in another order; 0 for none.
        added: to every number.
    """

    name: str
    there: str
    kind: str
    shape: tuple[int, ...]
    heads: int = 0
    added: float = 0.0

    def reordered(self, rows: Tensor) -> Tensor:
        """Rows with the two numbers of a pair beside each other, where they were half a head apart."""
        return rows.reshape(self.heads, 2, -1, self._width).transpose(1, 2).reshape(rows.shape) if self.heads else rows

    def restored(self, rows: Tensor) -> Tensor:
        """The inverse of `reordered`."""
        return rows.reshape(self.heads, -1, 2, self._width).transpose(1, 2).reshape(rows.shape) if self.heads else rows

    @property
    def _width(self) -> int:
        return self.shape[1] if len(self.shape) > 1 else 1  # of a bias


@dataclass(frozen=True)
class GgufPlan:
    """An export to GGUF, checked."""

    source: DenseCheckpoint
    config: Config
    row: Architecture
    type: str
    tensors: tuple[GgufTensor, ...]
    tokenizer: GgufTokenizer
    left_out: tuple[str, ...]

    @property
    def notes(self) -> tuple[str, ...]:
        """What is not in the file, or is otherwise than asked for."""
        odd = [t.name for t in self.tensors if t.kind == "F16" and self.type not in ("F16", *_MIXED)]
        unused, window = self.tokenizer.types.count(UNUSED), self.config.get("sliding_window")
        whole = self.row.there in _WHOLE and window and self.config.get("use_sliding_window", True)
        notes = {
            f"{len(self.left_out)} tensors have no use there: {', '.join(self.left_out[:3])}": bool(self.left_out),
            f"{len(odd)} tensors are F16, whose columns are no blocks of {_BLOCK}: {', '.join(odd[:3])}": bool(odd),
            f"{unused} rows of the embedding have no token, and are called [PAD...]": unused > 0,
            f"llama.cpp looks at the whole context, and not at a window of {window} tokens": bool(whole),
        }
        return tuple(f"{note}." for note, holds in notes.items() if holds)

    @property
    def kept(self) -> Mapping[str, str]:
        """Vectors, and tables of positions."""
        return {tensor.name: "in float32" for tensor in self.tensors if tensor.kind == "F32"}

    @property
    def converted(self) -> Mapping[str, str]:
        """The type of every other tensor."""
        mixed = self.type in _MIXED
        return {t.name: self.type if mixed else t.kind for t in self.tensors if t.kind != "F32"}

    def write(self, folder: Path, measure: Measure, progress: Progress) -> list[Path]:
        """See `ModelPlan`."""
        file = folder / f"model-{self.type}.gguf"
        if self.type not in _MIXED:
            self._write(file, measure, progress)
            return [file]
        plain = folder / "plain.gguf"
        self._write(plain, None, progress)
        quantize_file(plain, file, self.type)
        plain.unlink()
        self._measure(file, measure)
        return [file]

    def _write(self, file: Path, measure: Measure | None, progress: Progress) -> None:
        gguf: Any = required("gguf", "write GGUF files")
        writer = gguf.GGUFWriter(None, self.row.there)
        writer.add_name(self.source.index.root.name)
        self.row.parameters(writer, self.config)
        if self.row.there == "bert":
            writer.add_pooling_type(_pooling(self.source.index.root, gguf))
        else:
            writer.add_vocab_size(len(self.tokenizer.tokens))
        writer.add_file_type(gguf.LlamaFileType[_file_type(self.type)])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        self.tokenizer.add_to(writer)
        factors = None if self.row.there == "bert" else rotation_factors(self.config)
        kinds = gguf.GGMLQuantizationType
        for tensor in self.tensors:
            writer.add_tensor_info(tensor.there, tensor.shape, np.float32, _nbytes(tensor, gguf), kinds[tensor.kind])
        if factors is not None:
            writer.add_tensor_info("rope_freqs.weight", tuple(factors.shape), np.float32, factors.nbytes, kinds.F32)
        with writing_to(file), closing(writer):
            writer.write_header_to_file(file)
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for number, tensor in enumerate(self.tensors, 1):
                _into(writer, self._pieces(tensor, measure, gguf))
                progress(number, len(self.tensors), tensor.name)
            if factors is not None:
                _into(writer, iter([factors.numpy()]))

    def _pieces(self, tensor: GgufTensor, measure: Measure | None, gguf: Any) -> Iterator[Any]:
        """The bytes of a tensor as arrays; rows that change places are in memory together."""
        kind, first, nbytes = gguf.GGMLQuantizationType[tensor.kind], 0, 0
        parts: Iterator[Tensor] = (rows.float() for rows in self.source.rows(tensor.name))
        for rows in iter([torch.cat(list(parts))]) if tensor.heads else parts:
            if not bool(torch.isfinite(rows).all()):
                raise CheckpointError(f"{tensor.name}: has NaN or infinite values; expected finite weights. Repair it.")
            data = gguf.quants.quantize((tensor.reordered(rows) + tensor.added).numpy(), kind)
            if measure is not None and tensor.kind != "F32":
                measure.rows(tensor.name, first, rows, _decoded(tensor, data, kind, gguf))
            first, nbytes = first + len(rows), nbytes + data.nbytes
            yield data
        if measure is not None and tensor.kind != "F32":
            measure.finish(tensor.name, tensor.kind, nbytes)

    def _measure(self, file: Path, measure: Measure) -> None:
        """Errors of a file that llama.cpp wrote."""
        gguf: Any = required("gguf", "read GGUF files")
        stored = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
        for tensor in self.tensors:
            if tensor.kind == "F32":
                continue
            found = stored[tensor.there]
            after = _decoded(tensor, found.data, found.tensor_type, gguf).reshape(-1, tensor.shape[-1])
            first = 0
            for rows in self.source.rows(tensor.name):
                measure.rows(tensor.name, first, rows.float(), after[first : first + len(rows)])
                first += len(rows)
            measure.finish(tensor.name, found.tensor_type.name, found.n_bytes)


def quantize_file(file: Path, out: Path, kind: str) -> None:
    """Let llama.cpp write a GGUF file as one of another type.

    Args:
        file: of any type.
        out: to be written.
        kind: as llama.cpp calls it: ``Q4_K_M``.

    Raises:
        BackendError: when llama-cpp-python is not installed, or refuses.
    """
    library: Any = required(_LLAMA, f"write {kind}")
    settings = library.llama_model_quantize_default_params()
    settings.ftype = getattr(library, f"LLAMA_FTYPE_MOSTLY_{kind}")
    settings.allow_requantize = True
    settings.nthread = torch.get_num_threads()
    library.llama_log_set(_quiet, None)
    failed = library.llama_model_quantize(str(file).encode(), str(out).encode(), ctypes.byref(settings))
    if failed or not out.is_file():
        raise BackendError(f"llama.cpp: {kind} was not written, code {failed}; expected 0. Use another type.")


def _nbytes(tensor: GgufTensor, gguf: Any) -> int:
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[tensor.kind]]
    return math.prod(tensor.shape) // int(block) * int(size)


def _into(writer: Any, pieces: Iterator[Any]) -> None:
    """Write a tensor piece by piece, which gguf does of whole ones."""
    file, nbytes = writer.fout[0], 0
    writer.write_padding(file, file.tell())
    for piece in pieces:
        file.write(piece.tobytes())
        nbytes += piece.nbytes
    writer.write_padding(file, nbytes)


def _decoded(tensor: GgufTensor, data: Any, kind: Any, gguf: Any) -> Tensor:
    """What stored numbers stand for, in the order of the checkpoint."""
    dense = torch.from_numpy(gguf.quants.dequantize(data, kind).copy())
    return tensor.restored(dense) - tensor.added


def _file_type(kind: str) -> str:
    return {"F32": "ALL_F32"}.get(kind, "MOSTLY_F16" if kind in _MIXED else f"MOSTLY_{kind}")


def _pooling(folder: Path, gguf: Any) -> Any:
    """How the outputs of all tokens become one, as sentence-transformers says; none where it does not."""
    from spectral_surgery.files.header import read_json

    file = folder / "1_Pooling" / "config.json"
    told = read_json(file) if file.is_file() else {}
    ways = {"pooling_mode_mean_tokens": "MEAN", "pooling_mode_cls_token": "CLS", "pooling_mode_lasttoken": "LAST"}
    return gguf.PoolingType[next((way for key, way in ways.items() if told.get(key)), "NONE")]


def _plan(source: DenseCheckpoint, settings: Any) -> GgufPlan:
    gguf: Any = required("gguf", "write GGUF files")
    if settings.type in _MIXED:
        required(_LLAMA, f"write {settings.type}")
    config = settled_config(source.index.root)
    row = architecture_of(config)
    arch = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == row.there)
    names = gguf.get_tensor_name_map(arch, config["num_hidden_layers"])
    tied = config.get("tie_word_embeddings")
    _check_whole(source, row)
    tensors, left_out = [], []
    for name, tensor in source.tensors.items():
        if row.left_out.search(name) or (tied and name == "lm_head.weight"):
            left_out.append(name)
            continue
        there = names.get_name(_known(name, row), try_suffixes=_ENDS)
        if there is None:
            raise ConfigError(f"{name}: has no place in GGUF's architecture {row.there}; expected its tensors alone.")
        if there.endswith(".bias") and not (row.biases.search(there)):
            raise ConfigError(f"{name}: is a bias that llama.cpp does not add in {row.there}; expected none there.")
        tensors.append(_tensor(tensor, there, row, config, settings.type))
    embedding = next((tensor for tensor in tensors if tensor.there == _EMBEDDING), None)
    if embedding is None:
        raise CheckpointError(f"{source.index.root.name}: has no embedding; expected a whole model.")
    tokenizer = read_tokenizer(source.index.root, embedding.shape[0])
    return GgufPlan(source, config, row, settings.type, tuple(tensors), tokenizer, tuple(left_out))


def _check_whole(source: DenseCheckpoint, row: Architecture) -> None:
    """llama.cpp reads no file that lacks a tensor, and takes the embedding for an output layer that is not there.

    Raises:
        CheckpointError: when a parameter of the model is not stored, or in another shape than config.json says.
    """
    root = source.index.root
    model = outline_model(root)
    names = names_in(model, source.headers)
    for name, parameter in model.named_parameters():
        if row.left_out.search(name):
            continue
        stored, shape = names.find(name), tuple(parameter.shape)
        if stored is None or stored.shape != shape:
            got = "none" if stored is None else f"shape {list(stored.shape)}"
            raise CheckpointError(
                f"{name}: expected a tensor of shape {list(shape)} by config.json of {root.name}, got {got}. Use a"
                " whole checkpoint with its configuration."
            )


def _known(name: str, row: Architecture) -> str:
    """A name as gguf knows it."""
    name = name.removeprefix(row.prefix) if row.prefix else name
    return re.sub(r"\.gamma$", ".weight", re.sub(r"\.beta$", ".bias", name))


def _tensor(tensor: DenseTensor, there: str, row: Architecture, config: Config, asked: str) -> GgufTensor:
    kind, shape = "F16" if asked in _MIXED else asked, tensor.shape
    if kind in _COARSE and there in (_EMBEDDING, _OUTPUT):
        kind = "Q8_0"
    if len(shape) < 2 or _PRECISE.search(there):
        kind = "F32"
    elif kind.startswith("Q") and shape[-1] % _BLOCK:
        kind = "F16"
    heads = {"attn_q": int(config["num_attention_heads"]), "attn_k": key_heads(config)} if row.pairs else {}
    added = row.norms if tensor.name.endswith("norm.weight") else 0.0
    return GgufTensor(tensor.name, there, kind, shape, heads.get(there.rsplit(".", 2)[-2], 0), added)


GGUF = ModelTarget(
    "gguf", GgufSettings, _plan, "llama.cpp and what is built on it: one file with weights and tokenizer"
)
