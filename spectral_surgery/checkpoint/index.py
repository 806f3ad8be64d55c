"""What a checkpoint holds and where its bytes are, from headers alone."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import NoReturn

from spectral_surgery.checkpoint.header import (
    Header,
    TensorInfo,
    named,
    read_header,
    read_json,
    reading,
)
from spectral_surgery.errors import CheckpointError

__all__ = ["INDEX_FILE", "SINGLE_FILE", "CheckpointIndex", "TensorInfo", "read_index"]

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_PICKLES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"})
_FOREIGN = frozenset(
    {
        ".onnx",
        ".onnx_data",
        ".h5",
        ".keras",
        ".msgpack",
        ".ot",
        ".gguf",
        ".ggml",
        ".tflite",
        ".pb",
        ".npz",
    }
)
_EXPORTS = frozenset({"onnx", "openvino", "coreml"})  # folders with the model once more, for other runtimes
_MODULE = re.compile(r"\d+_\w+")  # "2_Dense": a sentence-transformers module is part of the model


@dataclass(frozen=True)
class CheckpointIndex:
    """A checkpoint, seen from its headers.

    Attributes:
        root: the folder; of a lone file, the folder it is in.
        tensors: by name, sorted.
        files: the files that hold them, sorted.
        other_files: relative to root, to be copied as bytes: configuration, tokenizer, modules.
        skipped_files: relative to root: weights in other formats, or no part of this model.
        config: content of config.json, empty without one.
        metadata: free text in the headers of the files, by key; the last file with a key has it.
    """

    root: Path
    tensors: dict[str, TensorInfo]
    files: tuple[Path, ...]
    other_files: tuple[Path, ...]
    skipped_files: tuple[Path, ...]
    config: dict[str, object]
    metadata: dict[str, str]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.nbytes for info in self.tensors.values())


def read_index(source: Path) -> CheckpointIndex:
    """Read the headers of a checkpoint.

    Args:
        source: a folder with an indexed, a single or several ``.safetensors`` files, or one
            safetensors file of any name. Weights at the top level of a folder are the model.
            Links to files are followed, links to folders are not.

    Returns:
        The index; a lone file has neither other files nor configuration.

    Raises:
        CheckpointError: when there is no checkpoint, or it is pickled, incomplete, ambiguous or
            damaged.
        LimitError: when a header or JSON file is longer than any real one.
    """
    with reading(source):
        if source.is_file():
            return _lone_file(source)
        if not source.is_dir():
            raise CheckpointError(
                f"{source}: no such file or folder; a .safetensors file or a folder with some is"
                " accepted. Check the path."
            )
        top = {path for path in source.iterdir() if path.is_file()}
        weight_map = _read_weight_map(source, top)
        files = _shards(source, weight_map) if weight_map else _unindexed(source, top)
        header = _merged(files)
        _check_complete(source, weight_map, header.tensors)
        others, skipped = _other_files(source, files)
        config = read_json(source / "config.json") if source / "config.json" in top else {}
        return CheckpointIndex(source, header.tensors, tuple(files), others, skipped, config, header.metadata)


def _lone_file(file: Path) -> CheckpointIndex:
    if file.suffix.lower() in _PICKLES:
        _refuse_pickle(file.parent, [file.name])
    header = _merged([file])
    return CheckpointIndex(file.parent, header.tensors, (file,), (), (), {}, header.metadata)


def _read_weight_map(root: Path, top: set[Path]) -> dict[str, str]:
    """Tensor name -> file; empty without an index, or with a single file that it does not name."""
    path = root / INDEX_FILE
    if path not in top:
        return {}
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            f"{path}: weight_map is {named([weight_map])}; the file of every tensor by name is"
            " accepted. Download it again."
        )
    if root / SINGLE_FILE in top and SINGLE_FILE not in weight_map.values():
        return {}  # as transformers loads it
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not shard.endswith(".safetensors"):
            raise CheckpointError(
                f"{path}: tensor {named([name])} is in {named([shard])}; a .safetensors file is"
                " accepted. Download it again."
            )
        parts = PureWindowsPath(shard)  # knows both separators, and drives
        if parts.anchor or ".." in parts.parts:
            raise CheckpointError(
                f"{path}: {named([shard])} leads out of the folder; paths below it are accepted."
                " Do not trust this checkpoint."
            )
    return weight_map


def _shards(root: Path, weight_map: Mapping[str, str]) -> list[Path]:
    shards = sorted({root / shard for shard in weight_map.values()})
    missing = [str(shard.relative_to(root)) for shard in shards if not shard.is_file()]
    if missing:
        raise CheckpointError(
            f"{root}: {len(missing)} of {len(shards)} weight files are missing: {named(missing)}; "
            f"all that {INDEX_FILE} names are needed. Download them."
        )
    return shards


def _unindexed(root: Path, top: set[Path]) -> list[Path]:
    if root / SINGLE_FILE in top:
        return [root / SINGLE_FILE]
    found = sorted(path for path in top if path.suffix == ".safetensors")
    if found:
        return found
    pickles = sorted(path.name for path in top if path.suffix.lower() in _PICKLES)
    if pickles:
        _refuse_pickle(root, pickles)
    foreign = sorted(path.name for path in top if _holds_weights(path))
    deeper = sorted({path.parent.name for path in root.glob("*/*.safetensors")})
    hint = "Check the path."
    if foreign:
        hint = f"Instead of {named(foreign)}, give the checkpoint it was made from."
    elif deeper:
        hint = f"Give one of its folders that have some: {named(deeper)}."
    raise CheckpointError(f"{root}: no weights; a folder with .safetensors files is accepted. {hint}")


def _refuse_pickle(root: Path, names: list[str]) -> NoReturn:
    config = root / "config.json"
    if config.is_file():
        architectures = read_json(config).get("architectures")
        first = architectures[0] if isinstance(architectures, list) and architectures else None
        model = first if isinstance(first, str) and first.isidentifier() else "AutoModel"
        convert = (
            f"    from transformers import {model}\n"
            f"    {model}.from_pretrained({str(root)!r}).save_pretrained({str(root)!r})"
        )
    else:
        source, target = str(root / names[0]), str(root / SINGLE_FILE)
        convert = (
            "    import safetensors.torch, torch\n"
            f"    tensors = torch.load({source!r}, weights_only=True)\n"
            f"    safetensors.torch.save_file(tensors, {target!r})"
        )
    raise CheckpointError(
        f"{root}: the weights are pickled ({named(names)}); safetensors is accepted, and pickle"
        " refused since loading it can run code. If you trust who made it, convert it once with"
        f" these lines of Python:\n{convert}"
    )


def _merged(files: Iterable[Path]) -> Header:
    """The headers of all files as one, tensors sorted by name."""
    tensors: dict[str, TensorInfo] = {}
    metadata: dict[str, str] = {}
    for file in files:
        header = read_header(file)
        twice = sorted(header.tensors.keys() & tensors.keys())
        if twice:
            raise CheckpointError(
                f"{file}: {named(twice)} also in {tensors[twice[0]].file.name}; every tensor in one"
                " file is accepted. Give one of the files instead of the folder."
            )
        tensors |= header.tensors
        metadata |= header.metadata
    return Header(dict(sorted(tensors.items())), metadata)


def _check_complete(root: Path, weight_map: Mapping[str, str], tensors: Mapping[str, TensorInfo]) -> None:
    absent = sorted(
        name for name, shard in weight_map.items() if name not in tensors or tensors[name].file != root / shard
    )
    if absent:
        raise CheckpointError(
            f"{root / INDEX_FILE}: {len(absent)} of {len(weight_map)} tensors are not in the file"
            f" it names for them: {named(absent)}; a complete checkpoint is accepted."
            " Download it again."
        )


def _other_files(root: Path, files: list[Path]) -> tuple[tuple[Path, ...], tuple[Path, ...]]:
    others, skipped = [], []
    for path in sorted(set(root.rglob("*")).difference(files)):
        relative = path.relative_to(root)
        if not path.is_file() or any(part.startswith(".") for part in relative.parts):
            continue
        folder = relative.parts[0] if len(relative.parts) > 1 else ""
        if folder in _EXPORTS or (_holds_weights(path) and not _MODULE.fullmatch(folder)):
            skipped.append(relative)
        elif not path.name.endswith(".index.json"):
            others.append(relative)
    return tuple(others), tuple(skipped)


def _holds_weights(path: Path) -> bool:
    return path.suffix == ".safetensors" or path.suffix.lower() in _PICKLES | _FOREIGN
