"""compress --calibrate on a cluster of Ray: the moments of all samples, whatever is lost on the way."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from spectral_surgery.calibration import layer_moments as module
from spectral_surgery.codec.rate import Target
from spectral_surgery.commands.compress import CompressReport, compress
from spectral_surgery.commands.decompress import decompress
from spectral_surgery.engines import shares as engine
from spectral_surgery.errors import BackendError
from spectral_surgery.files.compressed.settings import CompressOptions
from spectral_surgery.text.settings import TextData
from tests.commands.test_calibrate import save_model, write_text
from tests.engines.nodes import another_node, on

ray = pytest.importorskip("ray")
pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::FutureWarning:ray", "ignore::DeprecationWarning", "ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

OPTIONS = CompressOptions(Target("bits", 3.0))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("llama", tmp_path_factory.mktemp("llama") / "model")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TextData:
    return TextData(write_text(tmp_path_factory.mktemp("text") / "text.txt"), 32, 16)


@pytest.fixture(autouse=True)
def several_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BATCH_TOKENS", 64)  # eight of four sequences


@pytest.fixture
def expected(model: Path, data: TextData, tmp_path: Path) -> CompressReport:
    report = compress(model, tmp_path / "expected", OPTIONS, calibrate=data)
    decompress(tmp_path / "expected", tmp_path / "dense")
    return report


def is_the_same(found: CompressReport, expected: CompressReport, folder: Path) -> None:
    """Within what another order of a sum changes: the errors of the layers, the rate, and nearly all weights."""
    ours, theirs = (report.calibration for report in (found, expected))
    assert ours is not None
    assert theirs is not None
    assert [one.name for one in ours.layers] == [one.name for one in theirs.layers]
    for one, other in zip(ours.layers, theirs.layers, strict=True):
        assert one.output_error == pytest.approx(other.output_error, rel=1e-4), one.name
    assert found.manifest.report.bits_per_weight == pytest.approx(expected.manifest.report.bits_per_weight, rel=1e-4)
    decompress(folder / "out", folder / "found")
    weights, wanted = (load_file(folder / name / "model.safetensors") for name in ("found", "dense"))
    error = sum(float((weights[name].double() - wanted[name].double()).square().sum()) for name in wanted)
    assert error < 1e-6 * sum(float(weight.double().square().sum()) for weight in wanted.values())


def test_the_result_is_that_of_one_machine(
    connected: Any, model: Path, data: TextData, expected: CompressReport, tmp_path: Path
) -> None:
    found = compress(model, tmp_path / "out", OPTIONS, calibrate=data, run=on(connected))
    is_the_same(found, expected, tmp_path)
    again = compress(model, tmp_path / "again", OPTIONS, calibrate=data, run=on(connected))
    assert again.manifest == found.manifest


@pytest.mark.parametrize("lost", [1, 2])
def test_nodes_are_lost(
    connected: Any, model: Path, data: TextData, expected: CompressReport, tmp_path: Path, lost: int
) -> None:
    """Every node has a share, and no processor is left for those of the lost ones."""
    moved: list[int] = []
    real = engine.Shares._move

    def move(shares: engine.Shares) -> None:
        before = list(shares.seats)
        real(shares)
        moved.append(sum(one is not other for one, other in zip(before, shares.seats, strict=True)))

    def lose(done: int, _: int, __: str) -> None:
        if done == 3:  # in the first block
            for node in (third, fourth)[:lost]:
                connected.remove_node(node, allow_graceful=False)

    with (
        another_node(connected) as third,
        another_node(connected) as fourth,
        pytest.MonkeyPatch.context() as patched,
    ):
        patched.setattr(engine.Shares, "_move", move)
        found = compress(model, tmp_path / "out", OPTIONS, calibrate=data, run=on(connected, progress=lose))
    assert sum(moved) >= lost  # some twice
    is_the_same(found, expected, tmp_path)


def test_what_is_wrong_there_is_told_in_one_line(
    connected: Any, model: Path, data: TextData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "installed", lambda: "0.0.9 (12345678)")
    with pytest.raises(BackendError, match=r"^--engine ray: expected spectral-surgery 0\.0\.9 .* on every node, got"):
        compress(model, tmp_path / "out", OPTIONS, calibrate=data, run=on(connected))
    assert not (tmp_path / "out").exists()


def test_the_command(cluster: Any, model: Path, data: TextData, tmp_path: Path) -> None:
    options = ("--bits", "3", "--calibrate", str(data.file), "--samples", "32", "--seq-length", "16")
    where = ("--engine", "ray", "--ray-address", cluster.address)
    command = [sys.executable, "-m", "spectral_surgery", "compress", str(model), str(tmp_path / "out"), *options]
    done = subprocess.run([*command, *where, "--quiet"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "14 weights calibrated" in done.stderr
    assert "raylet" not in done.stderr
