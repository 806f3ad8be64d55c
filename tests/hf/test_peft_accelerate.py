"""The fast forward in models of PEFT: the same numbers, and everything else as PEFT has it."""

from __future__ import annotations

import copy
import pickle
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spectral_surgery import accelerate_peft
from spectral_surgery.errors import BackendError, TargetError
from tests.support.tiny import outputs, tiny

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)
        yield


def config(*targets: str, **others: Any) -> Any:
    return peft.FourierFTConfig(n_frequency=40, scaling=20.0, target_modules=list(targets), **others)


def made(kind: str = "llama", *targets: str) -> Any:
    torch.manual_seed(1)
    targets = targets or ("q_proj", "mlp.down_proj")
    return peft.get_peft_model(tiny(kind), config(*targets, fan_in_fan_out=kind == "gpt2")).eval()


def close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> bool:
    return bool((a - b).norm() <= tolerance * b.norm())


def base_logits(kind: str = "llama") -> Tensor:
    return outputs(kind, tiny(kind))


@pytest.mark.parametrize(("kind", "targets"), [("llama", ()), ("bert", ("query", "dense")), ("gpt2", ("c_attn",))])
def test_outputs_keys_and_undoing(kind: str, targets: tuple[str, ...]) -> None:
    model = made(kind, *targets)
    expected, keys = outputs(kind, model), list(model.state_dict())
    types = [type(module) for module in model.modules()]
    count = accelerate_peft(model)
    assert count == sum("FourierFTLinear" in kind.__name__ for kind in types) > 1
    fast = outputs(kind, model)
    assert close(fast, expected)
    assert not close(fast, base_logits(kind), 1e-3)
    assert list(model.state_dict()) == keys
    assert accelerate_peft(model) == count  # once more changes nothing
    assert torch.equal(outputs(kind, model), fast)
    assert accelerate_peft(model, enabled=False) == count
    assert [type(module) for module in model.modules()] == types
    assert torch.equal(outputs(kind, model), expected)


def test_gradients() -> None:
    model = made()
    ids = torch.arange(3, 27).reshape(2, 12)

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    expected = gradients()
    accelerate_peft(model)
    actual = gradients()
    assert actual.keys() == expected.keys()
    assert all(close(actual[name], expected[name], 1e-4) for name in expected)


def test_the_forward_is_ours_and_never_forms_a_delta(monkeypatch: pytest.MonkeyPatch) -> None:
    model = made()
    accelerate_peft(model)
    monkeypatch.setattr(peft.tuners.fourierft.FourierFTLinear, "get_delta_weight", None)
    assert not close(outputs("llama", model), base_logits(), 1e-3)


def test_several_adapters_disabling_and_switching(tmp_path: Path) -> None:
    model = made()
    model.add_adapter("second", config("q_proj", "k_proj", random_loc_seed=3))
    accelerate_peft(model)

    def all_states() -> list[Tensor]:
        found = []
        for active in ("default", "second", ["default", "second"]):
            model.base_model.set_adapter(active)
            found.append(outputs("llama", model))
        return found

    fast = all_states()
    with model.disable_adapter():
        assert torch.equal(outputs("llama", model), base_logits())
    accelerate_peft(model, enabled=False)
    assert all(close(a, b) for a, b in zip(fast, all_states(), strict=True))
    accelerate_peft(model)
    model.save_pretrained(tmp_path)
    model.delete_adapter("default")
    model.load_adapter(tmp_path, "default")
    model.add_adapter("third", config("q_proj", "v_proj"))  # v_proj is wrapped by PEFT, which keeps its own forward
    assert all(close(a, b) for a, b in zip(all_states(), fast, strict=True))


def test_an_adapter_that_is_replaced_is_noticed() -> None:
    model = made()
    accelerate_peft(model)
    before = outputs("llama", model)
    model.add_adapter("keep", config("q_proj"))
    model.set_adapter("keep")
    model.delete_adapter("default")
    torch.manual_seed(1)
    model.add_adapter("default", config("q_proj", "mlp.down_proj", random_loc_seed=9))
    model.set_adapter("default")
    fast = outputs("llama", model)
    accelerate_peft(model, enabled=False)
    assert close(fast, outputs("llama", model))
    assert not close(fast, before, 1e-3)


def test_merge_state() -> None:
    model = made()
    accelerate_peft(model)
    expected = outputs("llama", model)
    model.merge_adapter()
    assert model.base_model.model.model.layers[0].self_attn.q_proj.merged
    assert close(outputs("llama", model), expected)
    model.unmerge_adapter()
    assert close(outputs("llama", model), expected)
    model.merge_adapter()
    with model.disable_adapter():
        assert close(outputs("llama", model), base_logits())
    merged = model.merge_and_unload()
    assert type(merged.model.layers[0].self_attn.q_proj) is nn.Linear
    assert close(outputs("llama", merged), expected)


@pytest.mark.parametrize("autocast", [True, False])
def test_half_precision(autocast: bool) -> None:
    torch.manual_seed(1)
    base = tiny("llama").to(torch.bfloat16)
    model = peft.get_peft_model(base, config("q_proj"), autocast_adapter_dtype=autocast).eval()
    expected = outputs("llama", model)
    accelerate_peft(model)
    actual = outputs("llama", model)
    assert actual.dtype == expected.dtype == torch.bfloat16
    assert close(actual.float(), expected.float(), 0.02)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    x = torch.randn(2, 32)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.to(torch.float32)(x).dtype == torch.float32  # PEFT gives back the dtype of its input


def test_hooks_on_the_base_are_called() -> None:
    model = made()
    accelerate_peft(model)
    expected = outputs("llama", model)
    seen = []
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    layer.base_layer.register_forward_hook(lambda *_: seen.append(1))
    assert close(outputs("llama", model), expected)
    assert seen


def test_copies_and_pickles() -> None:
    model = made()
    accelerate_peft(model)
    expected = outputs("llama", model)
    assert torch.equal(outputs("llama", copy.deepcopy(model)), expected)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    x = torch.randn(3, 32)
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x), layer(x))


def test_models_without_such_layers() -> None:
    with pytest.raises(TargetError, match=r"LlamaForCausalLM: expected a model.*got no FourierFT layers of PEFT"):
        accelerate_peft(tiny("llama"))


def test_peft_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft.tuners.fourierft", None)
    with pytest.raises(BackendError, match=r"peft: expected it to accelerate its.*got none installed\. pip install"):
        accelerate_peft(nn.Linear(2, 2))
