"""Calibrating all-MiniLM-L6-v2 in memory with parts of the method changed one by one."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.reference_text import write_passages
from benchmarks.weights import checkpoint_folder
from spectral_surgery.calibration.layer_moments import CalibrationData
from spectral_surgery.calibration.sensitivity import probe
from spectral_surgery.codec.allocation import Share, spread_bits
from spectral_surgery.codec.encoded import Basis
from spectral_surgery.codec.feedback import DAMPING, encode_codes, feedback_factor, output_error
from spectral_surgery.codec.feedback_rate import codes_at
from spectral_surgery.codec.rate import Target
from spectral_surgery.codec.refit import refit_rows_and_columns, refit_step
from spectral_surgery.commands.compress.spread_bits import REACH, measure_shares
from spectral_surgery.files.compressed.plan import CompressOptions, make_plan
from spectral_surgery.files.index import read_index
from spectral_surgery.hf.models import SentenceEncoder, load_encoder
from spectral_surgery.live.blocks import Sample, captured_inputs, find_blocks, next_inputs
from spectral_surgery.text.sequences import equal_lengths, read_sequences

_SENTENCES = Path(__file__).with_name("sentences.txt")
_LENGTH = 128  # tokens of a passage at most
_RESIDUALS = {"attention.output.dense": "attention.output", "output.dense": "output"}  # of BERT: who adds, second


@dataclass(frozen=True)
class Parts:
    """What a calibration consists of.

    Attributes:
        feedback: rounding errors are fed forward into later columns.
        transform: of the codes.
        damping: of H, relative to its mean diagonal.
        own_inputs: blocks see what the compressed blocks before them give; else what the original ones give.
        spread: rates follow from equal slopes; else they are equal.
        column_steps: a step per column, where that is worth its bytes.
        refitted: one step, refitted to the outputs after the codes are chosen.
        rescaled: scales of rows and columns, refitted to the outputs.
        compensated: weights first take up what the blocks before did to the inputs, and to the residual stream.
        weighted: tokens count as much as the last hidden states change with the output of the layer there.
    """

    feedback: bool = True
    transform: str = "dct"
    damping: float = DAMPING
    own_inputs: bool = True
    spread: bool = True
    column_steps: bool = True
    refitted: bool = False
    rescaled: bool = False
    compensated: bool = False
    weighted: bool = False


@dataclass(frozen=True)
class Outcome:
    """What came of it.

    Attributes:
        bits: stored bits per weight of the linear layers in blocks.
        error: mean over layers of the relative error of outputs, on the text calibrated on.
        cosine: mean cosine between sentence embeddings before and after, on other text.
        seconds: wall time.
    """

    bits: float
    error: float
    cosine: float
    seconds: float


@dataclass
class _Seen:
    """Sums over the tokens that a layer was given: H, and what its outputs lack times its inputs."""

    moment: Tensor
    lack: Tensor


class Laboratory:
    """The model, the text, and what does not depend on the parts."""

    def __init__(self, *, blocks: int | None = None, passages: int = 512) -> None:
        """Load everything.

        Args:
            blocks: so many of the first ones; None for all.
            passages: of text to calibrate on.

        Raises:
            ConfigError: when the package with the weights is not installed.
        """
        self.encoder: SentenceEncoder = load_encoder(checkpoint_folder())
        model = self.encoder.model.requires_grad_(requires_grad=False)
        self.passages = passages
        with self._text() as data:
            sequences = read_sequences(
                self.encoder.tokenizer, data.file, length=_LENGTH, samples=passages, causal=False
            )
        self.prefix, whole = find_blocks(model)
        del whole[blocks if blocks is not None else len(whole) :]
        self.blocks: list[nn.Module] = list(whole)
        self.batches = equal_lengths(sequences)
        self.originals = {name: own.clone() for name, own in model.state_dict().items()}
        self.sentences = _SENTENCES.read_text(encoding="utf-8").splitlines()
        self.expected = self.encoder.embed(self.sentences)

    @contextmanager
    def _text(self) -> Iterator[CalibrationData]:
        with tempfile.TemporaryDirectory() as scratch:
            file = write_passages(Path(scratch) / "text.txt", self.passages)
            yield CalibrationData(file, self.passages, _LENGTH)

    @cached_property
    def shares(self) -> dict[str, Share]:
        """Of the layers of the whole model, by name of the weight."""
        index = read_index(checkpoint_folder())
        with self._text() as data:
            return measure_shares(
                checkpoint_folder(), index, make_plan(index, CompressOptions(Target("bits", 3))), data
            )

    def trial(self, parts: Parts, bits: float) -> Outcome:
        """Compress the blocks; the model has its own weights again afterwards."""
        started = time.perf_counter()
        sizes = {name: own.weight.numel() for name, own in self.layers().items()}
        rates = dict.fromkeys(sizes, bits)
        if parts.spread:
            rates = spread_bits({name: self.shares[f"{name}.weight"] for name in sizes}, bits, REACH)
        first = [captured_inputs(self.encoder.model, nn.ModuleList(self.blocks), batch) for batch in self.batches]
        dense = inputs = first
        stored, errors = 0, list[float]()
        for number, block in enumerate(self.blocks):
            name = f"{self.prefix}.{number}"
            seen = self._seen(name, block, dense, inputs if parts.own_inputs else dense, parts)
            dense = next_inputs(block, dense)
            for key, layer in linear_layers(block).items():
                size, error = _quantised(layer, seen[key], rates[f"{name}.{key}"], parts)
                stored += size
                errors.append(error)
            inputs = next_inputs(block, inputs)
        seconds = time.perf_counter() - started
        cosine = float((self.encoder.embed(self.sentences) * self.expected).sum(-1).mean())
        self.encoder.with_weights(self.originals)
        return Outcome(8 * stored / sum(sizes.values()), sum(errors) / len(errors), cosine, seconds)

    def _seen(
        self, name: str, block: nn.Module, dense: Sequence[Sample], inputs: Sequence[Sample], parts: Parts
    ) -> dict[str, _Seen]:
        layers = linear_layers(block)
        found = {
            key: _Seen(torch.zeros(own.in_features, own.in_features), torch.zeros(own.weight.shape))
            for key, own in layers.items()
        }
        for number, (before, now) in enumerate(zip(dense, inputs, strict=True)):
            had, has = _given(block, before) if parts.compensated else {}, _given(block, now)
            for key, layer in layers.items():
                x, residual = has[key]
                weight = self.weights[f"{name}.{key}"][number].reshape(-1, 1) if parts.weighted else 1.0
                found[key].moment += (x * weight).T @ x
                if parts.compensated:
                    lack = (had[key][0] - x) @ layer.weight.T + (had[key][1] - residual)
                    found[key].lack += (lack * weight).T @ x
        return found

    def layers(self) -> dict[str, nn.Linear]:
        """The linear layers of the blocks, by name."""
        named = {f"{self.prefix}.{number}": block for number, block in enumerate(self.blocks)}
        return {f"{name}.{key}": own for name, block in named.items() for key, own in linear_layers(block).items()}

    @cached_property
    def weights(self) -> dict[str, list[Tensor]]:
        """Weight of every token of every batch, [B, T], by name of the layer."""
        model, layers = self.encoder.model, self.layers()
        found: dict[str, list[Tensor]] = {name: [] for name in layers}
        generator = torch.Generator().manual_seed(0)
        embeddings = model.get_input_embeddings().requires_grad_()
        with _hooked({name: (own, _keep_gradient(found[name])) for name, own in layers.items()}):
            for batch in self.batches:
                hidden = model(**batch).last_hidden_state
                hidden.backward(probe(hidden.detach(), generator))
        embeddings.requires_grad_(requires_grad=False).weight.grad = None
        return found


def linear_layers(block: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers of a block by name."""
    return {name: own for name, own in block.named_modules() if isinstance(own, nn.Linear)}


