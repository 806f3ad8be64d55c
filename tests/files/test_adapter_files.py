"""Adapters on disk: what is written comes back, and what is wrong is said in one line."""

from __future__ import annotations

import json
import math
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from spectral_surgery.adapters import METHODS
from spectral_surgery.adapters.base import AdapterSpec, AdapterState
from spectral_surgery.errors import CheckpointError
from spectral_surgery.files.peft import adapter_files
from spectral_surgery.files.peft.adapter_files import CONFIG_FILE, TENSOR_FILE, read_adapter, write_adapter
from spectral_surgery.targets import ModuleTargets
from tests.support.checkpoints import contents, gaussian

LAYERS = {"encoder.layer.0.query": (12, 8), "encoder.layer.1.query": (12, 8)}
TARGETS = ModuleTargets(("query",), modules_to_save=("classifier",), bias="all")
EXTRA = {"classifier.weight": gaussian(3, 8, seed=5), "encoder.layer.0.query.base_layer.bias": gaussian(12, seed=6)}


def spec(method: str, targets: ModuleTargets = TARGETS, **settings: Any) -> AdapterSpec:
    row = METHODS[method]
    small = {"n_frequency": 10, "r": 2}
    small = {item.name: small[item.name] for item in fields(row.config) if item.name in small}
    resolved = row.resolve(row.config(**{**small, **settings}), list(LAYERS.values()))
    return AdapterSpec(row, resolved, targets, base_model="org/base", revision="main", task_type="SEQ_CLS")


def filled(what: AdapterSpec, extra: dict[str, Tensor] | None = None) -> AdapterState:
    generator = torch.Generator().manual_seed(1)
    layers = {}
    for name, shape in LAYERS.items():
        tensors = what.build(name, *shape).state_dict()
        layers[name] = {
            key: torch.randn(value.shape, generator=generator) if value.is_floating_point() else value
            for key, value in tensors.items()
        }
    return AdapterState(what, layers, EXTRA if extra is None else extra)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) and a[key].dtype == b[key].dtype for key in a)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_adapter(filled(spec("fourierft")), tmp_path / "a")
    return tmp_path / "a"


def edit(folder: Path, changes: dict[str, Any]) -> None:
    config = json.loads((folder / CONFIG_FILE).read_text())
    (folder / CONFIG_FILE).write_text(json.dumps({**config, **changes}))


def store(folder: Path, changes: dict[str, Tensor | None]) -> None:
    tensors = {**load_file(folder / TENSOR_FILE), **changes}
    save_file({name: t for name, t in tensors.items() if t is not None}, folder / TENSOR_FILE)


