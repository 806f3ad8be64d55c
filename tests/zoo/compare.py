"""Outputs of models and tensors of folders, compared."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from tests.zoo.entry import Entry

STATES = ("past_key_values", "cache", "state", "rwkv_state", "cache_params", "mems")  # of later calls: no outputs
Outputs = dict[str, Tensor]
Keys = dict[str, list[str]]


def load(entry: Entry, folder: Path, dtype: torch.dtype | None = None) -> tuple[Any, Keys]:
    """The model in eval mode, and names that were missing, unexpected or of another shape."""
    own = {"dtype": dtype} if dtype is not None else {}
    trust = {"trust_remote_code": True} if entry.own_code else {}
    model, info = entry.loader_class().from_pretrained(str(folder), output_loading_info=True, **own, **trust)
    keys = {kind: sorted(map(str, names)) for kind, names in info.items() if names and kind != "error_msgs"}
    return model.eval(), keys


def more(keys: Keys, baseline: Keys) -> str:
    """Names in ``keys`` that the original has not in its own, as text; empty when there are none."""
    found = {kind: [n for n in names if n not in baseline.get(kind, [])] for kind, names in keys.items()}
    return ", ".join(f"{kind}: {names[:4]}" for kind, names in found.items() if names)


def outputs(entry: Entry, model: Any, base: Any = None, seed: int = 0) -> Outputs:
    """All floating tensors that the model returns, float32, by their place; ``base`` says the inputs' dtype.

    Those that modules in ``entry.inside`` return are among them.
    """
    inputs = entry.make_inputs(model if base is None else base, seed)
    torch.manual_seed(7)  # some draw noise
    with torch.no_grad(), _watching(model, entry.inside) as seen:
        return dict(_leaves(model(**inputs))) | dict(_leaves(seen))


@contextmanager
def _watching(model: Any, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """What modules return, by their names in the plain model: PEFT puts its model around it."""
    seen: dict[str, Any] = {}
    hooks = []
    for name in names:
        (module,) = (own for full, own in model.named_modules() if f".{full}".endswith(f".{name}"))
        hooks.append(module.register_forward_hook(lambda *call, name=name: seen.update({name: call[2]})))
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _leaves(value: Any, place: str = "") -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        if value.is_floating_point() and value.numel():
            yield place, value.detach().float()
    elif isinstance(value, Mapping) or hasattr(value, "items"):
        for name, inner in value.items():
            if name not in STATES:
                yield from _leaves(inner, f"{place}.{name}")
    elif isinstance(value, (list, tuple)):
        for number, inner in enumerate(value):
            yield from _leaves(inner, f"{place}[{number}]")


def distance(one: Outputs, other: Outputs) -> tuple[float, str]:
    """(largest relative error, where it is); infinite where names, shapes or finite places differ."""
    if one.keys() != other.keys():
        return math.inf, f"names {sorted(one.keys() ^ other.keys())[:4]}"
    worst, where = 0.0, ""
    for name, wanted in one.items():
        error = _relative(wanted.double(), other[name].double())
        if error > worst:
            worst, where = error, name
    return worst, where


def _relative(wanted: Tensor, got: Tensor) -> float:
    if wanted.shape != got.shape:
        return math.inf
    finite = torch.isfinite(wanted)
    if not torch.equal(finite, torch.isfinite(got)):
        return math.inf
    wanted, got = wanted[finite], got[finite]
    return float((wanted - got).norm()) / max(float(wanted.norm()), 1e-12)


def tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of the safetensors files in a folder."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            found |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - it is no mapping
    return found


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether dtype, shape and all bits are equal, also those of NaN."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(one.contiguous().flatten().view(torch.uint8), other.contiguous().flatten().view(torch.uint8))


def same_values(one: Tensor, other: Tensor) -> bool:
    """Whether all numbers are equal, the second perhaps in a wider dtype: transformers keeps some in float32."""
    if one.dtype == other.dtype:
        return same_bits(one, other)
    wider = one.is_floating_point() and other.is_floating_point() and other.itemsize > one.itemsize
    return wider and one.shape == other.shape and torch.equal(one.to(other.dtype), other)


def differing(
    one: dict[str, Tensor], other: dict[str, Tensor], same: Callable[[Tensor, Tensor], bool] = same_bits
) -> str:
    """What differs between the tensors of two folders, in words; empty when all are the same."""
    if one.keys() != other.keys():
        return f"names {sorted(one.keys() ^ other.keys())[:4]}"
    names = [name for name in one if not same(one[name], other[name])]
    return f"bits of {names[:4]}" if names else ""
