"""report: pages say what files say, hold nothing but themselves, and run no script but ours, whatever is in a name."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from spectral_surgery.codec.rate import Target
from spectral_surgery.commands.compress import CompressReport, compress
from spectral_surgery.commands.merge import merge
from spectral_surgery.commands.report import report
from spectral_surgery.commands.report.adapters import layer_of
from spectral_surgery.commands.report.records import layers
from spectral_surgery.commands.report.training import curves
from spectral_surgery.commands.report.treemap import squarified
from spectral_surgery.errors import CheckpointError, ConfigError
from spectral_surgery.files.compressed.checkpoint import open_compressed
from spectral_surgery.files.compressed.plan import CompressOptions
from spectral_surgery.files.index import read_index
from spectral_surgery.files.merge_record import read_record
from tests.commands.test_merge import DOWN, Q, adapter
from tests.support.checkpoints import contents, gaussian, llama_like, write_folder
from tests.support.command import run
from tests.support.html import Node, facts, parse, rows, tips

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")

HOSTILE = "a.<script>alert(1)</script>\"'&amp;<img src=x onerror=alert(2)>]]>.weight"
THREE_BITS = CompressOptions(Target("bits", 3.0))


def page_of(folder: Path, out: Path, **options: Any) -> Node:
    report(folder, out, **options)
    return parse(out.read_text(encoding="utf-8"))


def sections(page: Node) -> list[str]:
    return [section.one("h2").text for section in page.all("section")]


def section(page: Node, title: str) -> Node:
    (found,) = [own for own in page.all("section") if own.one("h2").text == title]
    return found


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "_name_or_path": "org/small"}
    return write_folder(tmp_path_factory.mktemp("report") / "source", llama_like(), config=config)


@pytest.fixture(scope="module")
def compressed(source: Path) -> tuple[Path, CompressReport]:
    out = source.parent / "compressed"
    return out, compress(source, out, THREE_BITS)


@pytest.fixture(scope="module")
def merged(source: Path) -> Path:
    one = adapter(source.parent / "adapter")
    other = adapter(source.parent / "other", "fourierft", (Q,))
    merge(source, [one, other], source.parent / "merged", weights=[1.0, 0.5])
    return source.parent / "merged"


def test_a_compressed_folder_says_what_its_manifest_says(
    compressed: tuple[Path, CompressReport], tmp_path: Path
) -> None:
    folder, done = compressed
    checkpoint = open_compressed(folder)
    manifest, total = checkpoint.manifest, checkpoint.manifest.report
    page = page_of(folder, tmp_path / "page.html")
    assert page.one("h1").text == "compressed"
    assert page.one("p", kind="kind").text == "Compressed checkpoint, data-free"
    assert sections(page) == ["How it was made", "Where the bytes are", "Bits and error", "All tensors"]
    numbers = facts(page.one("header"))
    assert numbers["bits per weight"] == f"{total.bits_per_weight:.3f}"
    assert numbers["relative error"] == f"{total.relative_error:.4f}"
    assert numbers["compression ratio"] == f"{done.compression_ratio:.2f}"
    assert numbers["coefficients kept"] == f"{total.density:.1%}"
    making = facts(section(page, "How it was made"))
    assert making["Model"] == "org/small"
    assert making["Architecture"] == "LlamaForCausalLM"
    assert making["Asked for"] == "bits 3"
    assert making["Bytes"] == f"{done.input_bytes:,} before, {done.output_bytes:,} after"
    assert making["Made with"].startswith("spectral-surgery ")
    assert manifest.source in making["Source"]
    command = section(page, "How it was made").one("code").text
    assert command.startswith("spectral-surgery compress org/small OUT")
    assert "--bits 3" in command
    table = {row["tensor"]: row for row in rows(page, "Compressed")}
    assert table.keys() == manifest.tensors.keys()
    for name, record in manifest.tensors.items():
        assert int(table[name]["bytes"]) == record.report.stored_bytes
        assert float(table[name]["bits per weight"]) == record.report.bits_per_weight
        assert float(table[name]["relative error"]) == record.report.relative_error
        assert float(table[name]["kept"]) == record.report.density
        assert table[name]["shape"] == " x ".join(map(str, record.shape))
    copied = {row["tensor"]: int(row["bytes"]) for row in rows(page, "Copied bit for bit")}
    assert copied == {"model.layers.0.input_layernorm.weight": 192, "model.steps": 56}
    assert rows(page, "Tied") == [{"tensor": "lm_head.weight", "stored as": "model.embed_tokens.weight"}]
    drawn = {tip.split("\n")[0] for tip in tips(section(page, "Where the bytes are"), "tile")}
    assert drawn == table.keys() | copied.keys()


def positions(svg: Node) -> tuple[dict[str, tuple[float, float]], list[tuple[float, float]], list[tuple[float, float]]]:
    """Of a chart: where its points are, by the name in what they say; its curve; ticks of y and their pixels."""
    points = {
        dot.one("title").text.split("\n")[0]: (float(dot.attributes["cx"] or 0), float(dot.attributes["cy"] or 0))
        for dot in svg.all("circle", kind="dot")
    }
    curve = list(svg.all("path", kind="curve"))
    along = (
        [tuple(map(float, pair.split())) for pair in (curve[0].attributes["d"] or "")[1:].split("L")] if curve else []
    )
    grid = [
        float((path.attributes["d"] or "M0 0")[1:].split("L")[0].split()[1]) for path in svg.all("path", kind="grid")
    ]
    labels = [own.text for own in svg.all("text", kind="tick") if own.attributes["text-anchor"] == "end"]
    ticks = [(float(label.replace(",", "")), y) for label, y in zip(labels, grid, strict=True)]
    return points, along, ticks


def test_points_lie_where_their_values_are_and_the_bound_is_two_to_minus_the_rate(
    compressed: tuple[Path, CompressReport], tmp_path: Path
) -> None:
    page = page_of(compressed[0], tmp_path / "page.html")
    for kind in ("wide", "narrow"):
        svg = list(section(page, "Bits and error").all("svg", kind=kind))[-1]
        points, curve, ticks = positions(svg)
        (low, y_low), *_, (high, y_high) = ticks
        slope = (y_high - y_low) / math.log(high / low)
        across = [own for own in svg.all("text", kind="tick") if own.attributes["text-anchor"] == "middle"]
        (rate, x_rate), *_, (more, x_more) = [(float(own.text), float(own.attributes["x"] or 0)) for own in across]
        unit = (x_more - x_rate) / (more - rate)
        for name, record in open_compressed(compressed[0]).manifest.tensors.items():
            x, y = points[name]
            assert y == pytest.approx(y_low + slope * math.log(record.report.relative_error / low), abs=0.2)
            assert x == pytest.approx(x_rate + unit * (record.report.bits_per_weight - rate), abs=0.2)
        for x, y in curve:
            bits = rate + (x - x_rate) / unit
            assert y == pytest.approx(y_low + slope * math.log(2**-bits / low), abs=0.3)


def test_a_page_is_one_file_that_fetches_nothing(compressed: tuple[Path, CompressReport], tmp_path: Path) -> None:
    page = page_of(compressed[0], tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert not re.search(r"https?://|@import|url\(", text)
    assert not list(page.all("link", "img", "iframe", "object", "embed", "base", "form"))
    links = [node.attributes["href"] or "" for node in page.all("a")]
    assert links == [f"#{own.attributes['id']}" for own in page.all("section")]
    policy = next(m.attributes["content"] or "" for m in page.all("meta") if "http-equiv" in m.attributes)
    for tag in ("script", "style"):
        node = page.one(tag)
        assert not node.attributes
        digest = base64.b64encode(hashlib.sha256(node.text.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'; ")
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
    report(compressed[0], tmp_path / "again.html")
    assert (tmp_path / "again.html").read_bytes() == (tmp_path / "page.html").read_bytes()


def test_nothing_in_a_checkpoint_becomes_markup(tmp_path: Path) -> None:
    tensors = {HOSTILE: gaussian(80, 64), "b." + HOSTILE: torch.ones(3), "c.layers.1.</svg>.weight": gaussian(70, 64)}
    config = {"model_type": HOSTILE, "architectures": [HOSTILE]}
    source = write_folder(tmp_path / "source", tensors, config=config)
    compress(source, tmp_path / "<b>out", THREE_BITS)
    page = page_of(tmp_path / "<b>out", tmp_path / "page.html")
    assert len(list(page.all("script"))) == 1
    assert not list(page.all("img", "b"))
    assert page.one("h1").text == "<b>out"
    assert {row["tensor"] for row in rows(page, "Compressed")} == {HOSTILE, "c.layers.1.</svg>.weight"}
    assert [row["tensor"] for row in rows(page, "Copied bit for bit")] == ["b." + HOSTILE]
    assert facts(section(page, "How it was made"))["Architecture"] == HOSTILE
    assert any(tip.startswith(HOSTILE) for tip in tips(page, "tile"))
    ours = {"class", "x", "y", "width", "height", "cx", "cy", "r", "d", "text-anchor", "viewbox", "role"}
    for svg in page.all("svg"):
        for node in (svg, *svg.all("rect", "circle", "path", "text", "title")):
            assert node.attributes.keys() <= ours | {"aria-label", "aria-hidden", "rx"}


def test_weights_are_not_read(compressed: tuple[Path, CompressReport], tmp_path: Path) -> None:
    shutil.copytree(compressed[0], tmp_path / "compressed")
    file = tmp_path / "compressed" / "model.safetensors"
    data = file.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    file.write_bytes(data[:start] + bytes(len(data) - start))
    report(compressed[0], tmp_path / "one.html")
    report(tmp_path / "compressed", tmp_path / "other.html")
    assert (tmp_path / "one.html").read_bytes() == (tmp_path / "other.html").read_bytes()


def test_charts_and_tables_can_be_read_without_seeing_them(merged: Path, tmp_path: Path) -> None:
    page = page_of(merged, tmp_path / "page.html")
    charts = [svg for svg in page.all("svg") if svg.attributes.get("aria-hidden") != "true"]
    assert len(charts) == 4
    for svg in charts:
        assert svg.attributes["role"] == "img"
        assert len(svg.attributes["aria-label"] or "") > 30
    for table in page.all("table"):
        assert table.one("caption").text
        for head in table.one("thead").all("th"):
            assert head.attributes["scope"] == "col"
            assert head.attributes["aria-sort"] == "none"
            assert head.one("button").attributes["type"] == "button"
    for scroll in page.all("div", kind="scroll"):
        assert scroll.attributes["tabindex"] == "0"
        assert scroll.attributes["aria-label"]
    assert page.one("html").attributes["lang"] == "en"


def test_differences_to_a_base(source: Path, tmp_path: Path) -> None:
    tuned = {name: tensor + 1 if tensor.dtype.is_floating_point else tensor for name, tensor in llama_like().items()}
    write_folder(tmp_path / "tuned", tuned)
    compress(tmp_path / "tuned", tmp_path / "out", THREE_BITS, base=source)
    page = page_of(tmp_path / "out", tmp_path / "page.html")
    assert page.one("p", kind="kind").text == "Differences to a base, data-free"
    assert facts(section(page, "How it was made"))["Base"] == "source"
    assert "--base source" in section(page, "How it was made").one("code").text


def test_an_adapter_is_counted_by_module(merged: Path, tmp_path: Path) -> None:
    folder = merged.parent / "adapter"
    page = page_of(folder, tmp_path / "page.html")
    index = read_index(folder, adapters=True)
    numbers = facts(page.one("header"))
    assert page.one("p", kind="kind").text == "Adapter"
    assert numbers["parameters"] == f"{2 * (96 + 130) + 2 * (200 + 96):,}"
    assert numbers["modules"] == "2"
    assert {tip.split("\n")[0] for tip in tips(page, "tile")} == {Q, DOWN}
    assert sum(int(row["bytes"]) for row in rows(page, "Tensors")) == index.nbytes
    assert {"setting": "r", "value": "2"} in rows(page, "Settings")


@pytest.mark.parametrize("base", ["/home/somebody/models/small", "C:\\models\\small"])
def test_folders_of_a_machine_are_not_told(merged: Path, tmp_path: Path, base: str) -> None:
    shutil.copytree(merged.parent / "adapter", tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": base}))
    page = page_of(tmp_path / "adapter", tmp_path / "page.html")
    assert facts(section(page, "How it was made"))["Base model"] == "small"
    assert base not in page.text


@pytest.mark.parametrize(
    ("name", "method", "layer"),
    [
        ("base_model.model.h.0.q.lora_A.weight", "LORA", "h.0.q"),
        ("base_model.model.h.0.q.fourierft_spectrum", "FOURIERFT", "h.0.q"),
        ("base_model.model.score.modules_to_save.weight", "LORA", "score"),
        ("base_model.model.score.weight", "LORA", "score"),
        ("base_model.model.embed.lora_embedding_A", "LORA", "embed"),
        ("base_model.model.experts.base_layer.lora_A.weight", "LORA", "experts"),
        ("w", "VERA", "w"),
    ],
)
def test_tensors_of_adapters_are_told_by_module(name: str, method: str, layer: str) -> None:
    assert layer_of(name, method) == layer


def test_a_merged_folder_says_what_its_record_says(merged: Path, tmp_path: Path) -> None:
    page, record, index = page_of(merged, tmp_path / "page.html"), read_record(merged), read_index(merged)
    assert page.one("p", kind="kind").text == "Model with adapters merged"
    changed = {row["tensor"]: row for row in rows(page, "Changed")}
    assert changed.keys() == record.tensors.keys()
    for name, tensor in record.tensors.items():
        assert int(changed[name]["record"]) == tensor.nbytes
        assert int(changed[name]["bytes"]) == index.tensors[name].nbytes
    assert changed[f"{Q}.weight"]["adapters"] == "1, 2"
    adapters = rows(page, "Adapters")
    assert [(row["factor"], row["method"]) for row in adapters] == [("1.0", "LORA"), ("0.5", "FOURIERFT")]
    assert len(tips(page, "tile")) == len(index.tensors)
    assert len(tips(page, "changed")) == len(record.tensors)
    assert "--weights 1,0.5" in section(page, "How it was made").one("code").text


def test_the_page_is_for_this_file_alone(compressed: tuple[Path, CompressReport], tmp_path: Path) -> None:
    folder = compressed[0]
    before = contents(folder)
    out = tmp_path / "new" / "page.html"
    done = run("report", folder, "-o", out, "--json")
    assert done.returncode == 0, done.stderr
    body = json.loads(done.stdout)
    assert (body["command"], body["page"], body["bytes"]) == ("report", str(out), out.stat().st_size)
    assert body["kind"] == "Compressed checkpoint, data-free"
    assert body["sections"][-1]["tables"][0] == {"title": "Compressed", "rows": 3}
    assert body["sections"][1]["charts"] == ["Bytes by tensor"]
    again = run("report", folder, "-o", out)
    assert again.returncode == 1
    assert again.stderr == f"Error: {out}: expected a new file, got one that exists. Use --overwrite to replace it.\n"
    out.write_text("old")
    shown = run("report", folder, "-o", out, "--overwrite")
    assert shown.returncode == 0
    assert shown.stdout.startswith("Compressed checkpoint, data-free: How it was made, ")
    assert [path.name for path in out.parent.iterdir()] == ["page.html"]
    assert contents(folder) == before


def test_what_is_no_record_is_refused_and_the_old_page_stays(
    compressed: tuple[Path, CompressReport], source: Path, tmp_path: Path
) -> None:
    page = tmp_path / "page.html"
    page.write_text("old")
    (tmp_path / "other.json").write_text('{"models": 3}')
    (tmp_path / "text.txt").write_text("no JSON")
    cases = {
        source: "got a folder without a record. Use inspect for a plain model.",
        source / "model.safetensors": "got another file. Use inspect for weights.",
        tmp_path / "other.json": "got another file. Use inspect for weights.",
        tmp_path / "missing": "got nothing of this name. Check the path.",
    }
    for folder, words in cases.items():
        with pytest.raises(ConfigError, match=re.escape(f"{folder}: expected a compressed folder, ")) as caught:
            report(folder, page, overwrite=True)
        assert str(caught.value).endswith(words)
    with pytest.raises(CheckpointError, match="expected JSON, got an error"):
        report(tmp_path / "text.txt", page, overwrite=True)
    shutil.copytree(compressed[0], tmp_path / "damaged")
    (tmp_path / "damaged" / "spectral_surgery.json").write_text("{}")
    with pytest.raises(CheckpointError):
        report(tmp_path / "damaged", page, overwrite=True)
    with pytest.raises(CheckpointError, match=r"expected a file to write, got a folder\. Name a file in it\."):
        report(compressed[0], tmp_path)
    assert page.read_text() == "old"


@pytest.mark.parametrize(
    "course",
    [
        7,
        {"train": "x", "held_out": None},
        {"train": [[1], [2, "x"], [3, math.nan], [4, True], "ab"], "held_out": [[0, 1.5], [True, 2], [5, 1e400]]},
    ],
)
def test_metrics_that_somebody_edited_are_left_out(
    compressed: tuple[Path, CompressReport], tmp_path: Path, course: object
) -> None:
    shutil.copytree(compressed[0], tmp_path / "healed")
    body = {"curve": course, "blocks": {"0": [1, 2], "1": "x", "2": [None, 3]}, "best_step": "<b>", "objective": None}
    (tmp_path / "healed" / "heal.json").write_text(json.dumps(body))
    page = page_of(tmp_path / "healed", tmp_path / "page.html")
    assert not list(page.all("b"))
    readable = isinstance(course, dict) and isinstance(course["train"], list)
    assert ("Healing" in sections(page)) == readable
    if readable:  # one point of the loss, and one block before and after
        assert tips(section(page, "Healing"), "dot") == [
            *("held out, step 0: 1.5", "block 0, before: 1", "block 0, after: 2")
        ]


def test_areas_of_a_treemap_are_bytes() -> None:
    sizes = [400.0, 300.0, 90.0, 90.0, 60.0, 30.0, 20.0, 10.0]
    places = squarified(sizes, (3.0, 5.0, 200.0, 100.0))
    for size, (x, y, width, height) in zip(sizes, places, strict=True):
        assert width * height == pytest.approx(20.0 * size)
        assert x >= 3 - 1e-6
        assert y >= 5 - 1e-6
        assert x + width <= 203 + 1e-6
        assert y + height <= 105 + 1e-6
    for n, (x, y, width, height) in enumerate(places):
        for other in places[n + 1 :]:
            apart = x + width <= other[0] + 1e-6 or other[0] + other[2] <= x + 1e-6
            assert apart or y + height <= other[1] + 1e-6 or other[1] + other[3] <= y + 1e-6


def test_layers_are_in_the_order_of_a_model() -> None:
    names = ["head.weight", "model.layers.10.a.weight", "model.layers.2.a.weight", "model.embed_tokens.weight"]
    assert list(layers(names).values()) == ["model", "layer 2", "layer 10", "head"]
    names = ["m.norm.weight", "m.encoder.block.0.a.weight", "m.decoder.block.0.a.weight", "m.shared.weight"]
    assert layers(names) == {
        "m.shared.weight": "shared",
        "m.decoder.block.0.a.weight": "decoder 0",
        "m.encoder.block.0.a.weight": "encoder 0",
        "m.norm.weight": "norm",
    }


def test_a_loss_that_falls_far_is_drawn_on_a_logarithmic_axis() -> None:
    assert "logarithmic" in str(curves("Loss", {"training": [(1, 10.0), (2, 0.1)]}, 2))
    assert "logarithmic" not in str(curves("Loss", {"training": [(1, 1.0), (2, 0.9)]}, 2))
    assert curves("Loss", {"training": []}, 2) == ()
