"""Folders of sound: models that hear are calibrated and healed on them, and sound of any rate and width is read."""

from __future__ import annotations

import json
import math
import struct
import wave
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from spectral_surgery.calibration.layer_moments import model_and_inputs
from spectral_surgery.codec.rate import Target
from spectral_surgery.commands.compress import compress
from spectral_surgery.commands.decompress import decompress
from spectral_surgery.commands.heal import heal
from spectral_surgery.errors import ConfigError
from spectral_surgery.files.compressed.settings import CompressOptions
from spectral_surgery.files.index import read_index
from spectral_surgery.hf.models import load_any
from spectral_surgery.inputs import sound as module
from spectral_surgery.inputs.folders import UnreadableError
from spectral_surgery.inputs.sound import read_sound
from spectral_surgery.text.settings import TextData
from spectral_surgery.training.settings import DistillSettings
from tests.commands.test_train import WORDS, save_tokenizer
from tests.zoo.entry import stir

EARS = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2,
        "conv_dim": (16, 16), "conv_stride": (10, 8), "conv_kernel": (10, 8), "num_feat_extract_layers": 2,
        "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 4, "vocab_size": 12}  # fmt: skip
WHISPER = {"d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2,
           "decoder_attention_heads": 2, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96, "num_mel_bins": 80,
           "max_source_positions": 50, "max_target_positions": 32, "vocab_size": 12, "pad_token_id": 0,
           "bos_token_id": 1, "eos_token_id": 1, "decoder_start_token_id": 1, "suppress_tokens": None,
           "begin_suppress_tokens": None}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "whisper": ("WhisperForConditionalGeneration", WHISPER),
    "wav2vec2": ("Wav2Vec2ForCTC", EARS),
    "hubert": ("HubertModel", EARS),
}
RATE = 16_000


def save_model(kind: str, folder: Path) -> Path:
    import transformers

    name, settings = MODELS[kind]
    own = getattr(transformers, name)
    torch.manual_seed(0)
    model = own(own.config_class(**settings))
    stir(model)
    model.save_pretrained(folder)
    if kind == "whisper":
        transformers.WhisperFeatureExtractor(chunk_length=1).save_pretrained(folder)
        save_tokenizer(folder)
    else:
        transformers.Wav2Vec2FeatureExtractor().save_pretrained(folder)
    return folder


def tone(seed: int, seconds: float = 0.4, rate: int = RATE) -> torch.Tensor:
    torch.manual_seed(seed)
    time = torch.arange(int(seconds * rate)) / rate
    return 0.4 * torch.sin(2 * math.pi * (200 + 900 * torch.rand(1)) * time) + 0.05 * torch.randn(len(time))


