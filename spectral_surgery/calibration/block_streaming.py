"""A model whose weights are on the disk until their block has its turn: the memory of one block, whatever the depth."""

from __future__ import annotations

import tempfile
import weakref
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spectral_surgery.files.index import CheckpointIndex
from spectral_surgery.hf.models import load_any, load_outline
from spectral_surgery.hf.tensor_names import StoredParameter, TensorNames, names_in
from spectral_surgery.live.stacks import TEXT, Chain, Prefixes, chain_of
from spectral_surgery.memory import release_freed_memory


@dataclass(frozen=True)
class LazyModel:
    """A model that reads its weights, as float32, when they are needed.

    Attributes:
        model: a transformers model; parameters that are not needed now are on the meta device.
        names: where its parameters are stored.
        tensors: the same, of those that are read when they are needed; none when all are in memory for good.
        device: where it runs.
        bf16: whether its products are those of bfloat16, see `computing`.
        given: names of what it is run on.
        again: loads the same once more, perhaps on another machine.
    """

    model: Any
    names: TensorNames
    tensors: dict[str, StoredParameter]
    again: Callable[[], LazyModel]
    device: str = "cpu"
    bf16: bool = False
    given: frozenset[str] = TEXT

    def computing(self) -> torch.autocast:
        """A context to run the model in: products of bfloat16, if they are wanted, and everything else in float32."""
        return torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=self.bf16)

    @cached_property
    def chain(self) -> Chain:
        """The stacks of blocks that run on the inputs of this model."""
        return chain_of(self.model, self.given, self.holding)

    @property
    def whole(self) -> bool:
        """Whether the model had to be loaded at once."""
        return not self.tensors

    @contextmanager
    def holding(self, prefix: str = "", without: Prefixes = ()) -> Iterator[None]:
        """Have some parameters in memory while the block lasts, and forget them, with all changes, afterwards."""
        names = [name for name in self.tensors if name.startswith(prefix) and not name.startswith(without)]
        read: dict[str, nn.Parameter] = {}
        for name in names:  # tied parameters are stored once
            key = self.tensors[name].name
            if key not in read:
                read[key] = nn.Parameter(self.tensors[name].read().to(self.device, torch.float32), requires_grad=False)
            self._put(name, read[key])
        try:
            yield
        finally:
            for name in names:
                shape = self.tensors[name].shape
                self._put(name, nn.Parameter(torch.empty(shape, device="meta"), requires_grad=False))
            read.clear()
            release_freed_memory()

    def _put(self, name: str, parameter: nn.Parameter) -> None:
        path, _, leaf = name.rpartition(".")
        self.model.get_submodule(path)._parameters[leaf] = parameter


def load_lazily(
    folder: Path,
    index: CheckpointIndex,
    auto_class: str,
    *,
    trust_remote_code: bool = False,
    device: str = "cpu",
    bf16: bool = False,
    given: Collection[str] = TEXT,
    outline: Any = None,
) -> LazyModel:
    """Load a model without its weights, where every parameter is stored as it is, or as rows of stored tensors.

    Args:
        auto_class: see `load_any`.
        device: where it will run.
        bf16: whether in bfloat16.
        given: names of what it is run on.
        outline: the model without weights, where somebody has it already.

    Returns:
        The model; with all its weights where it has no list of blocks, or where loading computes parameters from what
        is stored.
    """
    outline, given = outline or load_outline(folder, auto_class, trust_remote_code=trust_remote_code), frozenset(given)
    outline.config.use_cache = False
    where = partial(load_lazily, folder, index, auto_class)
    again = partial(where, trust_remote_code=trust_remote_code, device=device, bf16=bf16, given=given)
    names = names_in(outline, index)
    parameters = dict(outline.named_parameters(remove_duplicate=False))
    places = {name: names.find(name) for name in parameters}
    tensors = {
        name: stored
        for name, stored in places.items()
        if stored is not None and stored.shape == tuple(parameters[name].shape)
    }
    tied = {id(parameters[name]): stored for name, stored in tensors.items()}
    tensors |= {name: tied[id(p)] for name, p in parameters.items() if name not in tensors and id(p) in tied}
    if tensors.keys() == parameters.keys() and chain_of(outline, given).stacks:
        for module in outline.modules():
            module._buffers |= {
                name: buffer if buffer is None or buffer.is_meta else buffer.to(device)
                for name, buffer in module._buffers.items()
            }
        return LazyModel(outline, names, tensors, again, device, bf16, given)
    model = load_any(folder, auto_class, dtype=torch.float32, trust_remote_code=trust_remote_code)
    model.config.use_cache = False
    model.requires_grad_(requires_grad=False).to(device)
    return LazyModel(model, names, {}, again, device, bf16, given)


class ActivationStore:
    """Tensors in memory up to a limit, and in files beyond it; each lasts as long as what `put` returned for it."""

    def __init__(self, limit: int, folder: Path | None = None) -> None:
        """Start empty."""
        self._limit, self._used = limit, 0
        self._folder = tempfile.TemporaryDirectory(prefix="activations-", dir=folder)

    def put(self, tensor: Tensor) -> Callable[[], Tensor]:
        """Put a tensor away; call what is returned to have it.

        A file is mapped for as long as somebody uses the tensor read from it: what only waits takes no memory.
        """
        if self._used + tensor.nbytes > self._limit and tensor.numel():
            return self._filed(tensor)

        def kept() -> Tensor:
            return tensor

        self._used += tensor.nbytes
        weakref.finalize(kept, self._forget, tensor.nbytes)
        return kept

    def close(self) -> None:
        """Give the room back."""
        self._folder.cleanup()

    def _filed(self, tensor: Tensor) -> Callable[[], Tensor]:
        file = tempfile.NamedTemporaryFile(dir=self._folder.name, delete=False)  # noqa: SIM115 - only its name
        file.close()
        size, dtype, shape, device = tensor.numel(), tensor.dtype, tensor.shape, tensor.device
        torch.from_file(file.name, shared=True, size=size, dtype=dtype).reshape(shape).copy_(tensor)

        def mapped() -> Tensor:
            return torch.from_file(file.name, size=size, dtype=dtype).reshape(shape).to(device)

        weakref.finalize(mapped, Path(file.name).unlink, missing_ok=True)
        return mapped

    def _forget(self, nbytes: int) -> None:
        self._used -= nbytes
