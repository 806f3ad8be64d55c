"""generate: plain and compressed models, with and without an adapter, streamed and as JSON."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from spectral_surgery import cli
from spectral_surgery.adapters import METHODS
from spectral_surgery.adapters.base import AdapterSpec
from spectral_surgery.adapters.lora import LoraConfig
from spectral_surgery.codec.rate import Target
from spectral_surgery.commands.compress import compress
from spectral_surgery.commands.generate import generate
from spectral_surgery.commands.settings import Running
from spectral_surgery.errors import CheckpointError, ConfigError, LimitError
from spectral_surgery.files.compressed.settings import CompressOptions
from spectral_surgery.files.peft.adapter_files import write_adapter
from spectral_surgery.hf.models import continue_text
from spectral_surgery.hf.quantizer.load_compressed import load_compressed
from spectral_surgery.hf.settings import Sampling
from spectral_surgery.live.attach import adapted_layers, inject, state_of
from spectral_surgery.targets import ModuleTargets
from tests.support.compressed import TEXT, compressed_folder, save_tokenizer

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
PROMPT = "w5 w6 w7"
SHORT = Sampling(max_tokens=6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A compressed llama with a tokenizer, beside its source."""
    out = compressed_folder("llama_tied", tmp_path_factory.mktemp("llama"), bits=6)
    save_tokenizer(out)
    save_tokenizer(out.parent / "source")
    return out


def test_a_compressed_model_writes_what_the_dense_one_writes(folder: Path) -> None:
    pieces: list[str] = []
    ours = generate(folder, PROMPT, SHORT, Running(), pieces.append)
    dense = generate(folder.parent / "source", PROMPT, SHORT, Running())
    assert ours.text == dense.text == "".join(pieces)
    assert len(pieces) > 2
    assert (ours.prompt_tokens, ours.tokens) == (3, 6)
    assert 0 < ours.first_seconds <= ours.seconds
    assert ours.weight_bytes < 0.3 * dense.weight_bytes


def test_a_model_that_cannot_generate_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"generate: expected a model that.*got Linear without that method"):
        continue_text(torch.nn.Linear(2, 2), None, PROMPT, SHORT, print)


def test_an_encoder_without_an_output_layer_is_refused(tmp_path: Path) -> None:
    """One that begins at random would write random words."""
    plain, small = tmp_path / "plain", tmp_path / "small"
    transformers.BertModel(transformers.BertConfig(**TEXT)).save_pretrained(plain)
    save_tokenizer(plain)
    compress(plain, small, CompressOptions(Target("bits", 4.0), min_weights=1000))
    for folder in (plain, small):
        with pytest.raises(CheckpointError, match=r"expected the weights of BertLMHeadModel, got none for cls\.pred"):
            generate(folder, PROMPT, SHORT, Running())


def test_sampling_follows_its_seed(folder: Path) -> None:
    sampling = Sampling(max_tokens=12, temperature=2.0, top_k=50, top_p=0.99, seed=1)
    first, again = (generate(folder, PROMPT, sampling, Running("coded")).text for _ in range(2))
    assert first == again != generate(folder, PROMPT, replace(sampling, seed=2), Running()).text


def test_with_an_adapter(folder: Path, tmp_path: Path) -> None:
    base = load_compressed(folder)
    spec = inject(
        base, AdapterSpec(METHODS["lora"], LoraConfig(r=2), ModuleTargets(target_modules=("q_proj", "up_proj")))
    )
    for layer in adapted_layers(base).values():
        for parameter in layer.adapters.parameters():
            torch.nn.init.normal_(parameter, std=2.0)
    write_adapter(state_of(base, spec), tmp_path / "adapter")
    adapted = generate(folder, PROMPT, SHORT, Running(adapter=tmp_path / "adapter"))
    assert adapted.text != generate(folder, PROMPT, SHORT, Running()).text


def test_pipeline(folder: Path) -> None:
    settings: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
    made = transformers.pipeline("text-generation", model=str(folder))(PROMPT, **settings)
    assert made[0]["generated_text"].split(" ")[-5:] == generate(folder, PROMPT, SHORT, Running()).text.split()[-5:]


def test_command(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["spectral-surgery", "generate", str(folder), *arguments])
        with pytest.raises(SystemExit) as end:
            cli.main()
        return int(end.value.code or 0), *capsys.readouterr()

    code, out, err = run(PROMPT, "--max-tokens", "6")
    assert (code, out.strip()) == (0, generate(folder, PROMPT, SHORT, Running()).text.strip())
    assert "6 tokens" in err
    code, out, _ = run(PROMPT, "--max-tokens", "6", "--json", "--resident", "coded", "--max-memory", "1GB")
    body = json.loads(out)
    assert (code, body["command"], body["tokens"]) == (0, "generate", 6)
    assert body["tokens_per_second"] > 0
    code, _, err = run(PROMPT, "--max-memory", "1kB")
    assert (code, err.count("\n")) == (1, 1)
    assert ", got 1000. Compress to fewer bits." in err
    code, _, err = run(PROMPT, "--max-memory", "much")
    assert code == 2
    assert "expected a size such as 500MB" in err


@pytest.mark.parametrize(
    ("running", "error", "text"),
    [
        (Running("int8"), ConfigError, "source: expected a compressed folder for --resident and --max-memory"),
        (Running(dtype="int8"), ConfigError, "--dtype: expected float32, bfloat16, float16 or the like, got int8"),
        (Running(adapter=Path("nowhere")), CheckpointError, "nowhere"),
    ],
)
def test_bad_settings(folder: Path, running: Running, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        generate(folder.parent / "source", PROMPT, SHORT, running)


def test_bad_input(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="generate: expected a prompt with some text, got no tokens"):
        generate(folder, "", SHORT, Running())
    least = 45_088 + torch.get_num_threads() * (8 << 20)
    with pytest.raises(LimitError, match=rf"max_memory: expected {least} bytes or.*got 10"):
        generate(folder, PROMPT, SHORT, Running(max_memory=10))
    bert = compressed_folder("vit", tmp_path)
    with pytest.raises(CheckpointError, match="has no tokenizer"):
        generate(bert, PROMPT, SHORT, Running())
    save_tokenizer(bert)
    with pytest.raises(CheckpointError, match="transformers cannot load it"):
        generate(bert, PROMPT, SHORT, Running())
