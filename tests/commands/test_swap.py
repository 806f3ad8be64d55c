"""swap: folders load as the model that was judged, metrics and card are beside it, bad input writes nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from spectral_surgery.cli import cli
from spectral_surgery.commands.compress import compress
from spectral_surgery.commands.eval import evaluate
from spectral_surgery.commands.settings import FitSettings
from spectral_surgery.commands.swap import plan_swap, swap
from spectral_surgery.errors import CausalityError, CheckpointError, ConfigError, FormatVersionError
from spectral_surgery.files.remote_code import SHIM_FILE
from spectral_surgery.files.swap_record import SwapRecord, read_record
from spectral_surgery.live.families import FAMILIES
from spectral_surgery.live.swap import SwapSpec, swap_attention
from spectral_surgery.text.settings import EvalData, TextData
from tests.commands.test_train import WORDS, save_tokenizer
from tests.support.compressed import compressed_folder
from tests.support.swappable import MODELS, inputs_of, logits, mixer_of, model_of

pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


def folder_of(family: str, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    model_of(family).to(dtype).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text("\n".join(" ".join(WORDS[(i * k) % 10] for i in range(2 + k % 5)) for k in range(1, 80)))
    return file


def loaded(family: str, folder: Path) -> Any:
    import transformers

    return getattr(transformers, MODELS[family][0]).from_pretrained(folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_from_pretrained_rebuilds_it(tmp_path: Path, family: str) -> None:
    import transformers

    source = folder_of(family, tmp_path / "source")
    settings = {"init_std": 0.5}
    swap(source, tmp_path / "out", SwapSpec(mixer_of(family), (1,), settings), seed=4)
    expected = loaded(family, source)
    with torch.random.fork_rng():
        torch.manual_seed(4)
        swap_attention(expected, mixer_of(family), [1], settings)
    model, inputs = loaded(family, tmp_path / "out"), inputs_of(family)
    assert type(model) is type(expected)
    assert not model.training
    assert torch.equal(logits(model, inputs), logits(expected, inputs))
    base = transformers.AutoModel.from_pretrained(tmp_path / "out")
    assert torch.equal(base(**inputs)[0], expected.base_model(**inputs)[0])
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(loaded(family, tmp_path / "again"), inputs), logits(expected, inputs))
    assert "auto_map" not in json.loads((tmp_path / "again" / "config.json").read_text())


def test_half_precision_is_kept_and_all_other_weights_bit_for_bit(tmp_path: Path, text: Path) -> None:
    source = folder_of("llama", tmp_path / "source", torch.bfloat16)
    report = swap(
        source,
        tmp_path / "out",
        SwapSpec("causal_spectral_mixing", (0,), {"kernel_length": 8}),
        data=TextData(text, seq_length=16),
        training=FitSettings(3, 2),
        judged_on=EvalData(text=text, seq_length=16),
    )
    before, after = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "out"))
    changed = {name for name in after if name not in before}
    assert changed == {
        f"model.layers.0.self_attn.projected.{name}" for name in ("value.weight", "mixer.filter", "output.weight")
    }
    assert all(torch.equal(before[name], after[name]) for name in after.keys() - changed)
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    assert report.to_json()["leak"] == 0
    # what was judged is what is read
    found = evaluate(source, None, EvalData(text=text, seq_length=16)).measures["perplexity_a"]
    assert report.measures["perplexity_a"] == pytest.approx(found)
    found = evaluate(tmp_path / "out", None, EvalData(text=text, seq_length=16)).measures["perplexity_a"]
    assert report.measures["perplexity_b"] == pytest.approx(found)


def test_the_command(tmp_path: Path, text: Path) -> None:
    source, sts, out = folder_of("bert", tmp_path / "source"), tmp_path / "sts.csv", tmp_path / "out"
    sts.write_text("red cat,red dog,3\nsun,moon,1.5\none two,two,2.5\nblue,blue,5\n")
    run = CliRunner().invoke
    words = ["swap", str(source), str(out), "--mixer", "spectral_mixing", "--layers", "0-1", "-o", "bins=5", "-q"]
    done = run(cli, [*words, "--dry-run", "--json"])
    assert done.exit_code == 0
    plan = json.loads(done.stdout)
    assert plan["settings"] == {"bins": 5}
    assert not out.exists()
    assert "Nothing was written." in run(cli, [*words, "--dry-run"]).stdout
    words += ["--distill", str(text), "--steps", "4", "--end-to-end-steps", "2", "--sts", str(sts)]
    done = run(cli, [*words, "--json"], catch_exceptions=False)
    body = json.loads(done.stdout)
    assert body["command"] == "swap"
    assert set(body["measures"]) == {"spearman_a", "spearman_b"}
    assert [fit["layer"] for fit in body["layer_errors"]] == [0, 1]
    assert body["parameters"] == plan["parameters"]
    saved = json.loads((out / "swap.json").read_text())
    assert saved["measures"] == body["measures"]
    assert (out / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert (out / SHIM_FILE).exists()
    card = (out / "README.md").read_text()
    assert "--mixer spectral_mixing --layers 0,1 -o bins=5 --distill TEXT --steps 4" in card
    assert "spearman of this model" in card
    again = run(cli, words)
    assert again.exit_code == 1
    assert "expected a new or empty folder, got one with content" in str(again.exception)
    shown = run(cli, [*words, "--overwrite"], catch_exceptions=False).stdout
    assert "error before" in shown
    assert "spearman_b" in shown
    assert run(cli, [*words, "--layers", "x"]).exit_code == 2


def test_bad_input_writes_nothing(tmp_path: Path, text: Path) -> None:
    llama, vit = folder_of("llama", tmp_path / "llama"), folder_of("vit", tmp_path / "vit")
    out, good = tmp_path / "out", SwapSpec("causal_fnet", (0,))
    with pytest.raises(CausalityError, match="got hybrid, which lets a token see later ones"):
        swap(llama, out, SwapSpec("hybrid", (0,)))
    with pytest.raises(ConfigError, match="layers: expected 0 to 1 for this model, got 9"):
        swap(llama, out, SwapSpec("causal_fnet", (9,)))
    with pytest.raises(ConfigError, match=r"no.txt: expected a text"):
        swap(llama, out, good, data=TextData(tmp_path / "no.txt"))
    with pytest.raises(ConfigError, match="--sts: expected a sentence encoder with it, got llama"):
        swap(llama, out, good, judged_on=EvalData(sts=text))
    with pytest.raises(ConfigError, match="--distill: expected a model of text with it, got vit"):
        swap(vit, out, SwapSpec("fnet", (0,)), data=TextData(text))
    with pytest.raises(CheckpointError, match="expected a folder apart from the source, got one that overlaps"):
        swap(llama, llama, good)
    config = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps(config | {"model_type": "opt"}))
    with pytest.raises(ConfigError, match=r"model family: expected one of bert,.*got 'opt'"):
        swap(llama, out, good)
    (llama / "config.json").write_text(json.dumps(config | {"architectures": ["Own"]}))
    with pytest.raises(CheckpointError, match=r"expected a class that transformers has, got Own in config.json"):
        swap(llama, out, good)
    (llama / "config.json").write_text(json.dumps(config | {"hidden_act": "none"}))
    with pytest.raises(CheckpointError, match="has no configuration that transformers knows"):
        swap(llama, out, good)
    (llama / "config.json").write_text(json.dumps(config | {"vocab_size": 95}))
    with pytest.raises(CheckpointError, match=r"llama: cannot be loaded: .*vocab|llama: cannot be loaded: .*mismatch"):
        swap(llama, out, good)
    assert not list(tmp_path.glob("out*"))


def test_quantised_compressed_and_swapped_sources_are_refused(tmp_path: Path) -> None:
    compressed = compressed_folder("llama", tmp_path)
    with pytest.raises(CheckpointError, match="expected a plain checkpoint, got one quantised already"):
        plan_swap(compressed, SwapSpec("causal_fnet", (0,)))
    swap(tmp_path / "source", tmp_path / "out", SwapSpec("causal_fnet", (0,)))
    with pytest.raises(CheckpointError, match="Start from the original"):
        plan_swap(tmp_path / "out", SwapSpec("causal_fnet", (1,)))
    from spectral_surgery.codec.rate import Target
    from spectral_surgery.files.compressed.settings import CompressOptions

    with pytest.raises(CheckpointError, match=r"quantised already \(spectral_surgery_swap\)"):
        compress(tmp_path / "out", tmp_path / "c", CompressOptions(Target("bits", 4.0)))


def test_records_of_other_versions_and_damaged_ones() -> None:
    body = SwapRecord("fnet", (1,), {}).to_json()
    assert read_record(body) == SwapRecord("fnet", (1,), {})
    with pytest.raises(FormatVersionError, match=r"config\.json: expected a swap in format version 1, got 2"):
        read_record(body | {"format_version": 2})
    with pytest.raises(CheckpointError, match=r"layers \['1'\] and settings"):
        read_record(body | {"layers": ["1"]})


def test_a_dense_model_is_not_swapped_on_the_fly() -> None:
    from spectral_surgery.hf.swapped_models import SpectralSwapConfig, SpectralSwapQuantizer

    settings = SpectralSwapConfig(**SwapRecord("fnet", (0,), {}).to_json())
    quantizer = SpectralSwapQuantizer(settings, pre_quantized=False)
    with pytest.raises(ConfigError, match="expected a folder that `spectral-surgery swap` wrote, got a plain one"):
        quantizer.validate_environment()
    assert quantizer.is_trainable
    assert quantizer.is_qat_trainable


@pytest.mark.slow
def test_loads_without_the_import(tmp_path: Path) -> None:
    source = folder_of("bert", tmp_path / "source")
    swap(source, tmp_path / "out", SwapSpec("fftnet", (0,)))
    code = (
        "import transformers\n"
        f"model = transformers.AutoModel.from_pretrained({str(tmp_path / 'out')!r}, trust_remote_code=True)\n"
        "assert type(model.encoder.layer[0].attention.self).__name__ == 'SwappedAttention'\n"
    )
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home")}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, timeout=300)
