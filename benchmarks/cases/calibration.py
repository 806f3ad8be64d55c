"""Time of `compress --calibrate` before anything is quantised, in forward passes of the same text."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.case import Row, require
from benchmarks.language_model import Size, prompt, write_model
from benchmarks.timing import interleaved
from spectral_surgery.calibration.block_streaming import LazyModel
from spectral_surgery.calibration.layer_moments import BATCH_TOKENS, layer_moments, model_and_inputs
from spectral_surgery.files.index import read_index
from spectral_surgery.hf.models import load_model
from spectral_surgery.inputs.model_input import Batch, ModelInput, equal_shapes
from spectral_surgery.live.hooks import hooked
from spectral_surgery.text.settings import TextData

PASSES = 7.0  # forward passes that calibrating may take
ROUNDS = 3
CLOSE = 1e-3  # of the largest entry: moments of float32 sums
CLOSE_BF16 = 2e-2  # the same, of inputs that a model in bfloat16 computed: they have 8 bits


@dataclass(frozen=True)
class Load:
    """What is calibrated.

    Attributes:
        size: of the model.
        samples: sequences.
        length: tokens of each.
    """

    size: Size
    samples: int
    length: int

    @property
    def tokens(self) -> int:
        """In all sequences."""
        return self.samples * self.length


FULL = Load(Size(512, 1408, 6, 1024), 64, 128)
QUICK = Load(Size(256, 704, 3, 1024), 32, 64)


def run(quick: bool) -> list[Row]:
    """Seconds of one forward pass and of all second moments, in float32, nothing being quantised."""
    return measure(QUICK if quick else FULL)


def measure(load: Load, rounds: int = ROUNDS) -> list[Row]:
    """Rows of one load.

    Raises:
        CheckFailedError: when a moment is not that of the definition.
    """
    with tempfile.TemporaryDirectory() as scratch:
        source, text = write_model(Path(scratch) / "model", load.size), Path(scratch) / "text.txt"
        text.write_text(prompt(load.tokens, load.size.words), encoding="utf-8")
        index = read_index(source)
        names = [name for name, info in index.tensors.items() if len(info.shape) == 2]
        model, _ = load_model(source, "AutoModel", dtype=torch.float32)
        model.config.use_cache = False
        data = TextData(text, load.samples, load.length)
        (lazy, inputs), (native, _) = (model_and_inputs(source, index, data, exact=exact) for exact in (True, False))
        batches = equal_shapes(inputs, BATCH_TOKENS)
        moments = calibrate(lazy, inputs, names)
        check(moments, model, batches, CLOSE)
        check(calibrate(native, inputs, names), model, batches, CLOSE_BF16)
        providers: dict[str, Callable[[], object]] = {
            "one forward pass": partial(forward, model, batches),
            "all second moments": partial(calibrate, lazy, inputs, names),
            f"the same, as --calibrate does{', in bfloat16' if native.bf16 else ''}": partial(
                calibrate, native, inputs, names
            ),
        }
        timings = interleaved(providers, rounds)
    once = timings["one forward pass"].median
    return [
        {
            "what": what,
            "tokens": load.tokens,
            "s": timing.median,
            "p20": timing.p20,
            "p80": timing.p80,
            "tokens/s": load.tokens / timing.median,
            "/ forward": timing.median / once,
            "target": "" if what == "one forward pass" else f"<= {PASSES:g}",
            "met": "" if what == "one forward pass" else timing.median <= PASSES * once,
        }
        for what, timing in timings.items()
    ]


@torch.inference_mode()
def forward(model: nn.Module, batches: Iterable[Batch]) -> None:
    """Run the model on all batches."""
    for batch in batches:
        model(**batch)


def calibrate(lazy: LazyModel, inputs: Sequence[ModelInput], names: Sequence[str]) -> dict[str, Tensor]:
    """The moments by tensor, with all layers as they are."""
    return {turn.tensor: turn.moment for turn in layer_moments(lazy, inputs, names)}


def check(moments: dict[str, Tensor], model: nn.Module, batches: Iterable[Batch], close: float) -> None:
    """Compare moments with the definition, from a plain forward pass in which each layer sums its inputs."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    plain: dict[str, Tensor] = {}

    def see(name: str, args: tuple[Tensor, ...], _: object) -> None:
        x = args[0].flatten(0, -2)
        plain[name] = plain.get(name, torch.zeros(())) + x.T @ x

    with hooked(layers, see, before=True):
        forward(model, batches)
    require(len(moments) == len(plain), f"{len(moments)} layers of {len(plain)} have moments")
    for name, wanted in plain.items():
        moment = moments[f"model.{name}.weight"]
        error = float((moment - wanted).abs().max() / wanted.abs().max())
        require(error < close, f"the moment of {name} differs from the definition by {error:.1e}")
