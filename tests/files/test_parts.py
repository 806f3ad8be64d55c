"""Parts of one tensor that were encoded in different ways are stored as one tensor."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch

from spectral_surgery.codec import encoded as codec
from spectral_surgery.codec.encode import encode
from spectral_surgery.codec.encoded import Basis, EncodedSpectrum
from spectral_surgery.codec.feedback import Codes
from spectral_surgery.codec.rate import Target
from spectral_surgery.commands.compress import compress, plan_compression
from spectral_surgery.commands.compress.job import opened
from spectral_surgery.commands.decompress import decompress
from spectral_surgery.files.compressed import plan as plan_module
from spectral_surgery.files.compressed.checkpoint import open_compressed
from spectral_surgery.files.compressed.parts import part_record, read_part, write_part
from spectral_surgery.files.compressed.settings import CompressOptions
from spectral_surgery.files.compressed.units import leave_codes, read_unit, run_unit
from spectral_surgery.files.index import read_index
from spectral_surgery.files.reader import read_bytes, read_tensor
from spectral_surgery.run import Run
from tests.support.checkpoints import gaussian, write_folder

NAME, EXPERTS, HEIGHT, WIDTH = "model.layers.0.mlp.experts.down_proj", 4, 64, 96
OPTIONS = CompressOptions(Target("bits", 3.0), min_weights=1, allocation="even", calibration="some text")


@pytest.mark.parametrize("chosen", [(), (2,), (0, 3), (0, 1, 2, 3)], ids=str)
def test_experts_with_one_step_and_with_a_step_for_each_column(tmp_path: Path, chosen: tuple[int, ...]) -> None:
    source = write_folder(tmp_path / "source", {NAME: gaussian(EXPERTS, HEIGHT, WIDTH)})
    index, plan = plan_compression(source, OPTIONS)
    (tensor,) = plan.tensors
    weight, basis = read_tensor(tensor.info), Basis(OPTIONS.transform, OPTIONS.tile, tensor.axes)
    out = tmp_path / "out"
    with opened(source, out, index, plan, Run()) as job:
        store = job.store
        for expert in chosen:
            coefficients = basis.forward(weight[expert])
            steps = 0.05 * torch.linspace(1, 2, WIDTH).bfloat16().float()
            codes = Codes((coefficients / (0.4 * steps)).round().to(torch.int32), 0.4, 0.0, steps)
            leave_codes(store, plan, tensor, coefficients, codes, first=expert * HEIGHT)
        for unit in plan.units:
            run_unit(store, read_unit(store, unit), OPTIONS, 1)
        alone = [_alone(store.path(unit), store.key) for unit in plan.units]
        out.mkdir()
        job.write(out)
    stored = open_compressed(tmp_path / "out")
    for number, one in enumerate(alone):
        part = stored.part(NAME, number)
        assert part.frames == one.frames
        assert part.offset == one.offset
        assert torch.equal(part.decode().coefficients(), one.decode().coefficients())
        assert torch.equal(part.to_dense(), one.to_dense())
    assert decompress(tmp_path / "out", tmp_path / "plain", verify=True).failures == ()
    on_disk = sum(own.nbytes for own in read_index(tmp_path / "out").tensors.values())
    shared = 8 * (EXPERTS - 1)  # every part counts the offset that it begins at
    assert stored.manifest.report.stored_bytes == on_disk + shared


def _alone(file: Path, key: str) -> EncodedSpectrum:
    """What a unit file holds."""
    found = read_part(file, key)
    assert found is not None
    assert found[1] is not None
    tensors, record = found
    codes, step = tensors["codes"], read_tensor(tensors["step"])
    data = bytes(read_bytes(codes, 0, codes.nbytes))
    frames = tuple(data[a:b] for a, b in pairwise(read_tensor(tensors["frames"]).tolist()))
    basis = Basis(record.transform, OPTIONS.tile)
    return EncodedSpectrum(frames, (HEIGHT, WIDTH), record.rows_per_frame, step[:-1], float(step[-1]), basis)


def test_one_transform_for_all_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The best of the first one, even where it is not that of another: one form in memory holds them together."""
    monkeypatch.setattr(codec, "FRAME_SIZE", 64)
    monkeypatch.setattr(plan_module, "PART_WEIGHTS", 1 << 14)
    weight = gaussian(256, 128)
    uneven = weight[:128] * torch.tensor([[1.0], [0.05]]).repeat(64, 1)  # transforms mix its large and small rows
    wanted = ("dct", "identity")
    for number, whole in enumerate((torch.cat((weight[:128], uneven)), torch.cat((uneven, weight[:128])))):
        source = write_folder(tmp_path / f"source{number}", {"w": whole})
        report = compress(source, tmp_path / f"out{number}", CompressOptions(Target("bits", 3.0), transform="auto"))
        assert report is not None
        parts = report.manifest.tensors["w"].parts
        assert len(parts) == 2
        assert {part.transform for part in parts} == {wanted[number]}


def test_a_part_with_a_hole_is_done_again(tmp_path: Path) -> None:
    """Parts are not waited for, so that a power failure may leave any page of one empty."""
    weight = gaussian(64, 96)
    encoded, report = encode(weight, Target("bits", 3.0))
    write_part(tmp_path / "part", "key", encoded, part_record((0, 64), encoded, report))
    whole = (tmp_path / "part").read_bytes()
    assert read_part(tmp_path / "part", "key") is not None
    for name, info in read_index(tmp_path / "part").tensors.items():
        at = info.start + next(i for i in range(info.nbytes) if whole[info.start + i])
        (tmp_path / "part").write_bytes(whole[:at] + b"\0" + whole[at + 1 :])
        assert read_part(tmp_path / "part", "key") is None, name
    (tmp_path / "part").write_bytes(b"")
    assert read_part(tmp_path / "part", "key") is None
