"""Whisper is read from another layout, and sentences are judged on what is said in them."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import espeak, whisper_base
from benchmarks.case import CheckFailedError, Inputs
from benchmarks.cases import speech
from spectral_surgery.files.index import read_index
from spectral_surgery.files.reader import read_tensor
from spectral_surgery.inputs.sound import resampled

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")

WORDS = ["<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|transcribe|>", "<|notimestamps|>", "?", "A", "child"]


def model_bin(variables: dict[str, torch.Tensor], kind: str = "WhisperSpec") -> bytes:
    def text(name: str) -> bytes:
        return struct.pack("<H", len(name) + 1) + name.encode() + b"\0"

    body = struct.pack("<I", 6) + text(kind) + struct.pack("<II", 3, len(variables) + 1)
    body += text("decoder/pre_norm") + struct.pack("<BBI", 0, 1, 1) + b"\1"
    for name, tensor in variables.items():
        data = tensor.half().numpy().tobytes()
        body += text(name) + struct.pack(f"<B{tensor.ndim}IBI", tensor.ndim, *tensor.shape, 4, len(data)) + data
    return body + struct.pack("<I", 1) + text("decoder/projection/weight") + text("decoder/embeddings/weight")


def there(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors of transformers in the layout of the file."""
    found: dict[str, torch.Tensor] = {}
    stems = {here: name for name, here in whisper_base._STEMS.items()}
    for name, tensor in state.items():
        _, side, *inside, end = name.split(".")
        layer = f"layer_{inside[1]}/" if inside[0] == "layers" else ""
        stem = ".".join(inside[2:] if layer else inside)
        if stem in stems:
            ends = {"weight": "gamma", "bias": "beta"} if "norm" in stem else {}
            ends = {"weight": "encodings"} if stem == "embed_positions" else ends
            found[f"{side}/{layer}{stems[stem]}/{ends.get(end, end)}"] = tensor
    for fused, parts in whisper_base._FUSED.items():
        for side in ("encoder", "decoder"):
            prefix = f"model.{side}.layers.0."
            if f"{prefix}{parts[0]}.weight" not in state:
                continue
            size = len(state[f"{prefix}{parts[-1]}.weight"])
            for end in ("weight", "bias"):
                each = [state.get(f"{prefix}{part}.{end}", torch.zeros(size)) for part in parts]
                found[f"{side}/layer_0/{fused}/{end}"] = torch.cat(each)
    return found


@pytest.fixture
def whisper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """A tiny model of random weights, carried by two packages."""
    transformers = pytest.importorskip("transformers")
    sizes = {"WIDTH": 64, "HEADS": 2, "LAYERS": 1, "INNER": 64, "WORDS": len(WORDS), "END": 0}
    for name, value in sizes.items():
        monkeypatch.setattr(whisper_base, name, value)
    torch.manual_seed(0)
    config = transformers.WhisperConfig(**{k: v for k, v in whisper_base._config().items() if k != "model_type"})
    model = transformers.WhisperForConditionalGeneration(config).half()
    state = {name: tensor.detach() for name, tensor in model.state_dict().items() if name != "proj_out.weight"}
    content, homes = model_bin(there(state)), []
    for number, part in enumerate((content[:5000], content[5000:]), 1):
        homes.append(tmp_path / f"package-{number}")
        homes[-1].mkdir()
        (homes[-1] / f"model.bin.part{number}").write_bytes(part)
    vocabulary = {word: n for n, word in enumerate(WORDS)}
    (homes[1] / "tokenizer.json").write_text(
        json.dumps(
            {
                "version": "1.0",
                "added_tokens": [
                    {"id": n, "content": word, "special": True, "single_word": False, "lstrip": False,
                     "rstrip": False, "normalized": False}
                    for n, word in enumerate(WORDS[:5])
                ],
                "pre_tokenizer": {"type": "WhitespaceSplit"},
                "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "?"},
            }
        )
    )  # fmt: skip
    found = dict(zip(whisper_base.PACKAGES, homes, strict=True))
    monkeypatch.setattr(whisper_base, "_home", found.get)
    return state


def test_whisper_is_read_from_its_packages(whisper: dict[str, torch.Tensor], tmp_path: Path) -> None:
    folder = whisper_base.whisper_folder(tmp_path / "scratch")
    assert folder is not None
    written = {name: read_tensor(info) for name, info in read_index(folder).tensors.items()}
    assert written.keys() == whisper.keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in whisper.items())


