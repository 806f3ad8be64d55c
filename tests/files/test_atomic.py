from __future__ import annotations

import errno
from pathlib import Path

import pytest

from spectral_surgery.errors import CheckpointError
from spectral_surgery.files.atomic import partial_folder, publishing, replace_file, writing_to


class StoppedError(Exception):
    """Stands for whatever goes wrong inside of a block."""


def tree(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in sorted(folder.rglob("*")) if path.is_file()}


def publish(out: Path, text: str = "new", *, overwrite: bool = False) -> None:
    with publishing(out, overwrite=overwrite) as folder:
        assert folder == out.resolve().with_name(f"{out.resolve().name}.partial")
        (folder / "sub").mkdir()
        (folder / "sub" / "file").write_text(text)


def start(out: Path, stop: type[BaseException], *, keep_partial: bool = False) -> None:
    with publishing(out, overwrite=True, keep_partial=keep_partial) as folder:
        (folder / f"{len(list(folder.iterdir()))}").write_text("new")
        raise stop


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A folder in the way, alone in its parent."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").write_text("old")
    return tmp_path / "out"


def test_a_new_folder_appears_whole(tmp_path: Path) -> None:
    publish(tmp_path / "some" / "parents" / "out")
    assert tree(tmp_path) == {"some/parents/out/sub/file": "new"}
    assert [path.name for path in (tmp_path / "some" / "parents").iterdir()] == ["out"]


