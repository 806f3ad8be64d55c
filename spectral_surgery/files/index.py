"""What a checkpoint holds and where its bytes are, from headers alone."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import NoReturn

from spectral_surgery.errors import CheckpointError
from spectral_surgery.files.header import Header, TensorInfo, named, read_header, read_json
from spectral_surgery.files.reader import same_bytes
from spectral_surgery.files.sources import quantisation_of, read_as_plain
from spectral_surgery.files.storage import (
    Checkpoint,
    File,
    FoundCheckpoint,
    RemoteCheckpoint,
    RemoteFile,
    calling,
    path_of,
    reading,
    weights_of,
)

__all__ = ["INDEX_FILE", "SINGLE_FILE", "CheckpointIndex", "TensorInfo", "is_adapter", "read_index", "refuse_adapter"]

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_ADAPTER_CONFIG, _ADAPTER_FILES = "adapter_config.json", ("adapter_model.safetensors", "adapter_model.bin")

_PICKLES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"})
_FOREIGN = frozenset(
    {".onnx", ".onnx_data", ".h5", ".keras", ".msgpack", ".ot", ".gguf", ".ggml", ".tflite", ".pb", ".npz"}
)
_EXPORTS = frozenset({"onnx", "openvino", "coreml"})  # folders with the model once more, for other runtimes
_CONNECTIONS = 8  # headers read at once from elsewhere
_MODULE = re.compile(r"\d+_\w+")  # "2_Dense": a sentence-transformers module is part of the model


@dataclass(frozen=True)
class CheckpointIndex:
    """A checkpoint, seen from its headers.

    Attributes:
        root: the folder; of a lone file, the folder it is in.
        tensors: by name, sorted; those that another tool has quantised as what they stand for, see `SOURCES`.
        other_files: relative to root, to be copied as bytes: configuration, tokenizer, modules.
        skipped_files: relative to root: weights in other formats, or no part of this model.
        config: content of config.json, empty without one; it names no quantisation that is read as what it stands for.
        metadata: free text in the headers of the files, by key; the last file with a key has it.
        notes: what is odd about it and was read all the same, in sentences for the user.
    """

    root: Path
    tensors: dict[str, TensorInfo]
    files: tuple[File, ...]
    other_files: tuple[Path, ...]
    skipped_files: tuple[Path, ...]
    config: dict[str, object]
    metadata: dict[str, str]
    notes: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes that all tensors take in files."""
        return sum(info.stored_bytes for info in self.tensors.values())

    @property
    def why_not_plain(self) -> str | None:
        """What config.json calls it, if it is quantised, compressed or swapped, and what to do; None when plain."""
        settings = quantisation_of(self.config)
        if settings is None:
            return None
        method = str(settings.get("quant_method"))
        remedies = {"spectral_surgery": "Decompress it first.", "spectral_surgery_swap": "Start from the original."}
        remedy = remedies.get(method, "Start from the unquantised checkpoint.")
        return f"expected a plain checkpoint, got one quantised already ({method}). {remedy}"

    def require_plain(self) -> None:
        """Refuse what is quantised, compressed or swapped. Raises CheckpointError when it is."""
        if self.why_not_plain:
            raise CheckpointError(f"{self.root}: {self.why_not_plain}")


def is_adapter(source: Checkpoint) -> bool:
    """Whether a folder holds an adapter in PEFT's format, and no model beside it."""
    folder = path_of(source)
    if not (folder / _ADAPTER_CONFIG).is_file() or (folder / INDEX_FILE).is_file():
        return False
    return all(path.name in _ADAPTER_FILES for path in (*folder.glob("*.safetensors"), *weights_of(source)))


