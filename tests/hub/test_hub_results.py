"""What commands make goes to the Hub with --push, has a card of its kind, and loads by name where it should."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from tests.hub_server import TOKEN, LoopbackHub
from tests.support.checkpoints import gaussian, llama_like, write_folder
from tests.support.hub_client import ROOT, Client
from tests.support.tiny import WORDS, save_tokenizer

Q = "model.layers.0.self_attn.q_proj"
CARD = "---\nlicense: mit\nbase_model: org/older\n---\n\n# Base\n"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_folder(tmp_path_factory.mktemp("results") / "base", llama_like(torch.float32))
    (folder / "README.md").write_text(CARD)
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that runs, with a tokenizer and a text to train on."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("peft")
    folder = tmp_path_factory.mktemp("llama") / "model"
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=12, pad_token_id=0, tie_word_embeddings=True, **sizes)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    save_tokenizer(folder)
    (folder.parent / "text.txt").write_text(" ".join(WORDS[i % 10] for i in range(600)))
    return folder


def card_of(hub: LoopbackHub, name: str) -> tuple[dict[str, object], str]:
    text = hub.contents(name)["README.md"].decode()
    front: dict[str, object] = yaml.safe_load(text.split("---\n")[1])
    assert "spectral-surgery" in str(front["tags"])
    assert "THIS_FOLDER" not in text
    return front, text


def adapter(client: Client, base: object, out: Path, *options: str) -> None:
    """A LoRA of one layer whose update is not zero."""
    settings = ("--method", "lora", "-o", "r=2", "--target-modules", Q, *options)
    client.result("inject", base, out, *settings)
    file = out / "adapter_model.safetensors"
    save_file({name: gaussian(*tensor.shape) for name, tensor in load_file(file).items()}, file)


@pytest.mark.slow
def test_merge_and_unmerge(hub: LoopbackHub, client: Client, base: Path, tmp_path: Path) -> None:
    hub.seed("org/base", base)
    adapter(client, "org/base", tmp_path / "adapter")
    client.result("push", tmp_path / "adapter", "org/lora")
    done = client.result("merge", "org/base", "org/lora", tmp_path / "merged", "--push", "me/merged", "--private")
    assert done["pushed"]["changed"] is True
    assert hub.repos["me/merged"].private
    front, text = card_of(hub, "me/merged")
    assert (front["base_model"], front["base_model_relation"], front["license"]) == ("org/base", "merge", "mit")
    assert "spectral-surgery merge org/base ADAPTER_1 OUT\n" in text
    assert text.endswith("# Base\n")
    client.result("unmerge", "me/merged", tmp_path / "again", "--push", "me/again")
    assert hub.contents("me/again")["model.safetensors"] == (base / "model.safetensors").read_bytes()
    assert (tmp_path / "again" / "README.md").read_text() == CARD
    assert card_of(hub, "me/again")[0]["license"] == "mit"


@pytest.mark.usefixtures("hub")
def test_unmerge_of_a_base_without_a_card_leaves_none(client: Client, tmp_path: Path) -> None:
    source = write_folder(tmp_path / "base", llama_like())
    adapter(client, source, tmp_path / "adapter")
    client.result("merge", source, tmp_path / "adapter", tmp_path / "merged")
    assert "with adapters merged" in (tmp_path / "merged" / "README.md").read_text()
    client.result("unmerge", tmp_path / "merged", tmp_path / "again")
    assert not (tmp_path / "again" / "README.md").exists()


def test_adapters_that_are_made_and_not_trained(hub: LoopbackHub, client: Client, base: Path, tmp_path: Path) -> None:
    hub.seed("org/base", base)
    tuned = {name: tensor + gaussian(*tensor.shape, seed=9) for name, tensor in llama_like(torch.float32).items()}
    hub.seed("org/tuned", write_folder(tmp_path / "tuned", tuned))
    settings = ("--method", "lora", "--target-modules", Q)
    commands = {
        "inject": ("org/base", tmp_path / "inject", *settings),
        "extract": ("org/base", "org/tuned", tmp_path / "extract", *settings, "--rank", "4"),
        "export": ("me/extract", tmp_path / "export", "--to", "foura"),
    }
    for command, arguments in commands.items():
        assert client.result(command, *arguments, "--push", f"me/{command}")["pushed"]["kind"] == "adapter"
        front, text = card_of(hub, f"me/{command}")
        assert (front["base_model"], front["base_model_relation"]) == ("org/base", "adapter")
        assert front["library_name"] == "peft"
        assert f'"me/{command}")' in text
    delta = ("--to", "delta", "--base", "org/base", "--push", "me/delta")
    assert client.result("export", "me/extract", tmp_path / "delta", *delta)["pushed"]["kind"] == "dense"
    front, text = card_of(hub, "me/delta")
    assert (front["base_model"], front["base_model_relation"]) == ("org/base", "adapter")
    assert "spectral-surgery export ADAPTER OUT --to delta --base org/base\n" in text
    assert 'resolve("me/delta")' in text
    done = client("inject", "org/base", tmp_path / "x", *settings, "--private")
    assert done.code == 2
    assert "--private: expected with --push, got it alone." in done.stderr


def test_token_and_revision_reach_every_source(hub: LoopbackHub, client: Client, base: Path, tmp_path: Path) -> None:
    hub.seed("org/base", base, private=True)
    hub.repos["org/base"].refs["dev"] = hub.repos["org/base"].refs["main"]
    tuned = {name: tensor + gaussian(*tensor.shape, seed=9) for name, tensor in llama_like(torch.float32).items()}
    hub.seed("org/tuned", write_folder(tmp_path / "tuned", tuned), private=True)
    given = ("--token", TOKEN, "--revision", "dev")  # which only the first source of each has
    size = ("--method", "lora", "--target-modules", Q, "--rank", "4")
    client.result("extract", "org/base", "org/tuned", tmp_path / "a", *size, *given, HF_TOKEN=None)
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("org/base", "dev")
    lora = hub.seed("org/lora", tmp_path / "a", private=True)
    lora.refs["dev"] = lora.refs["main"]
    made = client.result("export", "org/lora", tmp_path / "d", "--to", "delta", *given, HF_TOKEN=None)
    assert made["relative_error"] < 1e-6
    body = client.result("eval", "org/base", "org/tuned", *given, HF_TOKEN=None)
    assert body["relative_error"] > 0.1
    assert all(record.authorized for record in hub.log)
    done = client("eval", "org/tuned", "org/base", *given, HF_TOKEN=None)
    assert "org/tuned@dev: has no such revision" in done.stderr


def python(hub: LoopbackHub, home: Path, *arguments: object) -> str:
    """Run Python as a user of that Hub does; its output."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    own = {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_TOKEN": TOKEN,
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], capture_output=True, text=True, env=kept | own, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
def test_a_trained_adapter_is_loaded_by_name(hub: LoopbackHub, client: Client, llama: Path, tmp_path: Path) -> None:
    hub.seed("org/llama", llama)
    options = ("--method", "lora", "-o", "r=2", "--lr", "0.01", "--steps", "4", "--batch-size", "4")
    text = llama.parent / "text.txt"
    done = client.result("train", "org/llama", tmp_path / "a", "--data", text, *options, "--push", "me/adapter")
    assert (tmp_path / "a" / "checkpoints").is_dir()
    assert not [name for name in done["pushed"]["files"] if name.startswith("checkpoints")]
    front, card = card_of(hub, "me/adapter")
    assert (front["base_model"], front["library_name"]) == ("org/llama", "peft")
    assert f"| loss | {done['before']['loss']:.4g} | {done['after']['loss']:.4g} |\n" in card
    assert "spectral-surgery train org/llama OUT --data DATA --method lora --task causal-lm -o r=2 " in card
    script = card.split("```python\n")[1].split("```")[0]  # as the card says, and without importing us
    check = "import sys; assert 'spectral_surgery' not in sys.modules; print(model.peft_config['default'].r)"
    assert python(hub, tmp_path / "home", "-c", script + check) == "2\n"


