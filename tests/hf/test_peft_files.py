"""Adapter files both ways: what we write PEFT loads with equal outputs, and the reverse."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spectral_surgery.adapters import METHODS
from spectral_surgery.adapters.base import AdapterSpec
from spectral_surgery.errors import CheckpointError
from spectral_surgery.files.peft.adapter_config import DIALECTS
from spectral_surgery.files.peft.adapter_files import CONFIG_FILE, read_adapter, write_adapter
from spectral_surgery.live.attach import inject, load, state_of
from spectral_surgery.targets import ModuleTargets
from tests.support.tiny import MODELS, outputs, tiny

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

SETTINGS: dict[str, dict[str, Any]] = {"fourierft": {"n_frequency": 40, "scaling": 300.0}, "lora": {"r": 4}}


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():  # of the libraries, not ours
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
        warnings.filterwarnings("ignore", message="Careful, disabling adapter layers with bias")
        yield


def stir(model: nn.Module, seed: int = 0) -> None:
    """Give everything that is trained a value of its own, as training does."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))


def close(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).norm() < 1e-5 * b.norm())


def ours_from(kind: str, folder: Path) -> nn.Module:
    model = tiny(kind)
    load(model, read_adapter(folder))
    return model.eval()


def theirs_from(kind: str, folder: Path) -> nn.Module:
    return peft.PeftModel.from_pretrained(tiny(kind), folder).eval()


@pytest.mark.parametrize("method", SETTINGS)
@pytest.mark.parametrize("kind", MODELS)
def test_peft_loads_what_we_write(kind: str, method: str, tmp_path: Path) -> None:
    model = tiny(kind)
    row = METHODS[method]
    targets = ModuleTargets(MODELS[kind].targets, fan_in_fan_out=kind == "gpt2")
    spec = inject(model, AdapterSpec(row, row.config(**SETTINGS[method]), targets))
    stir(model)
    expected = outputs(kind, model.eval())
    assert not close(outputs(kind, tiny(kind)), expected)
    write_adapter(state_of(model, spec), tmp_path)
    assert close(outputs(kind, theirs_from(kind, tmp_path)), expected)
    assert close(outputs(kind, ours_from(kind, tmp_path)), expected)


@pytest.mark.parametrize("bias", ["none", "all", "{}_only"])
@pytest.mark.parametrize("method", SETTINGS)
def test_peft_loads_biases_and_saved_modules(bias: str, method: str, tmp_path: Path) -> None:
    model = tiny("bert")
    row = METHODS[method]
    targets = ModuleTargets(("query", "value"), modules_to_save=("classifier",), bias=bias.format(method))
    spec = inject(model, AdapterSpec(row, row.config(**SETTINGS[method]), targets))
    stir(model)
    write_adapter(state_of(model, spec), tmp_path)
    expected = outputs("bert", model.eval())
    assert close(outputs("bert", theirs_from("bert", tmp_path)), expected)
    assert close(outputs("bert", ours_from("bert", tmp_path)), expected)


CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("llama", "fourierft", {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["0.self_attn.v_proj"]}),
    (
        "llama",
        "fourierft",
        {"target_modules": r".*layers\.\d\.mlp\.(up|down)_proj", "exclude_modules": r".*\.1\..*up.*"},
    ),
    ("llama", "fourierft", {"target_modules": "all-linear", "n_frequency_pattern": {"q_proj": 7, "0.mlp.up_.*": 90}}),
    ("llama", "fourierft", {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"}),
    ("llama", "fourierft", {"target_modules": ["q_proj"], "layers_to_transform": 0}),
    ("llama", "fourierft", {"target_modules": ["q_proj"], "random_loc_seed": 5, "init_weights": True}),
    ("llama", "fourierft", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "model.norm"]}),
    ("llama", "fourierft", {}),
    ("bert", "fourierft", {"task_type": "SEQ_CLS"}),
    ("bert", "fourierft", {"target_modules": ["query"], "bias": "all", "modules_to_save": ["classifier"]}),
    ("bert", "fourierft", {"target_modules": ["query"], "bias": "fourier_only"}),
    ("gpt2", "fourierft", {"target_modules": ["c_attn", "mlp.c_fc"], "fan_in_fan_out": True}),
    (
        "llama",
        "lora",
        {"target_modules": "all-linear", "rank_pattern": {"q_proj|k_proj": 2}, "alpha_pattern": {"k_proj|x": 9}},
    ),
    ("llama", "lora", {"target_modules": ["q_proj", "v_proj"], "use_rslora": True, "rank_pattern": {"q_proj": 2}}),
    ("llama", "lora", {"target_modules": ["q_proj"], "init_lora_weights": "gaussian", "lora_dropout": 0.1}),
    ("bert", "lora", {"target_modules": ["query"], "bias": "lora_only", "modules_to_save": ["classifier"]}),
    ("bert", "lora", {"target_modules": ["query"], "bias": "all", "task_type": "SEQ_CLS"}),
    ("gpt2", "lora", {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
]


def peft_config(method: str, settings: dict[str, Any]) -> Any:
    return peft.PeftConfig.from_peft_type(peft_type=METHODS[method].peft_type, **{**SETTINGS[method], **settings})


@pytest.mark.parametrize(("kind", "method", "settings"), CASES)
def test_we_load_what_peft_writes(kind: str, method: str, settings: dict[str, Any], tmp_path: Path) -> None:
    model = peft.get_peft_model(tiny(kind), peft_config(method, settings))
    stir(model)
    expected = outputs(kind, model.eval())
    model.save_pretrained(tmp_path / "theirs")
    ours = ours_from(kind, tmp_path / "theirs")
    assert close(outputs(kind, ours), expected)
    write_adapter(read_adapter(tmp_path / "theirs"), tmp_path / "again")
    assert close(outputs(kind, theirs_from(kind, tmp_path / "again")), expected)


def test_a_layer_without_tensors_is_refused(tmp_path: Path) -> None:
    model = peft.get_peft_model(tiny("llama"), peft_config("fourierft", {"target_modules": ["q_proj"]}))
    model.save_pretrained(tmp_path)
    state = read_adapter(tmp_path)
    del state.layers["model.layers.1.self_attn.q_proj"]
    ours = tiny("llama")
    with pytest.raises(CheckpointError, match=r"model.layers.1.self_attn.q_proj is a target and has no tensors"):
        load(ours, state)
    assert torch.equal(outputs("llama", ours), outputs("llama", tiny("llama")))


@pytest.mark.parametrize("peft_type", DIALECTS)
def test_we_write_the_fields_that_peft_writes(peft_type: str, tmp_path: Path) -> None:
    theirs = peft.PeftConfig.from_peft_type(peft_type=peft_type, target_modules=["q_proj"])
    theirs.save_pretrained(str(tmp_path / "theirs"))
    row = next(row for row in METHODS.values() if row.peft_type == peft_type)
    settings = {item.name: getattr(theirs, item.name) for item in dataclasses.fields(row.config)}
    model = tiny("llama")
    if peft_type == "FOURIERFT":
        settings["n_frequency"] = theirs.n_frequency = 5
        theirs.save_pretrained(str(tmp_path / "theirs"))
    spec = inject(model, AdapterSpec(row, row.config(**settings), ModuleTargets(("q_proj",))))
    write_adapter(state_of(model, spec), tmp_path / "ours")
    a, b = (json.loads((tmp_path / name / CONFIG_FILE).read_text()) for name in ("ours", "theirs"))
    for name in ("inference_mode", "peft_version"):
        del a[name], b[name]
    assert a == b
