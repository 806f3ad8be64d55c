"""eval's table of models: baselines are what they are called, at the bytes they are said to have."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from click import Context, Option
from click.testing import CliRunner

pytest.importorskip("transformers")

from spectral_surgery.baselines import BASELINES, SHORT_NAMES
from spectral_surgery.cli import cli
from spectral_surgery.codec.rate import Target
from spectral_surgery.commands.compress import compress
from spectral_surgery.commands.eval import ModelRow, evaluate
from spectral_surgery.commands.eval.baselines import Cost, matrices_of, write_baseline
from spectral_surgery.commands.eval.plot import plot_rate_distortion
from spectral_surgery.commands.settings import Reference
from spectral_surgery.errors import CheckpointError, ConfigError
from spectral_surgery.files.compressed.settings import CompressOptions
from spectral_surgery.files.index import read_index
from spectral_surgery.files.reader import read_tensor
from spectral_surgery.hf.models import load_model
from spectral_surgery.run import Run
from spectral_surgery.text.scores import compare_logits
from spectral_surgery.text.settings import EvalData
from tests.support.checkpoints import write_folder
from tests.support.compressed import compressed_folder, save_tokenizer

WORDS = " ".join(f"w{3 + (7 * n) % 90}" for n in range(60))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("table")
    compressed_folder("llama_tied", root)
    for name in ("source", "compressed"):
        save_tokenizer(root / name)
    (root / "text.txt").write_text(WORDS)
    return root


def test_the_table_of_a_model_compressed_and_as_baselines_leave_it(folder: Path) -> None:
    run = CliRunner().invoke
    arguments = [str(folder / "source"), str(folder / "compressed"), "--text", str(folder / "text.txt"), "-q"]
    arguments += ["--seq-length", "12", "--samples", "2", "--baseline", "int8,int4,pruning"]
    done = run(cli, ["eval", *arguments, "--json"])
    assert done.exit_code == 0, done.output
    body = json.loads(done.stdout)
    dense, ours, int8, int4, pruned = body["models"]
    assert dense["bits_per_weight"] == 32
    assert dense["bytes"] == read_index(folder / "source").nbytes
    assert ours["bytes"] == read_index(folder / "compressed").nbytes
    assert ours["bits_per_weight"] == pytest.approx(4, rel=0.05)
    assert pruned["bits_per_weight"] == pytest.approx(ours["bits_per_weight"], rel=0.01)
    assert pruned["bits_per_weight"] <= ours["bits_per_weight"]
    assert dense["relative_error"] == 0 < int8["relative_error"] < ours["relative_error"] < int4["relative_error"]
    assert abs(ours["relative_error"] - body["relative_error"]) < 1e-9
    assert body["measures"]["perplexity_a"] == dense["perplexity"]
    assert body["measures"]["perplexity_b"] == ours["perplexity"]
    assert int8["kl"] < ours["kl"] < pruned["kl"]
    alone = run(cli, ["eval", *arguments[:-2], "--json"])
    assert json.loads(alone.stdout)["measures"] == pytest.approx(body["measures"])
    shown = run(cli, ["eval", *arguments]).stdout
    assert "int4 g128" in shown
    assert "perplexity" in shown.splitlines()[0]
    assert shown.splitlines()[0].endswith("seconds  peak_bytes")
    for made in (int8, int4, pruned):  # here; the others were not
        assert made["seconds"] > 0
        assert made["peak_bytes"] >= 0
    assert not {"seconds", "peak_bytes"} & (dense.keys() | ours.keys())


def test_the_plot_of_the_table(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    arguments = ["eval", str(folder / "source"), str(folder / "compressed"), "-q", "--plot"]
    text = ["--text", str(folder / "text.txt"), "--seq-length", "12"]
    done = CliRunner().invoke(cli, [*arguments, str(tmp_path / "x.png"), *text, "--baseline", "int8,hqq4,hqq3,prune"])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    for more, why in (
        (["x.png"], "expected several B or --baseline, whose table is drawn, got one model or two"),
        (
            [str(tmp_path / "no" / "x.png"), "--baseline", "int8"],
            "got .*no/x.png. Create",
        ),
    ):
        with pytest.raises(ConfigError, match=f"eval --plot: .*{why}"):
            CliRunner().invoke(cli, [*arguments, *more], standalone_mode=False, catch_exceptions=False)


def test_rates_that_hold_no_bitmap_are_left_out(folder: Path, tmp_path: Path) -> None:
    tiny = tmp_path / "tiny"
    compress(folder / "source", tiny, CompressOptions(Target("bits", 0.9)))
    reference = Reference((tiny,), ("svd", "prune"))
    report = evaluate(folder / "source", folder / "compressed", EvalData(), reference=reference)
    assert [row.short for row in report.models] == ["source", "compressed", "tiny", "svd", "svd", "prune"]
    with pytest.raises(ConfigError, match=r"model\.embed_tokens\.weight: prune:.*got [\d.e-]+"):
        evaluate(folder / "source", tiny, EvalData(), reference=Reference(baselines=("prune",)))


def test_what_cannot_be_judged_is_named_and_the_others_are(folder: Path, tmp_path: Path) -> None:
    other = write_folder(tmp_path / "other", {"model.norm.weight": torch.ones(7)})
    same, ours = str(folder / "source"), str(folder / "compressed")
    done = CliRunner().invoke(cli, ["eval", same, str(other), ours, same, "-q", "--json"])
    assert done.exit_code == 1
    body = json.loads(done.stdout)
    assert [model["model"] for model in body["models"]] == ["source", "compressed", "source"]
    assert list(body["failed"]) == [str(other)]
    assert f"Error: {other}: model.norm.weight: expected equal shapes" in done.stderr
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight: expected equal shapes"):
        evaluate(folder / "source", other, EvalData(), reference=Reference((other,)))


@pytest.mark.parametrize(
    ("others", "device", "message"),
    [((), "cpu", "expected several B, got 1"), (("compressed",), "cuda", "expected --device cpu, got cuda")],
)
def test_what_does_not_go_with_a_cluster(folder: Path, others: tuple[str, ...], device: str, message: str) -> None:
    reference = Reference(tuple(folder / name for name in others))
    with pytest.raises(ConfigError, match=f"eval --engine ray: {message}"):
        evaluate(
            folder / "source",
            folder / "compressed",
            EvalData(),
            reference=reference,
            device=device,
            run=Run(engine="ray"),
        )


def test_points_of_the_plot(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.text import Text

    drawn = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, *_, **__: drawn.append(figure.axes[0]))
    rows = [
        ModelRow("dense", Cost(32.0, 1, 0.0), {"perplexity": 9.0}, short="dense"),
        ModelRow("GPTQ int3", Cost(3.1, 1, 0.2), {"kl": 0.02}, "gptq", "gptq3"),
        ModelRow("GPTQ int4", Cost(4.1, 1, 0.1), {"kl": 0.01}, "gptq", "gptq4"),
        ModelRow("model-3bit", Cost(3.0, 1, 0.2), {"kl": 0.01}, "calibrated", "model-3bit"),
        ModelRow("prune, 4 bits", Cost(4.0, 1, 0.3), {"kl": 0.4}, "prune", "prune"),
        ModelRow("prune, 3 bits", Cost(3.0, 1, 0.4), {"kl": 0.0}, "prune", "prune"),  # has no place
    ]
    plot_rate_distortion(rows, tmp_path / "x.png", "a model")
    (axes,) = drawn
    assert {line.get_label(): line.get_xydata().tolist() for line in axes.lines} == {
        "GPTQ": [[3.1, 0.02], [4.1, 0.01]],
        "spectral_surgery, calibrated": [[3.0, 0.01]],
        "magnitude pruning": [[4.0, 0.4]],
    }
    assert sorted(text.get_text() for text in axes.texts) == ["gptq3", "gptq4", "model-3bit", "prune"]
    renderer = axes.figure.canvas.get_renderer()
    boxes = [Text.get_window_extent(text, renderer) for text in axes.texts]  # without the line to its point
    assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))
    for measure, name, value in (("cosine", "1 - cosine", 0.25), ("spearman", "relative error", 0.2)):
        plot_rate_distortion([ModelRow("b", Cost(3.0, 1, 0.2), {measure: 0.75}, "", "b")], tmp_path / "x.png", "")
        assert drawn[-1].get_ylabel().startswith(name)
        assert drawn[-1].lines[0].get_ydata()[0] == value
    with pytest.raises(ConfigError, match=r"--plot: expected models that differ from the first, got none"):
        plot_rate_distortion(rows[:1], tmp_path / "x.png", "a model")


def test_help_names_every_baseline() -> None:
    command = cli.get_command(Context(cli), "eval")
    assert command is not None
    shown = str(
        next(option.help for option in command.params if isinstance(option, Option) and option.name == "baseline")
    )
    short = {name: short for short, name in SHORT_NAMES.items()}
    assert all(name in shown or short[name] in shown for name in BASELINES)


def test_a_baseline_is_judged_by_the_weights_that_it_leaves(folder: Path) -> None:
    data = EvalData(folder / "text.txt", seq_length=12)
    report = evaluate(folder / "source", None, data, reference=Reference(baselines=("nf4",)))
    model, tokenizer = load_model(folder / "source", "AutoModelForCausalLM", dtype=torch.float32)
    before = compare_logits([model], tokenizer, WORDS, 12)
    index = read_index(folder / "source")
    stored = 0
    for name in matrices_of(index, None).shapes:
        result = BASELINES["nf4"].apply(read_tensor(index.tensors[name]), None)
        model.get_parameter(name).data.copy_(result.weight)
        stored += result.stored_bytes
    assert report.models[1].measures["perplexity"] == pytest.approx(
        compare_logits([model], tokenizer, WORDS, 12)["perplexity_a"], rel=1e-6
    )
    assert report.measures == pytest.approx(before, rel=1e-6)
    rest = sum(info.nbytes for name, info in index.tensors.items() if name not in matrices_of(index, None).shapes)
    assert report.models[1].cost.nbytes == rest + stored


def test_experts_are_taken_one_by_one_and_tied_tensors_count_once(tmp_path: Path) -> None:
    experts = torch.randn(3, 64, 32, generator=torch.Generator().manual_seed(0))
    table = torch.randn(96, 64, generator=torch.Generator().manual_seed(1))
    tensors = {
        "mlp.experts.up": experts,
        "model.embed.weight": table,
        "lm_head.weight": table.clone(),
        "norm": torch.ones(8),
    }
    index = read_index(write_folder(tmp_path / "a", tensors))
    matrices = matrices_of(index, None)
    (tmp_path / "b").mkdir()
    cost = write_baseline(index, matrices, BASELINES["prune"], 4.0, tmp_path / "b")
    written = read_index(tmp_path / "b")
    each = [BASELINES["prune"].apply(expert, 4.0) for expert in experts]
    assert torch.equal(read_tensor(written.tensors["mlp.experts.up"]), torch.stack([own.weight for own in each]))
    once = BASELINES["prune"].apply(table, 4.0)
    for name in ("model.embed.weight", "lm_head.weight"):
        assert torch.equal(read_tensor(written.tensors[name]), once.weight)
    stored = sum(own.stored_bytes for own in each) + once.stored_bytes
    assert cost.nbytes == stored + 8 * 4
    assert cost.bits_per_weight == pytest.approx(8 * stored / (experts.numel() + table.numel()))
    lost = (experts - torch.stack([own.weight for own in each])).square().sum() + (table - once.weight).square().sum()
    assert cost.relative_error == pytest.approx(float(lost / (experts.square().sum() + table.square().sum())) ** 0.5)


def test_what_no_table_can_be_made_of(folder: Path) -> None:
    a, b = folder / "source", folder / "compressed"
    with pytest.raises(ConfigError, match=r"baseline prune: expected a compressed B or --bits to meet, got none"):
        evaluate(a, None, EvalData(), reference=Reference(baselines=("prune",)))
    with pytest.raises(ConfigError, match=r"eval --baseline: expected a plain A .*, got compressed"):
        evaluate(b, None, EvalData(), reference=Reference(baselines=("int8",)))
    with pytest.raises(ConfigError, match=r"eval --adapter: expected at most one B and no baselines with it, got more"):
        evaluate(a, b, EvalData(), reference=Reference(others=(b,)), adapter=folder)
    with pytest.raises(ConfigError, match=r"baseline: expected one of int8,.*got 'int5'"):
        evaluate(a, None, EvalData(), reference=Reference(baselines=("int5",)))
    with pytest.raises(ConfigError, match=r"model\.embed_tokens\.weight: prune:.*got 0\.5"):
        evaluate(a, None, EvalData(), reference=Reference(baselines=("prune",), bits=0.5))
    table = evaluate(a, None, EvalData(), reference=Reference(baselines=("prune", "svd"), bits=6.0)).models
    assert [row.model for row in table] == ["source", "magnitude pruning, 6 bits", "truncated SVD, 6 bits"]
    assert evaluate(a, b, EvalData(), reference=Reference(others=(b,))).models[2].cost.nbytes == read_index(b).nbytes