def _quantised(layer: nn.Linear, seen: _Seen, bits: float, parts: Parts) -> tuple[int, float]:
    """Give a layer its codes; (stored bytes, relative error of the outputs)."""
    weight, basis = layer.weight.detach().clone(), Basis(parts.transform)
    wanted = weight
    if parts.compensated:
        wanted = weight + torch.linalg.solve(_damped(seen.moment, parts.damping), seen.lack.T).T
    coefficients, moment = basis.forward(wanted), basis.forward(seen.moment)
    factor = feedback_factor(seen.moment, basis, parts.damping)
    used = factor if parts.feedback else torch.eye(len(moment))
    codes = codes_at(coefficients, used, Target("bits", bits), basis, column_steps=parts.column_steps)
    stored = encode_codes(coefficients, codes, basis)[1].stored_bytes
    if parts.refitted:
        codes = refit_step(coefficients, codes, moment)
    held = codes.coefficients()
    if parts.rescaled:
        rows, columns, held = refit_rows_and_columns(coefficients, held, moment)
        stored += 2 * (rows.numel() + columns.numel())
    restored = basis.inverse(held)
    layer.weight.copy_(restored)
    return stored, output_error(weight, restored, seen.moment)


def _damped(moment: Tensor, damping: float) -> Tensor:
    return moment + damping * moment.diagonal().mean() * torch.eye(len(moment))


def _given(block: nn.Module, sample: Sample) -> dict[str, tuple[Tensor, Any]]:
    """What each linear layer is given, [tokens, I], and what is added to its output, [tokens, O] or 0."""
    found: dict[str, tuple[Tensor, Any]] = {}
    residuals: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def see(_: nn.Module, args: tuple[Any, ...], _output: Any) -> None:
            found[name] = args[0].reshape(-1, args[0].shape[-1]), 0.0

        return see

    def keep_residual(name: str) -> Callable[..., None]:
        def see(_: nn.Module, args: tuple[Any, ...], _output: Any) -> None:
            residuals[name] = args[1].reshape(-1, args[1].shape[-1])

        return see

    hooks = {name: (own, keep(name)) for name, own in linear_layers(block).items()}
    adders = {f"+{name}": (block.get_submodule(own), keep_residual(name)) for name, own in _RESIDUALS.items()}
    with torch.no_grad(), _hooked(hooks | adders):
        sample.through(block)
    return {name: (x, residuals.get(name, 0.0)) for name, (x, _) in found.items()}


def _keep_gradient(kept: list[Tensor]) -> Callable[..., None]:
    def see(_: nn.Module, _args: tuple[Any, ...], output: Tensor) -> None:
        output.register_hook(lambda own: kept.append(own.square().sum(-1)))

    return see


@contextmanager
def _hooked(hooks: dict[str, tuple[nn.Module, Callable[..., None]]]) -> Iterator[None]:
    handles = [module.register_forward_hook(hook) for module, hook in hooks.values()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
