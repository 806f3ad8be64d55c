"""Compress the layers of a model in memory: each becomes a layer that multiplies by its spectrum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn

from spectral_surgery.adapters.layer import is_conv1d
from spectral_surgery.errors import TargetError
from spectral_surgery.layers import SpectralConv1D, SpectralEmbedding, SpectralLinear, SpectralWeight
from spectral_surgery.targets import ALL_LINEAR, ModuleTargets

EVERYTHING = ModuleTargets(ALL_LINEAR)
_MIN_WEIGHTS = 4096
_LAYERS: dict[str, Any] = {"Linear": SpectralLinear, "Embedding": SpectralEmbedding, "Conv1D": SpectralConv1D}

Compressed = SpectralLinear | SpectralEmbedding | SpectralConv1D


@dataclass(frozen=True)
class LiveReport:
    """What compressing a model in memory did.

    Attributes:
        dense_bytes: of their weights before, tied ones once.
        resident_bytes: of their spectra.
    """

    replaced: tuple[str, ...]
    dense_bytes: int
    resident_bytes: int


def compress_model(
    model: nn.Module,
    *,
    sparsity: float | None = None,
    bits: float | None = None,
    max_error: float | None = None,
    transform: str = "dct",
    tile: int = 64,
    resident: str = "int8",
    targets: ModuleTargets = EVERYTHING,
    min_weights: int = _MIN_WEIGHTS,
) -> LiveReport:
    """Replace linear layers and embeddings by compressed ones, in place; all of them or, after an error, none.

    Only nn.Linear, nn.Embedding and transformers' Conv1D themselves are replaced: a subclass may mean something else.
    Modules that share a weight share its spectrum.

    Args:
        model: changed in place; not itself one of the layers.
        sparsity: fraction of coefficients KEPT; exactly one of this, bits and max_error is given.
        bits: stored bits per weight.
        max_error: relative Frobenius error of every weight.
        tile: side of the transform tiles.
        targets: which modules; all-linear means every one, embeddings too.
        min_weights: smaller layers stay as they are.

    Raises:
        TargetError: when no module matches.
        ConfigError: when none or several of sparsity, bits and max_error are given, or codes do not fit.
    """
    modules = model.named_modules(remove_duplicate=False)
    candidates = {name: module for name, module in modules if name and _fits(module, min_weights)}
    if not candidates:
        raise TargetError(
            f"compress_model: expected a Linear, Embedding or Conv1D of {min_weights} or more weights, got none in"
            f" {type(model).__name__}. Lower min_weights."
        )
    names = targets.select(candidates)
    # an embedding decides how a weight that it shares is transformed: its rows must decode alone
    names.sort(key=lambda name: type(candidates[name]) is not nn.Embedding)
    settings: dict[str, Any] = {"sparsity": sparsity, "bits": bits, "max_error": max_error}
    settings |= {"transform": transform, "tile": tile, "resident": resident}
    fresh, spectra = _built([candidates[name] for name in names], settings)
    dense = {id(candidates[name].weight): cast(Tensor, candidates[name].weight).nbytes for name in names}
    for name in names:
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, fresh[id(candidates[name])])
    return LiveReport(
        tuple(name for name in candidates if name in set(names)),
        sum(dense.values()),
        sum(weight.nbytes for weight in spectra),
    )


def _built(modules: list[nn.Module], settings: dict[str, Any]) -> tuple[dict[int, Compressed], list[SpectralWeight]]:
    """Compressed layers by the identity of the dense ones, and their spectra, shared ones once."""
    fresh: dict[int, Compressed] = {}
    spectra: dict[int, SpectralWeight] = {}
    for module in modules:
        if id(module) not in fresh:
            layer = _sharing(module, spectra.get(id(module.weight)))
            layer = layer or _LAYERS[type(module).__name__].from_dense(module, **settings)
            spectra.setdefault(id(module.weight), layer.spectrum)
            fresh[id(module)] = layer.train(module.training)
    return fresh, list(spectra.values())


def _fits(module: nn.Module, min_weights: int) -> bool:
    exact = type(module) in (nn.Linear, nn.Embedding) or is_conv1d(module)
    rescaled = isinstance(module, nn.Embedding) and module.max_norm is not None
    return exact and not rescaled and cast(Tensor, module.weight).numel() >= min_weights


def _sharing(module: nn.Module, spectrum: SpectralWeight | None) -> Compressed | None:
    """A layer around the spectrum of a tied one; None where there is none, or its layout is another."""
    if spectrum is None:
        return None
    if type(module) is nn.Embedding:
        return SpectralEmbedding(spectrum, module.padding_idx)
    return SpectralLinear(spectrum, module.bias) if type(module) is nn.Linear else None