def test_a_model_from_nothing_is_pushed_without_its_control(
    hub: LoopbackHub, client: Client, llama: Path, tmp_path: Path
) -> None:
    small = ("--d-model", "16", "--num-layers", "1", "--heads", "4", "--steps", "2", "--seq-length", "16")
    small += ("--vocab-size", "280", "--device", "cpu", "--control", "--data", llama.parent / "long.txt")
    (llama.parent / "long.txt").write_text("To be, or not to be, that is the question. " * 100)
    done = client.result("train", "--init", "fftnet", tmp_path / "a", *small, "--push", "me/fftnet")
    assert (tmp_path / "a" / "control" / "config.json").exists()
    names = {name.partition("/")[0] for name in done["pushed"]["files"]}
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= names
    assert not {"control", "checkpoints"} & names
    assert set(done["pushed"]["files"]) <= set(hub.contents("me/fftnet"))


@pytest.mark.slow
def test_the_example_of_an_adapter(hub: LoopbackHub, llama: Path, tmp_path: Path) -> None:
    hub.seed("org/llama", llama)
    arguments = ("examples/train_push_load.py", "org/llama", llama.parent / "text.txt", tmp_path / "out", "me/adapter")
    said = python(hub, tmp_path / "home", *arguments)
    assert f"{hub.endpoint}/me/adapter/commit/" in said
    assert "adapter_model.safetensors" in hub.contents("me/adapter")
    assert float(said.rpartition(" ")[2].strip().removesuffix("%")) > 1


@pytest.mark.slow
def test_the_example_of_compression_and_its_card(hub: LoopbackHub, llama: Path, tmp_path: Path) -> None:
    hub.seed("org/llama", llama)
    said = python(hub, tmp_path / "home", "examples/compress_push_load.py", "org/llama", tmp_path / "out", "me/small")
    assert "verified" in said
    script = card_of(hub, "me/small")[1].split("```python\n")[1].split("```")[0]
    check = f"""
import torch
ids = torch.arange(8)[None]
plain = AutoModelForCausalLM.from_pretrained({str(llama)!r})(ids).logits
error = (model(ids).logits - plain).norm() / plain.norm()
print(type(model.model.layers[0].self_attn.q_proj).__name__, 0 < float(error) < 0.3)
"""
    assert python(hub, tmp_path / "home", "-c", script + check) == "LinearStandIn True\n"
