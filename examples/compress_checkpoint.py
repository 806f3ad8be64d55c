"""Compress a checkpoint three ways, look at what each costs, and get a plain folder back.

Run: python examples/compress_checkpoint.py MODEL_FOLDER OUTPUT_FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

from spectral_surgery import CompressOptions, Run, Target, compress, decompress


def main(source: Path, out: Path) -> None:
    for target in (Target("bits", 4.0), Target("max_error", 0.05), Target("density", 0.2)):
        folder = out / f"{target.kind}-{target.value:g}"
        report = compress(source, folder, CompressOptions(target), run=Run(threads=2))  # workers=2 is two processes
        total = report.manifest.report
        print(
            f"{folder.name}: {total.bits_per_weight:.3f} bits per weight, relative error {total.relative_error:.4f}, "
            f"{report.compression_ratio:.1f}x smaller on disk"
        )
    print(decompress(out / "bits-4", out / "plain", verify=True, threads=2))


if __name__ == "__main__":  # workers would import this file
    main(Path(sys.argv[1]), Path(sys.argv[2]))
