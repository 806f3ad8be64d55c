"""Moments of layers are those of a plain way, in which the whole model runs from its beginning for every block."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")

from spectral_surgery.calibration import layer_moments as module
from spectral_surgery.calibration.block_streaming import LazyModel, load_lazily
from spectral_surgery.calibration.early_stop import EarlyStop
from spectral_surgery.calibration.layer_moments import layer_moments
from spectral_surgery.files.index import read_index
from spectral_surgery.hf.models import load_model
from spectral_surgery.inputs.plain_text import token_inputs
from spectral_surgery.live.blocks import Reached, find_blocks
from spectral_surgery.live.hooks import hooked
from tests.commands.test_calibrate import KINDS, save_model

TOKENS = 64  # of a batch, so that there are several
WEIGHTS = {"llama": 7, "bert": 6, "gpt2": 4}  # of a block


def sequences() -> list[list[int]]:
    """Of two lengths."""
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(2, 12, (length,), generator=generator).tolist() for length in [16] * 14 + [9] * 12]


def changed(weight: Tensor) -> Tensor:
    """What compressing does to a weight, roughly."""
    step = weight.abs().max() / 3
    return (weight / step).round() * step


def opened(kind: str, folder: Path) -> tuple[LazyModel, list[str]]:
    source = save_model(kind, folder)
    index = read_index(source)
    return load_lazily(source, index, "AutoModel"), [n for n, info in index.tensors.items() if len(info.shape) == 2]


def plain_moments(folder: Path) -> dict[str, Tensor]:
    """XᵀX in float64 by name of the layer; one sequence at a time through the whole model, once for every block."""
    model, _ = load_model(folder, "AutoModel", dtype=torch.float32)
    prefix, blocks = find_blocks(model)
    moments: dict[str, Tensor] = {}

    def see(name: str, args: tuple[Tensor, ...], _: object) -> None:
        x = args[0].double().flatten(0, -2)
        moments[name] = moments.get(name, torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64)) + x.T @ x

    for number, block in enumerate(blocks):
        inside = {name: layer for name, layer in block.named_modules() if type(layer).__name__ in ("Linear", "Conv1D")}
        layers = {f"{prefix}.{number}.{name}": layer for name, layer in inside.items()}
        with hooked(layers, see, before=True), torch.no_grad():
            for sequence in sequences():
                model(input_ids=torch.tensor([sequence]))
        for layer in layers.values():
            layer.weight.data = changed(layer.weight.data)
    return moments


@pytest.mark.parametrize("kind", KINDS)
def test_moments_are_those_of_the_plain_way(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BATCH_TOKENS", TOKENS)
    lazy, names = opened(kind, tmp_path / "model")
    found: dict[str, Tensor] = {}
    for turn in layer_moments(lazy, token_inputs(sequences()), names):
        (layer,) = turn.matrix.layers
        found[f"{turn.block}.{layer}"] = turn.moment.clone()
        turn.matrix.put(changed(turn.matrix.weight))
    wanted = plain_moments(tmp_path / "model")
    assert found.keys() == wanted.keys()
    assert len(found) == 2 * WEIGHTS[kind]
    for name, moment in found.items():
        largest = float(wanted[name].abs().max())
        torch.testing.assert_close(moment.double(), wanted[name], rtol=1e-4, atol=1e-5 * largest, msg=name)


def test_nothing_runs_after_the_last_layer_that_is_wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BATCH_TOKENS", TOKENS)
    lazy, names = opened("llama", tmp_path / "model")
    first = find_blocks(lazy.model)[1][0]
    runs: Counter[str] = Counter()

    def ran(name: str, _: object, __: object) -> None:
        runs[name] += 1

    layers = {"k": first.self_attn.k_proj, "gate": first.mlp.gate_proj, "down": first.mlp.down_proj}
    batches, shapes = 2 + 4, 4  # 7 and 5 sequences of 9 tokens; 4, 4, 4 and 2 of 16 tokens
    for include, wanted in (
        ("", {"k": batches, "gate": batches, "down": shapes}),
        ("self_attn.k", {"k": shapes, "gate": shapes, "down": shapes}),
    ):
        runs.clear()
        turns = layer_moments(lazy, token_inputs(sequences()), [name for name in names if include in name])
        with hooked(layers, ran):
            next(turns)
        assert runs == Counter({name: count + batches for name, count in wanted.items()})  # all run once beforehand


def test_a_run_ends_only_where_it_is_known_that_nothing_follows() -> None:
    x, longer = torch.zeros(2, 3), torch.zeros(2, 4)
    stop = EarlyStop(["a", "b"])
    for name in ("a", "b", "a"):
        stop.seen(name, x)
    stop.finished()
    stop.seen("a", x)
    stop.seen("b", x)
    with pytest.raises(Reached):
        stop.seen("a", x)  # it was called twice before
    for name in ("a", "b", "a"):
        stop.seen(name, longer)  # which may be run in more pieces
    stop.finished()


def test_a_router_that_chooses_others_misses_nothing() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])

        def forward(self, x: Tensor) -> Tensor:
            for number, expert in enumerate(self.experts):
                rows = x[x[:, 0] == number]
                if len(rows):
                    expert(rows)
            return x

    block, seen = Block(), Counter[str]()
    stop = EarlyStop(["0", "1", "2"])

    def see(name: str, args: tuple[Tensor, ...], _: object) -> None:
        seen[name] += 1
        stop.seen(name, args[0])

    layers = {str(number): expert for number, expert in enumerate(block.experts)}
    with hooked(layers, see, before=True):
        for chosen in ([0.0, 1.0], [1.0, 2.0], [0.0, 1.0], [0.0, 2.0]):  # never all three
            block(torch.tensor(chosen)[:, None].expand(2, 4))
            stop.finished()
    assert seen == Counter({"0": 3, "1": 3, "2": 2})
