"""Names and prompts with characters that Python was told not to expect: PYTHONUTF8=0 in the locale C."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from spectral_surgery.commands.generate import generate
from spectral_surgery.commands.settings import Running
from spectral_surgery.commands.train import check_out
from spectral_surgery.errors import ConfigError
from spectral_surgery.hf.load_errors import check_utf8
from spectral_surgery.hf.models import load_tokenizer
from spectral_surgery.hf.settings import Sampling
from spectral_surgery.text.examples import read_examples

UNREAD = os.fsencode("modèle").decode("ascii", "surrogateescape")  # what Python makes of it there
REASON = "expected text that Python can read as {}, got other bytes. {}"


def test_readable_text_is_accepted() -> None:
    check_utf8("modèle 模型 😀", "prompt")
    check_utf8(Path("modèle"), "folder")


@pytest.mark.parametrize(
    ("encoding", "remedy"), [("ascii", "Set PYTHONUTF8=1 in the environment."), ("utf-8", "Use a name in UTF-8.")]
)
def test_the_way_out_is_named(encoding: str, remedy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "getfilesystemencoding", lambda: encoding)
    with pytest.raises(ConfigError) as error:
        check_utf8(UNREAD, "prompt")
    assert str(error.value) == f"prompt: {REASON.format(encoding, remedy)}"


def test_what_needs_the_name_says_so_before_any_work(tmp_path: Path) -> None:
    folder, problem = tmp_path / UNREAD, r"expected text that Python can read as"
    with pytest.raises(ConfigError, match=rf"mod.*le: {problem}"):
        load_tokenizer(folder)
    with pytest.raises(ConfigError, match=rf"mod.*le: {problem}"):
        check_out(folder, resume=False, overwrite=False)
    with pytest.raises(ConfigError, match=f"^generate: the prompt: {problem}"):
        generate(tmp_path / "none", UNREAD, Sampling(), Running())


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has its names in Unicode")
def test_a_command_in_that_locale(tmp_path: Path) -> None:
    """Text is read from any path; a training, which writes logs and checkpoints, is refused in one line."""
    (tmp_path / "model").mkdir()
    words = ("train", "model", "modèle", "--data", "tèxt.txt", "--method", "lora", "-q")
    done = subprocess.run(
        [sys.executable, "-m", "spectral_surgery", *words],
        cwd=tmp_path,
        env=os.environ | {"PYTHONUTF8": "0", "LC_ALL": "C", "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        check=False,
    )
    lines = done.stderr.decode("ascii", "replace").splitlines()
    assert done.returncode == 1
    assert len(lines) == 1
    assert lines[0].startswith("Error: mod")
    assert lines[0].endswith(REASON.format("ascii", "Set PYTHONUTF8=1 in the environment."))


@pytest.mark.skipif(sys.platform != "linux", reason="others refuse such names")
def test_text_is_read_from_such_a_path(tmp_path: Path) -> None:
    file = tmp_path / f"{UNREAD}.txt"
    file.write_text("ein Wört", encoding="utf-8")
    assert read_examples(file)[0].texts == ("ein Wört",)
