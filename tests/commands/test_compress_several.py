"""compress of several fine-tunes: each as by itself, one after the other, and going on where it was cut off."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from spectral_surgery.cli import cli
from spectral_surgery.codec.rate import Target
from spectral_surgery.commands.compress import compress
from spectral_surgery.commands.compress import several as several_module
from spectral_surgery.commands.compress.several import compress_several
from spectral_surgery.commands.decompress import decompress
from spectral_surgery.errors import CheckpointError
from spectral_surgery.files.compressed.settings import CompressOptions
from spectral_surgery.run import Run
from tests.support.checkpoints import contents, gaussian, llama_like, write_folder

OPTIONS = CompressOptions(Target("bits", 2.0))
NAMES = ("chat", "code", "maths")


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, dict[str, Path]]:
    """A base, and fine-tunes of it."""
    base, tuned = llama_like(), {}
    for seed, name in enumerate(NAMES, 5):
        moved = {key: t + 0.01 * gaussian(*t.shape, seed=seed) if t.dim() > 1 else t for key, t in base.items()}
        moved["lm_head.weight"] = moved["model.embed_tokens.weight"].clone()
        tuned[name] = write_folder(tmp_path / "tuned" / name, moved)
    return write_folder(tmp_path / "base", base), tuned


def command(*arguments: object) -> Result:
    return CliRunner().invoke(cli, ["compress", *map(str, arguments)])


def test_each_is_what_it_is_alone(tmp_path: Path, folders: tuple[Path, dict[str, Path]]) -> None:
    base, tuned = folders
    result = command(*tuned.values(), tmp_path / "out", "--base", base, "--bits", 2, "--threads", 1, "--json")
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert list(said["folders"]) == list(NAMES)
    for name, source in tuned.items():
        compress(source, tmp_path / "alone", OPTIONS, base=base, run=Run(overwrite=True))
        assert contents(tmp_path / "out" / name) == contents(tmp_path / "alone")
        assert said["folders"][name]["bits_per_weight"] < 2.1
        decompress(tmp_path / "out" / name, tmp_path / "plain", base=base, overwrite=True, verify=True)
        assert f"{name}: " in result.stderr


def test_goes_on_where_it_was_cut_off(
    tmp_path: Path, folders: tuple[Path, dict[str, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, tuned = folders
    done: list[str] = []

    def cut_off(source: Path, out: Path, *rest: object, **more: object) -> object:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(out.name)
        return compress(source, out, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(several_module, "compress", cut_off)
    with pytest.raises(KeyboardInterrupt):
        compress_several(tuned, tmp_path / "out", OPTIONS, base=base)
    monkeypatch.undo()
    assert done == list(NAMES[:2])
    before = {name: contents(tmp_path / "out" / name) for name in done}
    with pytest.raises(CheckpointError, match="chat: expected a new or empty folder"):
        compress_several(tuned, tmp_path / "out", OPTIONS, base=base)
    reports = compress_several(tuned, tmp_path / "out", OPTIONS, base=base, run=Run(resume=True))
    assert [report is None for report in reports.values()] == [True, True, False]
    assert {name: contents(tmp_path / "out" / name) for name in done} == before
    result = command(*tuned.values(), tmp_path / "out", "--base", base, "--bits", 2, "--resume", "--threads", 1)
    assert result.exit_code == 0, result.output
    assert result.stderr.count("finished before") == 3


def test_folders_of_other_options_or_of_another_base_are_not_taken_for_finished(
    tmp_path: Path, folders: tuple[Path, dict[str, Path]]
) -> None:
    base, tuned = folders
    two = {name: tuned[name] for name in NAMES[:2]}
    compress(two["code"], tmp_path / "out" / "code", CompressOptions(Target("bits", 3.0)), base=base)
    with pytest.raises(CheckpointError, match=r"code: expected what an earlier run .*--overwrite to replace it\.$"):
        compress_several(two, tmp_path / "out", OPTIONS, base=base, run=Run(resume=True))
    assert not (tmp_path / "out" / "chat").exists()
    compress_several(two, tmp_path / "out", OPTIONS, base=base, run=Run(overwrite=True))
    with pytest.raises(CheckpointError, match="another base"):
        compress_several(two, tmp_path / "out", OPTIONS, base=tuned["maths"], run=Run(resume=True))


def test_what_does_not_go_together_is_one_line(tmp_path: Path, folders: tuple[Path, dict[str, Path]]) -> None:
    base, tuned = folders
    chat, code, _ = tuned.values()
    other = write_folder(tmp_path / "elsewhere" / "chat", llama_like())
    out = tmp_path / "out"
    for arguments, words in (
        ((chat, code, out, "--bits", 2), "several SOURCEs: expected with --base"),
        ((chat, code, out, "--bits", 2, "--base", base, "--shard", "0/2"), "several SOURCEs: expected with --base"),
        ((chat, other, out, "--bits", 2, "--base", base), "for the folders in OUT, got chat twice"),
    ):
        result = command(*arguments)
        assert result.exit_code == 2
        assert words in result.output
        assert not out.exists()
