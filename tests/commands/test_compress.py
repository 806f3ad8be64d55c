"""compress and decompress as a user runs them: fidelity, determinism, interruption, bad input."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from spectral_surgery.codec.rate import Target
from spectral_surgery.commands.compress import compress, compress_shard, plan_compression
from spectral_surgery.commands.decompress import decompress
from spectral_surgery.errors import CheckpointError, ConfigError, TargetError
from spectral_surgery.files import atomic as publish
from spectral_surgery.files.compressed import parts as part_files
from spectral_surgery.files.compressed import plan as plan_module
from spectral_surgery.files.compressed import units
from spectral_surgery.files.compressed.settings import CompressOptions
from spectral_surgery.files.index import read_index
from spectral_surgery.files.reader import read_bytes
from spectral_surgery.files.writer import Entry, tensor_entry, write_file
from spectral_surgery.run import Run
from tests.support.checkpoints import contents, gaussian, llama_like, write_folder

ROOT = Path(__file__).parents[2]
FIFTH = CompressOptions(Target("density", 0.2))


def load(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "source", llama_like())


@pytest.mark.parametrize("target", [Target("density", 0.2), Target("bits", 3.0), Target("max_error", 0.1)])
@pytest.mark.parametrize("shards", [1, 3])
def test_round_trip_keeps_names_shapes_and_the_reported_error(tmp_path: Path, target: Target, shards: int) -> None:
    tensors = llama_like()
    source = write_folder(tmp_path / "source", tensors, shards=shards)
    report = compress(source, tmp_path / "out", CompressOptions(target))
    assert report is not None
    back = decompress(tmp_path / "out", tmp_path / "plain", verify=True)
    assert back.failures == ()
    plain = load(tmp_path / "plain")
    assert plain.keys() == tensors.keys()
    assert all(plain[n].dtype == tensors[n].dtype and plain[n].shape == tensors[n].shape for n in tensors)
    for row in report.to_json()["tensors"]:
        original, decoded = tensors[row["name"]].double(), plain[row["name"]].double()
        error = float((original - decoded).norm() / original.norm())
        assert error == pytest.approx(row["relative_error"], abs=0.004)  # bfloat16 rounds by 0.002
    for name in ("model.layers.0.input_layernorm.weight", "model.steps"):
        assert torch.equal(plain[name], tensors[name])
    assert torch.equal(plain["lm_head.weight"], plain["model.embed_tokens.weight"])
    assert (tmp_path / "plain" / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert json.loads((tmp_path / "plain" / "config.json").read_text()) == json.loads(
        (source / "config.json").read_text()
    )
    assert not (tmp_path / "plain" / "spectral_surgery.json").exists()


def test_report_counts_the_bytes_on_disk(tmp_path: Path, source: Path) -> None:
    report = compress(source, tmp_path / "out", FIFTH)
    assert report is not None
    body = report.to_json()
    stored = load(tmp_path / "out")
    for row in body["tensors"]:
        parts = [v for n, v in stored.items() if n.startswith(row["name"] + ".spectral_")]
        assert len(parts) == 3
        nbytes = sum(p.numel() * p.element_size() for p in parts)
        weights = row["shape"][0] * row["shape"][1]
        assert 8 * nbytes / weights == pytest.approx(row["bits_per_weight"], rel=1e-12)
    on_disk = sum(p.stat().st_size for p in (tmp_path / "out").iterdir() if p.name.startswith(("model", "spectral")))
    assert body["output_bytes"] == on_disk
    assert {row["name"] for row in body["skipped"]} == {"model.layers.0.input_layernorm.weight", "model.steps"}
    assert body["tied"] == {"lm_head.weight": "model.embed_tokens.weight"}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "spectral_surgery"


def test_same_bytes_whatever_the_workers_threads_and_shards(tmp_path: Path, source: Path) -> None:
    compress(source, tmp_path / "one", FIFTH)
    compress(source, tmp_path / "threads", FIFTH, run=Run(threads=3))
    compress(source, tmp_path / "workers", FIFTH, run=Run(workers=2))
    results = [compress_shard(source, tmp_path / "shards", FIFTH, (i, 3)) for i in (2, 0, 1)]
    assert [r is None for r in results] == [True, True, False]
    expected = contents(tmp_path / "one")
    for other in ("threads", "workers", "shards"):
        assert contents(tmp_path / other) == expected
    assert not list(tmp_path.glob("*.partial"))


def test_parts_of_a_large_tensor_decode_like_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = gaussian(9000, 300)
    source = write_folder(tmp_path / "source", {"w": weight})
    monkeypatch.setattr(plan_module, "PART_WEIGHTS", 1 << 20)
    report = compress(source, tmp_path / "out", CompressOptions(Target("bits", 4.0)))
    assert report is not None
    assert len(report.manifest.tensors["w"].parts) == 3
    assert decompress(tmp_path / "out", tmp_path / "plain", verify=True).failures == ()
    error = (load(tmp_path / "plain")["w"] - weight).norm() / weight.norm()
    assert float(error) == pytest.approx(report.manifest.report.relative_error, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "shape", "axes", "parts"),
    [
        ("model.embed_tokens.weight", (200, 64), (1,), 1),
        ("transformer.h.0.attn.c_attn.weight", (96, 288), (0, 1), 1),
        ("vit.embeddings.patch_projection.weight", (64, 3, 8, 8), (1,), 1),
        ("features.conv.weight", (64, 32, 3, 3), (0, 1), 1),
        ("model.layers.0.mlp.experts.gate_up_proj", (5, 64, 96), (0, 1), 5),
        ("model.layers.0.mlp.experts.3.up_proj.weight", (64, 96), (0, 1), 1),
    ],
)
def test_every_kind_of_tensor(
    tmp_path: Path, name: str, shape: tuple[int, ...], axes: tuple[int, ...], parts: int
) -> None:
    weight = gaussian(*shape)
    source = write_folder(tmp_path / "source", {name: weight})
    report = compress(source, tmp_path / "out", CompressOptions(Target("max_error", 0.05)))
    assert report is not None
    record = report.manifest.tensors[name]
    assert (record.axes, len(record.parts)) == (axes, parts)
    decompress(tmp_path / "out", tmp_path / "plain")
    plain = load(tmp_path / "plain")[name]
    assert plain.shape == shape
    assert float((plain - weight).norm() / weight.norm()) <= 0.05 * 1.001


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
)
def test_every_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    weight = gaussian(128, 96).mul(20).to(dtype)
    source = write_folder(tmp_path / "source", {"w": weight, "ids": torch.arange(9000).reshape(90, 100)})
    compress(source, tmp_path / "out", CompressOptions(Target("bits", 6.0)))
    report = decompress(tmp_path / "out", tmp_path / "plain", verify=True)
    plain = load(tmp_path / "plain")
    assert plain["w"].dtype == dtype
    assert report.failures == ()
    error = (plain["w"].double() - weight.double()).norm() / weight.double().norm()
    assert float(error) < 0.03 + torch.finfo(dtype).eps / 2
    assert torch.equal(plain["ids"], torch.arange(9000).reshape(90, 100))


def test_decompress_dtype_casts_every_floating_tensor(tmp_path: Path, source: Path) -> None:
    compress(source, tmp_path / "out", FIFTH)
    decompress(tmp_path / "out", tmp_path / "plain", dtype="float32", verify=True)
    kinds = {v.dtype for v in load(tmp_path / "plain").values()}
    assert kinds == {torch.float32, torch.int64}
    assert json.loads((tmp_path / "plain" / "config.json").read_text())["dtype"] == "float32"
    with pytest.raises(ConfigError, match=r"--dtype: expected float64, float32,.*got float31"):
        decompress(tmp_path / "out", tmp_path / "other", dtype="float31")


def test_verify_fails_when_the_manifest_lies_about_the_norm(tmp_path: Path, source: Path) -> None:
    compress(source, tmp_path / "out", FIFTH)
    path = tmp_path / "out" / "spectral_surgery.json"
    body = json.loads(path.read_text())
    name = "model.layers.0.mlp.down_proj.weight"
    body["tensors"][name]["parts"][0]["report"]["stored_energy"] *= 1.5
    path.write_text(json.dumps(body))
    report = decompress(tmp_path / "out", tmp_path / "plain", verify=True)
    assert len(report.failures) == 1
    assert name in report.failures[0]
    assert not (tmp_path / "plain").exists()


def test_elements_smaller_than_a_byte_are_copied(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    packed = Entry("packed", "F4", (7, 4), lambda: [bytes(range(14))])
    write_file(tmp_path / "source" / "model.safetensors", [packed, tensor_entry("weight", gaussian(64, 64))])
    compress(tmp_path / "source", tmp_path / "out", FIFTH)
    assert decompress(tmp_path / "out", tmp_path / "plain", dtype="bfloat16", verify=True).failures == ()
    stored = read_index(tmp_path / "plain").tensors["packed"]
    assert (stored.dtype, stored.shape, read_bytes(stored, 0, 14)) == ("F4", (7, 4), bytes(range(14)))
    assert decompress(tmp_path / "out", tmp_path / "same", verify=True).failures == ()


def test_include_exclude_and_small_tensors(source: Path) -> None:
    options = CompressOptions(Target("bits", 4.0), include=("model.layers.*",), exclude=("*q_proj*",))
    _, plan = plan_compression(source, options)
    assert [t.info.name for t in plan.tensors] == ["model.layers.0.mlp.down_proj.weight"]
    assert plan.copied["model.layers.0.self_attn.q_proj.weight"] == "excluded"
    with pytest.raises(TargetError, match=r"--include:.*got 'nothing\.\*', which matches none of 6 tensors"):
        plan_compression(source, CompressOptions(Target("bits", 4.0), include=("nothing.*",)))
    with pytest.raises(ConfigError, match="no tensor is left to compress"):
        plan_compression(source, CompressOptions(Target("bits", 4.0), min_weights=10**9))


def test_auto_takes_the_transform_that_compacts(tmp_path: Path) -> None:
    phase = torch.linspace(0, 3, 256)
    smooth = torch.outer(torch.cos(2 * phase), torch.sin(phase)) + 1e-3 * gaussian(256, 256)
    spiky = torch.zeros(256, 256)
    spiky.view(-1)[:: 257 * 3] = 1.0
    source = write_folder(tmp_path / "source", {"smooth": smooth, "spiky": spiky, "noise": gaussian(256, 256)})
    report = compress(source, tmp_path / "out", CompressOptions(Target("bits", 2.0), transform="auto"))
    assert report is not None
    chosen = {row["name"]: row["transform"] for row in report.to_json()["tensors"]}
    assert chosen["noise"] == "dct"
    assert chosen["smooth"] in ("dct", "hartley")
    assert chosen["spiky"] == "identity"


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nonfinite_weights_are_refused_or_copied(tmp_path: Path, bad: float) -> None:
    tensors = {"good": gaussian(80, 80), "bad": gaussian(80, 80)}
    tensors["bad"][3, 4] = bad
    source = write_folder(tmp_path / "source", tensors)
    with pytest.raises(
        ConfigError, match=r"bad: expected finite weights, got NaN or infinite values.*--copy-nonfinite"
    ):
        compress(source, tmp_path / "out", FIFTH)
    assert not (tmp_path / "out").exists()
    report = compress(
        source, tmp_path / "out", CompressOptions(Target("density", 0.2), copy_nonfinite=True), run=Run(overwrite=True)
    )
    assert report is not None
    assert report.copied["bad"] == "not finite"
    decompress(tmp_path / "out", tmp_path / "plain", verify=True)
    assert torch.equal(load(tmp_path / "plain")["bad"].view(torch.int32), tensors["bad"].view(torch.int32))


def test_output_in_the_way_and_unfinished_work(tmp_path: Path, source: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("keep")
    with pytest.raises(CheckpointError, match=r"expected a new or empty folder, got one with content.*--overwrite"):
        compress(source, tmp_path / "out", FIFTH)
    assert (tmp_path / "out" / "mine").read_text() == "keep"
    assert compress(source, tmp_path / "out", FIFTH, run=Run(overwrite=True)) is not None
    assert not (tmp_path / "out" / "mine").exists()
    compress_shard(source, tmp_path / "half", FIFTH, (0, 2))
    with pytest.raises(CheckpointError, match=r"half\.partial: expected an empty folder, got unfinished work"):
        compress(source, tmp_path / "half", FIFTH)
    assert compress(source, tmp_path / "half", FIFTH, run=Run(resume=True)) is not None
    assert contents(tmp_path / "half") == contents(tmp_path / "out")


def test_resume_ignores_work_of_other_options_and_damaged_units(tmp_path: Path, source: Path) -> None:
    compress_shard(source, tmp_path / "out", CompressOptions(Target("bits", 5.0)), (0, 2))
    unit = next((tmp_path / "out.partial" / "units").iterdir())
    compress(source, tmp_path / "expected", FIFTH)
    compress_shard(source, tmp_path / "third", FIFTH, (0, 2))
    for file in (tmp_path / "third.partial" / "units").iterdir():
        file.write_bytes(file.read_bytes()[:-3])
    assert unit.exists()
    for name in ("out", "third"):
        compress(source, tmp_path / name, FIFTH, run=Run(resume=True))
        assert contents(tmp_path / name) == contents(tmp_path / "expected")


def test_two_processes_do_not_share_a_folder(tmp_path: Path, source: Path) -> None:
    from spectral_surgery.files.lock import hold

    (tmp_path / "out.partial").mkdir()
    with (
        hold(tmp_path / "out.partial", exclusive=True, wait=False),
        pytest.raises(CheckpointError, match=r"out\.partial: expected one.*got another that is working in it"),
    ):
        compress(source, tmp_path / "out", FIFTH, run=Run(resume=True))


def test_a_full_disk_publishes_nothing_and_resumes(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = publish.replace_file
    calls = iter(range(100))

    def full(path: Path, data: bytes, *, durable: bool = True) -> None:
        if next(calls) == 1:
            with publish.writing_to(path):
                raise OSError(errno.ENOSPC, "No space left on device")
        real(path, data, durable=durable)

    monkeypatch.setattr(part_files, "replace_file", full)
    with pytest.raises(CheckpointError, match="no space left"):
        compress(source, tmp_path / "out", FIFTH)
    assert not (tmp_path / "out").exists()
    compress(source, tmp_path / "out", FIFTH, run=Run(resume=True))
    compress(source, tmp_path / "expected", FIFTH)
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")


_RUN = """
import sys
from pathlib import Path
from spectral_surgery.files.compressed.settings import CompressOptions
from spectral_surgery.codec.rate import Target
from spectral_surgery.commands.compress import compress
from spectral_surgery.run import Run
if __name__ == "__main__":
    print("ready", flush=True)
    compress(Path(sys.argv[1]), Path(sys.argv[2]), CompressOptions(Target("bits", 3.0)), run=Run(resume=True))
