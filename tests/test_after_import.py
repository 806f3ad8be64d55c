"""An action follows the import of a library, whoever imports it."""

from __future__ import annotations

import importlib
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from spectral_surgery.after_import import when_imported
from spectral_surgery.errors import BackendError

HOME = "spectral_surgery_test_home"
LIBRARY = "spectral_surgery_test_library"


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    home = "from spectral_surgery.errors import BackendError\ncalls = []\ndef act(): calls.append(1)\n"
    (tmp_path / f"{HOME}.py").write_text(home + "def fail(): raise BackendError('not this one')\n")
    (tmp_path / f"{LIBRARY}.py").write_text("value = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    finders = list(sys.meta_path)
    yield tmp_path
    sys.meta_path[:] = finders
    for name in (HOME, LIBRARY):
        sys.modules.pop(name, None)


def calls() -> int:
    return len(importlib.import_module(HOME).calls)


@pytest.mark.usefixtures("modules")
def test_the_action_waits_for_the_import_and_comes_once() -> None:
    before = list(sys.meta_path)
    when_imported(LIBRARY, HOME, "act")
    assert HOME not in sys.modules
    assert importlib.util.find_spec(LIBRARY) is not None  # looking alone is no import
    assert HOME not in sys.modules
    assert importlib.import_module(LIBRARY).value == 1
    assert calls() == 1
    assert sys.meta_path == before
    importlib.reload(sys.modules[LIBRARY])
    assert calls() == 1


@pytest.mark.usefixtures("modules")
def test_a_library_that_is_there_already() -> None:
    importlib.import_module(LIBRARY)
    when_imported(LIBRARY, HOME, "act")
    assert calls() == 1


def test_an_import_that_fails_is_the_librarys_own_matter(modules: Path) -> None:
    when_imported(LIBRARY, HOME, "act")
    (modules / f"{LIBRARY}.py").write_text("raise RuntimeError('broken')\n")
    importlib.invalidate_caches()
    with pytest.raises(RuntimeError, match="broken"):
        importlib.import_module(LIBRARY)
    assert HOME not in sys.modules
    (modules / f"{LIBRARY}.py").write_text("value = 23\n")
    assert importlib.import_module(LIBRARY).value == 23
    assert calls() == 1


@pytest.mark.usefixtures("modules")
def test_a_library_that_does_not_exist() -> None:
    when_imported("spectral_surgery_no_such_library", HOME, "act")
    assert importlib.util.find_spec("spectral_surgery_no_such_library") is None
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("spectral_surgery_no_such_library")
    assert HOME not in sys.modules


@pytest.mark.usefixtures("modules")
def test_a_version_that_does_not_fit_is_a_warning() -> None:
    when_imported(LIBRARY, HOME, "fail")
    with pytest.warns(UserWarning, match="not this one"):
        assert importlib.import_module(LIBRARY).value == 1
    assert issubclass(BackendError, Exception)


def test_layers_import_no_compiler(tmp_path: Path) -> None:
    """To import torch.compile takes seconds, and fails where its cache cannot be written."""
    code = "import sys, torch; before = set(sys.modules); import spectral_surgery.layers, spectral_surgery.adapters\n"
    code += "assert not (set(sys.modules) - before) & {'torch._dynamo', 'torch._inductor'}"
    (tmp_path / "file").touch()
    nowhere = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "file" / "cache"), "HOME": str(tmp_path / "file")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False, env={**os.environ, **nowhere})
    assert done.returncode == 0, done.stderr.decode()