def write(file: Path, sound: torch.Tensor, rate: int = RATE, width: int = 2, channels: int = 1) -> Path:
    whole = (sound.double() * (2 ** (8 * width - 1) - 1)).round().long().repeat_interleave(channels)
    whole = whole + 128 if width == 1 else whole
    with wave.open(str(file), "wb") as made:
        made.setparams((channels, width, rate, 0, "NONE", ""))
        made.writeframes(b"".join(int(v).to_bytes(width, "little", signed=width > 1) for v in whole))
    return file


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("sound")
    rows = []
    for number in range(12):
        write(made / f"{number}.wav", tone(number))
        rows.append({"file_name": f"{number}.wav", "text": " ".join(WORDS[number % 5 : number % 5 + 4])})
    (made / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return made


def outputs(source: Path, inputs: list[Any]) -> torch.Tensor:
    model = load_any(source, dtype=torch.float32)
    with torch.inference_mode():
        found = [model(**{name: x[None] for name, x in one.read().items()})[0].flatten() for one in inputs]
    return torch.cat(found)


@pytest.mark.parametrize("kind", MODELS)
def test_outputs_are_better_at_the_same_rate(tmp_path: Path, kind: str, folder: Path) -> None:
    source = save_model(kind, tmp_path / "model")
    lazy, inputs = model_and_inputs(source, read_index(source), TextData(folder, 12))
    assert len(lazy.chain.stacks) == (2 if kind == "whisper" else 1)
    options = CompressOptions(Target("bits", 2.5), include=("*layers*",), allocation="even")
    compress(source, tmp_path / "plain", options)
    report = compress(source, tmp_path / "heard", options, calibrate=TextData(folder, 12))
    assert report.calibration is not None
    assert not report.calibration.whole
    assert not [name for name in report.calibration.left if "_proj" in name or "fc" in name]
    assert report.manifest.options["calibration"].startswith("12 sounds of sha256:")
    original, errors = outputs(source, inputs), []
    for name in ("plain", "heard"):
        decompress(tmp_path / name, tmp_path / f"{name}-dense", verify=True)
        errors.append(float((outputs(tmp_path / f"{name}-dense", inputs) - original).norm()))
    assert errors[1] < 0.9 * errors[0]


@pytest.mark.parametrize(
    ("kind", "objective"), [("whisper", "tokens"), ("wav2vec2", "tokens"), ("hubert", "embeddings")]
)
def test_healed_models_are_nearer(tmp_path: Path, kind: str, objective: str, folder: Path) -> None:
    source = save_model(kind, tmp_path / "model")
    compress(source, tmp_path / "sparse", CompressOptions(Target("density", 0.3)))
    settings = DistillSettings(steps=16, eval_every=4, warmup_steps=2)
    report = heal(tmp_path / "sparse", source, tmp_path / "healed", TextData(folder, batch_size=6), settings)
    assert report.objective == objective
    assert report.curve.best < report.curve.held_out[0][1]


def test_what_is_said_is_what_the_decoder_reads(tmp_path: Path, folder: Path) -> None:
    source = save_model("whisper", tmp_path / "model")
    _, inputs = model_and_inputs(source, read_index(source), TextData(folder, 3))
    for one in inputs:
        ids = one.read()["decoder_input_ids"].tolist()
        assert ids[0] == 1
        assert all(b == a + 1 for a, b in pairwise(ids[1:]))
        assert len(ids) == 4
    silent = tmp_path / "silent"
    silent.mkdir()
    write(silent / "a.wav", tone(0))
    _, (only,) = model_and_inputs(source, read_index(source), TextData(silent))
    assert only.read()["decoder_input_ids"].tolist() == [1]


@pytest.mark.parametrize(("kind", "got"), [("whisper", "pairs of a source and a target"), ("hubert", "text")])
def test_a_model_that_reads_nothing_says_what_it_takes(tmp_path: Path, kind: str, got: str) -> None:
    source, text = save_model(kind, tmp_path / "model"), tmp_path / "notes.txt"
    text.write_text("words")
    with pytest.raises(ConfigError, match=rf"notes\.txt: expected a folder of sound for \w+, got {got}\."):
        model_and_inputs(source, read_index(source), TextData(text))


@pytest.mark.parametrize("width", [1, 2, 3, 4])
@pytest.mark.parametrize("channels", [1, 2])
def test_files_of_whole_numbers(tmp_path: Path, width: int, channels: int) -> None:
    sound = tone(0)
    found = read_sound(write(tmp_path / "a.wav", sound, width=width, channels=channels), RATE)
    assert float((found - sound).abs().max()) < (0.01 if width == 1 else 1e-4)


def test_other_rates(tmp_path: Path) -> None:
    time = torch.arange(22_050) / 22_050
    sound = 0.5 * torch.sin(2 * math.pi * 440 * time)
    found = read_sound(write(tmp_path / "a.wav", sound, 22_050), RATE)
    wanted = 0.5 * torch.sin(2 * math.pi * 440 * torch.arange(RATE) / RATE)
    assert float((found - wanted).abs().max()) < 1e-3
    assert len(read_sound(write(tmp_path / "b.wav", sound.repeat(40), 22_050, 1), RATE)) == 30 * RATE


def test_files_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_spec", lambda _: None)
    (tmp_path / "text.wav").write_text("no sound")
    with pytest.raises(UnreadableError, match=r"text\.wav: expected a WAV file of whole numbers, got another kind"):
        read_sound(tmp_path / "text.wav", RATE)
    floats = struct.pack(
        "<4sI4s4sIHHIIHH4sI", b"RIFF", 44, b"WAVE", b"fmt ", 16, 3, 1, RATE, 4 * RATE, 4, 32, b"data", 8
    )
    (tmp_path / "floats.wav").write_bytes(floats + struct.pack("<2f", 0.5, 0.25))
    with pytest.raises(UnreadableError, match=r"Others are read with pip install 'spectral-surgery\[sound\]'"):
        read_sound(tmp_path / "floats.wav", RATE)
    with pytest.raises(UnreadableError, match=r"empty\.wav: expected sound, got no samples"):
        read_sound(write(tmp_path / "empty.wav", torch.zeros(0)), RATE)
