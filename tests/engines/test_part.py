"""One part on another machine: the same bytes, its file where the folder is, and errors that may pass."""

from __future__ import annotations

import errno
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fsspec.implementations.local import LocalFileSystem
from fsspec.registry import known_implementations, register_implementation
from safetensors.torch import load_file

from spectral_surgery.codec.rate import Target
from spectral_surgery.commands.compress import plan_compression
from spectral_surgery.engines import part as part_module
from spectral_surgery.engines.part import Order, carry_out, installed
from spectral_surgery.engines.parts import Parts
from spectral_surgery.errors import BackendError, CheckpointError, ConfigError
from spectral_surgery.files.compressed.settings import CompressOptions
from spectral_surgery.files.compressed.units import UnitStore, is_done
from spectral_surgery.hub.failures import UnansweredError
from spectral_surgery.run import Run
from tests.support.checkpoints import gaussian, write_folder

OPTIONS = CompressOptions(Target("bits", 3.0))


@pytest.fixture
def order(tmp_path: Path) -> Order:
    source = write_folder(tmp_path / "source", {"layers.0.weight": gaussian(64, 96)})
    _, plan = plan_compression(source, OPTIONS)
    (tmp_path / "units").mkdir()
    (tmp_path / "units" / "a.token").write_text("a.token")
    file = source / "model.safetensors"
    store, unit = UnitStore(tmp_path / "units", "key"), plan.units[0]
    return Order(store, unit, plan.options, Run().threads, "a.token", {file: file.stat().st_size})


def test_the_file_is_left_in_the_folder_or_given_back(order: Order, tmp_path: Path) -> None:
    given = carry_out(replace(order, store=replace(order.store, folder=tmp_path / "nowhere")))
    assert not is_done(order.store, order.unit)
    order.store.path(order.unit).write_bytes(given or b"")
    assert is_done(order.store, order.unit)
    back = load_file(order.store.path(order.unit))
    order.store.path(order.unit).unlink()
    assert carry_out(order) is None
    left = load_file(order.store.path(order.unit))
    assert left.keys() == back.keys() == {"codes", "frames", "step"}
    assert all(torch.equal(left[name], back[name]) for name in left)


def test_the_file_is_left_where_all_nodes_reach(order: Order, tmp_path: Path) -> None:
    parts = Parts("memory://shared/parts")
    parts.check()
    assert parts.fetch(order.store, order.unit) is None
    there = replace(order, store=replace(order.store, folder=tmp_path / "nowhere"), parts=parts)
    assert carry_out(there) is None
    order.store.path(order.unit).write_bytes(parts.fetch(order.store, order.unit) or b"")
    assert is_done(order.store, order.unit)
    parts.remove(replace(order.store, key="another"))
    assert parts.fetch(order.store, order.unit)
    parts.remove(order.store)
    assert parts.fetch(order.store, order.unit) is None


class Full(LocalFileSystem):
    """A place that cannot be written."""

    protocol = "full"

    def pipe_file(self, *_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("url", "kind", "message"),
    [
        (
            "nowhere://bucket",
            ConfigError,
            r"expected a URL such as s3://.* got another one \(Protocol not known: nowhere",
        ),
        ("missing://bucket", BackendError, r"expected a package for it, got none \(.*Install the package missing"),
        ("full://{}", CheckpointError, r"expected a place to write to, got an error \(.*No space left on device"),
    ],
)
def test_places_that_cannot_be_used(tmp_path: Path, url: str, kind: type[Exception], message: str) -> None:
    register_implementation("full", Full, clobber=True)
    known_implementations["missing"] = {"class": "nopackage.System", "err": "Install the package missing"}
    with pytest.raises(kind, match=rf"^--parts {url.split(':', maxsplit=1)[0]}://.*: {message}") as told:
        Parts(url.format(tmp_path)).check()
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("content", [None, b"b.token", b"\xff"])
def test_another_folder_at_the_same_path_is_left_alone(order: Order, content: bytes | None) -> None:
    token = order.store.folder / order.token
    token.unlink()
    if content is not None:
        token.write_bytes(content)
    assert carry_out(order)
    assert not order.store.path(order.unit).exists()


def test_a_source_that_is_not_here_is_refused(order: Order) -> None:
    (file,) = order.sizes
    for other, found in ((1, "one of"), (None, "none")):
        if other is None:
            file.unlink()
        sizes = {file: 7}
        with pytest.raises(CheckpointError, match=rf"node .*model\.safetensors: expected the file of 7 .*got {found}"):
            carry_out(replace(order, sizes=sizes))


def test_errors_that_may_pass_are_system_errors(order: Order, monkeypatch: pytest.MonkeyPatch) -> None:
    def raising(error: Exception, cause: OSError | None = None) -> None:
        def read(*_: object) -> None:
            raise error from cause

        monkeypatch.setattr(part_module, "read_unit", read)

    passing = [
        (CheckpointError("x"), OSError(errno.EIO, "I/O error")),
        (CheckpointError("x"), OSError(errno.ESTALE, "Stale file handle")),
        (UnansweredError("x"), None),
    ]
    for error, cause in passing:
        raising(error, cause)
        with pytest.raises(OSError, match="x"):
            carry_out(order)
    lasting = [
        (CheckpointError("x"), OSError(errno.ENOSPC, "No space left on device")),
        (CheckpointError("x"), None),
        (ConfigError("x"), None),
    ]
    for error, cause in lasting:
        raising(error, cause)
        with pytest.raises(type(error), match="x"):
            carry_out(order)


def test_the_version_changes_with_the_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("a = 1\n")
    monkeypatch.setattr("spectral_surgery.__file__", str(package / "__init__.py"))
    found = set()
    for text in ("a = 1\n", "a = 2\n"):
        (package / "more.py").write_text(text)
        installed.cache_clear()
        found.add(installed())
    installed.cache_clear()
    assert len(found) == 2
    assert all(one.startswith("0.1.0 (") for one in found)
