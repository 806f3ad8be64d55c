"""The linear layers of a checkpoint in the order in which a model runs them, with what they are given on some text."""

from __future__ import annotations

import hashlib
from collections.abc import Container, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spectral_surgery.checkpoint.index import CheckpointIndex
from spectral_surgery.checkpoint.task import task_of
from spectral_surgery.errors import ConfigError
from spectral_surgery.surgery.blocks import blocks_in_turn, moments_of
from spectral_surgery.workflows.lazy_model import LazyModel, Shelf, load_lazily
from spectral_surgery.workflows.merge_plan import tensor_of
from spectral_surgery.workflows.progress import Progress, silent
from spectral_surgery.workflows.sequences import check_vocabulary, equal_lengths, read_sequences

IN_MEMORY = 32 << 20  # bytes of activations; more go to files
BATCH_TOKENS = 1024  # of a batch: what a block computes on the way has room beside its weights


@dataclass(frozen=True)
class CalibrationData:
    """Text to calibrate on.

    Attributes:
        file: text, JSONL or CSV.
        samples: sequences at most.
        seq_length: tokens of a sequence at most.
    """

    file: Path
    samples: int = 512
    seq_length: int = 256

    def digest(self) -> str:
        """What it is, for the manifest and for recognising unfinished work."""
        body = hashlib.sha256(self.file.read_bytes()).hexdigest()
        return f"{self.samples} x {self.seq_length} tokens of sha256:{body}"


@dataclass(frozen=True)
class LayerMoment:
    """A layer in its turn.

    Attributes:
        block: name of its block; empty when the model has no list of blocks.
        layer: nn.Linear, or Conv1D of transformers.
        tensor: name of its weight in the checkpoint.
        moment: H = Xᵀ X of its inputs, [I, I] float32.
    """

    block: str
    layer: Any
    tensor: str
    moment: Tensor

    @property
    def transposed(self) -> bool:
        """Whether the weight is stored as [I, O]."""
        return type(self.layer).__name__ == "Conv1D"

    def put(self, weight: Tensor) -> None:
        """Give the layer another weight, of the shape it is stored in, for the blocks after it to be judged with."""
        with torch.no_grad():
            self.layer.weight.copy_(weight)


def layer_moments(
    source: Path,
    index: CheckpointIndex,
    data: CalibrationData,
    names: Container[str],
    *,
    folder: Path | None = None,
    progress: Progress = silent,
) -> Iterator[LayerMoment]:
    """Visit the layers in blocks, one block in memory at a time; layers that no sample reaches are left out.

    All layers of a block are seen with the blocks before it as they were left, see `LayerMoment.put`.

    Args:
        source: a checkpoint with a tokenizer.
        index: of it.
        data: text.
        names: of the tensors wanted.
        folder: for activations that do not fit into memory; None for the folder of temporary files.
        progress: called after each layer.

    Raises:
        ConfigError: when there is no text, the model does not know its tokens, or has an encoder and a decoder.
        CheckpointError: when the model cannot be loaded.
    """
    lazy, sequences = model_and_text(source, index, data)
    count, total = 0, sum(1 for _ in layers_of(index, names, "", lazy.model))
    with closing(Shelf(IN_MEMORY, folder)) as shelf:
        batches = equal_lengths(sequences, BATCH_TOKENS)
        for block, module, run in blocks_in_turn(lazy.model, batches, holding=lazy.holding, keep=shelf.put):
            layers = dict(layers_of(index, names, f"{block}." if block else "", module))
            with moments_of({key: layer for key, (layer, _) in layers.items()}) as moments:
                for _ in run():
                    pass
            for key, (layer, tensor) in layers.items():
                if key in moments:
                    yield LayerMoment(block, layer, tensor, moments.pop(key))
                count += 1
                progress(count, total, tensor)


def model_and_text(source: Path, index: CheckpointIndex, data: CalibrationData) -> tuple[LazyModel, list[list[int]]]:
    """The model to calibrate, and token sequences to calibrate it on.

    Args:
        source: a checkpoint with a tokenizer.
        index: of it.
        data: text.

    Raises:
        ConfigError: when there is no text, the model does not know its tokens, or has an encoder and a decoder.
        CheckpointError: when the model cannot be loaded.
    """
    task = task_of(index.config)
    if task == "SEQ_2_SEQ_LM":
        raise ConfigError("calibrate: the model has an encoder and a decoder; models of one of them are accepted.")
    lazy, causal = load_lazily(source, index, "AutoModel"), task == "CAUSAL_LM"
    sequences = read_sequences(lazy.tokenizer, data.file, length=data.seq_length, samples=data.samples, causal=causal)
    if not any(sequences):
        raise ConfigError(
            f"{data.file}: the tokenizer of {source.name} finds no token in it; text that the model reads is accepted."
        )
    check_vocabulary(sequences, lazy.model.get_input_embeddings().num_embeddings, data.file)
    return lazy, sequences


def layers_of(
    index: CheckpointIndex, names: Container[str], prefix: str, block: nn.Module
) -> Iterator[tuple[str, tuple[Any, str]]]:
    """The linear layers of a block: (name in the block, (the layer, name of its weight in the checkpoint)).

    Args:
        index: of the checkpoint.
        names: of the tensors wanted.
        prefix: of the names of the block's modules, with its dot.
        block: part of a model.
    """
    for name, module in block.named_modules():
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
            info = tensor_of(index, f"{prefix}{name}.weight")
            if info is not None and info.name in names and len(info.shape) == 2:
                yield name, (module, info.name)
