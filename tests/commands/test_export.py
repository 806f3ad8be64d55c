"""export: another form of an adapter does the same, exactly or up to the error that is reported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from torch import Tensor

from spectral_surgery.adapters import METHODS
from spectral_surgery.adapters.base import AdapterSpec, AdapterState
from spectral_surgery.adapters.from_update.fit_update import Size
from spectral_surgery.cli import cli
from spectral_surgery.commands.export import export
from spectral_surgery.commands.extract import delta_of
from spectral_surgery.commands.merge import merge
from spectral_surgery.errors import CheckpointError, ConfigError, NotMergeableError
from spectral_surgery.files.index import read_index
from spectral_surgery.files.peft.adapter_files import TENSOR_FILE, read_adapter, write_adapter
from spectral_surgery.files.reader import read_tensor
from spectral_surgery.live import attach
from spectral_surgery.targets import ModuleTargets
from tests.support.checkpoints import gaussian, llama_like, write_folder
from tests.support.tiny import MODELS, outputs, tiny

Q, DOWN, EMBED = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj", "model.embed_tokens"
SHAPES = {Q: (130, 96), DOWN: (96, 200), EMBED: (300, 96)}


def adapter(folder: Path, method: str, layers: tuple[str, ...] = (Q, DOWN), **settings: Any) -> Path:
    """Write an adapter with random numbers."""
    extra, targets = settings.pop("extra", {}), settings.pop("targets", {})
    spec = AdapterSpec(
        METHODS[method], METHODS[method].config(**settings), ModuleTargets(layers, **targets), "somewhere"
    )
    tensors = {}
    for seed, layer in enumerate(layers):
        built = spec.build(layer, *SHAPES[layer])
        if settings.get("use_gate"):
            built(torch.randn(50, SHAPES[layer][1]))  # type: ignore[operator]
            built.freeze_gate()  # type: ignore[operator]
        fresh = built.state_dict()
        tensors[layer] = {
            key: gaussian(*value.shape, seed=seed) if key in ("A", "B", "spectrum") else value
            for key, value in fresh.items()
        }
    write_adapter(AdapterState(spec, tensors, extra), folder)
    return folder


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "base", llama_like(torch.float32))


def deltas(folder: Path) -> dict[str, Tensor]:
    state = read_adapter(folder)
    return {layer: delta_of(state, layer, SHAPES[layer]) for layer in state.layers}


def error(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("settings", [{}, {"transform": "hartley"}, {"transform": "dft"}], ids=str)
def test_foura_becomes_a_lora_exactly(tmp_path: Path, base: Path, settings: dict[str, Any]) -> None:
    own = adapter(tmp_path / "a", "foura", r=3, alpha=5, **settings)
    report = export(own, tmp_path / "lora", "lora", base=base if settings.get("transform") == "dft" else None)
    assert report.exact
    assert report.relative_error < 1e-6
    before, after = deltas(own), deltas(tmp_path / "lora")
    assert all(error(after[layer], before[layer]) < 1e-6 for layer in before)
    assert {layer.components for layer in report.layers} == {6 if settings.get("transform") == "dft" else 3}
    assert read_adapter(tmp_path / "lora").spec.base_model == "somewhere"


@pytest.mark.parametrize("kind", MODELS)
def test_outputs_are_equal(tmp_path: Path, kind: str) -> None:
    pytest.importorskip("transformers")
    model, row = tiny(kind), METHODS["foura"]
    spec = attach.inject(model, AdapterSpec(row, row.config(r=3, use_gate=True), ModuleTargets(MODELS[kind].targets)))
    with torch.no_grad():
        for layer in attach.adapted_layers(model).values():
            layer.adapters["default"].B.normal_(std=0.5, generator=torch.Generator().manual_seed(0))
    outputs(kind, model.train())  # the gate sees tokens
    model.eval()
    write_adapter(attach.state_of(model, spec), tmp_path / "dynamic")
    with pytest.raises(NotMergeableError, match=r"got one that depends on the input, so no one.* Call"):
        export(tmp_path / "dynamic", tmp_path / "lora", "lora")
    assert not (tmp_path / "lora").exists()
    for layer in attach.adapted_layers(model).values():
        layer.adapters["default"].freeze_gate()
    write_adapter(attach.state_of(model, spec), tmp_path / "frozen")
    export(tmp_path / "frozen", tmp_path / "lora", "lora")
    fresh = tiny(kind)
    attach.load(fresh, read_adapter(tmp_path / "lora"))
    torch.testing.assert_close(outputs(kind, fresh), outputs(kind, model), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(outputs(kind, fresh), outputs(kind, tiny(kind)), atol=1e-3)


@pytest.mark.parametrize("method", ["fourierft", "fourierft_biased", "spectral_delta"])
def test_other_methods_become_the_best_lora_of_a_rank(tmp_path: Path, base: Path, method: str) -> None:
    own = adapter(tmp_path / "a", method, n_frequency=40)
    report = export(own, tmp_path / "lora", "lora", base=base, size=Size("count", 5))
    before, after = deltas(own), deltas(tmp_path / "lora")
    assert not report.exact
    for layer in report.layers:
        energies = torch.linalg.svdvals(before[layer.layer].double()).square()
        best = float((energies[5:].sum() / energies.sum()).sqrt())
        assert error(after[layer.layer], before[layer.layer]) == pytest.approx(best, rel=1e-3)
        assert layer.relative_error == pytest.approx(best, rel=1e-3)
    close = export(own, tmp_path / "close", "lora", base=base, size=Size("max_error", 0.01))
    assert close.relative_error <= 0.01
    small = export(own, tmp_path / "small", "lora", base=base, size=Size("bytes", 20000), dtype="BF16")
    assert (tmp_path / "small" / TENSOR_FILE).stat().st_size == small.stored_bytes <= 20000


def test_low_rank_methods_become_each_other(tmp_path: Path) -> None:
    own = adapter(tmp_path / "a", "lora", r=4, rank_pattern={"down_proj": 2}, alpha_pattern={"down_proj": 9.0})
    assert export(own, tmp_path / "foura", "foura").exact
    export(tmp_path / "foura", tmp_path / "again", "lora")
    before, after = deltas(own), deltas(tmp_path / "again")
    assert all(error(after[layer], before[layer]) < 1e-5 for layer in before)
    less = export(own, tmp_path / "less", "lora", size=Size("count", 1))
    assert {layer.components for layer in less.layers} == {1}


def test_what_is_trained_beside_is_kept(tmp_path: Path) -> None:
    extra = {f"{Q}.base_layer.bias": gaussian(130), "score.weight": gaussian(3, 96)}
    targets = {"bias": "foura_only", "modules_to_save": ("score",)}
    own = adapter(tmp_path / "a", "foura", r=2, extra=extra, targets=targets)
    export(own, tmp_path / "lora", "lora")
    state = read_adapter(tmp_path / "lora")
    assert state.spec.targets.bias == "lora_only"
    assert state.extra.keys() == extra.keys()
    assert all(torch.equal(state.extra[name], extra[name]) for name in extra)


def test_components_closed_by_a_frozen_gate_are_left_out(tmp_path: Path) -> None:
    own = adapter(tmp_path / "a", "foura", r=6, use_gate=True)
    state = read_adapter(own)
    closed = {layer: dict(tensors) for layer, tensors in state.layers.items()}
    closed[Q]["gate.frozen_mask"] = torch.tensor([1, 0, 1, 0, 0, 1], dtype=torch.int8)
    write_adapter(AdapterState(state.spec, closed), own)
    report = export(own, tmp_path / "lora", "lora")
    assert next(layer for layer in report.layers if layer.layer == Q).components == 3
    assert report.relative_error < 1e-6


@pytest.mark.parametrize("method", METHODS)
def test_differences_added_to_the_base_are_the_merged_model(tmp_path: Path, base: Path, method: str) -> None:
    settings = {"r": 2} if method in ("lora", "foura") else {"n_frequency": 50}
    own = adapter(tmp_path / "a", method, (Q, DOWN, EMBED), **settings)
    report = export(own, tmp_path / "delta", "delta", base=base)
    merge(base, [own], tmp_path / "merged")
    before, after, added = (
        {name: read_tensor(info) for name, info in read_index(folder).tensors.items()}
        for folder in (base, tmp_path / "merged", tmp_path / "delta")
    )
    assert added.keys() == {f"{layer}.weight" for layer in (Q, DOWN, EMBED)}
    assert all(torch.allclose(before[name] + added[name], after[name], atol=1e-6) for name in added)
    assert report.relative_error < 1e-6
    half = export(own, tmp_path / "half", "delta", base=base, dtype="BF16")
    assert 1e-4 < half.relative_error < 1e-2


def test_differences_of_transposed_weights_and_convolutions(tmp_path: Path) -> None:
    tensors = {f"{Q}.weight": gaussian(96, 130)}
    gpt = write_folder(tmp_path / "gpt", tensors, config={"model_type": "gpt2"})
    own = adapter(tmp_path / "a", "spectral_delta", (Q,), n_frequency=9, targets={"fan_in_fan_out": True})
    export(own, tmp_path / "delta", "delta", base=gpt)
    found = read_tensor(read_index(tmp_path / "delta").tensors[f"{Q}.weight"])
    assert torch.allclose(found, deltas(own)[Q].T, atol=1e-7)
    conv = write_folder(tmp_path / "conv", {f"{Q}.weight": gaussian(130, 24, 2, 2)})
    own = adapter(tmp_path / "b", "lora", (Q,), r=2)
    export(own, tmp_path / "delta2", "delta", base=conv)
    found = read_tensor(read_index(tmp_path / "delta2").tensors[f"{Q}.weight"])
    assert torch.allclose(found.reshape(130, 96), deltas(own)[Q], atol=1e-7)


def test_bad_input_is_refused_and_nothing_written(tmp_path: Path, base: Path) -> None:
    lora, fourier = adapter(tmp_path / "l", "lora", r=2), adapter(tmp_path / "f", "fourierft", n_frequency=9)
    other, out = write_folder(tmp_path / "other", {"x.weight": gaussian(4, 4)}), tmp_path / "out"
    fresh = AdapterSpec(METHODS["fourierft"], METHODS["fourierft"].config(n_frequency=3), ModuleTargets(("q_proj",)))
    write_adapter(AdapterState(fresh, {Q: {"spectrum": torch.zeros(3)}}), tmp_path / "zero")
    for source, form, options, kind, match in (
        (fourier, "lora", {"base": base}, ConfigError, "fourierft to lora: is an approximation, and no size was given"),
        (
            lora,
            "spectral_delta",
            {},
            ConfigError,
            "lora to spectral_delta: is an approximation.*; expected .* a n_frequency",
        ),
        (fourier, "lora", {"size": Size("count", 1)}, ConfigError, "fourierft to lora: names and shapes of the base"),
        (lora, "delta", {}, ConfigError, "lora to delta: names and shapes of the base model are needed"),
        (
            lora,
            "delta",
            {"base": other},
            CheckpointError,
            r"other: has no matrix model\.layers\.0\.mlp\.down_proj\.weight",
        ),
        (lora, "gguf", {}, ConfigError, "method to extract to: expected one of.*got 'gguf'"),
        (tmp_path / "zero", "lora", {"base": base, "size": Size("count", 1)}, ConfigError, "got zero in every layer"),
        (
            lora,
            "foura",
            {"config": METHODS["foura"].config(transform="dft")},
            ConfigError,
            "got 'dft', whose factors do not",
        ),
        (other, "lora", {}, CheckpointError, "got no adapter_config.json"),
    ):
        with pytest.raises(kind, match=match):
            export(source, out, form, **options)  # type: ignore[arg-type]
    assert not out.exists()


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(cli, ["export", *map(str, arguments)])


def test_command(tmp_path: Path, base: Path) -> None:
    foura, out = adapter(tmp_path / "a", "foura", r=2), tmp_path / "out"
    assert "foura would become lora, exactly. Nothing was written." in invoke(foura, out, "--dry-run").stdout
    plan = json.loads(invoke(foura, out, "--rank", 1, "--dry-run", "--json").stdout)
    assert (plan["exact"], plan["layers"][Q]) == (False, [130, 96])
    assert not out.exists()
    assert "foura as lora, exact but for rounding: relative error" in invoke(foura, out, "-q").stdout
    fourier = adapter(
        tmp_path / "f", "fourierft", n_frequency=30, targets={"bias": "all"}, extra={"a.bias": gaussian(3)}
    )
    done = invoke(fourier, out, "--base", base, "--rank", 2, "--overwrite", "--json", "-q")
    body = json.loads(done.stdout)
    assert (body["method"], body["format"], body["exact"]) == ("fourierft", "lora", False)
    dense = invoke(fourier, out, "--base", base, "--to", "delta", "--overwrite", "-q")
    assert "a.bias: trained whole, and not a difference of weights; left out" in dense.stdout
    assert "names and shapes" not in dense.stdout
    two = invoke(foura, out, "--rank", 2, "--bytes", 5)
    assert two.exit_code == 2
    assert "expected one of --bytes, --rank, got all" in two.output
