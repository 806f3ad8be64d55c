"""Benchmarks refuse to print figures of wrong results; their parts are right on small inputs."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import case as case_module
from benchmarks import cases as bench
from benchmarks import language_model, llama_files, runner, timing, weights
from benchmarks.case import BenchCase, CheckFailedError, Inputs, chosen, require
from benchmarks.cases import coding, engine, feedback, generate, generate_large, gpu, rate, spectral_matmul, speed
from spectral_surgery.codec.feedback import feedback_factor, stored_codes
from spectral_surgery.codec.feedback_rate import codes_at
from spectral_surgery.codec.quantizers import QUANTIZERS
from spectral_surgery.codec.rate import Target
from spectral_surgery.errors import BackendError, ConfigError
from spectral_surgery.files.index import read_index
from spectral_surgery.hf.models import load_tokenizer
from spectral_surgery.registry import Table


def matrix(rows: int = 300, columns: int = 200) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


def wrong(_: Inputs) -> list[case_module.Row]:
    require(False, "2 is not 3")
    return [{"speed": 1}]


def test_a_case_whose_check_fails_shows_no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    good = BenchCase("good", "works", lambda inputs: [{"quick": inputs.quick}])
    monkeypatch.setattr(runner, "CASES", Table("bench case", (good, BenchCase("bad", "fails", wrong))))
    results = runner.run_cases(["good", "bad"], Inputs(quick=True))
    assert [r["status"] for r in results] == ["ok", "FAILED"]
    assert results[0]["rows"] == [{"quick": True}]
    assert results[1]["rows"] == []
    assert "2 is not 3; the figures of this case are not shown" in str(results[1]["reason"])
    assert {"commit", "torch", "device", "threads", "date"} <= runner.stamp().keys()
    with pytest.raises(ConfigError, match="bench case: expected one of good, bad, got 'odd'"):
        runner.run_cases(["good", "odd"])


def test_the_stamp_says_what_the_processor_computes_with(monkeypatch: pytest.MonkeyPatch) -> None:
    fields = {"flags": ["fpu avx2 avx512f avx512_vnni"] * 2, "model name": ["A processor"] * 2}
    monkeypatch.setattr(runner, "_cpuinfo", fields.__getitem__)
    assert runner.stamp() | {"device": "A processor", "arithmetic": "AVX2 and AVX-512 and int8"} == runner.stamp()
    monkeypatch.setattr(runner, "_cpuinfo", lambda _: [])
    assert runner.stamp()["arithmetic"] == "unknown"


def test_names_are_those_of_the_commands() -> None:
    assert list(bench.CASES) == [
        "coding",
        "rate",
        "tiles",
        "feedback",
        "fp8",
        "many_tensors",
        "speed",
        "spectral_matmul",
        "generate",
        "generate_large",
        "startup",
        "fourierft",
        "gpu_static",
        "gpu_products",
        "gpu_streaming",
        "mixers",
        "memory",
        "calibrate",
        "text",
        "hub",
        "streaming",
        "lossless",
        "beyond_text",
        "workers",
        "ray",
        "language_model",
        "export",
        "vllm",
        "encoder",
        "speech",
    ]


def test_long_cases_run_where_they_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    short = BenchCase("short", "works", lambda _: [{"ran": 1}])
    long = BenchCase("long", "works", lambda inputs: [{"only": inputs.only}], takes=("only",), notes=("Mind.",))
    monkeypatch.setattr(runner, "CASES", Table("bench case", (short, long)))
    assert [result["case"] for result in runner.run_cases([])] == ["short"]
    (result,) = runner.run_cases(["long"], Inputs(only=("a",)))
    assert (result["rows"], result["notes"]) == ([{"only": ("a",)}], ["Mind."])
    with pytest.raises(ConfigError, match="--only: expected one of the cases that take it, long, got none"):
        runner.run_cases(["short"], Inputs(only=("a",)))
    with pytest.raises(ConfigError, match="--heal-minutes: expected one of the cases"):
        runner.run_cases(["long"], Inputs(heal_minutes=1.0))


def test_rows_are_chosen_by_name() -> None:
    known = ("a", "b", "c")
    assert chosen(("c", "a"), known, ("b",), Inputs(quick=True)) == ["a", "c"]
    assert chosen((), known, ("b",), Inputs(quick=True)) == ["b"]
    assert chosen((), known, ("b",), Inputs()) == ["a", "b", "c"]
    with pytest.raises(ConfigError, match="--only d: expected some of a, b, c, got another name"):
        chosen(("d",), known, ("b",), Inputs())


def test_timings_are_medians_of_interleaved_calls() -> None:
    calls: list[str] = []
    got = timing.interleaved({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 3)
    assert calls == ["a", "b"] * 4
    assert got["a"].p20 <= got["a"].median <= got["a"].p80


def test_rows_on_a_small_matrix() -> None:
    row = coding.overhead({"w": matrix()}, 3.0)
    assert 1.0 < float(str(row["stored / entropy"])) < 1.06
    assert float(str(coding.decode_speed(matrix(), Target("bits", 3.0))["Gsym/s per core"])) > 0
    assert rate.measure({"w": matrix()}, Target("bits", 3.0)).bits_per_weight == pytest.approx(3, rel=0.01)
    assert len(speed.naive_pipeline(matrix(128, 128))) > 1000
    assert speed.fft_top(matrix(10, 10), 0.2).numel() == 20


def test_calibrated_codes_are_measured_against_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, moment = matrix(512, 64), feedback.falling_moment(64)
    assert float(moment.diagonal().mean()) == pytest.approx(1 + feedback.DAMPING)
    factor = feedback_factor((moment - feedback.DAMPING * torch.eye(64)).float(), feedback._BASIS, feedback.DAMPING)
    gaps = {}
    for name in QUANTIZERS:
        codes = codes_at(weight, factor, 3.0, feedback._BASIS, quantizer=name)
        entropy, error, gaps[name] = feedback.gap(codes, weight, moment)
        assert 2.5 < entropy < 3  # column steps and tables come on top
        difference = weight - codes.coefficients()
        lost = ((difference.double() @ moment) * difference).sum() / ((weight.double() @ moment) * weight).sum()
        assert error == pytest.approx(float(lost) ** 0.5)
    assert 0.05 < gaps["lattice"] < gaps["scalar"]
    monkeypatch.setattr(
        feedback, "stored_codes", lambda codes, basis: stored_codes(replace(codes, values=codes.values + 1), basis)
    )
    with pytest.raises(CheckFailedError, match="other codes came back than were stored"):
        feedback.gap(codes, weight, moment)


def test_rows_of_a_device_have_every_form_and_number_of_tokens() -> None:
    rows = gpu.on_device(64, torch.device("cpu"))
    found = {(row["layer"], row["tokens"]) for row in rows}
    names = ("int8", "int12", "int5", "int4", "dense bfloat16")
    assert found == {(name, tokens) for name in names for tokens in (1, 8, 64, 512)}
    assert all(float(str(row["ms"])) > 0 for row in rows)


def test_rows_of_streaming_and_of_other_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = gpu.streaming(64, torch.device("cpu"))
    names = {"streamed, 2 bits stored", "streamed, 4 bits stored", "bfloat16"}
    assert {(row["from host memory"], row["tokens"]) for row in rows} == {(n, t) for n in names for t in (1, 64)}
    monkeypatch.setattr(spectral_matmul, "find_spec", lambda _: None)
    layers, skipped = spectral_matmul.bitsandbytes_layers(64)
    assert layers == {}
    assert skipped == [{"skipped": "bitsandbytes", "reason": "not installed; pip install bitsandbytes"}]


@pytest.mark.parametrize("runs", [True, False])
def test_layers_of_another_package_are_checked(runs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    class Other(torch.nn.Linear):
        def __init__(self, *sizes: int, bias: bool, **_: object) -> None:
            super().__init__(*sizes, bias=bias, dtype=torch.bfloat16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if not runs:
                raise NotImplementedError("no kernel")
            return super().forward(x)

    modules = SimpleNamespace(Linear4bit=Other, Linear8bitLt=Other)
    monkeypatch.setattr(spectral_matmul, "find_spec", lambda _: True)
    monkeypatch.setattr(spectral_matmul, "import_module", lambda _: modules)
    layers, skipped = spectral_matmul.bitsandbytes_layers(64)
    assert len(layers) == (2 if runs else 0)
    assert [row["reason"] for row in skipped] == ([] if runs else ["no kernel"] * 2)
    monkeypatch.setattr(Other, "forward", lambda self, x: 2 * torch.nn.functional.linear(x, self.weight))
    with pytest.raises(CheckFailedError, match="bitsandbytes nf4: relative error 1"):
        spectral_matmul.bitsandbytes_layers(64)


@pytest.mark.slow
def test_a_generating_model_that_differs_fails_the_check(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    size = generate.TINY
    ways = generate.prepare(tmp_path, size)
    models = generate.check(ways, size)
    assert list(models) == list(ways) == ["dense bfloat16", "int8", "int4, 2 bits stored", "coded"]
    tokenizer = load_tokenizer(ways["coded"].folder)
    held = {name: generate.held_bytes(model) for name, model in models.items()}
    rows = generate.speeds(generate.writers_of(models, tokenizer, size), held)
    generate.memory(ways, tokenizer, size, rows)
    assert [row["model"] for row in rows] == list(ways)
    assert all(float(str(row[key])) > 0 for row in rows for key in ("tokens/s", "load, s", "to the first token, s"))
    other = language_model.write_model(tmp_path / "other", replace(size, layers=2))
    with pytest.raises(CheckFailedError, match=r"another in bfloat16: relative error .* of the logits"):
        generate.check({"another": generate.Way(other, ways["int8"].exact)}, size)


@pytest.mark.slow
def test_a_large_model_beside_llama_cpp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real llama.cpp where it is installed: it must read the same weights, heads of keys and all."""
    pytest.importorskip("transformers")
    size = language_model.Size(256, 256, 2, 512, key_heads=2, tied=False)
    monkeypatch.setattr(generate_large, "QUICK", size)
    for module, name, value in ((generate_large, "THREADS", 1), (generate, "ROUNDS", 2)):
        monkeypatch.setattr(module, name, value)  # threads that wait for each other are slow where others work too
    rows = generate_large.run(Inputs(quick=True, scratch=tmp_path))
    beside = ["llama.cpp Q8_0", "llama.cpp Q4_0"] if generate_large.available() else []
    names = [row["model"] for row in rows if "model" in row]
    assert names == ["dense bfloat16", "int8", "int5", "int4, 2 bits stored", "coded", *beside]
    assert [row["skipped"] for row in rows if "skipped" in row] == ([] if beside else ["llama.cpp"])
    index = read_index(tmp_path / "dense")
    assert {name: tuple(info.shape) for name, info in index.tensors.items()} == size.shapes()
    if beside:
        generate.decompress(tmp_path / "2 bits", tmp_path / "other")
        shutil.rmtree(tmp_path / "plain")
        expected = torch.zeros(12, size.words)
        with pytest.raises(CheckFailedError, match=r"llama.cpp: relative error .* of the logits"):
            generate_large.llama_files(tmp_path / "other", tmp_path, size, expected + 1)
    monkeypatch.setattr(generate_large, "available", lambda: False)
    assert generate_large.run(Inputs(quick=True, scratch=tmp_path))[-1] == llama_files.skipped()


