"""What PEFT's users expect of any method: making, storing, loading, choosing and training its adapters."""

from __future__ import annotations

import copy
import io
import pickle
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from spectral_surgery.adapters import METHODS
from spectral_surgery.errors import ConfigError
from tests.support.tiny import outputs, tiny
from tests.support.tuners import IDS, OURS, TUNERS, Small, Tuner, answer, stir, weights

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

every = pytest.mark.parametrize("tuner", TUNERS, ids=lambda tuner: tuner.name)
ours = pytest.mark.parametrize("tuner", OURS, ids=lambda tuner: tuner.name)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():  # of the libraries, not ours
        warnings.simplefilter("ignore")
        yield


def trainable(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def carriers(model: nn.Module) -> set[str]:
    """Names of the modules that carry an adapter."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    found = {name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    return {name.removeprefix("base_model.model.") for name in found}


def test_every_method_is_under_the_laws() -> None:
    assert {tuner.peft_type for tuner in TUNERS} == {row.peft_type for row in METHODS.values()}


@every
def test_configurations_are_stored_as_they_are(tuner: Tuner, tmp_path: Path) -> None:
    for targets in (("lin0", "head"), ".*lin0", "all-linear", None):
        config = tuner.config(targets, exclude_modules=["x"], layers_to_transform=None, modules_to_save=["emb"])
        config.save_pretrained(tmp_path)
        for back in (type(config).from_pretrained(tmp_path), peft.PeftConfig.from_pretrained(tmp_path)):
            assert back == config
            assert type(back) is type(config)
        assert copy.copy(config).to_dict() == copy.deepcopy(config).to_dict() == config.to_dict()
        assert pickle.loads(pickle.dumps(config)) == config
    with pytest.raises(ValueError, match="Invalid task type"):
        tuner.config(task_type="NOTHING")
    with pytest.raises(TypeError, match="use_something"):
        type(config)(use_something=True)


@every
def test_a_fresh_adapter_changes_nothing_and_is_alone_trained(tuner: Tuner) -> None:
    model = tuner.put(Small())
    assert torch.equal(answer(model), answer(Small()))
    names = trainable(model)
    assert names
    assert all(f".{tuner.prefix}" in name and ".default" in name for name in names)
    assert names == {name for name, _ in model.named_parameters() if tuner.prefix in name}
    trained, total = model.get_nb_trainable_parameters()
    assert trained == sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert total == sum(parameter.numel() for parameter in model.parameters())


@every
def test_what_is_stored_is_the_adapter_alone(tuner: Tuner, tmp_path: Path) -> None:
    model = tuner.trained()
    stored = peft.get_peft_model_state_dict(model)
    assert stored
    assert all(tuner.prefix in key and ".default" not in key for key in stored)
    assert {key.split(f".{tuner.prefix}")[0].removeprefix("base_model.model.") for key in stored} == carriers(model)
    expected = answer(model)
    model.save_pretrained(tmp_path)
    for options in ({}, {"low_cpu_mem_usage": True}, {"adapter_name": "other"}, {"is_trainable": True}):
        assert torch.equal(answer(tuner.load(Small(), tmp_path, **options)), expected)
    injected = peft.inject_adapter_in_model(tuner.config(), Small())  # as other libraries do
    assert not peft.set_peft_model_state_dict(injected, stored).unexpected_keys
    assert torch.allclose(answer(injected), expected, atol=1e-6)


@every
@pytest.mark.parametrize("is_trainable", [True, False])
def test_loading_trains_what_was_asked(tuner: Tuner, is_trainable: bool, tmp_path: Path) -> None:
    tuner.put(Small(), ("lin0",), modules_to_save=["head"]).save_pretrained(tmp_path)
    model = tuner.load(Small(), tmp_path, is_trainable=is_trainable)
    own = {name for name, _ in model.named_parameters() if ".default" in name}
    assert own
    assert trainable(model) == (own if is_trainable else set())
    model.load_adapter(tmp_path, "frozen", is_trainable=False)
    assert trainable(model) == (own if is_trainable else set())
    model.load_adapter(tmp_path, "trained", is_trainable=True)
    assert trainable(model) == (own if is_trainable else set()) | {
        name for name, _ in model.named_parameters() if ".trained" in name
    }


@every
def test_several_adapters_with_other_targets(tuner: Tuner) -> None:
    model = tuner.trained()
    first = answer(model)
    model.add_adapter("second", tuner.config(("lin1", "head")))
    tuner.ready(model)
    assert torch.equal(answer(model), first)
    assert not any(".second" in name for name in trainable(model))
    model.set_adapter("second")
    assert trainable(model) == {name for name, _ in model.named_parameters() if ".second" in name}
    assert torch.equal(answer(model), answer(Small()))
    stir(model, 1)
    second = answer(model)
    assert not torch.allclose(second, first, atol=1e-3)
    model.base_model.set_adapter(["default", "second"])
    both = answer(model)
    assert not torch.allclose(both, first, atol=1e-3)
    assert not torch.allclose(both, second, atol=1e-3)
    model.set_adapter("default")
    assert torch.equal(answer(model), first)
    model.delete_adapter("second")
    assert torch.equal(answer(model), first)
    assert not any(".second" in name for name in model.state_dict())
    for call in (model.set_adapter, model.delete_adapter):
        with pytest.raises(ValueError, match="nothing"):
            call("nothing")


@every
def test_disabling_gives_the_base_and_ends(tuner: Tuner) -> None:
    model = tuner.trained()
    expected, names = answer(model), trainable(model)
    with model.disable_adapter():
        assert torch.equal(answer(model), answer(Small()))
        assert not trainable(model)
    assert torch.equal(answer(model), expected)
    assert trainable(model) == names
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.allclose(answer(model), answer(Small()), atol=1e-5)
    assert torch.allclose(answer(model), expected, atol=1e-5)


@every
def test_steps_change_adapters_alone_and_gradients_add_up(tuner: Tuner) -> None:
    model = tuner.trained(modules_to_save=["lin1"]).train()
    names, before = trainable(model), weights(model)
    model(IDS).square().sum().backward()
    whole = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    model.zero_grad()
    for row in IDS:
        model(row[None]).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (name not in names)
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, whole[name], rtol=1e-4, atol=1e-4)
    torch.optim.AdamW(model.parameters(), lr=0.1).step()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == names


@every
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_gradients_are_the_same(tuner: Tuner, reentrant: bool) -> None:
    gradients = []
    for checkpointed in (True, False):
        torch.manual_seed(0)
        model = tuner.put(tiny("llama"), ("q_proj", "down_proj"), task_type="CAUSAL_LM")
        stir(model)
        if checkpointed:
            model.base_model.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        ids = torch.arange(3, 15)[None]
        model.train()(input_ids=ids, labels=ids).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-4, atol=1e-6)


@every
def test_ways_to_name_targets(tuner: Tuner) -> None:
    linear = {f"layers.{i}.lin{j}" for i in (0, 1) for j in (0, 1)} | {"head"}
    first, second = {"layers.0.lin0", "layers.0.lin1"}, {"layers.1.lin0", "layers.1.lin1"}
    for targets, others, expected in (
        (("lin0",), {}, {"layers.0.lin0", "layers.1.lin0"}),
        (("layers.0.lin0", "head"), {}, {"layers.0.lin0", "head"}),
        (r".*\.0\.lin\d", {}, first),
        ("all-linear", {}, linear),
        ("all-linear", {"exclude_modules": ["head", "lin1"]}, {"layers.0.lin0", "layers.1.lin0"}),
        (("lin0", "lin1"), {"exclude_modules": r".*\.0\..*"}, second),
        (("lin0", "lin1"), {"layers_to_transform": 1, "layers_pattern": ["layers"]}, second),
        (("lin0", "lin1"), {"layers_to_transform": [0], "layers_pattern": "layers"}, first),
    ):
        assert carriers(tuner.put(Small(), targets, **others)) == expected
    for wrong, message in ((("nothing",), "not found in the base model"), (None, "specify `target_modules`")):
        with pytest.raises(ValueError, match=message):
            tuner.put(Small(), wrong)
    llama = tuner.put(tiny("llama"), None)  # the usual layers of the architecture
    assert {name.rpartition(".")[2] for name in carriers(llama)} <= {"q_proj", "v_proj"}


@every
def test_patterns_give_layers_their_own_size(tuner: Tuner) -> None:
    size = "r" if "r" in tuner.settings else "n_frequency"
    pattern = "rank_pattern" if size == "r" else "n_frequency_pattern"
    model = tuner.put(Small(), **{pattern: {"layers.0.lin0": 3}})
    small, usual = (
        {size for name, own in layer.lin0.named_parameters() if tuner.prefix in name for size in own.shape}
        for layer in model.base_model.model.layers
    )
    assert 3 in small
    assert 3 not in usual
    assert tuner.settings[size] in usual


@every
def test_modules_and_biases_trained_whole(tuner: Tuner, tmp_path: Path) -> None:
    model = tuner.put(Small(), ("lin0",), modules_to_save=["head"], bias="none")
    stir(model)
    assert {name for name in trainable(model) if tuner.prefix not in name} == {
        f"base_model.model.head.modules_to_save.default.{own}" for own in ("weight", "bias")
    }
    expected = answer(model)
    model.save_pretrained(tmp_path / "whole")
    assert torch.equal(answer(tuner.load(Small(), tmp_path / "whole")), expected)
    with model.disable_adapter():
        assert torch.equal(answer(model), answer(Small()))
    biased = tuner.put(Small(), ("lin0",), bias="all")
    stir(biased)
    assert {name for name, _ in biased.named_parameters() if name.endswith(".bias")} <= trainable(biased)
    expected = answer(biased)
    biased.save_pretrained(tmp_path / "bias")
    assert torch.equal(answer(tuner.load(Small(), tmp_path / "bias")), expected)
    with pytest.raises(ValueError, match="supports only 1 adapter with bias"):
        biased.add_adapter("second", tuner.config(("lin0",), bias="all"))


@every
def test_status_says_what_is_there(tuner: Tuner) -> None:
    model = tuner.trained()
    status = model.get_model_status()
    assert status.available_adapters == status.active_adapters == ["default"]
    assert status.num_adapter_layers == len(carriers(model))
    assert status.enabled
    assert not status.merged_adapters
    assert status.requires_grad == {"default": True}
    assert {layer.name.removeprefix("model.") for layer in model.get_layer_status()} == carriers(model)
    model.merge_adapter()
    assert model.get_model_status().merged_adapters == ["default"]


@every
@pytest.mark.parametrize("merged", [False, True])
def test_copies_and_other_processes(tuner: Tuner, merged: bool) -> None:
    model = tuner.trained()
    original = answer(model)
    if merged:
        model.merge_adapter()
    expected, file = answer(model), io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)):
        assert torch.equal(answer(other), expected)
        with other.disable_adapter():
            assert torch.allclose(answer(other), answer(Small()), atol=1e-5)
        assert torch.allclose(answer(other), original, atol=1e-5)
        stir(other, 3)
        assert torch.equal(answer(model), expected)


@pytest.mark.parametrize("tuner", [own for own in TUNERS if own.is_ours or own.fast], ids=lambda own: own.name)
def test_compiled_without_a_backend(tuner: Tuner) -> None:
    model = tuner.trained(targets=("head",))
    compiled = torch.compile(model, backend="eager")
    assert torch.allclose(compiled(IDS), model(IDS), atol=1e-5)
    compiled(IDS).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


@ours
def test_what_is_not_there_is_refused(tuner: Tuner, tmp_path: Path) -> None:
    from peft.utils.hotswap import hotswap_adapter

    model = tuner.trained()
    message = re.escape(f"adapter_names: expected {tuner.peft_type.lower()} to serve the whole batch")
    with pytest.raises(ConfigError, match=message):
        model(IDS, adapter_names=["default", "__base__"])
    model.save_pretrained(tmp_path)
    with pytest.raises((NotImplementedError, ValueError), match=r"[Hh]otswapp?ing"):
        hotswap_adapter(model, tmp_path, "default")


@every
def test_logits_of_a_transformers_model(tuner: Tuner, tmp_path: Path) -> None:
    model: Any = tuner.put(tiny("llama"), "all-linear", task_type="CAUSAL_LM")
    assert not any("lm_head" in name for name in carriers(model))
    stir(model)
    expected = outputs("llama", model)
    model.save_pretrained(tmp_path)
    assert torch.equal(outputs("llama", tuner.load(tiny("llama"), tmp_path)), expected)
    ids = torch.arange(3, 9)[None]
    generated = model.generate(input_ids=ids, max_new_tokens=3, do_sample=False)
    assert generated.shape[1] > 6
    assert torch.equal(generated[:, :6], ids)
