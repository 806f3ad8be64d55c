"""Adapters under FSDP2: two processes train like one, and the adapter is saved whole."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from spectral_surgery.files.peft.adapter_files import read_adapter

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fourierft", "lora"])
def test_two_shards_train_like_one_process(tmp_path: Path, method: str) -> None:
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    for name, prefix in (("one", ["-m"]), ("two", launch)):
        command = [sys.executable, *prefix, "tests.support.fsdp_training", method, str(tmp_path / name)]
        done = subprocess.run(
            command, check=False, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-3000:]
    losses = [json.loads((tmp_path / name / "losses.json").read_text()) for name in ("one", "two")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert losses[0][-1] < losses[0][0]
    one, two = read_adapter(tmp_path / "one"), read_adapter(tmp_path / "two")
    for layer, tensors in one.layers.items():
        for key, tensor in tensors.items():
            torch.testing.assert_close(two.layers[layer][key], tensor, rtol=1e-3, atol=1e-4)
