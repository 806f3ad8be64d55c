"""Matrices that make up for what was compressed before are those of a plain way, with all inputs in memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")

from spectral_surgery.calibration import matched_layers as module
from spectral_surgery.calibration.layer_moments import layer_moments
from spectral_surgery.calibration.matched_layers import RIDGE, matched_layers
from spectral_surgery.hf.models import load_model
from spectral_surgery.inputs.plain_text import token_inputs
from spectral_surgery.live.blocks import find_blocks
from spectral_surgery.live.hooks import hooked
from tests.calibration.test_layer_moments import TOKENS, WEIGHTS, changed, opened, sequences
from tests.commands.test_calibrate import KINDS

# layers that add to the hidden states, in their order; BERT normalises the sum
ADDING = {
    "llama": ("self_attn.o_proj", "mlp.down_proj"),
    "gpt2": ("attn.c_proj", "mlp.c_proj"),
    "bert": (),
}


def seen_by(model: nn.Module, layers: dict[str, nn.Module]) -> dict[str, tuple[Tensor, Tensor]]:
    """What layers are given and return on all sequences, float64 [N, I] and [N, O]."""
    parts: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def see(name: str, args: tuple[Tensor, ...], output: object) -> None:
        y = output[0] if isinstance(output, tuple) else output
        assert isinstance(y, Tensor)
        parts.setdefault(name, []).append((args[0].double().flatten(0, -2), y.double().flatten(0, -2)))

    with hooked(layers, see), torch.no_grad():
        for sequence in sequences():
            model(input_ids=torch.tensor([sequence]))
    return {name: (torch.cat([x for x, _ in both]), torch.cat([y for _, y in both])) for name, both in parts.items()}


@torch.no_grad()
def plain_target(kind: str, block: str, layer: str, dense: nn.Module, model: nn.Module) -> Tensor:
    """W* as [O, I], by the normal equations in float64."""
    names = [f"{block}.{name}" for name in (layer, *ADDING[kind])]
    found = [seen_by(each, {n: each.get_submodule(n) for n in [block, *names]}) for each in (dense, model)]
    (_, y), (given, _) = (each[f"{block}.{layer}"] for each in found)
    if layer in ADDING[kind]:
        before = ADDING[kind][: ADDING[kind].index(layer)]
        sums = [each[block][0] + sum(each[f"{block}.{name}"][1] for name in before) for each in found]
        y = y + sums[0] - sums[1]
    linear = dense.get_submodule(f"{block}.{layer}")
    weight = linear.weight.double() if isinstance(linear, nn.Linear) else linear.weight.double().T
    if linear.bias is not None:
        y = y - linear.bias.double()
    damped = given.T @ given
    damped += RIDGE * damped.diagonal().mean() * torch.eye(len(damped), dtype=torch.float64)
    return weight + (y - given @ weight.T).T @ given @ torch.linalg.inv(damped)


@pytest.mark.parametrize("kind", KINDS)
def test_targets_are_those_of_the_plain_way(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BATCH_TOKENS", TOKENS)
    lazy, names = opened(kind, tmp_path / "model")
    dense, _ = load_model(tmp_path / "model", "AutoModel", dtype=torch.float32)
    model, _ = load_model(tmp_path / "model", "AutoModel", dtype=torch.float32)

    def outside(part: nn.Module) -> None:
        for each in (part, model):
            words = each.get_input_embeddings().weight  # type: ignore[operator]
            words.data = changed(words.data)

    count = 0
    for turn in matched_layers(lazy, token_inputs(sequences()), names, outside=outside):
        (layer,) = turn.matrix.layers
        wanted = plain_target(kind, turn.block, layer, dense, model)
        assert turn.target is not None
        found = turn.target.T if turn.transposed else turn.target
        torch.testing.assert_close(found.double(), wanted, rtol=1e-3, atol=1e-3 * float(wanted.std()), msg=layer)
        turn.matrix.put(changed(turn.target))
        model.get_submodule(f"{turn.block}.{layer}").weight.data = changed(turn.target)
        count += 1
    assert count == 2 * WEIGHTS[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_layers_that_add_to_hidden_states_are_found(kind: str, tmp_path: Path) -> None:
    from spectral_surgery.live.blocks import captured_inputs

    opened(kind, tmp_path / "model")
    model, _ = load_model(tmp_path / "model", "AutoModel", dtype=torch.float32)
    _, blocks = find_blocks(model)
    sample = captured_inputs(model, blocks, {"input_ids": torch.tensor([sequences()[0]])})
    layers = {n: part for n, part in blocks[0].named_modules() if type(part).__name__ in ("Linear", "Conv1D")}
    found = module._additions(blocks[0], sample, layers)
    assert found == pytest.approx(dict.fromkeys(ADDING[kind], 1.0), rel=1e-3)


def test_all_layers_have_their_turn_and_errors_shrink(tmp_path: Path) -> None:
    errors = []
    for matched in (True, False):
        lazy, names = opened("llama", tmp_path / f"{matched}")
        dense, _ = load_model(tmp_path / f"{matched}", "AutoModel", dtype=torch.float32)
        if matched:
            turns = matched_layers(lazy, token_inputs(sequences()), names, outside=lambda _: None)
        else:
            turns = layer_moments(lazy, token_inputs(sequences()), names)
        found = {}
        for turn in turns:
            (layer,) = turn.matrix.layers
            weight = turn.matrix.weight if turn.target is None else turn.target
            found[f"{turn.block}.{layer}"] = changed(weight)
            turn.matrix.put(changed(weight))
        assert len(found) == 2 * WEIGHTS["llama"]
        prefix, blocks = find_blocks(dense)
        name = f"{prefix}.{len(blocks) - 1}"
        before = seen_by(dense, {name: dense.get_submodule(name)})[name][1]
        for path, weight in found.items():
            dense.get_submodule(path).weight.data = weight.clone()
        after = seen_by(dense, {name: dense.get_submodule(name)})[name][1]
        errors.append(float((after - before).norm() / before.norm()))
    assert errors[0] < 0.95 * errors[1]
