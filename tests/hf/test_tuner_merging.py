"""What PEFT's users expect of any method: dtypes, merging, other kinds of layers and conversion to LoRA."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spectral_surgery.adapters import METHODS
from spectral_surgery.adapters.base import AdapterSpec
from spectral_surgery.errors import NotMergeableError
from spectral_surgery.live.attach import inject
from spectral_surgery.live.merging import merge, unmerge
from spectral_surgery.targets import ModuleTargets
from tests.support.tiny import outputs, tiny
from tests.support.tuners import IDS, LORA, OURS, TUNERS, Small, Tuner, answer, stir, weights

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

every = pytest.mark.parametrize("tuner", TUNERS, ids=lambda tuner: tuner.name)
ours = pytest.mark.parametrize("tuner", OURS, ids=lambda tuner: tuner.name)
not_lora = pytest.mark.parametrize("tuner", [own for own in TUNERS if own is not LORA], ids=lambda tuner: tuner.name)
SIXTEEN = (torch.float16, torch.bfloat16)
DTYPES = (*SIXTEEN, torch.float32)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():  # of the libraries, not ours
        warnings.simplefilter("ignore")
        yield


def own(tuner: Tuner, model: nn.Module) -> list[nn.Parameter]:
    return [parameter for name, parameter in model.named_parameters() if tuner.prefix in name]


def near(a: Tensor, b: Tensor, dtype: torch.dtype) -> bool:
    return bool((a.double() - b.double()).norm() < {torch.float32: 1e-5}.get(dtype, 2e-2) * b.double().norm())


class Scaled(nn.Embedding):
    """An embedding that multiplies what it looks up, as those of Gemma and BART do."""

    def __init__(self, scale: Any) -> None:
        super().__init__(30, 12)
        self.embed_scale = scale

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * self.embed_scale


@every
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("autocast", [True, False])
def test_adapters_are_float32_unless_asked_otherwise(
    tuner: Tuner, dtype: torch.dtype, autocast: bool, tmp_path: Path
) -> None:
    expected = torch.float32 if autocast else dtype
    model = tuner.trained(dtype, autocast_adapter_dtype=autocast)
    model.add_adapter("second", tuner.config(), autocast_adapter_dtype=autocast)
    tuner.ready(model)
    assert {parameter.dtype for parameter in own(tuner, model)} == {expected}
    before = answer(model)
    assert before.dtype == dtype
    assert before.isfinite().all()
    model.save_pretrained(tmp_path)
    for low in (False, True):
        options = {"autocast_adapter_dtype": autocast, "low_cpu_mem_usage": low}
        again = tuner.load(Small(dtype), tmp_path, **options)
        again.load_adapter(tmp_path / "second", "second", **options)
        assert {parameter.dtype for parameter in own(tuner, again)} == {expected}
        if tuner.is_ours or not low:  # PEFT's own rounds to the dtype of the base on the way
            assert torch.equal(answer(tuner.ready(again)), before)


@ours
def test_a_double_base_is_not_rounded(tuner: Tuner) -> None:
    model = tuner.trained(torch.float64)
    assert {parameter.dtype for parameter in own(tuner, model)} == {torch.float64}
    expected = answer(model)
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(answer(model), expected, rtol=1e-12, atol=1e-12)


@every
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("autocast", [True, False])
def test_merging_gives_the_same_outputs_and_goes_back(tuner: Tuner, dtype: torch.dtype, autocast: bool) -> None:
    model = tuner.trained(dtype, autocast_adapter_dtype=autocast)
    expected, before = answer(model), weights(model)
    for safe in (False, True):
        model.merge_adapter(safe_merge=safe)
        assert near(answer(model), expected, dtype)
        model.unmerge_adapter()
        assert near(answer(model), expected, dtype)
        if tuner.is_ours:
            assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    merged = model.merge_and_unload(safe_merge=True)
    assert {type(module) for module in merged.modules()} == {type(module) for module in Small().modules()}
    assert {parameter.dtype for parameter in merged.parameters()} == {dtype}
    assert near(answer(merged), expected, dtype)


@every
def test_unloading_gives_the_base(tuner: Tuner) -> None:
    base = tuner.trained().unload()
    assert {type(module) for module in base.modules()} == {type(module) for module in Small().modules()}
    assert base.state_dict().keys() == Small().state_dict().keys()
    assert torch.equal(answer(base), answer(Small()))


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_several_merged_at_once_or_in_turn(tuner: Tuner, dtype: torch.dtype) -> None:
    model = tuner.trained(dtype)
    model.add_adapter("second", tuner.config(("lin1", "head")))
    model.set_adapter("second")
    stir(model, 1)
    model.base_model.set_adapter(["default", "second"])
    tuner.ready(model)
    expected, before = answer(model), weights(model)
    model.merge_adapter(["default", "second"])
    together = answer(model)
    assert near(together, expected, dtype)
    with pytest.raises(ValueError, match="while they are merged"):
        model.delete_adapter("second")
    model.unmerge_adapter()
    for name in ("default", "second"):
        model.merge_adapter([name])
    assert near(answer(model), together, dtype)
    if tuner.is_ours:
        assert torch.equal(answer(model), together)
    model.set_adapter("default")  # PEFT unmerges for it
    if tuner.is_ours:
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    alone = answer(model)
    assert near(answer(model.merge_and_unload(adapter_names=["default"])), alone, dtype)


@every
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_safe_merging_sees_what_is_not_finite(tuner: Tuner, value: float) -> None:
    model = tuner.trained()
    before = weights(model)
    with torch.no_grad():
        for parameter in own(tuner, model):
            parameter[0] = value
    message = "NaNs detected in the merged weights. The adapter default seems to be broken"
    with pytest.raises(ValueError, match=message):
        model.merge_adapter(safe_merge=True)
    for name, tensor in model.state_dict().items():
        if tuner.prefix not in name:
            assert torch.equal(tensor, before[name])
    with pytest.raises(ValueError, match=message):
        model.merge_and_unload(safe_merge=True)


@ours
def test_a_sum_too_large_for_the_base_is_seen(tuner: Tuner) -> None:
    model = tuner.trained(torch.float16)
    with torch.no_grad():
        for parameter in own(tuner, model):
            parameter.mul_(1e8)
    with pytest.raises(NotMergeableError, match=r"expected sums that are finite in torch.float16"):
        model.merge_adapter(safe_merge=True)


@ours
def test_quantised_bases_keep_float32_adapters_and_are_not_merged(tuner: Tuner) -> None:
    base = Small()
    base.head.weight = nn.Parameter(base.head.weight.to(torch.float8_e4m3fn), requires_grad=False)
    model = tuner.put(base, ("head",), autocast_adapter_dtype=False)
    assert {parameter.dtype for parameter in own(tuner, model)} == {torch.float32}
    with pytest.raises(NotMergeableError, match=r"Linear: expected floating-point.*got torch\.float8_e4m3fn"):
        model.merge_adapter()


@ours
@pytest.mark.parametrize("backwards", [False, True])
def test_tied_weights_come_back(tuner: Tuner, backwards: bool) -> None:
    base = tiny("llama").to(torch.bfloat16)
    base.lm_head.weight = base.model.embed_tokens.weight
    model = tuner.put(base, ("embed_tokens", "lm_head"))
    stir(model)
    layers = (model.base_model.model.model.embed_tokens, model.base_model.model.lm_head)
    weight, before = layers[0].weight, layers[0].weight.clone()
    deltas = [layer.get_delta_weight("default") for layer in layers]
    model.merge_adapter()
    assert layers[0].weight is layers[1].weight is weight
    assert torch.equal(weight, (before.float() + deltas[0] + deltas[1]).bfloat16())
    first, last = reversed(layers) if backwards else layers
    first.unmerge()
    assert torch.equal(weight, (before.float() + last.get_delta_weight("default")).bfloat16())
    last.unmerge()
    assert torch.equal(weight, before)


@ours
def test_a_model_cast_or_copied_while_merged(tuner: Tuner) -> None:
    import copy

    model = tuner.trained()
    model.merge_adapter()
    other = copy.deepcopy(model).to(torch.bfloat16)
    other.unmerge_adapter()
    assert torch.equal(other.base_model.model.head.weight, Small().head.weight.bfloat16())
    model.unmerge_adapter()
    assert torch.equal(model.base_model.model.head.weight, Small().head.weight)


@pytest.mark.parametrize(
    "tuner", [own for own in TUNERS if own.is_ours or own.name == "lora"], ids=lambda own: own.name
)
@pytest.mark.parametrize("scale", [None, 3.5, torch.tensor(3.5)], ids=["plain", "number", "tensor"])
def test_embeddings_scaled_or_not(tuner: Tuner, scale: Any) -> None:
    base = Small()
    if scale is not None:
        base.emb = Scaled(scale)
    plain = answer(base)
    model = tuner.put(base, ("emb",))
    assert torch.equal(answer(model), plain)
    stir(model)
    expected = answer(model)
    assert not torch.allclose(expected, plain, atol=1e-2)
    assert torch.allclose(answer(model.merge_and_unload()), expected, atol=1e-4)


@ours
@pytest.mark.parametrize("scale", [3.5, torch.tensor(3.5)], ids=["number", "tensor"])
def test_scaled_embeddings_without_peft(tuner: Tuner, scale: Any) -> None:
    row = METHODS[tuner.peft_type.lower()]
    model = Small()
    model.emb = Scaled(scale)
    inject(model, AdapterSpec(row, row.config(**tuner.settings), ModuleTargets(("emb",))))
    stir(model)
    expected = answer(model)
    merge(model)
    assert torch.allclose(answer(model), expected, atol=1e-4)


@ours
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_convolutions(tuner: Tuner, groups: int, dtype: torch.dtype) -> None:
    class Net(nn.Sequential):
        pass

    torch.manual_seed(0)
    base = Net(nn.Conv2d(4, 8, 3, stride=2, padding=1, padding_mode="reflect", groups=groups), nn.ReLU()).to(dtype)
    x = torch.randn(2, 4, 9, 9, dtype=dtype)
    model = tuner.put(base, ("0",))
    stir(model)
    expected = model(x)
    assert near(model.merge_and_unload()(x), expected, dtype)


@not_lora
@pytest.mark.parametrize("dtype", DTYPES)
def test_conversion_to_lora(tuner: Tuner, dtype: torch.dtype) -> None:
    model = tuner.trained(dtype, autocast_adapter_dtype=False)
    expected = answer(model)
    config, tensors = peft.convert_to_lora(model, rank=8)
    assert {tensor.dtype for tensor in tensors.values()} == {dtype}
    converted = peft.get_peft_model(Small(dtype), config, autocast_adapter_dtype=False)
    assert not peft.set_peft_model_state_dict(converted, tensors).unexpected_keys
    if tuner.name == "foura":  # of rank 4: nothing is left out
        assert near(answer(converted), expected, dtype)
    error, base = (answer(converted) - expected).float().norm(), answer(Small(dtype))
    assert error < 0.7 * (base - expected).float().norm()


@not_lora
def test_conversion_is_for_linear_layers(tuner: Tuner) -> None:
    assert tuner.put(Small()).supports_lora_conversion()
    model = tuner.put(tiny("gpt2"), ("c_attn",), fan_in_fan_out=True)
    with pytest.raises(TypeError, match="do not support LoRA conversion"):
        peft.convert_to_lora(model, rank=2)


@every
def test_transposed_layers_of_a_transformers_model(tuner: Tuner, tmp_path: Path) -> None:
    model = tuner.put(tiny("gpt2").to(torch.bfloat16), ("c_attn", "mlp.c_proj"), fan_in_fan_out=True)
    stir(model)
    expected = outputs("gpt2", model)
    model.save_pretrained(tmp_path)
    assert torch.equal(outputs("gpt2", tuner.load(tiny("gpt2").to(torch.bfloat16), tmp_path)), expected)
    assert near(outputs("gpt2", model.merge_and_unload(safe_merge=True)), expected, torch.bfloat16)


@pytest.mark.parametrize("row", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("dtype", SIXTEEN)
def test_without_peft_adapters_are_float32_and_bits_come_back(row: Any, dtype: torch.dtype) -> None:
    settings = {k: v for k, v in {"r": 4, "n_frequency": 30}.items() if k in row.config.__dataclass_fields__}
    model = Small(dtype)
    before, plain = weights(model), answer(model)
    inject(model, AdapterSpec(row, row.config(**settings), ModuleTargets(("lin0", "emb", "head"))))
    adapters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert {parameter.dtype for parameter in adapters} == {torch.float32}
    stir(model)
    expected = answer(model)
    assert expected.dtype == dtype
    assert not torch.equal(expected, plain)
    model(IDS).float().square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.dtype == torch.float32 for parameter in adapters)
    merge(model)
    assert near(answer(model), expected, dtype)
    unmerge(model)
    held = {name.replace(".base_layer", ""): value for name, value in model.state_dict().items()}
    assert all(torch.equal(held[name], value) for name, value in before.items())
    model.to(dtype)  # adapters too, as a caller may do
    assert near(answer(model), expected, dtype)


@pytest.mark.parametrize("row", METHODS.values(), ids=METHODS)
def test_without_peft_tied_weights_come_back(row: Any) -> None:
    settings = {k: v for k, v in {"r": 4, "n_frequency": 30}.items() if k in row.config.__dataclass_fields__}
    model: Any = tiny("llama").to(torch.bfloat16)
    model.lm_head.weight = model.model.embed_tokens.weight
    before = model.lm_head.weight.clone()
    inject(model, AdapterSpec(row, row.config(**settings), ModuleTargets(("embed_tokens", "lm_head"))))
    stir(model)
    merge(model)
    assert not torch.equal(model.lm_head.weight, before)
    unmerge(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, before)
