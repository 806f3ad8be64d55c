"""What other processors do, on this one: choices are forced, and vector instructions switched off."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from spectral_surgery.matmul import dispatch
from spectral_surgery.matmul.dispatch import Processor
from tests.support.processors import exact_int_mm

ROOT = Path(__file__).parents[2]
OF_PRODUCTS = (
    "tests/matmul/test_host_offload.py::test_is_the_form_that_it_streams",
    "tests/matmul/test_few_tokens.py::test_steps_of_columns_and_outliers",
    "tests/codec/test_encode.py::test_an_error_limit_is_never_exceeded",
)
CAPABILITIES = {  # of torch, oneDNN and MKL: those that are not of this machine are taken as none by each
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    "default": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CAPABILITIES)
def test_products_and_promises_with_fewer_instructions(name: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", *OF_PRODUCTS]
    environment = os.environ | CAPABILITIES[name] | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


def test_this_processor_is_asked_once() -> None:
    found = dispatch.processor()
    assert found is dispatch.processor()
    assert isinstance(found, Processor)


def test_the_processor_decides(processor: Processor) -> None:
    """All that depends on it, as one table."""
    int8, bfloat16 = processor.int8, processor.bfloat16
    assert dispatch.way("cpu", 64, torch.float32) == ("planes" if int8 else "blocks")
    assert dispatch.way("cpu", 64, torch.bfloat16) == ("planes" if int8 and not bfloat16 else "blocks")
    assert dispatch.block_dtype("cpu", torch.bfloat16) == (torch.bfloat16 if bfloat16 else torch.float32)
    assert dispatch.transform_dtype("cpu", 16, torch.bfloat16) == torch.float32
    assert dispatch.transform_dtype("cpu", 17, torch.bfloat16) == (torch.bfloat16 if bfloat16 else torch.float32)
    for weights in (1, 1 << 18, 1 << 20, 1 << 24):
        limit = max(16, min(128, (1 << 24) // weights)) if processor.tiles else 128
        assert dispatch.most_tokens(weights, torch.bfloat16) == (limit if processor.tiles else 256)
        many = weights <= 1 << 20 and processor.int8 and not processor.tiles
        assert dispatch.most_tokens(weights, torch.float32) == (4096 if many else limit)
    for tokens in (1, 100):
        assert dispatch.transform_dtype("cpu", tokens, torch.float64) == torch.float64
        assert dispatch.transform_dtype("cuda", tokens, torch.float32) == torch.float32


@pytest.mark.usefixtures("processor")
def test_products_of_int8_do_not_saturate() -> None:
    left, right = torch.full((8, 64), 127, dtype=torch.int8), torch.full((64, 8), -128, dtype=torch.int8)
    if dispatch.processor().int8:
        assert torch.equal(torch._int_mm(left, right), exact_int_mm(left, right))
