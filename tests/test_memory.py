from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest

from spectral_surgery import memory
from spectral_surgery.memory import peak_rss_bytes, peak_rss_growth


def test_the_peak_is_ours_and_not_that_of_who_started_us() -> None:
    ballast = bytearray(300 << 20)
    ballast[::4096] = b"x" * len(ballast[::4096])
    assert peak_rss_bytes() > 300 << 20
    code = "from spectral_surgery.memory import peak_rss_bytes; print(peak_rss_bytes())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 150 << 20


def test_growth_is_that_of_one_call(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def call(size: int) -> int:
        ballast = bytearray(size)
        ballast[::4096] = b"x" * len(ballast[::4096])
        return len(ballast)

    if memory._RESET.exists():
        for size in (100 << 20, 30 << 20):  # the smaller one after the larger one
            result, grown = peak_rss_growth(lambda size=size: call(size))
            assert result == size
            assert grown == pytest.approx(size, rel=0.2)
    monkeypatch.setattr(memory, "_RESET", tmp_path / "nowhere")
    assert peak_rss_growth(lambda: call(1)) == (1, None)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="another allocator than glibc's")
@pytest.mark.parametrize("kept", [True, False])
def test_freed_memory_is_kept_where_asked(kept: bool) -> None:
    code = f"""if True:
        import ctypes
        import resource
        from spectral_surgery.memory import keep_freed_memory

        ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: huge pages would be few faults either way
        if {kept}:
            keep_freed_memory()
        for _ in range(2):
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            buffer = bytearray(40 << 20)
            buffer[::4096] = b"x" * len(buffer[::4096])
            del buffer
        print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    """
    clean = {name: value for name, value in os.environ.items() if "MALLOC" not in name and "GLIBC" not in name}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=clean)
    assert (int(done.stdout) < 1000) == kept  # of 10240 pages


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_info"), reason="another allocator than glibc's")
@pytest.mark.parametrize("shared", [True, False])
def test_threads_share_what_is_kept(shared: bool, tmp_path: Path) -> None:
    code = f"""if True:
        import ctypes
        import sys
        from threading import Barrier, Thread
        from spectral_surgery.memory import keep_freed_memory

        libc = ctypes.CDLL(None)
        libc.malloc.restype = libc.fopen.restype = ctypes.c_void_p
        if {shared}:
            keep_freed_memory()
        together = Barrier(4)

        def take():
            together.wait()
            libc.malloc(ctypes.c_size_t(5000))

        threads = [Thread(target=take) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        file = ctypes.c_void_p(libc.fopen(sys.argv[1].encode(), b"w"))
        libc.malloc_info(0, file)
        libc.fclose(file)
    """
    told = tmp_path / "arenas.xml"
    clean = {name: value for name, value in os.environ.items() if "MALLOC" not in name and "GLIBC" not in name}
    subprocess.run([sys.executable, "-c", code, str(told)], check=True, env=clean)
    assert (told.read_text(encoding="ascii").count("<heap ") == 1) == shared