def read_index(source: Checkpoint, *, adapters: bool = False) -> CheckpointIndex:
    """Read the headers of a checkpoint.

    Where an index and the files disagree, the checkpoint is what transformers loads: names that no file has do not
    count, and of a tensor in several files the one in the last file does.

    Args:
        source: a folder with an indexed, a single or several ``.safetensors`` files, or one
            safetensors file of any name; here or elsewhere; or a checkpoint in other files, see
            `files.pickled.find_pickled`. Weights at the top level of a folder are the model.
            Links to files are followed, links to folders are not.
        adapters: whether the folder of an adapter, which is not a model, will do.

    Returns:
        The index; a lone file has neither other files nor configuration.

    Raises:
        CheckpointError: when there is no checkpoint, or it is an adapter, pickled, incomplete,
            ambiguous or damaged.
        LimitError: when a header or JSON file is longer than any real one.
    """
    if isinstance(source, FoundCheckpoint):
        return _found(source)
    root, remote = path_of(source), weights_of(source)
    with reading(root), calling(source):
        if root.is_file() or root in remote:
            return _lone_file(root, remote.get(root, root))
        if isinstance(source, Path) and not root.is_dir():
            raise CheckpointError(
                f"{root}: expected a .safetensors file or a folder with some, got no such file or folder. Check the"
                " path."
            )
        if not adapters:
            refuse_adapter(source)
        every = _files_in(source)
        top = {path for path in every if path.parent == root}
        weight_map = _read_weight_map(root, top)
        paths = _shards(root, weight_map, remote) if weight_map else _unindexed(root, every)
        files = {path: remote.get(path, path) for path in paths}
        headers = _read_headers(files)
        notes = _disagreements(root, weight_map, headers) if weight_map else ()
        header = _merged(headers, twice=bool(weight_map))
        others, skipped = other_files(root, every.difference(paths))
        stored = read_json(root / "config.json") if root / "config.json" in top else {}
        tensors, config, made = read_as_plain(header.tensors, stored)
        notes = (*notes, *made)
    return CheckpointIndex(root, tensors, tuple(files.values()), others, skipped, config, header.metadata, notes)


def _found(source: FoundCheckpoint) -> CheckpointIndex:
    with reading(source):
        others, skipped = other_files(source.path, _files_in(source.path).difference(source.files))
        stored = read_json(source.path / "config.json") if (source.path / "config.json").is_file() else {}
        tensors, config, notes = read_as_plain(dict(source.tensors), stored)
    return CheckpointIndex(source.path, tensors, source.files, others, skipped, config, {}, (*source.notes, *notes))


def _files_in(source: Path | RemoteCheckpoint) -> set[Path]:
    """Every file of a folder, here or elsewhere."""
    if isinstance(source, RemoteCheckpoint):
        return {*source.weights, *(source.path / name for name in source.names)}
    return {path for path in source.rglob("*") if path.is_file()}


def _read_headers(files: Mapping[Path, File]) -> dict[Path, Header]:
    if all(isinstance(file, Path) for file in files.values()):
        return {path: read_header(file) for path, file in files.items()}
    with ThreadPoolExecutor(_CONNECTIONS) as pool:
        return dict(zip(files, pool.map(read_header, files.values()), strict=True))


def _lone_file(path: Path, file: File) -> CheckpointIndex:
    if path.suffix.lower() in _PICKLES:
        _refuse_pickle(path.parent, [path.name])
    header = _merged({path: read_header(file)}, twice=False)
    tensors, config, notes = read_as_plain(header.tensors, {})
    return CheckpointIndex(path.parent, tensors, (file,), (), (), config, header.metadata, notes)


def _read_weight_map(root: Path, top: set[Path]) -> dict[str, Path]:
    """Tensor name -> file; empty without an index, or with a single file that it does not name."""
    path = root / INDEX_FILE
    if path not in top:
        return {}
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            f"{path}: expected the file of every tensor by name as weight_map, got {named([weight_map])}. Download"
            " it again."
        )
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not shard.endswith(".safetensors"):
            raise CheckpointError(
                f"{path}: expected a .safetensors file for tensor {named([name])}, got {named([shard])}. Download it"
                " again."
            )
    shards = dict.fromkeys(weight_map.values())
    if root / SINGLE_FILE in top and SINGLE_FILE not in shards:
        return {}  # as transformers loads it
    for shard in shards:
        parts = PureWindowsPath(shard)  # knows both separators, and drives
        if parts.anchor or ".." in parts.parts:
            raise CheckpointError(
                f"{path}: expected paths below the folder, got {named([shard])}, which leads out of it. Do not trust"
                " this checkpoint."
            )
    files = {shard: root / shard for shard in shards}
    return {name: files[shard] for name, shard in weight_map.items()}


def _shards(root: Path, weight_map: Mapping[str, Path], remote: Mapping[Path, RemoteFile]) -> list[Path]:
    shards = sorted(set(weight_map.values()))
    missing = [str(shard.relative_to(root)) for shard in shards if not (shard.is_file() or shard in remote)]
    if missing:
        raise CheckpointError(
            f"{root}: expected the {len(shards)} weight files that {INDEX_FILE} names, got {len(missing)} missing: "
            f"{named(missing)}. Download them."
        )
    return shards


