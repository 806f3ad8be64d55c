"""Our methods as PEFT methods: every way in which PEFT and transformers make, save and load adapters."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from spectral_surgery.adapters import METHODS
from spectral_surgery.adapters.base import AdapterSpec
from spectral_surgery.errors import BackendError, ConfigError, NotMergeableError
from spectral_surgery.files.peft.adapter_config import DIALECTS
from spectral_surgery.files.peft.adapter_files import read_adapter, write_adapter
from spectral_surgery.hf.peft import plugin as peft_plugin
from spectral_surgery.live.attach import inject, load, state_of
from spectral_surgery.targets import ModuleTargets
from tests.support.tiny import outputs, tiny

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

OURS = [row for row in METHODS.values() if row.peft_type not in DIALECTS]
SMALL = {"n_frequency": 30, "r": 4}
by_method = pytest.mark.parametrize("row", OURS, ids=lambda row: row.name)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():  # of the libraries, not ours
        warnings.filterwarnings("ignore", category=FutureWarning)
        yield


def settings(row: Any) -> dict[str, Any]:
    return {name: value for name, value in SMALL.items() if name in row.config.__dataclass_fields__}


def config(row: Any, targets: Any = ("q_proj", "mlp.down_proj"), **others: Any) -> Any:
    chosen = list(targets) if isinstance(targets, tuple) else targets
    return peft.PeftConfig.from_peft_type(peft_type=row.peft_type, target_modules=chosen, **{**settings(row), **others})


def stir(model: nn.Module, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> bool:
    return bool((a - b).norm() < tolerance * b.norm())


def trained(row: Any, kind: str = "llama", **others: Any) -> tuple[Any, Tensor]:
    model = peft.get_peft_model(tiny(kind), config(row, **others))
    assert torch.equal(outputs(kind, model), outputs(kind, tiny(kind)))  # a fresh adapter changes nothing
    stir(model)
    logits = outputs(kind, model.eval())
    assert not close(logits, outputs(kind, tiny(kind)), 1e-3)
    return model, logits


def test_importing_us_is_enough() -> None:
    assert OURS
    assert {row.peft_type for row in OURS} <= set(peft.PeftType)


@by_method
def test_get_peft_model_saves_what_we_read_and_loads_what_we_write(row: Any, tmp_path: Path) -> None:
    model, expected = trained(row)
    model.save_pretrained(tmp_path / "theirs")
    ours = tiny("llama")
    load(ours, read_adapter(tmp_path / "theirs"))
    assert close(outputs("llama", ours.eval()), expected)
    write_adapter(read_adapter(tmp_path / "theirs"), tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(tiny("llama"), tmp_path / "ours")
    assert torch.equal(outputs("llama", again), expected)


@by_method
@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_peft_loads_what_we_inject(row: Any, kind: str, tmp_path: Path) -> None:
    model = tiny(kind)
    extras = {"modules_to_save": ("classifier",), "bias": "all"} if kind == "bert" else {}
    targets = ModuleTargets(("query", "c_attn", "mlp.c_proj"), **extras)
    spec = inject(model, AdapterSpec(row, row.config(**settings(row)), targets))
    stir(model)
    expected = outputs(kind, model.eval())
    write_adapter(state_of(model, spec), tmp_path)
    assert close(outputs(kind, peft.PeftModel.from_pretrained(tiny(kind), tmp_path)), expected)


@by_method
def test_transformers_and_auto_classes_load(row: Any, tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = peft.get_peft_model(base, config(row, task_type="CAUSAL_LM"))
    stir(model)
    expected = outputs("llama", model.eval())
    model.save_pretrained(tmp_path / "adapter")
    auto = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.equal(outputs("llama", auto.eval()), expected)
    plain = tiny("llama")
    plain.load_adapter(str(tmp_path / "adapter"))
    assert close(outputs("llama", plain.eval()), expected)
    assert close(outputs("llama", transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")), expected)


@by_method
def test_trainer_trains_the_adapter_alone(row: Any, tmp_path: Path) -> None:
    model = peft.get_peft_model(tiny("llama"), config(row))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    data = [{"input_ids": torch.arange(3, 15), "labels": torch.arange(3, 15)}] * 8
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=2, learning_rate=0.1, report_to=[], use_cpu=True, disable_tqdm=True, save_steps=2
    )
    transformers.Trainer(model, arguments, train_dataset=data).train()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed
    assert all(f".{row.name}_adapter.default." in name for name in changed)
    saved = read_adapter(tmp_path / "checkpoint-2")
    assert saved.spec.method is row


@by_method
def test_merge_and_unmerge_restores_the_bits(row: Any) -> None:
    model, expected = trained(row)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    model.merge_adapter(safe_merge=True)
    assert close(outputs("llama", model), expected, 1e-4)
    with pytest.warns(UserWarning, match="already merged, nothing to do"):
        model.merge_adapter()
    with model.disable_adapter():  # PEFT unmerges
        assert torch.equal(outputs("llama", model), outputs("llama", tiny("llama")))
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    merged = model.merge_and_unload()
    assert type(merged.model.layers[0].self_attn.q_proj) is nn.Linear
    assert close(outputs("llama", merged), expected, 1e-4)


@by_method
def test_merge_into_a_transposed_half_precision_weight(row: Any) -> None:
    base = tiny("gpt2").to(torch.bfloat16)
    original = base.transformer.h[0].attn.c_attn.weight.clone()
    model = peft.get_peft_model(base, config(row, ("c_attn",)))
    stir(model)
    layer = model.base_model.model.transformer.h[0].attn.c_attn
    assert all(p.dtype == torch.float32 for p in layer.adapters.parameters())
    model.merge_adapter()
    delta = layer.get_delta_weight("default")
    assert delta.shape == original.shape
    assert torch.equal(layer.weight, (original.float() + delta).to(torch.bfloat16))
    model.unmerge_adapter()
    assert torch.equal(layer.weight, original)


@by_method
def test_several_adapters(row: Any, tmp_path: Path) -> None:
    model, first = trained(row)
    model.save_pretrained(tmp_path)
    model.add_adapter("second", config(row, ("q_proj", "k_proj")))
    model.set_adapter("second")
    assert torch.equal(outputs("llama", model), outputs("llama", tiny("llama")))
    stir(model, 1)
    second = outputs("llama", model.eval())
    assert not close(second, first, 1e-3)
    model.set_adapter("default")
    assert torch.equal(outputs("llama", model.eval()), first)
    with model.disable_adapter():
        assert torch.equal(outputs("llama", model), outputs("llama", tiny("llama")))
    model.save_pretrained(tmp_path, selected_adapters=["second"])
    assert set(read_adapter(tmp_path / "second").layers) == {
        f"model.layers.{i}.self_attn.{own}_proj" for i in (0, 1) for own in "qk"
    }
    model.delete_adapter("second")
    assert torch.equal(outputs("llama", model.eval()), first)
    model.load_adapter(tmp_path / "second", "third")
    model.set_adapter("third")
    assert torch.equal(outputs("llama", model.eval()), second)


@by_method
def test_embeddings_and_patterns(row: Any) -> None:
    patterns = {n: {"embed_tokens": 3} for n in ("n_frequency_pattern", "rank_pattern") if hasattr(row.config(), n)}
    model = peft.get_peft_model(tiny("llama"), config(row, ("embed_tokens", "q_proj"), **patterns))
    stir(model)
    expected = outputs("llama", model.eval())
    layer = model.base_model.model.model.embed_tokens
    assert not patterns or any(3 in p.shape for p in layer.adapters.parameters())
    assert close(outputs("llama", model.merge_and_unload()), expected, 1e-4)


@by_method
def test_low_memory_loading_and_copies(row: Any, tmp_path: Path) -> None:
    model, expected = trained(row, targets="all-linear")
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(tiny("llama"), tmp_path, low_cpu_mem_usage=True)
    assert torch.equal(outputs("llama", again.eval()), expected)
    assert torch.equal(outputs("llama", copy.deepcopy(model)), expected)
    back = pickle.loads(pickle.dumps(model.peft_config["default"]))
    assert back == model.peft_config["default"]
    assert type(back) is getattr(peft_plugin, type(back).__name__)


@by_method
def test_lora_conversion_is_offered_for_linear_layers_alone(row: Any) -> None:
    model, _ = trained(row)
    assert model.supports_lora_conversion()
    assert not peft.get_peft_model(tiny("gpt2"), config(row, ("c_attn",))).supports_lora_conversion()


@by_method
def test_what_cannot_carry_an_adapter(row: Any) -> None:
    with pytest.raises(ConfigError, match=f"got LlamaRMSNorm, which cannot carry an adapter of {row.name}"):
        peft.get_peft_model(tiny("llama"), config(row, ("input_layernorm",)))


@by_method
def test_what_cannot_be_merged(row: Any) -> None:
    model, _ = trained(row)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    layer.base_layer.weight = nn.Parameter(torch.zeros(32, 32, dtype=torch.int8), requires_grad=False)
    with pytest.raises(NotMergeableError, match=r"Linear: expected floating-point.*got torch\.int8"):
        layer.merge()
    layer.base_layer.weight = nn.Parameter(torch.full((32, 32), torch.inf), requires_grad=False)
    with pytest.raises(NotMergeableError, match=r"adapter default:.*got NaNs detected in the merged weights"):
        layer.merge(safe_merge=True)
    assert not layer.merged


def test_a_dynamic_gate_trains_saves_and_refuses_to_merge(tmp_path: Path) -> None:
    model = peft.get_peft_model(tiny("llama"), config(METHODS["foura"], use_gate=True))
    stir(model)
    expected = outputs("llama", model.eval())
    model.save_pretrained(tmp_path)
    assert torch.equal(outputs("llama", peft.PeftModel.from_pretrained(tiny("llama"), tmp_path)), expected)
    ours = tiny("llama")
    load(ours, read_adapter(tmp_path))
    assert close(outputs("llama", ours.eval()), expected)
    with pytest.raises(NotMergeableError, match=r"foura: expected a.*got one that depends on the input, so no one"):
        model.merge_adapter()


def test_settings_left_to_us_are_decided() -> None:
    row = METHODS["fourierft_biased"]
    for targets in (("q_proj",), "all-linear"):
        model = peft.get_peft_model(tiny("llama"), config(row, targets, scaling="auto"))
        assert isinstance(model.peft_config["default"].scaling, float)
    with pytest.raises(ValueError, match="Target modules"):
        peft.get_peft_model(tiny("llama"), config(row, ("nothing",), scaling="auto"))


def test_an_enumeration_that_works_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    class Other:
        __members__: ClassVar[dict[str, object]] = {}

    monkeypatch.setattr(peft, "PeftType", Other)
    with pytest.raises(BackendError, match=r"peft: expected a version that takes the method SOMETHING, such as 0\.21"):
        peft_plugin.add_peft_type("SOMETHING")


def test_registering_again_changes_nothing() -> None:
    before = list(peft.PeftType)
    peft_plugin.register()
    peft_plugin.add_peft_type("LORA")
    assert list(peft.PeftType) == before
    assert not hasattr(peft_plugin, "Nothing")
