"""Kernels run wherever Python does: with a cache and without one, in threads, forks and fresh processes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from spectral_surgery.kernels.compile import kernel

ROOT = Path(__file__).parents[2]
FEWER = {
    "avx2": {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "+avx,+avx2,+fma,+sse4.2"},
    "plain": {"NUMBA_CPU_NAME": "x86-64", "NUMBA_CPU_FEATURES": ""},
}
LOOKING_UP = {"amd": FEWER["avx2"] | {"NUMBA_CPU_NAME": "znver3"}}  # without gathers


def use(how: str, root: Path = ROOT, **environment: str | None) -> None:
    """Use all kernels in a fresh process; None takes a variable away."""
    variables = {name: value for name, value in (os.environ | environment).items() if value is not None}
    variables["PYTHONPATH"] = str(root)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "tests.support.kernel_use", how],
        cwd=root,
        env=variables,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


@pytest.mark.slow
def test_they_are_kept_on_disk(tmp_path: Path) -> None:
    use("once", NUMBA_CACHE_DIR=str(tmp_path))
    files = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.nb*")}
    names = {file.name.split("-")[0].rsplit("_", 1)[0] for file in files}
    assert names >= {
        *("nearest.nearest", "lattice.words_of", "lanes.decode"),
        *("rans._encode", "rans.decode", "rans.count_symbols"),
    }
    use("once", NUMBA_CACHE_DIR=str(tmp_path))
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.nb*")} == files, "compiled again"


@pytest.mark.slow
def test_a_cache_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").touch()  # an administrator may write to every folder, but to none below a file
    (tmp_path / "folder").mkdir(mode=0o500)
    for cache in ("file/folder", "folder"):
        use("once", NUMBA_CACHE_DIR=str(tmp_path / cache), HOME=None)


@pytest.mark.slow
def test_a_package_that_cannot_be_written_to(tmp_path: Path) -> None:
    """Nowhere at all may kernels be kept; then each process compiles them."""
    for folder in ("spectral_surgery", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__", "golden"))
    (tmp_path / "spectral_surgery" / "kernels" / "__pycache__").touch()
    use("once", tmp_path, HOME="/dev/null", NUMBA_CACHE_DIR=None)
    assert not list(tmp_path.rglob("*.nb*"))


@pytest.mark.slow
def test_four_threads_compile_at_once(tmp_path: Path) -> None:
    use("threads", NUMBA_CACHE_DIR=str(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("how", ["threads", "fork", "spawn"])
def test_processes_that_find_them_on_disk(how: str) -> None:
    use(how)


def test_what_compiles_says_so(tmp_path: Path) -> None:
    """In one line of the process that does, and not where kernels are found on disk."""
    program = (
        "import numpy as np; from spectral_surgery.kernels.lattice import words_of;"
        " words_of(np.zeros((32, 2), np.int32), np.zeros(2, np.uint8))"
    )
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    said = [
        subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
        for _ in range(2)
    ]
    assert said[0].stderr.splitlines() == [
        "spectral_surgery compiles its kernels, once for this processor. This takes up to 40 seconds."
    ]
    assert said[1].stderr == ""


@pytest.mark.slow
def test_another_version_compiles_anew(tmp_path: Path) -> None:
    """Also where a part of a kernel lies in another file, and all times are the same."""
    shutil.copytree(ROOT / "spectral_surgery", tmp_path / "spectral_surgery", ignore=shutil.ignore_patterns("*.nb*"))
    program = (
        "import numpy as np; from spectral_surgery.kernels.lattice import words_of;"
        " words_of(np.zeros((32, 2), np.int32), np.zeros(2, np.uint8))"
    )
    said, other = [], tmp_path / "spectral_surgery" / "kernels" / "vectors.py"
    for text in ("", "# another version\n"):
        before = other.stat()
        other.write_text(other.read_text() + text)
        os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
        environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": str(tmp_path)}
        command = [sys.executable, "-c", program]
        for _ in range(2):
            done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
            said.append(done.stderr)
    assert [bool(one) for one in said] == [True, False, True, False]


@pytest.mark.slow
@pytest.mark.parametrize("processor", FEWER | LOOKING_UP)
def test_frames_and_points_on_other_processors(processor: str, tmp_path: Path) -> None:
    """The same bytes, codes and points without the vector instructions of this one."""
    tests = ("codec/test_golden.py", "kernels/test_lattice.py", "kernels/test_rans.py::test_lanes_in_vectors")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist"]
    variables = os.environ | (FEWER | LOOKING_UP)[processor] | {"NUMBA_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [*command, *(f"tests/{test}" for test in tests)],
        cwd=ROOT,
        env=variables,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


def test_a_kernel_of_a_function_without_a_file() -> None:
    """Where numba has no place for a cache it says so with a RuntimeError."""
    names: dict[str, object] = {}
    exec("def double(x):\n    return 2 * x\n", names)
    double = kernel(names["double"])  # type: ignore[type-var]
    assert double(21) == 42  # type: ignore[operator]
