"""What the library has packed is read as the library unpacks it, whole and by rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from spectral_surgery.errors import CheckpointError
from spectral_surgery.files.index import read_index
from spectral_surgery.files.reader import read_flat, read_tensor
from tests.support.quantised import write

pytest.importorskip("compressed_tensors")
STEM = "model.layers.0.mlp.up_proj"
INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "int4 in groups": ("pack-quantized", INT4),
    "int4 in groups, zero points": ("pack-quantized", INT4 | {"symmetric": False}),
    "int4 in rows": ("pack-quantized", {"num_bits": 4, "type": "int", "strategy": "channel", "symmetric": True}),
    "int8 in rows, packed": (
        "pack-quantized",
        {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True},
    ),
    "int8 in rows": ("int-quantized", {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}),
    "int8, zero points": ("int-quantized", {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": False}),
    "fp8 in rows": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}),
    "fp8": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True}),
    "nvfp4": ("nvfp4-pack-quantized", {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}),
}


def stored(case: str, weight: Tensor) -> tuple[dict[str, Tensor], dict[str, Any], Tensor]:
    """What the library stores of a weight, the settings, and what it unpacks."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    form, weights = CASES[case]
    args = QuantizationArgs(**weights)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    groups = weight.unflatten(1, (-1, args.group_size or weight.shape[1]))
    low, high = groups.amin(-1), groups.amax(-1)
    if args.strategy == "tensor":
        low, high = low.amin().reshape(1), high.amax().reshape(1)
    state = {"weight": weight}
    if form.startswith("nvfp4"):
        state["weight_global_scale"] = (448 * 6 / weight.abs().max()).reshape(1)
        scale, zero = calculate_qparams(low, high, args, global_scale=state["weight_global_scale"])
    else:
        scale, zero = calculate_qparams(low, high, args)
        scale = scale.bfloat16()
    state |= {"weight_scale": scale} | ({} if args.symmetric else {"weight_zero_point": zero})
    compressor = BaseCompressor.get_value_from_registry(form)
    packed = compressor.compress(state, scheme)
    unpacked = compressor.decompress(packed, scheme)["weight"]
    settings = {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head"],
    }
    return {f"{STEM}.{name}": tensor for name, tensor in packed.items()}, settings, unpacked


@pytest.mark.parametrize("case", CASES)
def test_as_the_library_unpacks_it(case: str, tmp_path: Path) -> None:
    weight = torch.randn(48, 96)
    tensors, settings, expected = stored(case, weight)
    tensors |= {f"{STEM}.input_scale": torch.ones(1), "lm_head.weight": torch.randn(4, 8).bfloat16()}
    index = read_index(write(tmp_path, tensors, settings))
    assert sorted(index.tensors) == ["lm_head.weight", f"{STEM}.weight"]
    info = index.tensors[f"{STEM}.weight"]
    assert (info.dtype, info.shape) == ("BF16", (48, 96))
    whole = read_tensor(info)
    assert torch.equal(whole, expected.bfloat16())
    assert float((whole.float() - weight).norm() / weight.norm()) < 0.15
    for first, last in ((0, 1), (5, 23), (47, 48)):
        assert torch.equal(read_flat(info, first * 96, last * 96), whole[first:last].reshape(-1)), (first, last)
    assert index.config.get("quantization_config") is None


def test_columns_that_are_no_multiple_of_a_word(tmp_path: Path) -> None:
    tensors, settings, expected = stored("int4 in rows", torch.randn(8, 91))
    info = read_index(write(tmp_path, tensors, settings)).tensors[f"{STEM}.weight"]
    assert info.shape == (8, 91)
    assert torch.equal(read_tensor(info), expected.bfloat16())


def test_groups_of_modules_have_schemes_of_their_own(tmp_path: Path) -> None:
    one, settings, expected = stored("int4 in groups", torch.randn(16, 64))
    other, more, also = stored("int8 in rows, packed", torch.randn(16, 64))
    down = {name.replace("up_proj", "down_proj"): tensor for name, tensor in other.items()}
    eight = more["config_groups"]["group_0"] | {"targets": ["re:.*down_proj"]}
    settings["config_groups"] = {
        "group_0": eight,
        "group_1": settings["config_groups"]["group_0"] | {"targets": [STEM]},
    }
    index = read_index(write(tmp_path, one | down, settings))
    assert torch.equal(read_tensor(index.tensors[f"{STEM}.weight"]), expected.bfloat16())
    found = read_tensor(index.tensors[f"{STEM.replace('up', 'down')}.weight"])
    assert torch.equal(found, also.bfloat16())


def test_faults(tmp_path: Path) -> None:
    tensors, settings, _ = stored("int4 in groups", torch.randn(16, 64))
    scale, packed = f"{STEM}.weight_scale", f"{STEM}.weight_packed"
    nan = tensors[scale].clone()
    nan[3, 1] = float("nan")
    cases: list[tuple[dict[str, Tensor], dict[str, Any], str]] = [
        ({packed: tensors[packed]}, settings, "has no scales"),
        (tensors | {scale: tensors[scale][:8].clone()}, settings, r"has the shape \[8, 2\]"),
        ({scale: tensors[scale]}, settings, "is the scale of a weight that is missing"),
        (tensors, settings | {"config_groups": {}}, "no config_groups"),
        (tensors, settings | {"format": "marlin-24"}, "is marlin-24; expected one of"),
        (tensors | {scale: nan}, settings, "NaN or infinite scales"),
    ]
    for number, (parts, said, message) in enumerate(cases):
        with pytest.raises(CheckpointError, match=message) as caught:
            read_tensor(read_index(write(tmp_path / str(number), parts, said)).tensors[f"{STEM}.weight"])
        assert "\n" not in str(caught.value)
