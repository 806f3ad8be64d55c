"""Parameters of other modules than linear layers that stay spectra: above all the matrices of fused experts.

Classes that are decorated with `use_experts_implementation` promise one forward in terms of their parameters and a few
flags; the implementations of transformers (batched, grouped) rely on it, and so does this one. Other classes keep their
forward, and read a `LazyWeight`, where they do nothing but multiply by it. Checkpoints store such parameters fused, or
a matrix for each expert that transformers stacks and concatenates: both keep their codes.
Source: transformers 5.24, `integrations/moe.py`, `models/dbrx/modeling_dbrx.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from spectral_surgery.files.compressed.manifest import TensorRecord
from spectral_surgery.hf.quantizer.lazy_weight import LazyWeight, Rows, Stack
from spectral_surgery.hf.quantizer.weight_uses import only_multiplies
from spectral_surgery.layers import SpectralExperts, SpectralWeight
from spectral_surgery.matmul import Form
from spectral_surgery.matmul.recorded import whole_graph

Stored = tuple[tuple[str, ...], ...]  # by pattern of a converter: a name for each expert; or one fused name
Held = SpectralExperts | SpectralWeight
_FLAGS = ("has_gate", "has_bias", "is_transposed", "_apply_gate", "num_experts")
_MATRICES = frozenset({"gate_up_proj", "up_proj", "down_proj"})
_MULTIPLIED_OUTSIDE = {("DbrxExpertGLU", leaf) for leaf in ("w1", "v1", "w2")}  # by the module around them

# of classes with another forward: whether experts multiply by the matrix, and not by the transposed one
_BY_CLASS: Mapping[str, Mapping[str, bool]] = {
    "DbrxExpertGLU": {"w1": False, "v1": False, "w2": True},
    "InklingSharedExperts": {"gate_proj": False, "up_proj": False, "down_proj": False},
    "JetMoeParallelExperts": {"weight": False},
    "Llama4TextExperts": {"gate_up_proj": True, "down_proj": True},
    "LongcatFlashExperts": {"gate_up_proj": False, "down_proj": False},
    "Step3p7Experts": {"gate_up_proj": False, "down_proj": False},
}


class ExpertsForward:
    """The forward of a decorated class, one expert after the other, with matrices that may be spectra."""

    num_experts: int
    has_gate: bool
    has_bias: bool
    is_transposed: bool
    act_fn: Any
    _apply_gate: Any

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Run experts on the tokens that are routed to them: [T, D] in the dtype of hidden_states.

        Args:
            hidden_states: [T, D].
            top_k_index: [T, k] experts of each token; numbers from `num_experts` on are left out.
            top_k_weights: [T, k].
        """
        if whole_graph():
            return self._by_every_expert(hidden_states, top_k_index, top_k_weights)
        tokens, chosen = top_k_index.shape
        ids, order = top_k_index.reshape(-1).sort(stable=True)
        counts = torch.bincount(ids, minlength=self.num_experts)[: self.num_experts].tolist()
        ids, order = ids[: sum(counts)], order[: sum(counts)]
        inner = self._project(
            "gate_up_proj" if self.has_gate else "up_proj", hidden_states[order // chosen], ids, counts
        )
        inner = self._apply_gate(inner) if self.has_gate else self.act_fn(inner)
        y = self._project("down_proj", inner, ids, counts)
        if getattr(self, "has_post_expert_norm", False):
            y = self.post_expert_norm(y)  # type: ignore[attr-defined]  # such a class has one
        y = y * top_k_weights.reshape(-1, 1)[order]
        whole = y.new_zeros((tokens * chosen, y.shape[1])).index_copy(0, order, y)
        return whole.reshape(tokens, chosen, -1).sum(1).to(hidden_states.dtype)

    def _by_every_expert(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """All tokens through all experts: where a graph is recorded, nobody can ask who goes where."""
        total: Tensor | None = None
        for expert in range(self.num_experts):
            inner = self._project_all("gate_up_proj" if self.has_gate else "up_proj", x, expert)
            y = self._project_all("down_proj", self._apply_gate(inner) if self.has_gate else self.act_fn(inner), expert)
            if getattr(self, "has_post_expert_norm", False):
                y = self.post_expert_norm(y)  # type: ignore[attr-defined]  # such a class has one
            y = y * (weights * (chosen == expert)).sum(1, keepdim=True)
            total = y if total is None else total + y
        return cast(Tensor, total).to(x.dtype)

    def _project_all(self, name: str, x: Tensor, expert: int) -> Tensor:
        matrices = getattr(self, name)
        if isinstance(matrices, SpectralExperts):
            weight = matrices.weights[expert]
            y = weight.matmul_transposed(x) if matrices.transposed else weight.matmul(x)
        else:
            y = x @ (matrices[expert] if self.is_transposed else matrices[expert].mT)
        return y + getattr(self, f"{name}_bias")[expert] if self.has_bias else y

    def _project(self, name: str, x: Tensor, ids: Tensor, counts: Sequence[int]) -> Tensor:
        matrices = getattr(self, name)
        if isinstance(matrices, SpectralExperts):
            y = matrices(x, counts)
        else:
            rows = torch.split(x, list(counts))
            dense = matrices if self.is_transposed else matrices.mT
            y = torch.cat(
                [tokens @ dense[expert] for expert, tokens in enumerate(rows) if len(tokens)] or [x @ dense[0]]
            )
        if self.has_bias:
            y = y + getattr(self, f"{name}_bias")[ids]
        return cast(Tensor, y)


def fused_matrices(module: nn.Module) -> tuple[str, ...]:
    """Names of the fused parameters of experts that `ExpertsForward` can run; none of any other module."""
    if not all(hasattr(module, flag) for flag in _FLAGS):
        return ()
    parameters = module._parameters
    return tuple(
        leaf for leaf in parameters if leaf in _MATRICES and _is_fused(parameters[leaf], cast(int, module.num_experts))
    )


def expert_matrices(module: nn.Module) -> dict[str, bool]:
    """The parameters with a matrix for each expert, one above the other, that calibration knows the use of.

    Returns by name, whether experts multiply by their matrix and not by the transposed one.
    """
    known = dict.fromkeys(fused_matrices(module), bool(getattr(module, "is_transposed", False)))
    return known or {
        leaf: plain for leaf, plain in _BY_CLASS.get(type(module).__name__, {}).items() if leaf in module._parameters
    }


def _is_fused(parameter: object, experts: int) -> bool:
    return isinstance(parameter, Tensor) and parameter.ndim == 3 and len(parameter) == experts


class _Holder:
    """A module of which parameters are spectra."""

    stands_for: ClassVar[type[nn.Module]]
    leaves: ClassVar[tuple[str, ...]]

    def __reduce_ex__(self, protocol: object) -> tuple[Any, ...]:
        """Classes that are made at run time have no name to be found by."""
        return _empty, (self.stands_for, self.leaves), cast(Any, self).__getstate__()

    def become_dense(self, done: dict[int, nn.Parameter]) -> None:
        """See `live.trained_copy`; no two of these share a spectrum."""
        del done
        module = cast(nn.Module, self)
        for leaf, (_, part) in held_parameters(module).items():
            put_parameter(module, leaf, nn.Parameter(part.to_dense()))


@cache
def _holding(cls: type[nn.Module], leaves: tuple[str, ...]) -> type[nn.Module]:
    """The class of modules of which these parameters are spectra: it runs them, or reads them as lazy weights."""
    settings: dict[str, Any] = {"__module__": cls.__module__, "stands_for": cls, "leaves": leaves}
    if _decorated(cls, leaves[0]):
        return type(cls.__name__, (ExpertsForward, cls, _Holder), settings)
    readers = {leaf: property(_reader(_place(cls, leaf))) for leaf in leaves}
    return type(cls.__name__, (_Holder, cls), settings | readers)


def _decorated(cls: type[nn.Module], leaf: str) -> bool:
    return hasattr(cls, "_apply_gate") and leaf in _MATRICES


def _place(cls: type[nn.Module], leaf: str) -> str:
    """The name of the spectra as a part of their module; that of the parameter where it is not read as a tensor."""
    return leaf if _decorated(cls, leaf) else f"{leaf}_spectra"


def _reader(place: str) -> Any:
    def read(module: nn.Module) -> Tensor:
        part = module._modules[place]
        if isinstance(part, SpectralExperts):
            return LazyWeight.of(Stack.of(part.weights))
        return LazyWeight.of(Rows.all(cast(SpectralWeight, part)))

    return read


def _empty(cls: Any, leaves: tuple[str, ...]) -> nn.Module:
    made = _holding(cls, leaves)
    return made.__new__(made)


def held_parameters(module: nn.Module) -> dict[str, tuple[str, Held]]:
    """Parameters of a module that are spectra, by name: the name of the spectra as its part, and themselves."""
    cls = getattr(type(module), "stands_for", type(module))
    places = {leaf: _place(cls, leaf) for leaf in getattr(type(module), "leaves", ())}
    return {leaf: (place, cast(Held, module._modules[place])) for leaf, place in places.items()}


def stored_matrices(
    model: nn.Module,
    parameter: str,
    by: Mapping[str, Sequence[str]],
    tensors: Mapping[str, TensorRecord],
    converters: Sequence[Any],
) -> Stored | None:
    """Whether a parameter can be run from its codes.

    Returns the stored names, in order of rows; None where it has to be decoded.

    ``by``: stored names that make it, by pattern of the converter; the pattern is empty for a mere renaming.
    """
    owner, _, leaf = parameter.rpartition(".")
    module = model.get_submodule(owner)
    whole = getattr(module, leaf, None)
    if not isinstance(whole, nn.Parameter) or not _can_hold(module, leaf, whole):
        return None
    if not all(name in tensors for names in by.values() for name in names):
        return None
    if "" in by:
        fits = len(by) == 1 and len(by[""]) == 1 and _aligned(tensors[by[""][0]], tuple(whole.shape))
        return (tuple(by[""]),) if fits else None
    patterns = _stacked_patterns(by, converters) if whole.ndim == 3 else None
    if patterns is None or getattr(module, "is_transposed", False):
        return None
    matrices = tuple(tuple(by[pattern]) for pattern in patterns)
    heights = [{tensors[name].shape for name in names} for names in matrices]
    if any(len(names) != len(whole) for names in matrices) or any(len(shape) != 1 for shape in heights):
        return None
    shapes = [next(iter(shape)) for shape in heights]
    fit = all(len(shape) == 2 and shape[1] == whole.shape[2] for shape in shapes)
    return matrices if fit and sum(shape[0] for shape in shapes) == whole.shape[1] else None


def _can_hold(module: nn.Module, leaf: str, whole: nn.Parameter) -> bool:
    if isinstance(module, nn.Linear | nn.Embedding) or not leaf:
        return False
    cls: Any = type(module)
    if all(hasattr(module, flag) for flag in _FLAGS):
        return leaf in fused_matrices(module)
    return whole.ndim in (2, 3) and ((cls.__name__, leaf) in _MULTIPLIED_OUTSIDE or only_multiplies(cls, leaf))


def _aligned(record: TensorRecord, shape: tuple[int, ...]) -> bool:
    """Whether the spectrum is that of the matrices, and no part of it belongs to two of them."""
    height = shape[-2]
    parts = all(part.rows[0] // height == (part.rows[1] - 1) // height for part in record.parts)
    return record.shape == shape and record.matrix[1] == shape[-1] and parts


def _stacked_patterns(by: Mapping[str, Sequence[str]], converters: Sequence[Any]) -> list[str] | None:
    """Patterns in order of rows, where all that is done is to stack experts and to put matrices below each other."""
    from transformers.core_model_loading import Concatenate, MergeModulelist

    for converter in converters:
        if set(by) == set(converter.source_patterns):
            stack, *rest = converter.operations or [None]
            below = len(rest) == 1 and type(rest[0]) is Concatenate and rest[0].dim == 1
            plain = type(stack) is MergeModulelist and stack.dim == 0 and len(converter.target_patterns) == 1
            return list(converter.source_patterns) if plain and (below or (not rest and len(by) == 1)) else None
    return None


def install_matrices(model: nn.Module, parameter: str, stored: Sequence[tuple[list[Form], str]], like: Tensor) -> None:
    """Put spectra in the place of a parameter.

    Args:
        stored: forms of row ranges, one below the other, and the resident form.
        like: a tensor on the device and of the dtype that the parameter should have.
    """
    owner, _, leaf = parameter.rpartition(".")
    module = model.get_submodule(owner)
    *front, height, _ = getattr(module, leaf).shape
    forms: list[list[Form]] = [[] for _ in range(front[0] if front else 1)]
    row = 0
    for form in (form for parts, _ in stored for form in parts):
        forms[row // height].append(form)
        row += form.shape[0]
    resident = stored[0][1]
    weights = [SpectralWeight(part, resident, like.dtype) for part in forms]
    weights = weights if like.is_cpu else [weight.to(like.device) for weight in weights]  # which takes its time
    transposed = bool(getattr(module, "is_transposed", False))
    put_parameter(module, leaf, SpectralExperts(weights, transposed=transposed) if front else weights[0])


def put_parameter(module: nn.Module, leaf: str, value: Held | nn.Parameter) -> None:
    """Replace one of the parameters of a module; it is of its first class again when none is a spectrum."""
    cls: Any = getattr(type(module), "stands_for", type(module))
    parts = {name: part for name, (_, part) in held_parameters(module).items()}
    module.__class__ = cls
    delattr(module, _place(cls, leaf) if leaf in parts else leaf)
    if isinstance(value, nn.Parameter):
        parts.pop(leaf, None)
        setattr(module, leaf, value)
    else:
        parts[leaf] = value
        setattr(module, _place(cls, leaf), value)
    if parts:
        module.__class__ = _holding(cls, tuple(parts))
