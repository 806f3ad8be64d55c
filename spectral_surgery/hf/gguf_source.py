"""GGUF files as checkpoints: the package gguf makes numbers, and transformers has the tables of names and settings.

llama.cpp renames tensors, moves rows of some, stacks experts, and adds one to norms. transformers undoes that tensor by
tensor; here its tables are run on labels in the place of rows, so that any row is found without reading the others.
Source: transformers 5.24, `modeling_gguf_pytorch_utils.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spectral_surgery.errors import CheckpointError, SpectralSurgeryError, required
from spectral_surgery.files.header import DTYPE_BITS, TensorInfo, named
from spectral_surgery.files.reader import DTYPES
from spectral_surgery.files.sources.gguf_rows import Block, GgufRows, dtype_of, library, stored_as
from spectral_surgery.files.storage import FoundCheckpoint
from spectral_surgery.hf.load_errors import RAISED, reason_of
from spectral_surgery.hf.plain_weights import without_weights

_LABELS = 1 << 62  # random ones below: no arithmetic on labels gives another label


@dataclass(frozen=True)
class _Changed:
    """A parameter whose numbers llama.cpp has changed or turned, changed back by the tables; it is made as a whole.

    Attributes:
        block: the stored tensor.
        architecture: what llama.cpp calls it.
        shape: in the file.
        settings: of the configuration, as the tables take them.
        dtype: of the numbers that are given.
    """

    block: Block
    architecture: str
    name: str
    shape: tuple[int, ...]
    settings: Mapping[str, Any]
    dtype: torch.dtype

    @property
    def stored_bytes(self) -> int:
        return self.block.rows.nbytes

    def rows(self, start: int, stop: int) -> Tensor:
        values = self.block.read(0, self.block.rows.shape[0]).numpy().reshape(self.shape)
        made = _processor(self.architecture, self.settings).process(weights=values, name=self.name).weights
        tensor = torch.from_numpy(np.ascontiguousarray(made, np.float32))
        return tensor.reshape(-1, tensor.shape[-1])[start:stop].to(self.dtype)


def find_gguf(file: Path, folder: Path) -> FoundCheckpoint:
    """Find the tensors of a GGUF file.

    Args:
        file: it. Of several parts it is refused.
        folder: where config.json and the tokenizer are written, which are made of what the file says.

    Raises:
        CheckpointError: when the file is damaged, or of an architecture that transformers has no tables of.
    """
    required("transformers", "know the names in GGUF files")
    library()
    with _reading(file):
        from transformers.modeling_gguf_pytorch_utils import get_gguf_hf_weights_map, load_gguf_checkpoint, read_field

        reader = library().GGUFReader(str(file))
        architecture = str(read_field(reader, "general.architecture")[0])
        if "split.count" in reader.fields and int(read_field(reader, "split.count")[0]) > 1:
            raise CheckpointError(
                f"{file}: expected one file, got one of several parts. Join them by llama-gguf-split."
            )
        settings = load_gguf_checkpoint(str(file))["config"]
        model = _outline(settings)
        found = _Found(file, architecture, settings, get_gguf_hf_weights_map(model, _processor(architecture, settings)))
        tensors = found.parameters(reader.tensors)
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    tied = {*model.all_tied_weights_keys, *model.all_tied_weights_keys.values()}
    lacking = sorted(expected.keys() - tensors.keys() - tied)
    strange = sorted(name for name, info in tensors.items() if expected.get(name) != info.shape)
    if lacking or strange:
        what = f"lacks {named(lacking)}" if lacking else f"has {named(strange)} in another shape"
        raise CheckpointError(
            f"{file}: expected all that {type(model).__name__} has, as transformers reads {architecture}, got a file"
            f" that {what}. Give the checkpoint it was made from."
        )
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    notes = _write_tokenizer(file, folder)
    return FoundCheckpoint(folder, dict(sorted(tensors.items())), (file,), str(file), notes)


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    """Turn what gguf and transformers raise of a file into a CheckpointError of one line."""
    try:
        yield
    except SpectralSurgeryError:
        raise
    except (*RAISED, MemoryError, OverflowError, AssertionError) as error:
        raise CheckpointError(
            f"{file}: expected GGUF that gguf and transformers read, got an error ({reason_of(error)[:300]}). Download"
            " it again, or give the checkpoint it was made from."
        ) from None


def _outline(settings: Mapping[str, Any]) -> Any:
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    kind = str(settings["model_type"])
    config = transformers.AutoConfig.for_model(kind, **{k: v for k, v in settings.items() if k != "model_type"})
    cls: Any = (
        transformers.AutoModelForCausalLM if kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES else transformers.AutoModel
    )
    with without_weights():
        model = cls.from_config(config)
    model.tie_weights()
    return model


def _processor(architecture: str, settings: Mapping[str, Any]) -> Any:
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

    return TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=dict(settings))


class _Found:
    """The parameters that the tensors of a file make."""

    def __init__(self, file: Path, architecture: str, settings: Mapping[str, Any], names: Mapping[str, str]) -> None:
        self._file, self._architecture, self._settings, self._names = file, architecture, settings, names

    def parameters(self, stored: Any) -> dict[str, TensorInfo]:
        """By the names of transformers; tensors that it has no name for are left out, as it leaves them out."""
        blocks = [stored_as(tensor, self._file) for tensor in stored]
        shapes = [tuple(int(size) for size in reversed(tensor.shape.tolist())) for tensor in stored]
        counts = np.array([block.rows.shape[0] for block in blocks])
        starts = np.concatenate([[0], np.cumsum(counts)])
        labels = np.random.default_rng(0).integers(_LABELS, size=int(starts[-1]))
        process, made = _processor(self._architecture, self._settings), dict[str, Any]()
        shared = {"config": dict(self._settings), "tensors": made}
        found: dict[str, TensorInfo] = {}
        for number, (tensor, block, shape) in enumerate(zip(stored, blocks, shapes, strict=True)):
            probe = labels[starts[number] : starts[number + 1]].reshape(*shape[:-1], 1)
            more = {"tensor_key_mapping": self._names, "parsed_parameters": shared}
            rows, name, _ = process.process(weights=probe, name=tensor.name, **more)
            if name in self._names:
                target, order = self._names[name], _places(rows, labels)
                width = shape[-1]
                if order is None or (rows.shape[-1] != 1 and width != 1):
                    found[target] = self._changed(tensor.name, block, shape)
                else:
                    found[target] = _moved(target, order, (*rows.shape[:-1], width), blocks, starts)
        for target, rows in made.items():
            order = _places(np.asarray(rows), labels)
            if order is None:
                raise CheckpointError(
                    f"{self._file}: expected {named([target])} to be rows of its tensors, got other numbers."
                )
            width = shapes[int(np.searchsorted(starts, order[0], side="right")) - 1][-1]
            found[target] = _moved(target, order, (*rows.shape[:-1], width), blocks, starts)
        return found

    def _changed(self, name: str, block: Block, shape: tuple[int, ...]) -> TensorInfo:
        dtype = dtype_of([block])
        decoder = _Changed(block, self._architecture, name, shape, self._settings, DTYPES[dtype])
        values = np.zeros(shape, np.float32)
        now = tuple(_processor(self._architecture, self._settings).process(weights=values, name=name).weights.shape)
        return _info(self._names[name], dtype, now, block, decoder)


def _places(rows: Any, labels: Any) -> Any:
    """Which of all rows these are; None when they are none."""
    flat = np.asarray(rows).reshape(-1)
    if flat.dtype != labels.dtype or not flat.size:
        return None
    order = np.argsort(labels)
    place = np.minimum(np.searchsorted(labels, flat, sorter=order), len(labels) - 1)
    found = order[place]
    return found if np.array_equal(labels[found], flat) else None


def _moved(name: str, order: Any, shape: tuple[int, ...], blocks: list[Block], starts: Any) -> TensorInfo:
    """A parameter that is made of whole rows."""
    numbers = np.unique(np.searchsorted(starts, order, side="right") - 1)
    used = tuple(blocks[number] for number in numbers)
    first = np.concatenate([[0], np.cumsum([block.rows.shape[0] for block in used])])
    owner = np.searchsorted(starts, order, side="right") - 1
    inside = order - starts[owner] + first[np.searchsorted(numbers, owner)]
    plain = np.array_equal(inside, np.arange(first[-1]))
    dtype = dtype_of(used)
    return _info(name, dtype, shape, used[0], GgufRows(used, None if plain else inside, DTYPES[dtype]))


def _info(name: str, dtype: str, shape: tuple[int, ...], block: Block, decoder: Any) -> TensorInfo:
    nbytes = prod(shape) * DTYPE_BITS[dtype] // 8
    return TensorInfo(name, dtype, shape, block.rows.file, block.rows.start, nbytes, decoder)


def _write_tokenizer(file: Path, folder: Path) -> tuple[str, ...]:
    """Leave the tokenizer in a folder; a sentence where transformers can make none of what a GGUF file says."""
    import transformers

    try:
        transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)
    except RAISED as error:  # a model without tokenizer is one all the same
        return (
            f"The result has no tokenizer: transformers cannot make one of the GGUF file ({reason_of(error)[:300]})."
            " Copy that of the checkpoint it was made from.",
        )
    return ()
