"""The table of engines, and what goes with which."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Literal, get_args

import pytest
from click.testing import CliRunner

from spectral_surgery.cli import cli
from spectral_surgery.codec.rate import Target
from spectral_surgery.commands.compress import compress
from spectral_surgery.commands.settings import Healing
from spectral_surgery.engines import ENGINES
from spectral_surgery.errors import BackendError, ConfigError
from spectral_surgery.files.compressed.settings import CompressOptions
from spectral_surgery.run import EngineName, Run
from spectral_surgery.text.settings import TextData
from tests.support.checkpoints import contents, gaussian, write_folder

OPTIONS = CompressOptions(Target("bits", 3.0))

Kind = Literal["bits", "density"]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "source", {"layers.0.weight": gaussian(64, 96)})


def test_every_engine_can_be_chosen() -> None:
    assert tuple(ENGINES) == get_args(EngineName)


def test_one_process_of_a_launcher_does_everything(tmp_path: Path, source: Path) -> None:
    compress(source, tmp_path / "local", OPTIONS)
    compress(source, tmp_path / "alone", OPTIONS, run=Run(engine="torchrun"))
    assert contents(tmp_path / "local") == contents(tmp_path / "alone")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--engine", "ray", "--shard", "0/2"), "--shard: expected --engine torchrun with it, got ray"),
        (("--engine", "local", "--shard", "0/2"), "--shard: expected --engine torchrun with it, got local"),
        (("--ray-address", "10.0.0.1:6379"), "--ray-address: expected with --engine ray"),
        (("--parts", "file:///tmp"), "--parts: expected with --engine ray"),
        (("--engine", "ray", "--workers", "2"), "--workers: expected none with --engine ray"),
        (("--engine", "rey"), "'rey' is not one of 'local', 'torchrun', 'ray'"),
    ],
)
def test_options_that_do_not_go_together(
    tmp_path: Path, source: Path, options: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    done = CliRunner().invoke(cli, ["compress", str(source), str(tmp_path / "out"), "--bits", "4", *options])
    assert done.exit_code == 2
    assert message in done.output
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("run", "target", "device", "message"),
    [
        (Run(engine="torchrun"), "bits", "cpu", r"--engine torchrun: expected without --calibrate, .*--engine ray"),
        (Run(engine="ray"), "density", "cpu", r"--engine ray: expected --bits with --calibrate, got --sparsity"),
        (Run(engine="ray"), "bits", "cuda", r"--engine ray: expected --device cpu with --calibrate, got cuda"),
    ],
)
def test_what_does_not_go_with_text(
    tmp_path: Path, source: Path, run: Run, target: Kind, device: str, message: str
) -> None:
    options, text = CompressOptions(Target(target, 1.0)), TextData(tmp_path / "text")
    with pytest.raises(ConfigError, match=message):
        compress(source, tmp_path / "out", options, calibrate=text, device=device, run=run)


def test_healing_is_done_here(tmp_path: Path, source: Path) -> None:
    with pytest.raises(ConfigError, match=r"--engine ray: expected without --heal, which trains here"):
        compress(source, tmp_path / "out", OPTIONS, heal=Healing(TextData(tmp_path / "text")), run=Run(engine="ray"))


def test_without_ray(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spectral_surgery.engines.cluster.find_spec", lambda _: None)
    with pytest.raises(BackendError, match=r"expected Ray, got none\. Run pip install \"spectral-surgery\[ray\]\""):
        compress(source, tmp_path / "out", OPTIONS, run=Run(engine="ray"))
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_an_address_where_nobody_answers(tmp_path: Path, source: Path, scheme: str) -> None:
    pytest.importorskip("ray")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and nobody listens
        address = f"{scheme}127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(BackendError, match=rf"--ray-address {address}: expected .*does not answer \(.*refused"):
            compress(source, tmp_path / "out", OPTIONS, run=Run(engine="ray", ray_address=address))
    assert not list(tmp_path.glob("out*"))
