"""The command line as a user meets it: output, errors and exit codes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.support.checkpoints import contents, gaussian, llama_like, write_folder
from tests.support.command import run

SLOW = """
import signal, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background a shell has processes ignore it
from spectral_surgery.cli import main
from spectral_surgery.engines import local

quick = local.run_unit
local.run_unit = lambda *arguments, **options: (quick(*arguments, **options), time.sleep(0.5))[0]
main()
"""


def result(*arguments: str | Path) -> dict[str, Any]:
    done = run(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    body: dict[str, Any] = json.loads(done.stdout)
    assert body["schema_version"] == 1
    assert body["command"] == arguments[0]
    return body


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("cli") / "source", llama_like())


def test_the_tour(source: Path, tmp_path: Path) -> None:
    body = result("inspect", source)
    assert body["kind"] == "dense"
    assert body["tied"] == {"lm_head.weight": "model.embed_tokens.weight"}
    body = result("compress", source, tmp_path / "out", "--sparsity", "0.2")
    wanted = {"bits_per_weight", "compression_ratio", "relative_error", "density", "tensors", "skipped", "seconds"}
    assert wanted | {"peak_rss_bytes"} <= body.keys()
    assert body["density"] == pytest.approx(0.2, abs=1e-3)
    assert {"name", "shape", "bits_per_weight", "relative_error", "density"} <= body["tensors"][0].keys()
    assert {"name", "reason"} == body["skipped"][0].keys()
    assert result("inspect", tmp_path / "out")["kind"] == "compressed"
    body = result("decompress", tmp_path / "out", tmp_path / "plain", "--verify")
    assert body["verified"] is True
    assert body["failures"] == []


def test_text_output_and_progress_lines(source: Path, tmp_path: Path) -> None:
    done = run("compress", source, tmp_path / "out", "--bits", "4")
    assert done.returncode == 0
    assert "3 tensors: " in done.stdout
    assert "100% " in done.stderr
    assert "bits_per_weight" in done.stdout.splitlines()[0]
    done = run("decompress", tmp_path / "out", tmp_path / "plain", "--verify", "--quiet")
    assert "6 tensors" in done.stdout
    assert "read back and verified" in done.stdout
    assert done.stderr == ""


def test_dry_runs_write_nothing(source: Path, tmp_path: Path) -> None:
    before = contents(tmp_path)
    body = result("compress", source, tmp_path / "out", "--bits", "3", "--dry-run")
    assert body["predicted_bits_per_weight"] == 3
    assert "Nothing was written" in run("compress", source, tmp_path / "out", "--max-error", "0.1", "--dry-run").stdout
    assert contents(tmp_path) == before
    assert not (tmp_path / "out.partial").exists()


def test_usage_errors_exit_with_2(source: Path, tmp_path: Path) -> None:
    for options in ((), ("--bits", "4", "--sparsity", "0.2")):
        done = run("compress", source, tmp_path / "out", *options)
        assert done.returncode == 2
        assert "expected one of --sparsity, --bits, --max-error and --lossless, got " in done.stderr
    done = run("compress", source, tmp_path / "out", "--bits", "4", "--shard", "3/2")
    assert done.returncode == 2
    assert "expected i/n with i below n, such as 0/4, got '3/2'" in done.stderr
    assert run("nonsense").returncode == 2


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("inspect", "./missing"), "got no such file or folder"),
        (("compress", "SOURCE", "OUT", "--bits", "40"), "bits 40: out of range; expected [0.5, 8]"),
        (("compress", "SOURCE", "OUT", "--bits", "4", "--transform", "dcd"), "got 'dcd'. Did you mean 'dct'?"),
        (("compress", "SOURCE", "OUT", "--bits", "4", "--transform", "hadamard", "--tile", "48"), "got 48"),
        (
            ("compress", "SOURCE", "OUT", "--bits", "4", "--include", "no*"),
            "got 'no*', which matches none of 6 tensors",
        ),
        (("decompress", "SOURCE", "OUT"), "no spectral_surgery.json"),
        (("methods", "nonsense"), "got 'nonsense'"),
    ],
)
def test_failures_are_one_line_and_exit_with_1(
    source: Path, tmp_path: Path, arguments: tuple[str, ...], text: str
) -> None:
    places = {"SOURCE": str(source), "OUT": str(tmp_path / "out")}
    done = run(*(places.get(argument, argument) for argument in arguments))
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("Error: ")
    assert done.stderr.count("\n") == 1
    assert text in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_failed_check_exits_with_3(source: Path, tmp_path: Path) -> None:
    result("compress", source, tmp_path / "out", "--bits", "4")
    path = tmp_path / "out" / "spectral_surgery.json"
    body = json.loads(path.read_text())
    record = body["tensors"]["model.layers.0.mlp.down_proj.weight"]
    record["parts"][0]["report"]["stored_energy"] *= 2
    path.write_text(json.dumps(body))
    done = run("decompress", tmp_path / "out", tmp_path / "plain", "--verify")
    assert done.returncode == 3
    assert "Check failed: model.layers.0.mlp.down_proj.weight: squared norm" in done.stderr
    assert not (tmp_path / "plain").exists()


def test_a_process_prints_and_exits_the_same(source: Path, tmp_path: Path) -> None:
    command = ("compress", str(source), str(tmp_path / "out"), "--bits", "40")
    own = subprocess.run(
        [sys.executable, "-m", "spectral_surgery", *command], capture_output=True, text=True, check=False
    )
    inside = run(*command)
    assert (own.returncode, own.stdout, own.stderr) == (inside.returncode, inside.stdout, inside.stderr)
    assert own.returncode == 1


@pytest.mark.slow
def test_ctrl_c_exits_with_130_and_resumes(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "source", {f"layers.{i}.weight": gaussian(64, 64, seed=i) for i in range(40)})
    command = ["compress", str(source), str(tmp_path / "out"), "--bits", "3"]
    with subprocess.Popen([sys.executable, "-c", SLOW, *command], stderr=subprocess.PIPE, text=True) as process:
        units = tmp_path / "out.partial" / "units"
        while process.poll() is None and not any(units.glob("*.unit")):
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None
        said = process.stderr.read()
    assert process.returncode == 130
    assert "Interrupted. Finished parts of a compression are kept: run it again with --resume." in said
    assert not (tmp_path / "out").exists()
    assert run(*command).returncode == 1
    assert run(*command, "--resume").returncode == 0
    assert run(*command[:2], tmp_path / "again", *command[3:]).returncode == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "again")


def test_options_from_the_environment_and_a_launcher(source: Path, tmp_path: Path) -> None:
    env = {"SPECTRAL_SURGERY_COMPRESS_BITS": "5"}
    done = run("compress", source, tmp_path / "out", "--json", "--quiet", env=env)
    assert json.loads(done.stdout)["bits_per_weight"] == pytest.approx(5, rel=0.03)
    for rank in ("1", "0"):
        env = {"RANK": rank, "WORLD_SIZE": "2"}
        done = run("compress", source, tmp_path / "shared", "--bits", "5", "--quiet", env=env)
        assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "shared") == contents(tmp_path / "out")


def test_help_is_quick_to_load_and_complete() -> None:
    code = (
        "import sys, click; from spectral_surgery.cli import cli\n"
        "context = click.Context(cli)\n"
        "helps = [cli.get_command(context, name).get_help(context) for name in cli.list_commands(context)]\n"
        "sys.exit('torch' in sys.modules or not all('Example' in text for text in helps))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert run("--version").stdout.startswith("spectral-surgery, version 0.")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(shell: str) -> None:
    assert "_SPECTRAL_SURGERY_COMPLETE" in run("completion", shell).stdout


def test_methods_lists_every_table() -> None:
    names = {row["name"] for row in result("methods")["methods"]}
    assert {"dct", "hadamard", "int4-g128", "fourierft"} <= names
    assert len(result("methods", "dct")["methods"]) == 1
    assert [row["setting"] for row in result("methods", "hybrid")["methods"]] == ["heads", "window", "bins"]
    assert [row["kind"] for row in result("methods", "fnet")["methods"]] == ["mixer"]


def test_a_plot(source: Path, tmp_path: Path) -> None:
    body = result("inspect", source, "--plot", tmp_path / "s.png")
    assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG")
    spectrum = body["spectra"][0]
    assert spectrum["energy_kept"] == sorted(spectrum["energy_kept"])
    assert spectrum["errors"] == sorted(spectrum["errors"], reverse=True)
