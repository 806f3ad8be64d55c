"""Small matrices that are decoded together are what each by itself is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from spectral_surgery.codec.rate import Target
from spectral_surgery.commands.compress import compress
from spectral_surgery.commands.decompress import decompress
from spectral_surgery.errors import CheckpointError
from spectral_surgery.files.compressed import stacked
from spectral_surgery.files.compressed.checkpoint import CompressedCheckpoint, open_compressed
from spectral_surgery.files.compressed.settings import CompressOptions
from spectral_surgery.files.compressed.stacked import Stacks
from tests.support.checkpoints import gaussian, write_folder


def opened(root: Path, target: Target) -> CompressedCheckpoint:
    """Experts of two shapes in turn, an embedding with another basis, and a matrix that is large."""
    shapes = {
        f"experts.{n:02d}.{kind}.weight": size for n in range(9) for kind, size in (("a", (40, 70)), ("b", (33, 20)))
    }
    shapes |= {"embed.weight": (40, 70), "large.weight": (300, 200)}
    tensors = {name: gaussian(*size, seed=n) * (n + 1) for n, (name, size) in enumerate(shapes.items())}
    tensors["experts.03.a.weight"][0, 0] = 4000  # codes beyond a byte
    write_folder(root / "source", tensors)
    compress(root / "source", root / "out", CompressOptions(target, min_weights=64))
    return open_compressed(root / "out").with_tables()


@pytest.mark.parametrize("target", [Target("bits", 4.0), Target("density", 0.3)], ids=["lattice", "offsets"])
def test_each_is_what_it_is_by_itself(target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stacked, "_STACK", 4 * 40 * 70)
    checkpoint = opened(tmp_path, target)
    stacks, calls = Stacks(checkpoint), []
    monkeypatch.setattr(
        Stacks, "_decoded", lambda self, names, of=Stacks._decoded: (calls.append(names), of(self, names))[1]
    )
    for name in sorted(checkpoint.manifest.tensors):
        found = stacks.take(name)
        expected = checkpoint.part(name, 0).to_dense()
        assert (found is None) == (name == "large.weight")
        if found is not None:
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))
    assert sorted(map(len, calls)) == [1, 1, 4, 4, 9]
    assert stacks.take("experts.01.a.weight") is not None, "asked for once more"
    assert decompress(tmp_path / "out", tmp_path / "plain", verify=True).failures == ()


def test_damage_is_said_of_the_tensor_that_has_it(tmp_path: Path) -> None:
    checkpoint = opened(tmp_path, Target("bits", 4.0))
    info = checkpoint.index.tensors["experts.02.b.weight.spectral_codes"]
    data = bytearray((tmp_path / "out" / "model.safetensors").read_bytes())
    data[info.start + 30] ^= 1
    (tmp_path / "out" / "model.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"experts\.02\.b\.weight: expected part 0 with its checksum"):
        decompress(tmp_path / "out", tmp_path / "plain")
