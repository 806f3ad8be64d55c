"""How long fresh processes take to be ready: kernels compiled once, later read from disk, beside torch alone."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch

from benchmarks.case import Row, require
from spectral_surgery.codec.encode import encode
from spectral_surgery.codec.rate import Target

FIRST, LATER = 20.0, 0.3  # seconds; the latter above those of torch
ROUNDS = 5
_SIDE = 512
_TORCH = "import torch"
_PROGRAMS = {
    _TORCH: "import torch",
    "a layer of text: decoded, one token, a row": """
import pickle, sys, torch
from spectral_surgery import matmul
with open(sys.argv[1], "rb") as file:
    form = matmul.resident_form(pickle.load(file), "int8")
with torch.inference_mode():
    y = matmul.form_matmul(torch.ones(1, form.shape[1]), [form])
    rows = matmul.rows_of(torch.tensor([0]), [form])
print(bool(y.isfinite().all() and rows.isfinite().all()))
""",
    "a matrix compressed": """
import torch
from spectral_surgery.codec.encode import encode
from spectral_surgery.codec.rate import Target
matrix = torch.arange(65536.0).sin().reshape(256, 256)
encoded, _ = encode(matrix, Target("bits", 4.0))
print(bool((encoded.to_dense() - matrix).norm() < 0.1 * matrix.norm()))
""",
}


def run(quick: bool) -> list[Row]:
    """Seconds of processes that use kernels, the first time on a machine and later."""
    seconds: dict[str, list[float]] = {name: [] for name in _PROGRAMS}
    with tempfile.TemporaryDirectory() as scratch:
        file, cache = Path(scratch) / "spectrum.pickle", Path(scratch) / "kernels"
        matrix = torch.randn(_SIDE, _SIDE, generator=torch.Generator().manual_seed(0))
        file.write_bytes(pickle.dumps(encode(matrix, Target("bits", 4.0))[0]))
        for _ in range(1 + (2 if quick else ROUNDS)):  # in turn; the first round compiles
            for name, program in _PROGRAMS.items():
                seconds[name].append(_seconds(name, program, file, cache))
    torch_alone = median(seconds[_TORCH][1:])
    rows: list[Row] = []
    for name, (first, *later) in seconds.items():
        own = median(later)
        ours = name != _TORCH
        rows.append(
            {
                "process": name,
                "first, s": first if ours else "",
                "later, s": own,
                "later above torch, s": own - torch_alone,
                "target": f"<= {FIRST:g}; <= {LATER:g}" if ours else "",
                "met": first <= FIRST and own - torch_alone <= LATER if ours else "",
            }
        )
    return rows


def _seconds(name: str, program: str, file: Path, cache: Path) -> float:
    environment = os.environ | {"NUMBA_CACHE_DIR": str(cache), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    started = time.perf_counter()
    done = subprocess.run(  # noqa: S603 (programs above)
        [sys.executable, "-c", program, str(file)], env=environment, capture_output=True, text=True, check=False
    )
    taken = time.perf_counter() - started
    require(done.returncode == 0 and done.stdout in ("", "True\n"), f"{name}: {(done.stderr or done.stdout)[-200:]}")
    return taken
