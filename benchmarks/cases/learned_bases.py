"""Whether the eigenbasis of the inputs, stored and counted, beats the calibrated DCT at equal bytes below 1.5 bits."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.case import Row, require
from benchmarks.learned_basis import in_eigenbasis
from benchmarks.reference_text import write_passages
from benchmarks.weights import checkpoint_folder
from spectral_surgery.codec.encoded import Basis
from spectral_surgery.codec.feedback import encode_codes, feedback_factor, output_error
from spectral_surgery.codec.feedback_rate import codes_at
from spectral_surgery.codec.rate import Target
from spectral_surgery.hf.models import load_encoder
from spectral_surgery.live.blocks import moments_of
from spectral_surgery.text.sequences import equal_lengths, read_sequences

RATES = (0.75, 1.0, 1.5)
_LAYER = 2  # of six
_EXPERTS = 32
_PASSAGES = 256


@dataclass(frozen=True)
class Group:
    """Weights that are given the same inputs.

    Attributes:
        name: in words.
        weight: [O, I] float32, stacked.
        moment: H of the inputs, [I, I].
        axes: transformed by the DCT, see Basis.
        basis_of: whose eigenvectors are the basis, [I, I]; None for H.
    """

    name: str
    weight: Tensor
    moment: Tensor
    axes: tuple[int, ...] = (0, 1)
    basis_of: Tensor | None = None


def run(quick: bool) -> list[Row]:
    """Output error of both at equal bytes, with the basis counted and as if it were free."""
    rates = RATES[1:2] if quick else RATES
    return [compared(group, bits) for group in groups(quick=quick) for bits in rates]


def groups(*, quick: bool) -> Iterator[Group]:
    """Small and large weights of all-MiniLM-L6-v2, and experts that share their inputs."""
    encoder = load_encoder(checkpoint_folder())
    model = encoder.model
    with tempfile.TemporaryDirectory() as scratch:
        file = write_passages(Path(scratch) / "text.txt", _PASSAGES)
        sequences = read_sequences(encoder.tokenizer, file, length=128, causal=False)
    layer = model.encoder.layer[_LAYER]
    query = layer.attention.self.query
    inner, outer = layer.intermediate.dense, layer.output.dense
    last = torch.zeros(inner.in_features, inner.in_features)
    with torch.no_grad(), moments_of({"attention": query, "inner": inner, "outer": outer}) as moments:
        for batch in equal_lengths(sequences):
            hidden = model(**batch).last_hidden_state.flatten(0, 1)
            last += hidden.T @ hidden
    shared = [module.weight.detach() for module in (query, layer.attention.self.key, layer.attention.self.value)]
    yield Group("query, key and value", torch.cat(shared), moments["attention"])
    if quick:
        return
    yield Group("feed-forward, inner", inner.weight.detach(), moments["inner"])
    yield Group("feed-forward, outer", outer.weight.detach(), moments["outer"])
    words = model.get_input_embeddings().weight.detach()
    yield Group("word embeddings as output layer", words, last, (1,))
    yield Group("word embeddings as table", words, torch.eye(words.shape[1]), (1,), words.T @ words)
    generator = torch.Generator().manual_seed(0)
    experts = torch.randn(_EXPERTS * inner.out_features, inner.in_features, generator=generator)
    yield Group(f"{_EXPERTS} Gaussian experts on the inputs of inner", experts, moments["inner"])


def compared(group: Group, bits: float) -> Row:
    """Both at equal bytes.

    Args:
        group: weights and inputs.
        bits: a weight, for all.
    """
    basis = Basis("dct", 64, group.axes)
    coefficients = basis.forward(group.weight)
    codes = codes_at(coefficients, feedback_factor(group.moment, basis), Target("bits", bits), basis)
    encoded, report = encode_codes(coefficients, codes, basis)
    error = output_error(group.weight, encoded.to_dense(), group.moment)
    size, turned = report.stored_bytes, group.basis_of
    counted = in_eigenbasis(group.weight, group.moment, size, basis_of=turned)
    free = in_eigenbasis(group.weight, group.moment, size, basis_of=turned, free=True)
    require(abs(report.bits_per_weight / bits - 1) < 0.02, f"{group.name}: {report.bits_per_weight:.3f} bits")
    for own in (counted, free):
        require(own is None or own.stored_bytes <= report.stored_bytes, f"{group.name}: more bytes than allowed")
    return {
        "weights": group.name,
        "shape": tuple(group.weight.shape),
        "bits_per_weight": report.bits_per_weight,
        "dct, output error": error,
        "eigenbasis": counted.error if counted else "no room",
        "eigenbasis / dct": counted.error / error if counted else "",
        "basis, part of bytes": counted.basis_bytes / counted.stored_bytes if counted else "",
        "basis free": free.error if free else "",
    }