@pytest.mark.parametrize("method", METHODS)
def test_what_is_written_comes_back(method: str, tmp_path: Path) -> None:
    state = filled(spec(method))
    write_adapter(state, tmp_path / "a")
    back = read_adapter(tmp_path / "a")
    assert back.spec == state.spec
    assert back.layers.keys() == state.layers.keys()
    assert all(same(back.layers[name], state.layers[name]) for name in LAYERS)
    assert same(back.extra, state.extra)
    for name, shape in LAYERS.items():
        assert isinstance(back.build(name, *shape), nn.Module)
    assert sorted(contents(tmp_path / "a")) == [CONFIG_FILE, TENSOR_FILE]
    write_adapter(back, tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


@pytest.mark.parametrize("method", METHODS)
def test_names_of_tensors(method: str, tmp_path: Path) -> None:
    state = filled(spec(method))
    write_adapter(state, tmp_path / "a")
    expected = {f"base_model.model.{name}" for name in EXTRA}
    for name, tensors in state.layers.items():
        expected |= {f"base_model.model.{name}.{METHODS[method].file_name(key)}" for key in tensors}
    assert set(load_file(tmp_path / "a" / TENSOR_FILE)) == expected


@pytest.mark.parametrize(
    "targets",
    [
        ModuleTargets(r".*\.query"),
        ModuleTargets(("query", "key"), exclude_modules=("decoder.query",)),
        ModuleTargets(("query",), exclude_modules=".*decoder.*", fan_in_fan_out=True),
        ModuleTargets(("query",), layers_to_transform=(0, 1), layers_pattern=("layer",)),
        ModuleTargets(("query",), bias="fourierft_only"),
    ],
)
def test_targets_come_back(targets: ModuleTargets, tmp_path: Path) -> None:
    write_adapter(filled(spec("fourierft", targets), {}), tmp_path / "a")
    assert read_adapter(tmp_path / "a").spec.targets == targets


def test_peft_words_in_the_configuration(tmp_path: Path) -> None:
    targets = ModuleTargets(r".*\.query", layers_to_transform=(0,), layers_pattern=("layer",), bias="fourierft_only")
    write_adapter(filled(spec("fourierft", targets), {}), tmp_path / "a")
    config = json.loads((tmp_path / "a" / CONFIG_FILE).read_text())
    assert config["bias"] == "fourier_only"
    assert config["layers_to_transform"] is config["layers_pattern"] is None  # PEFT refuses them beside an expression
    assert list(config) == sorted(config)


@pytest.mark.parametrize("chosen", [None, "all-linear"])
def test_targets_left_to_a_rule_are_listed(chosen: str | None, tmp_path: Path) -> None:
    write_adapter(filled(spec("lora", ModuleTargets(chosen)), {}), tmp_path / "a")
    assert read_adapter(tmp_path / "a").spec.targets.target_modules == tuple(LAYERS)


def test_single_values_of_peft_are_read(folder: Path) -> None:
    edit(folder, {"layers_to_transform": 1, "layers_pattern": "layer", "bias": "all", "n_frequency_pattern": None})
    store(folder, {"base_model.model.encoder.layer.0.query.fourierft_spectrum": None})
    state = read_adapter(folder)
    assert state.spec.targets.layers_to_transform == (1,)
    assert state.spec.targets.layers_pattern == ("layer",)
    assert state.spec.config.n_frequency_pattern == {}


@pytest.mark.parametrize("rank_pattern", [{}, {"0.query|other": 4}])
def test_rank_stabilized_lora_is_scaled(rank_pattern: dict[str, int], tmp_path: Path) -> None:
    what = spec("lora", ModuleTargets(("query",)), lora_alpha=6.0, rank_pattern={"0.query": 4} if rank_pattern else {})
    write_adapter(filled(what, {}), tmp_path / "a")
    edit(tmp_path / "a", {"use_rslora": True, "rank_pattern": rank_pattern})
    state = read_adapter(tmp_path / "a")
    for name, shape in LAYERS.items():
        adapter = state.build(name, *shape)
        own = state.layers[name]
        expected = 6.0 / math.sqrt(own["A"].shape[0]) * own["B"] @ own["A"]
        torch.testing.assert_close(adapter.delta_weight(), expected)


def test_lora_alpha_that_is_not_said_is_pefts(tmp_path: Path) -> None:
    write_adapter(filled(spec("lora"), {"classifier.weight": EXTRA["classifier.weight"]}), tmp_path / "a")
    config = json.loads((tmp_path / "a" / CONFIG_FILE).read_text())
    del config["lora_alpha"]
    (tmp_path / "a" / CONFIG_FILE).write_text(json.dumps(config))
    assert read_adapter(tmp_path / "a").spec.config.lora_alpha == 8


def test_names_of_classifiers_that_are_not_there_are_dropped(folder: Path) -> None:
    edit(folder, {"modules_to_save": ["classifier", "score"]})
    assert read_adapter(folder).spec.targets.modules_to_save == ("classifier",)


def test_copies_that_peft_writes_twice_are_dropped(folder: Path) -> None:
    names = ("classifier.original_module.bias", "classifier.modules_to_save.bias")
    store(folder, {f"base_model.model.{name}": torch.ones(3) for name in names})
    assert same(read_adapter(folder).extra, EXTRA)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"peft_type": "PROMPT_TUNING"}, "expected FOURIERFT, FOURIERFT_BIASED,.*got 'PROMPT_TUNING'"),
        ({"peft_type": None}, "expected FOURIERFT, FOURIERFT_BIASED,.*got None"),
        ({"n_frequency": 0}, "expected positive numbers as n_frequency, got 0"),
        ({"n_frequency_pattern": {"query": -1}}, r"expected positive numbers as.*got \{'query': -1\}"),
        ({"n_frequency": "many"}, "expected int as n_frequency, got 'many'"),
        ({"n_frequency": True}, "expected int as n_frequency, got True"),
        ({"n_frequency": None}, "expected int as n_frequency, got None"),
        ({"scaling": float("nan")}, "expected float as scaling, got nan"),
        ({"scaling": "auto"}, "expected float as scaling, got 'auto'"),
        ({"n_frequency_pattern": {"query": "a"}}, r"expected int.*got \{'query': 'a'\}\. n_frequency by layer name"),
        ({"target_modules": None}, "expected a regular expression or a.*got None"),
        ({"target_modules": [1]}, r"expected str or a list of str as target_modules, got \[1\]"),
        ({"target_modules": "("}, r"target_modules: expected a.*got '\(' \(missing \), unterminated subpattern at"),
        ({"bias": "some"}, "bias: expected none, all or <method>_only, got 'some'"),
        ({"revision": 3}, "expected a text or null as revision, got 3"),
        ({"new_feature": {"a": 1}}, "new_feature = .*not supported"),
        ({"n_frequency": 11}, r"spectrum is torch.float32 of shape \[10\], not floats of shape \[11\]"),
        ({"target_modules": ["key"]}, r"encoder.layer.0.query.\* is unexpected; .*encoder.layer.1.query.\* is unexp"),
        ({"modules_to_save": ["score"]}, "classifier.weight is unexpected; nothing of modules_to_save score is there"),
        ({"bias": "none"}, "query.base_layer.bias is unexpected"),
    ],
)
def test_wrong_configuration(folder: Path, changes: dict[str, Any], text: str) -> None:
    edit(folder, changes)
    with pytest.raises(CheckpointError, match=text):
        read_adapter(folder)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"use_dora": True}, r"0\.query\.lora_magnitude_vector is missing: use_dora says so"),
        ({"lora_bias": True}, r"0\.query\.lora_B\.bias is missing: lora_bias says so"),
        ({"use_qalora": True, "layer_replication": [[0, 1]]}, r"expected an adapter without layer_replication ="),
        (
            {"init_lora_weights": "pissa_niter_4"},
            "expected an adapter of an unchanged.*got init_lora_weights 'pissa_niter_4', which.*path_initial",
        ),
        ({"init_lora_weights": "olora"}, "which takes a part out of the base"),
        ({"init_lora_weights": "corda"}, "which takes a part out of the base"),
        ({"init_lora_weights": "lora_ga"}, "which takes a part out of the base"),
        ({"init_lora_weights": "loftq"}, "which replaces the base by a quantised one .* Merge it with PEFT"),
        ({"init_lora_weights": "new"}, "expected True, False, gaussian, eva,.*got 'new'"),
        ({"use_rslora": 2}, "expected False, True as use_rslora, got 2"),
        ({"r": 0}, "expected positive numbers as r, got 0"),
        ({"r": 3}, r"lora_A.weight is .* not floats of shape \[3, any\]; .*lora_B.weight .* \[any, 3\]"),
    ],
)
def test_lora_that_we_do_not_have(tmp_path: Path, changes: dict[str, Any], text: str) -> None:
    write_adapter(filled(spec("lora")), tmp_path / "a")
    edit(tmp_path / "a", changes)
    with pytest.raises(CheckpointError, match=text):
        read_adapter(tmp_path / "a")


