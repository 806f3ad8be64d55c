from __future__ import annotations

import subprocess
import sys

from spectral_surgery.memory import peak_rss_bytes


def test_the_peak_is_ours_and_not_that_of_who_started_us() -> None:
    ballast = bytearray(300 << 20)
    ballast[::4096] = b"x" * len(ballast[::4096])
    assert peak_rss_bytes() > 300 << 20
    code = "from spectral_surgery.memory import peak_rss_bytes; print(peak_rss_bytes())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 150 << 20