def _unindexed(root: Path, every: set[Path]) -> list[Path]:
    top = {path for path in every if path.parent == root}
    if root / SINGLE_FILE in top:
        return [root / SINGLE_FILE]
    files = sorted(path for path in top if path.suffix == ".safetensors")
    if files:
        return files
    pickles = sorted(path.name for path in top if path.suffix.lower() in _PICKLES)
    if pickles:
        _refuse_pickle(root, pickles)
    foreign = sorted(path.name for path in top if _holds_weights(path))
    deeper = sorted({path.parent.name for path in every if path.match("*.safetensors") and path.parent.parent == root})
    hint = "Check the path."
    gguf = [name for name in foreign if name.lower().endswith(".gguf")]
    if gguf:
        hint = f"Give one of its GGUF files by itself: {named(gguf)}."
    elif foreign:
        hint = f"Instead of {named(foreign)}, give the checkpoint it was made from."
    elif deeper:
        hint = f"Give one of its folders that have some: {named(deeper)}."
    raise CheckpointError(f"{root}: expected a folder with .safetensors files, got no weights. {hint}")


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
        f"{root}: expected safetensors, got pickled weights ({named(names)}), and to load a pickle can run code. If"
        " you trust who made it, use --allow-bin where a command has it, or convert it once with these lines of"
        f" Python:\n{convert}"
    )


def refuse_adapter(source: Checkpoint) -> None:
    """Refuse the folder of an adapter where a model is needed. Raises CheckpointError when it is one."""
    if not is_adapter(source):
        return
    folder = path_of(source)
    config = read_json(folder / _ADAPTER_CONFIG)
    base = config.get("base_model_name_or_path")
    known = named([base]) if isinstance(base, str) and base else "a base model"
    raise CheckpointError(
        f"{folder}: expected a model, got an adapter ({named([config.get('peft_type')])}) for {known}. Give that"
        " model, or merge the adapter into it first."
    )


def _merged(headers: Mapping[Path, Header], *, twice: bool) -> Header:
    """The headers of all files as one, tensors sorted by name; of those that may be there twice, the last one."""
    tensors: dict[str, TensorInfo] = {}
    metadata: dict[str, str] = {}
    for file, header in headers.items():
        again = sorted(header.tensors.keys() & tensors.keys())
        if again and not twice:
            raise CheckpointError(
                f"{file}: expected every tensor in one file, got {named(again)} also in"
                f" {tensors[again[0]].file.name}. Give one of the files instead of the folder."
            )
        tensors |= header.tensors
        metadata |= header.metadata
    return Header(dict(sorted(tensors.items())), metadata)


def _disagreements(root: Path, weight_map: Mapping[str, Path], headers: Mapping[Path, Header]) -> tuple[str, ...]:
    """Where an index does not say what its files hold, in sentences; refused where that leaves a doubt."""
    strangers = [
        path for path, header in headers.items() if not any(weight_map.get(name) == path for name in header.tensors)
    ]
    if strangers:
        raise CheckpointError(
            f"{strangers[0]}: expected a complete checkpoint, got a file with none of the tensors that {INDEX_FILE}"
            " names for it. Download it again."
        )
    last = {name: path for path, header in headers.items() for name in header.tensors}
    several = sorted({n for path, header in headers.items() for n in header.tensors if last[n] is not path})
    for name in several:
        counts, meant = last[name], weight_map.get(name, last[name])
        infos = [headers[path].tensors.get(name) for path in (meant, counts)]
        if infos[0] and infos[1] and meant != counts and not same_bytes(infos[0], infos[1]):
            raise CheckpointError(
                f"{root}: expected one {named([name])}, got that in {meant.name}, which {INDEX_FILE} names, and"
                f" another with other values in {counts.name}, which transformers loads. Remove one of them."
            )
    absent = sorted(weight_map.keys() - last.keys())
    elsewhere = sorted(n for n, path in weight_map.items() if n in last and n not in headers[path].tensors)
    return tuple(
        f"{INDEX_FILE}: {len(names)} of its names {what}: {named(names)}."
        for names, what in (
            (absent, "are in no file, and are left out"),
            (elsewhere, "are in another file than it says, and were taken from there"),
            (several, "are in several files, of which the last counts, as for transformers"),
        )
        if names
    )


def other_files(root: Path, beside: Iterable[Path]) -> tuple[tuple[Path, ...], tuple[Path, ...]]:
    """Of the files beside the weights of a model, those that belong to it and those left out, relative to the root."""
    others, skipped = [], []
    for path in sorted(beside):
        relative = path.relative_to(root)
        if any(part.startswith(".") for part in relative.parts):
            continue
        folder = relative.parts[0] if len(relative.parts) > 1 else ""
        if folder in _EXPORTS or (_holds_weights(path) and not _MODULE.fullmatch(folder)):
            skipped.append(relative)
        elif not path.name.endswith(".index.json"):
            others.append(relative)
    return tuple(others), tuple(skipped)


def _holds_weights(path: Path) -> bool:
    return path.suffix == ".safetensors" or path.suffix.lower() in _PICKLES | _FOREIGN
