"""The command line in this process: what a user gets, without the seconds it takes to import torch."""

from __future__ import annotations

import io
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest.mock import patch

from spectral_surgery.cli import main


def run(*arguments: str | Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """What ``spectral-surgery ARGUMENTS`` prints and returns."""
    words = [*map(str, arguments)]
    out, err = io.StringIO(), io.StringIO()
    code: object = 0
    changed = (patch.object(sys, "argv", ["spectral-surgery", *words]), patch.dict("os.environ", env or {}))
    with changed[0], changed[1], redirect_stdout(out), redirect_stderr(err):
        try:
            main()
        except SystemExit as end:
            code = end.code
    assert isinstance(code, int)
    return subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())