def test_a_wrong_result_fails_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    real = rate.encode
    monkeypatch.setattr(rate, "encode", lambda w, *a, **k: real(w + 0.01, *a, **k))
    with pytest.raises(CheckFailedError, match="w: error"):
        rate.measure({"w": matrix()}, Target("bits", 3.0))


@pytest.mark.slow
def test_generated_checkpoints_and_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "_SIDE", 128)
    folder = engine.generate(tmp_path / "source", 1)
    body = engine.run_command("compress", str(folder), str(tmp_path / "out"), "--bits", "4")
    assert body["bits_per_weight"] == pytest.approx(4, rel=0.01)
    with pytest.raises(CheckFailedError, match=r"compress failed: Error: .*expected a new or empty folder"):
        engine.run_command("compress", str(folder), str(tmp_path / "out"), "--bits", "4")
    with pytest.raises(BackendError, match=r"GB are needed. Use --quick"):
        engine._require_room(tmp_path, 1 << 60)


def test_weights_come_from_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip(weights.PACKAGE)
    linear = weights.linear_weights()
    assert len(linear) == 37
    assert sum(w.numel() for w in linear.values()) == 10_764_288
    monkeypatch.setattr(weights, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"not installed; .*spectral-surgery\[demo\]"):
        weights.checkpoint_folder()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_demo_on_real_weights() -> None:
    pytest.importorskip(weights.PACKAGE)
    pytest.importorskip("transformers")
    from benchmarks.demo import run_demo

    rows = {row.method: row for row in run_demo(threads=2).rows}
    ours, nf4 = rows["spectral --bits 4"], rows["nf4 g64, double quantisation"]
    assert ours.bits_per_weight < nf4.bits_per_weight
    assert ours.relative_error < 0.85 * nf4.relative_error
    assert ours.cosine > 0.96
    fifth = rows["spectral --sparsity 0.2"]
    assert fifth.bits_per_weight <= 1.45
    assert fifth.relative_error <= 0.592
    assert fifth.cosine > rows["prune, bytes of --sparsity 0.2"].cosine
