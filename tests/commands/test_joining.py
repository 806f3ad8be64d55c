"""Parts give way to weight files: the disk holds a result once, and nothing that was encoded is lost by a stop."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from spectral_surgery.codec.rate import Target
from spectral_surgery.commands.compress import compress, job
from spectral_surgery.engines import local
from spectral_surgery.errors import CheckpointError
from spectral_surgery.files import writer
from spectral_surgery.files.compressed.settings import CompressOptions
from spectral_surgery.run import Run
from tests.support.checkpoints import contents, gaussian, write_folder

OPTIONS = CompressOptions(Target("bits", 4.0))
TENSORS = {f"layers.{i}.weight": gaussian(130 + i, 200, seed=i) for i in range(6)} | {"norm": torch.ones(9)}
ENTRIES = 3 * 6 + 1


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("joining") / "source", TENSORS)


@pytest.fixture(scope="module")
def expected(source: Path) -> dict[str, bytes]:
    compress(source, source.parent / "out", OPTIONS)
    return contents(source.parent / "out")


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the tensors whose parts are encoded."""
    names, real = [], local.run_unit

    def counted(store: Any, read: Any, **options: Any) -> object:
        if read.weight is not None:
            names.append(read.unit.tensor.info.name)
        return real(store, read, **options)

    monkeypatch.setattr(local, "run_unit", counted)
    monkeypatch.setattr(writer, "_AT_ONCE", 1)  # the disk is waited for after every tensor
    return names


def stop_at(entry: int, monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    real, count = writer._stream, iter(range(1000))

    def stream(file: Any, path: Path, one: writer.Entry) -> None:
        if next(count) == entry:
            file.write(next(iter(one.chunks()))[:100])  # in the middle of it
            raise error
        real(file, path, one)

    monkeypatch.setattr(writer, "_stream", stream)


def units(out: Path) -> list[Path]:
    return sorted(out.with_name(f"{out.name}.partial").glob("units/*.unit"))


@pytest.mark.parametrize("entry", [0, 1, 6, 13, 14, 16, 18])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_join_that_stops_anywhere_goes_on(
    tmp_path: Path,
    source: Path,
    expected: dict[str, bytes],
    encoded: list[str],
    monkeypatch: pytest.MonkeyPatch,
    entry: int,
    error: BaseException,
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        stop_at(entry, patch, error)
        with pytest.raises((CheckpointError, KeyboardInterrupt)):
            compress(source, out, OPTIONS)
    assert len(encoded) == 6
    assert not out.exists()
    assert len(units(out)) == 6 - max(0, entry - 13)  # codes come last: what is on the disk has no part any more
    compress(source, out, OPTIONS, run=Run(resume=True))
    assert len(encoded) == 6  # nothing again
    assert contents(out) == expected


def test_two_stops_in_a_row(
    tmp_path: Path, source: Path, expected: dict[str, bytes], encoded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    for entry in (15, 3, 17):
        with monkeypatch.context() as patch:
            stop_at(entry, patch, KeyboardInterrupt())
            with pytest.raises(KeyboardInterrupt):
                compress(source, out, OPTIONS, run=Run(resume=True))
    compress(source, out, OPTIONS, run=Run(resume=True))
    assert len(encoded) == 6
    assert contents(out) == expected


def test_a_weight_file_that_was_damaged_meanwhile_is_not_trusted(
    tmp_path: Path, source: Path, expected: dict[str, bytes], encoded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        stop_at(16, patch, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            compress(source, out, OPTIONS)
    file = tmp_path / "out.partial" / "model.safetensors"
    info = writer_infos(file)["layers.1.weight.spectral_codes"]
    data = bytearray(file.read_bytes())
    data[info.start + 50] ^= 1
    file.write_bytes(bytes(data))
    compress(source, out, OPTIONS, run=Run(resume=True))
    assert encoded[6:] == ["layers.1.weight"]
    assert contents(out) == expected


def test_several_weight_files(
    tmp_path: Path, source: Path, encoded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "write_checkpoint", small_shards)
    compress(source, tmp_path / "whole", OPTIONS)
    assert len(list((tmp_path / "whole").glob("*.safetensors"))) > 3
    for entry in (4, 9, 14):
        out = tmp_path / str(entry)
        with monkeypatch.context() as patch:
            stop_at(entry, patch, KeyboardInterrupt())
            with pytest.raises(KeyboardInterrupt):
                compress(source, out, OPTIONS)
        assert len(units(out)) < 6
        encoded.clear()
        compress(source, out, OPTIONS, run=Run(resume=True))
        assert not encoded
        assert contents(out) == contents(tmp_path / "whole")


def test_the_disk_holds_a_result_once(tmp_path: Path, encoded: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_folder(tmp_path / "large", {f"layers.{i}.weight": gaussian(512, 512, seed=i) for i in range(8)})
    most, real = [0], writer.write_pieces

    def looked(file: Any, data: Any) -> None:
        real(file, data)
        file.flush()
        folder = tmp_path / "out.partial"
        most.append(sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file()))

    monkeypatch.setattr(writer, "write_pieces", looked)
    compress(source, tmp_path / "out", OPTIONS)
    size = sum(path.stat().st_size for path in (tmp_path / "out").iterdir())
    assert len(encoded) == 8
    assert max(most) < 1.4 * size  # the result, and the parts of one tensor


def small_shards(folder: Path, entries: list[writer.Entry], *, metadata: dict[str, str]) -> list[Path]:
    return writer.write_checkpoint(folder, entries, metadata=metadata, max_shard_size=20_000)


def writer_infos(file: Path) -> dict[str, Any]:
    from spectral_surgery.files.header import read_header

    return read_header(file).tensors


def test_a_file_with_the_same_header_is_written_in_place(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    values = torch.arange(100, dtype=torch.float32)
    called: list[str] = []

    def pieces() -> Iterator[memoryview]:
        yield writer.tensor_bytes(values)

    entry = writer.Entry("a", "F32", (100,), pieces, lambda: called.append("a"))
    writer.write_file(path, [entry])
    before, inode = path.read_bytes(), path.stat().st_ino
    writer.write_file(path, [writer.copy_entry(writer_infos(path)["a"])])
    assert (path.read_bytes(), path.stat().st_ino) == (before, inode)
    assert called == ["a"]
    writer.write_file(path, [writer.tensor_entry("b", torch.zeros(3))])
    assert writer_infos(path).keys() == {"b"}