def test_another_file_is_refused() -> None:
    key = {"encoder/layer_0/self_attention/linear_0/bias": torch.ones(6)}
    with pytest.raises(CheckFailedError, match="is a BertSpec, not a WhisperSpec"):
        whisper_base.read_variables(model_bin({}, "BertSpec"))
    with pytest.raises(CheckFailedError, match="2 bytes are left over"):
        whisper_base.read_variables(model_bin(key) + b"xx")
    with pytest.raises(CheckFailedError, match="expected keys without a bias"):
        whisper_base.renamed(whisper_base.read_variables(model_bin(key)))


@pytest.mark.slow
def test_rows_of_speech(whisper: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert whisper
    sentences = tmp_path / "sentences.txt"
    sentences.write_text("A child\nA\n")
    monkeypatch.setattr(speech, "_TEXT", sentences)
    monkeypatch.setattr(speech, "UNDERSTOOD", 10.0)
    sine = torch.sin(torch.arange(16_000) / 10)
    monkeypatch.setattr(espeak, "installed", lambda: True)
    monkeypatch.setattr(espeak, "spoken", lambda lines, _: [sine[: 8000 * min(2, len(x.split()))] for x in lines])
    monkeypatch.setattr(speech, "TRAINED_ON", 4)
    rows = speech.run(Inputs(scratch=tmp_path / "scratch"))
    assert [(row["method"], row["setting"]) for row in rows] == [
        ("dense", "float16"), ("spectral", "--bits 4"), ("spectral", "--bits 3"),
        ("spectral, calibrated", "--bits 4"), ("spectral, calibrated", "--bits 3")]  # fmt: skip
    above = [number(row, "loss") - number(rows[0], "loss") for row in rows]
    assert number(rows[4], "over data-free") == pytest.approx(above[4] / above[2], rel=1e-3)
    assert rows[4]["met"] == (above[4] <= speech.AIM * above[2])
    assert (rows[3]["target"], rows[3]["met"]) == ("", "")
    said = [json.loads(line)["text"] for line in (tmp_path / "scratch/spoken/metadata.jsonl").read_text().splitlines()]
    assert len(said) == 4
    assert not {"A child", "A"} & {line.strip() for line in said}
    assert rows[0]["bits per weight"] == 16
    assert 0 == rows[0]["relative error"] < number(rows[1], "relative error") < number(rows[2], "relative error")
    sounds = speech._sounds(tmp_path / "scratch" / "whisper-base")
    assert sounds.tokens.tolist() == [[1, 2, 3, 4, 6, 7, 0], [1, 2, 3, 4, 6, 0, 0]]
    assert sounds.labels.tolist() == [[-100] * 3 + [6, 7, 0], [-100] * 3 + [6, 0, -100]]
    assert rows[0]["loss"] == pytest.approx(math.log(len(WORDS)), abs=1)  # of random weights
    monkeypatch.setattr(speech, "UNDERSTOOD", 0.1)
    with pytest.raises(CheckFailedError, match="the dense model: losses"):
        speech.run(Inputs(scratch=tmp_path / "scratch"))
    monkeypatch.setattr(espeak, "installed", lambda: False)
    rows = speech.run(Inputs(scratch=tmp_path / "scratch"))
    assert rows[-1]["reason"] == "not run: espeak-ng is not installed; pip install espeakng-loader"
    monkeypatch.setattr(speech, "whisper_folder", lambda _: None)
    assert speech.run(Inputs())[0]["skipped"] == "Whisper base"


def number(row: Any, name: str) -> float:
    return float(row[name])


def test_sound_at_another_rate_keeps_its_tones() -> None:
    seconds = torch.arange(22_050, dtype=torch.float64) / 22_050
    low, high = (torch.sin(2 * math.pi * tone * seconds) for tone in (440, 9000))
    found = resampled(low + high, 22_050, 16_000)
    expected = torch.sin(2 * math.pi * 440 * torch.arange(16_000, dtype=torch.float64) / 16_000)
    assert float((found - expected).abs().max()) < 1e-9  # there is no room for 9000 Hz


def test_sentences_are_spoken() -> None:
    pytest.importorskip("espeakng_loader")
    one, two, longer = espeak.spoken(["A child.", "A child.", "A child is riding a horse."], 16_000)
    assert len(one) == pytest.approx(len(two), rel=0.01)
    assert 0.1 < float(one.abs().max()) <= 1
    assert len(longer) > len(one) > 4000
