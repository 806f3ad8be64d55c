"""Fused experts of transformers, run from the spectrum of each expert that tokens go to.

Classes that are decorated with `use_experts_implementation` promise one forward in terms of their parameters and a few
flags; transformers' own implementations (batched, grouped) rely on it, and so does this one. Checkpoints store such
parameters fused, or a matrix for each expert that transformers stacks and concatenates: both keep their codes.
Source: transformers 5.23, `integrations/moe.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn

from spectral_surgery.checkpoint.manifest import TensorRecord
from spectral_surgery.layers import SpectralExperts, SpectralWeight
from spectral_surgery.ops.spectral_matmul import Form

Stored = tuple[tuple[str, ...], ...]  # by pattern of a converter: a name for each expert; or one fused name
_FLAGS = ("has_gate", "has_bias", "is_transposed", "_apply_gate", "num_experts")
_MATRICES = frozenset({"gate_up_proj", "up_proj", "down_proj"})


class ExpertsForward:
    """The forward of a decorated class, one expert after the other, with matrices that may be spectra."""

    num_experts: int
    has_gate: bool
    has_bias: bool
    is_transposed: bool
    act_fn: Any
    _apply_gate: Any

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Run experts on the tokens that are routed to them.

        Args:
            hidden_states: [T, D].
            top_k_index: [T, k] experts of each token; numbers from `num_experts` on are left out.
            top_k_weights: [T, k].

        Returns:
            [T, D] in the dtype of hidden_states.
        """
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

    def _project(self, name: str, x: Tensor, ids: Tensor, counts: Sequence[int]) -> Tensor:
        matrices = getattr(self, name)
        if isinstance(matrices, SpectralExperts):
            y = matrices(x, counts)
        else:
            rows = torch.split(x, list(counts))
            dense = matrices if self.is_transposed else matrices.mT
            y = torch.cat([own @ dense[expert] for expert, own in enumerate(rows) if len(own)] or [x @ dense[0]])
        if self.has_bias:
            y = y + getattr(self, f"{name}_bias")[ids]
        return cast(Tensor, y)


@cache
def _running(own: type[nn.Module]) -> type[nn.Module]:
    return type(own.__name__, (ExpertsForward, own), {"__module__": __name__})


def stored_experts(
    model: nn.Module,
    parameter: str,
    by: Mapping[str, Sequence[str]],
    tensors: Mapping[str, TensorRecord],
    converters: Sequence[Any],
) -> Stored | None:
    """Whether a parameter can be run from its codes.

    Args:
        model: with parameters on the meta device.
        parameter: its name in the model.
        by: stored names that make it, by pattern of the converter; the pattern is empty for a mere renaming.
        tensors: what is compressed.
        converters: of transformers.

    Returns:
        The stored names, in order of rows; None where it has to be decoded.
    """
    owner, _, leaf = parameter.rpartition(".")
    module = model.get_submodule(owner)
    fused = getattr(module, leaf, None)
    known = leaf in _MATRICES and all(hasattr(module, flag) for flag in _FLAGS)
    if not known or not isinstance(fused, Tensor) or fused.ndim != 3 or len(fused) != module.num_experts:
        return None
    if not all(name in tensors for names in by.values() for name in names):
        return None
    if "" in by:
        record = tensors[by[""][0]]
        whole = len(by) == 1 and len(by[""]) == 1 and record.shape == tuple(fused.shape)
        height = fused.shape[1]
        aligned = all(part.rows[0] // height == (part.rows[1] - 1) // height for part in record.parts)
        return (tuple(by[""]),) if whole and aligned and record.matrix[1] == fused.shape[2] else None
    patterns = _stacked_patterns(by, converters)
    if patterns is None or module.is_transposed:
        return None
    found = tuple(tuple(by[pattern]) for pattern in patterns)
    heights = [{tensors[name].shape for name in names} for names in found]
    if any(len(names) != len(fused) for names in found) or any(len(own) != 1 for own in heights):
        return None
    shapes = [next(iter(own)) for own in heights]
    fit = all(len(own) == 2 and own[1] == fused.shape[2] for own in shapes)
    return found if fit and sum(own[0] for own in shapes) == fused.shape[1] else None


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


def install_experts(
    model: nn.Module, parameter: str, stored: Sequence[Sequence[tuple[list[Form], str]]], like: Tensor
) -> None:
    """Put spectra in the place of a fused parameter.

    Args:
        model: changed in place.
        parameter: its name.
        stored: forms of row ranges and the resident form, for each name that `stored_experts` gave.
        like: a tensor on the device and of the dtype that the parameter should have.
    """
    owner, _, leaf = parameter.rpartition(".")
    module = model.get_submodule(owner)
    count, height, _ = getattr(module, leaf).shape
    forms: list[list[Form]] = [[] for _ in range(count)]
    for group in stored:
        row = 0
        for expert, (parts, _) in enumerate(group):
            for form in parts:
                forms[row // height if len(group) == 1 else expert].append(form)
                row += form.shape[0]
    resident = stored[0][0][1]
    weights = [SpectralWeight(own, resident, like.dtype).to(like.device) for own in forms]
    put_experts(module, leaf, SpectralExperts(weights, transposed=bool(module.is_transposed)))


def put_experts(module: nn.Module, leaf: str, matrices: SpectralExperts | nn.Parameter) -> None:
    """Replace one of the fused parameters of a module; it runs as transformers made it when none is a spectrum."""
    delattr(module, leaf)
    setattr(module, leaf, matrices)
    spectral = any(isinstance(child, SpectralExperts) for child in module.children())
    if spectral and not isinstance(module, ExpertsForward):
        module.__class__ = _running(type(module))  # type: ignore[arg-type]
        module._is_hf_initialized = True  # type: ignore[assignment]  # there is nothing to initialise
    elif not spectral and isinstance(module, ExpertsForward):
        module.__class__ = type(module).__bases__[1]