def test_lora_of_both_a_linear_layer_and_an_embedding(tmp_path: Path) -> None:
    write_adapter(filled(spec("lora")), tmp_path / "a")
    layer = "base_model.model.encoder.layer.0.query."
    store(tmp_path / "a", {f"{layer}lora_embedding_A": torch.ones(2, 3)})
    with pytest.raises(CheckpointError, match=r"0\.query\.lora_embedding_A is unexpected"):
        read_adapter(tmp_path / "a")
    store(tmp_path / "a", {f"{layer}lora_embedding_A": None, f"{layer}lora_magnitude_vector": torch.ones(12)})
    with pytest.raises(CheckpointError, match=r"0\.query\.lora_magnitude_vector is unexpected: use_dora says so"):
        read_adapter(tmp_path / "a")


def test_every_wrong_tensor_is_listed(folder: Path) -> None:
    layer = "base_model.model.encoder.layer.0.query"
    bad = torch.full((3, 8), math.inf)
    store(folder, {f"{layer}.other": torch.ones(2), "x.y": torch.ones(2), "base_model.model.classifier.weight": bad})
    store(folder, {f"{layer}.fourierft_spectrum": torch.full((10,), math.nan)})
    with pytest.raises(CheckpointError) as caught:
        read_adapter(folder)
    for text in (
        f"{layer}.other is unexpected",
        "x.y is unexpected",
        "classifier.weight has NaN or infinity",
        "fourierft_spectrum has NaN or infinity",
    ):
        assert text in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_tensors(tmp_path: Path) -> None:
    write_adapter(filled(spec("lora")), tmp_path / "a")
    names = [f"base_model.model.{layer}.lora_B.weight" for layer in LAYERS]
    store(tmp_path / "a", dict.fromkeys(names))
    with pytest.raises(CheckpointError, match=f"{names[0]} is missing; {names[1]} is missing"):
        read_adapter(tmp_path / "a")