"""


@pytest.mark.slow
def test_killed_at_random_moments_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    tensors = {f"layers.{i}.weight": gaussian(384, 512, seed=i) for i in range(24)}
    source = write_folder(tmp_path / "source", tensors)
    compress(source, tmp_path / "expected", CompressOptions(Target("bits", 3.0)))
    out, chance = tmp_path / "out", random.Random(0)
    kills = 0
    while not out.exists():
        command = [sys.executable, "-c", _RUN, str(source), str(out)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.readline()
            if kills < 3:
                time.sleep(chance.uniform(0.05, 0.8))
                process.send_signal(signal.SIGKILL)
                kills += 1
        assert not out.exists() or contents(out) == contents(tmp_path / "expected")
    assert contents(out) == contents(tmp_path / "expected")
    assert not list(tmp_path.glob("out.*"))


def test_a_quantised_source_is_refused(tmp_path: Path, source: Path) -> None:
    compress(source, tmp_path / "out", FIFTH)
    with pytest.raises(CheckpointError, match=r"out: expected a plain .* \(spectral_surgery\)\. Decompress it first\."):
        compress(tmp_path / "out", tmp_path / "again", FIFTH)


@pytest.mark.parametrize("out", [".", "inside", ".."])
def test_the_source_is_never_overwritten(source: Path, out: str) -> None:
    before = contents(source)
    with pytest.raises(CheckpointError, match="expected a folder apart from the source, got one that overlaps"):
        compress(source, source / out, FIFTH, run=Run(overwrite=True))
    with pytest.raises(CheckpointError, match="expected a folder apart from the source, got one that overlaps"):
        decompress(source, source / out, overwrite=True)
    assert contents(source) == before


@pytest.mark.parametrize("shard", [(2, 2), (-1, 2), (0, 0)])
def test_shard_out_of_range(tmp_path: Path, source: Path, shard: tuple[int, int]) -> None:
    with pytest.raises(ConfigError, match="shard: expected 0/n to n-1/n, got"):
        compress_shard(source, tmp_path / "out", FIFTH, shard)


def test_a_killed_worker_is_reported_and_its_work_resumed(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    monkeypatch.setattr("spectral_surgery.commands.compress.job.run_unit", _die)
    with pytest.raises(CheckpointError, match=r"a worker was killed, .*--resume and fewer --workers"):
        compress(source, tmp_path / "out", FIFTH, run=Run(workers=2))
    monkeypatch.undo()
    assert compress(source, tmp_path / "out", FIFTH, run=Run(resume=True)) is not None


def _die(store: units.UnitStore, *_: object, **__: object) -> None:
    died = store.folder / "died"
    if multiprocessing.parent_process():
        died.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    while not died.exists():  # the other one gets its turn
        time.sleep(0.01)


_RUN_TWO = """
import multiprocessing, sys
from pathlib import Path
from spectral_surgery.files.compressed.settings import CompressOptions
from spectral_surgery.codec.rate import Target
from spectral_surgery.commands.compress import compress
from spectral_surgery.run import Run
if __name__ == "__main__":
    def say(done, total, what):
        print(multiprocessing.active_children()[0].pid, flush=True)
    options = CompressOptions(Target("bits", 3.0))
    compress(Path(sys.argv[1]), Path(sys.argv[2]), options, run=Run(workers=2, progress=say))
"""


@pytest.mark.slow
def test_workers_end_with_the_process_that_started_them(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "source", {f"layers.{i}.weight": gaussian(384, 512, seed=i) for i in range(12)})
    script = tmp_path / "run.py"  # workers import it
    script.write_text(_RUN_TWO)
    command = [sys.executable, str(script), str(source), str(tmp_path / "out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(ROOT)}) as process:
        assert process.stdout is not None
        worker = int(process.stdout.readline())
        process.send_signal(signal.SIGKILL)
    gone = time.monotonic() + 60
    while _runs(worker) and time.monotonic() < gone:
        time.sleep(0.05)
    assert not _runs(worker)
    options = CompressOptions(Target("bits", 3.0))
    assert not (tmp_path / "out").exists()
    compress(source, tmp_path / "out", options, run=Run(resume=True))
    compress(source, tmp_path / "expected", options)
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")


def _runs(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"  # nobody may be there to ask how it ended
