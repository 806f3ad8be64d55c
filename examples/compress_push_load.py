"""Compress a model, push it, pull it again, and get a plain folder back that every other tool loads.

Run: python examples/compress_push_load.py MODEL OUTPUT_FOLDER [REPO]

MODEL is a folder or org/name. Without REPO nothing is sent anywhere: the push is a dry run, and what would be pulled is
the folder that would have been pushed.
"""

from __future__ import annotations

import sys
from pathlib import Path

from spectral_surgery import CompressOptions, Target, compress, decompress, pull, push, resolve


def main(model: str, out: Path, repository: str | None) -> None:
    small = out / "compressed"
    report = compress(resolve(model), small, CompressOptions(Target("bits", 4.0)))
    print(f"compressed: {report.compression_ratio:.1f}x smaller, error {report.manifest.report.relative_error:.3f}")

    pushed = push(small, repository or "org/name", dry_run=repository is None)
    print(
        f"push: {len(pushed.files)} files, {pushed.nbytes / 1e6:.1f} MB; {pushed.url or 'not sent, no REPO was given'}"
    )

    if repository:
        small = out / "pulled"
        print(f"pull: {pull(repository, small).commit}")
    plain = decompress(small, out / "plain", verify=True)
    print(f"plain: {plain.tensors} tensors, {plain.output_bytes / 1e6:.1f} MB, verified; load {out / 'plain'} as usual")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3] if len(sys.argv) > 3 else None)
