"""GPU kernels as compilers make them, for chips that need not be here."""

from __future__ import annotations

import importlib.util

import pytest

from benchmarks.cases.gpu_static import over_memory
from benchmarks.compiled_kernels import CHIPS, Chip, compiled, matrix_variant, variants

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
    pytest.mark.slow,
]


@pytest.mark.parametrize("part", range(4))
@pytest.mark.parametrize("chip", CHIPS, ids=lambda chip: chip.name)
def test_no_kernel_spills_or_takes_more_than_a_chip_has(chip: Chip, part: int) -> None:
    if part and chip.name != "H200":
        pytest.skip("a fourth of the kernels is compiled for this chip; `benchmarks gpu_static` compiles all")
    for variant in variants(chip)[part::4]:
        result = compiled(variant, chip)
        assert not result.spilled, variant.name
        assert result.shared <= chip.shared, variant.name
        assert result.matrix or variant.name.startswith(("mix_bins", "coefficient_sums")), variant.name


@pytest.mark.parametrize("layout", ["int8", "int4", "int12"])
@pytest.mark.parametrize("tokens", [1, 8])
def test_codes_are_read_sixteen_bytes_at_a_time_and_faster_than_they_come(layout: str, tokens: int) -> None:
    chip = next(chip for chip in CHIPS if chip.name == "H200")
    variant = matrix_variant(chip, layout, tokens)
    result = compiled(variant, chip)
    assert result.loads.get(16, 0) >= 0.8 * sum(result.loads.values()), result.loads
    assert 0 < over_memory(chip, variant, result) < 0.5
