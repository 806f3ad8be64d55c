"""Run cases: check, then measure, then stamp; a case that fails its check shows no figures."""

from __future__ import annotations

import platform
import shutil
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch

from benchmarks.case import BenchCase, CheckFailedError, Inputs
from benchmarks.cases import CASES
from spectral_surgery.errors import ConfigError
from spectral_surgery.progress import Progress, silent

# kinds of arithmetic, and the flags of Linux that say that a processor has instructions for them
_ARITHMETIC = {
    "AVX2": {"avx2"},
    "AVX-512": {"avx512f"},
    "bfloat16": {"avx512_bf16", "amx_bf16"},
    "int8": {"avx512_vnni", "avx_vnni", "amx_int8"},
}


def run_cases(
    names: Sequence[str], inputs: Inputs | None = None, *, progress: Progress = silent
) -> list[dict[str, object]]:
    """Run benchmark cases.

    Args:
        names: of the cases; none for all that take no inputs of a user.
        inputs: what they are run on.
        progress: called after each case.

    Returns:
        For each case its name, help, status (``ok`` or ``FAILED``), reason, rows, notes and stamp.

    Raises:
        ConfigError: when a name is unknown, or no case takes what is given; nothing is run then.
    """
    inputs = inputs or Inputs()
    cases = [CASES[name] for name in names] or [case for case in CASES.values() if not case.takes]
    _refuse_unused(cases, inputs)
    results: list[dict[str, object]] = []
    for number, case in enumerate(cases):
        result: dict[str, object] = {"case": case.name, "help": case.help, "status": "ok", "reason": "", "rows": []}
        try:
            result |= {"rows": case.run(inputs), "notes": list(case.notes)}
        except CheckFailedError as error:
            result |= {"status": "FAILED", "reason": str(error)}
        results.append(result | {"stamp": stamp()})
        progress(number + 1, len(cases), case.name)
    return results


def _refuse_unused(cases: Sequence[BenchCase], inputs: Inputs) -> None:
    for name in inputs.given():
        if not any(name in case.takes for case in cases):
            takers = [case.name for case in CASES.values() if name in case.takes]
            raise ConfigError(
                f"--{name.replace('_', '-')}: expected one of the cases that take it, {', '.join(takers)}, got none."
                " Name it, or leave the option away."
            )


def stamp() -> dict[str, object]:
    """Where and with what a figure was measured."""
    return {
        "commit": _commit(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": _processor(),
        "arithmetic": _arithmetic(),
        "threads": torch.get_num_threads(),
        **({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}),
        "date": datetime.now(tz=UTC).date().isoformat(),
    }


def _commit() -> str:
    git = shutil.which("git")
    here = Path(__file__).parent
    if git is None:
        return "unknown"
    found = subprocess.run(  # noqa: S603 - a fixed command
        [git, "-C", str(here), "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    )
    return found.stdout.strip() or "unknown"


def _processor() -> str:
    return next(iter(_cpuinfo("model name")), "") or platform.processor() or platform.machine()


def _arithmetic() -> str:
    """What the processor computes with in vectors, beside float32."""
    flags = set(" ".join(_cpuinfo("flags")[:1]).split())
    kinds = [name for name, known in _ARITHMETIC.items() if flags & known]
    return " and ".join(kinds) or "unknown"


def _cpuinfo(field: str) -> list[str]:
    """The values of a field, one of each core; none where the system has no such file."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    return [line.partition(":")[2].strip() for line in lines if line.startswith(field)]