def test_nothing_appears_before_the_end(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with publishing(out, overwrite=False) as folder:
        (folder / "file").write_text("new")
        assert not out.exists()
    assert tree(out) == {"file": "new"}


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_empty_folder_is_filled(overwrite: bool, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    publish(tmp_path / "out", overwrite=overwrite)
    assert tree(tmp_path) == {"out/sub/file": "new"}


def test_a_folder_with_content_is_refused(old: Path) -> None:
    message = f"{old}: expected a new or empty folder, got one with content. Use --overwrite to replace"
    with pytest.raises(CheckpointError, match=message):
        publish(old)
    assert tree(old.parent) == {"out/file": "old"}
    assert list(old.parent.iterdir()) == [old]


def test_overwrite_replaces_the_whole_folder(old: Path) -> None:
    publish(old, overwrite=True)
    assert tree(old.parent) == {"out/sub/file": "new"}
    assert list(old.parent.iterdir()) == [old]


@pytest.mark.parametrize("stop", [StoppedError, KeyboardInterrupt, SystemExit])
def test_an_exception_publishes_nothing(stop: type[BaseException], old: Path) -> None:
    with pytest.raises(stop):
        start(old, stop)
    assert tree(old.parent) == {"out/file": "old"}
    assert list(old.parent.iterdir()) == [old]


def test_a_full_disk_publishes_nothing(old: Path) -> None:
    with (
        pytest.raises(CheckpointError, match=f"{old}: expected room for the output, got a full disk"),
        publishing(old, overwrite=True),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert list(old.parent.iterdir()) == [old]
    assert tree(old) == {"file": "old"}


def test_partial_work_is_kept_and_gone_on_with(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for _ in range(2):
        with pytest.raises(StoppedError):
            start(out, StoppedError, keep_partial=True)
    assert tree(tmp_path) == {"out.partial/0": "new", "out.partial/1": "new"}
    with publishing(out, overwrite=False, keep_partial=True):
        pass
    assert tree(tmp_path) == {"out/0": "new", "out/1": "new"}


def test_partial_work_of_others_is_removed(tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "stale").write_text("stale")
    publish(tmp_path / "out")
    assert tree(tmp_path) == {"out/sub/file": "new"}


@pytest.mark.parametrize("name", ["out", "out.partial"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_is_never_replaced(name: str, overwrite: bool, tmp_path: Path) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(CheckpointError, match=f"{name}: expected a folder, got a file. Choose"):
        publish(tmp_path / "out", overwrite=overwrite)
    assert tree(tmp_path) == {name: "mine"}


def test_a_link_is_followed(old: Path) -> None:
    link = old.parent / "link"
    link.symlink_to(old)
    publish(link, overwrite=True)
    assert link.is_symlink()
    assert tree(old) == {"sub/file": "new"}


@pytest.mark.parametrize("folder", ["", "below/here"])
def test_the_current_folder_is_not_replaced(folder: str, old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (old / folder).mkdir(parents=True, exist_ok=True)
    monkeypatch.chdir(old / folder)
    with pytest.raises(CheckpointError, match="holds the current or the home folder, which --over"):
        publish(old, overwrite=True)
    assert tree(old) == {"file": "old"}


def test_the_home_folder_is_not_replaced(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(old))
    with pytest.raises(CheckpointError, match="holds the current or the home folder, which --over"):
        publish(old, overwrite=True)
    assert tree(old) == {"file": "old"}


def test_a_mount_point_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "is_mount", lambda path: path == tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"expected a folder.*got a mount point, which cannot be replaced"):
        publish(tmp_path / "out")


def test_a_name_the_disk_refuses(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"expected a.*got an error \(\[Errno 36\] File name too long: '"):
        publish(tmp_path / ("x" * 300))


def fail_at(monkeypatch: pytest.MonkeyPatch, target: Path) -> None:
    rename = Path.rename

    def failing(path: Path, to: Path) -> Path:
        if path.suffix == ".partial" and to == target:
            raise OSError(errno.EIO, "Input/output error")
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", failing)


@pytest.mark.parametrize("overwrite", [False, True])
def test_the_finished_output_is_kept_when_it_cannot_be_put_in_place(
    overwrite: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    fail_at(monkeypatch, out)
    message = f"{out}: cannot be put in place .*; the finished output is kept in {out}.partial. Rena"
    with pytest.raises(CheckpointError, match=message):
        publish(out, overwrite=overwrite)
    assert tree(tmp_path) == {"out.partial/sub/file": "new"}


def test_the_old_folder_comes_back_when_the_new_one_cannot_be_put_in_place(
    old: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_at(monkeypatch, old)
    with pytest.raises(CheckpointError, match="cannot be put in place"):
        publish(old, overwrite=True)
    assert tree(old.parent) == {"out/file": "old", "out.partial/sub/file": "new"}
    assert len(list(old.parent.iterdir())) == 2


def test_a_folder_filled_in_the_meantime_is_not_replaced(tmp_path: Path) -> None:
    def both() -> None:
        with publishing(tmp_path / "out", overwrite=False) as folder:
            (folder / "file").write_text("ours")
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "file").write_text("theirs")

    with pytest.raises(CheckpointError, match=r"cannot be put in place .*not empty"):
        both()
    assert tree(tmp_path) == {"out/file": "theirs", "out.partial/file": "ours"}


def test_partial_folder_creates_nothing(tmp_path: Path) -> None:
    assert partial_folder(tmp_path / "a" / "out", overwrite=False) == tmp_path / "a" / "out.partial"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_named(code: int) -> None:
    with pytest.raises(CheckpointError) as caught, writing_to(Path("out")):
        raise OSError(code, "whatever")
    assert str(caught.value) == (
        "out: expected room for the output, got a full disk. Free some space or choose another output."
    )


def test_other_failures_to_write_are_named() -> None:
    with (
        pytest.raises(CheckpointError, match=r"out: expected.*got an error \(\[Errno 30\] Read-only file system:"),
        writing_to(Path("out")),
    ):
        raise OSError(errno.EROFS, "Read-only file system", "x")


def test_other_errors_pass() -> None:
    with pytest.raises(StoppedError), writing_to(Path("out")):
        raise StoppedError


def test_replace_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    replace_file(path, b"one")
    replace_file(path, b"two")
    assert path.read_bytes() == b"two"

    def failing(path: Path, to: Path) -> Path:
        raise OSError(errno.ENOSPC, "No space left on device", str(path), None, str(to))

    monkeypatch.setattr(Path, "replace", failing)
    with pytest.raises(CheckpointError, match=f"{path}: expected room for the output, got a full disk"):
        replace_file(path, b"three")
    assert path.read_bytes() == b"two"
    assert list(tmp_path.iterdir()) == [path]