def test_no_tensor_of_the_method(folder: Path) -> None:
    store(folder, {f"base_model.model.{layer}.fourierft_spectrum": None for layer in LAYERS})
    with pytest.raises(CheckpointError, match="no tensor of fourierft is there"):
        read_adapter(folder)


def test_integers_are_no_coefficients(folder: Path) -> None:
    store(folder, {"base_model.model.encoder.layer.0.query.fourierft_spectrum": torch.ones(10, dtype=torch.int8)})
    with pytest.raises(CheckpointError, match=r"is torch.int8 of shape \[10\], not floats"):
        read_adapter(folder)


def test_configuration_that_is_no_json(folder: Path) -> None:
    (folder / CONFIG_FILE).write_text("{")
    with pytest.raises(CheckpointError, match="expected JSON, got an error"):
        read_adapter(folder)


def test_missing_files(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"got no {CONFIG_FILE}"):
        read_adapter(tmp_path / "nothing")
    (folder / TENSOR_FILE).rename(folder / "aside")
    with pytest.raises(CheckpointError, match=f"got no {TENSOR_FILE}"):
        read_adapter(folder)
    (folder / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"got adapter_model\.bin, a pickle, which can run.*save_pretrained"):
        read_adapter(folder)


def test_truncated_tensors(folder: Path) -> None:
    data = (folder / TENSOR_FILE).read_bytes()
    (folder / TENSOR_FILE).write_bytes(data[:-5])
    with pytest.raises(CheckpointError, match="truncated"):
        read_adapter(folder)


def test_other_files_stay_and_an_adapter_is_replaced(folder: Path) -> None:
    (folder / "README.md").write_text("card")
    state = filled(spec("lora"))
    write_adapter(state, folder)
    assert sorted(contents(folder)) == ["README.md", CONFIG_FILE, TENSOR_FILE]
    assert read_adapter(folder).spec == state.spec


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda state: replace(state, layers={}), "it has no layers"),
        (lambda state: replace(state, spec=replace(state.spec, targets=ModuleTargets(("key",)))), r"got"),
        (lambda state: replace(state, extra={"classifier.weight": torch.tensor([math.nan])}), "has NaN or infinity"),
        (lambda state: replace(state, layers={"a.query": {}}), "fourierft_spectrum is missing"),
        (
            lambda state: replace(state, spec=replace(state.spec, config=replace(state.spec.config, scaling="auto"))),
            "fourierft: expected numbers in files, got a setting that is still 'auto'",
        ),
    ],
)
def test_what_cannot_be_written_changes_nothing(folder: Path, tmp_path: Path, change: Any, text: str) -> None:
    before = contents(folder)
    state = change(filled(spec("fourierft")))
    for out in (folder, tmp_path / "new"):
        with pytest.raises(CheckpointError, match=text):
            write_adapter(state, out)
    assert contents(folder) == before
    assert not (tmp_path / "new").exists()


def test_a_disk_that_fails_changes_nothing(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents(folder)

    def fails(path: Path) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(adapter_files, "sync", fails)
    for out in (folder, tmp_path / "new"):
        with pytest.raises(CheckpointError, match="expected room for the output, got a full disk"):
            write_adapter(filled(spec("lora")), out)
    assert contents(folder) == before
    assert not (tmp_path / "new").exists()


def test_a_file_in_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"expected a writable place, got an error \(\[Errno 17\] File exists: '"):
        write_adapter(filled(spec("lora")), tmp_path / "file")
