"""eval of what is no plain text: pairs, images and sound are judged by what fits the model, with and without labels."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

pytest.importorskip("transformers")
pytest.importorskip("PIL")

from spectral_surgery.cli import cli
from spectral_surgery.codec.rate import Target
from spectral_surgery.commands.compress import compress
from spectral_surgery.commands.eval import evaluate
from spectral_surgery.errors import ConfigError
from spectral_surgery.files.compressed.settings import CompressOptions
from spectral_surgery.files.index import read_index
from spectral_surgery.hf.models import load_any, load_tokenizer
from spectral_surgery.inputs.kind import Reading
from spectral_surgery.inputs.kinds import kind_of
from spectral_surgery.inputs.model_input import NOT_JUDGED, ModelInput
from spectral_surgery.text.settings import EvalData, TextData
from spectral_surgery.text.word_errors import word_edits, words_of
from tests.commands import test_images, test_pairs, test_sound
from tests.commands.test_calibrate import write_text
from tests.commands.test_train import WORDS

CASES = {"t5": test_pairs, "vit": test_images, "clip": test_images, "sam": test_images, "whisper": test_sound,
         "wav2vec2": test_sound, "hubert": test_sound}  # fmt: skip
MEASURES = {
    "t5": {"loss_a", "loss_b", "kl", "same_top"},
    "whisper": {"loss_a", "loss_b", "kl", "same_top", "wer_a", "wer_b"},
    "wav2vec2": {"kl", "same_top", "wer_a", "wer_b"},
    "vit": {"kl", "same_top", "accuracy_a", "accuracy_b"},
    "clip": {"cosine"},
    "sam": {"cosine"},
    "hubert": {"cosine"},
}


def save_letters(folder: Path) -> None:
    """A tokenizer of a model that hears letters."""
    import transformers

    letters = {letter: number for number, letter in enumerate(["<pad>", "<s>", "</s>", "<unk>", "|", *"abcdefg"])}
    (folder / "vocab.json").write_text(json.dumps(letters))
    transformers.Wav2Vec2CTCTokenizer(str(folder / "vocab.json")).save_pretrained(folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Pairs, images in folders by class, and sounds with what is said in them."""
    root = tmp_path_factory.mktemp("data")
    for number in range(12):
        place = root / "images" / str(number % 2)
        place.mkdir(parents=True, exist_ok=True)
        test_images.picture(number).save(place / f"{number}.png")
    (root / "sound").mkdir()
    rows = []
    for number in range(4):
        test_sound.write(root / "sound" / f"{number}.wav", test_sound.tone(number))
        said = " ".join(WORDS[number : number + 1 + number % 3])
        rows.append({"file_name": f"{number}.wav", "text": said})
    (root / "sound" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    lines = write_text(root / "pairs.tsv").read_text().splitlines()[:16]
    (root / "pairs.tsv").write_text("\n".join(f"{line}\t{line[::-1].split(' ', 1)[-1][::-1]}" for line in lines))
    of = {test_pairs: "pairs.tsv", test_images: "images", test_sound: "sound"}
    return {kind: root / of[module] for kind, module in CASES.items()}


def save_model(kind: str, folder: Path) -> Path:
    CASES[kind].save_model(kind, folder)
    if kind == "wav2vec2":
        save_letters(folder)
    return folder


def read(source: Path, data: Path) -> list[ModelInput]:
    config, model = read_index(source).config, load_any(source)
    reading = Reading(TextData(data), source, config, model, 256, causal=False)
    return kind_of(data, config).read(reading, 0)


def logits(source: Path, one: ModelInput) -> torch.Tensor:
    with torch.inference_mode():
        found = load_any(source, dtype=torch.float32)(**{name: tensor[None] for name, tensor in one.read().items()})
    return found.logits[0]  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", CASES)
def test_models_are_judged_by_what_fits_them(kind: str, tmp_path: Path, data: dict[str, Path]) -> None:
    source = save_model(kind, tmp_path / "model")
    found = {}
    for bits in (2.0, 5.0):
        compress(source, tmp_path / f"{bits}", CompressOptions(Target("bits", bits)))
        found[bits] = evaluate(source, tmp_path / f"{bits}", EvalData(data[kind])).measures
        assert found[bits].keys() == MEASURES[kind]
    better = (lambda name: found[5.0][name] - found[2.0][name]) if "cosine" in MEASURES[kind] else None
    assert (better("cosine") if better else found[2.0]["kl"] - found[5.0]["kl"]) > 0
    same = evaluate(source, source, EvalData(data[kind])).measures
    assert same.get("cosine", 1.0) == pytest.approx(1.0)
    assert same.get("kl", 0.0) == pytest.approx(0.0, abs=1e-6)
    assert same.get("same_top", 1.0) == 1.0
    for name in ("loss", "accuracy", "wer"):
        assert same.get(f"{name}_a") == same.get(f"{name}_b")


@pytest.mark.parametrize("kind", ["t5", "whisper"])
def test_the_loss_is_that_of_transformers(kind: str, tmp_path: Path, data: dict[str, Path]) -> None:
    source = save_model(kind, tmp_path / "model")
    model, total, count = load_any(source, dtype=torch.float32), 0.0, 0
    for one in read(source, data[kind]):
        batch = {name: tensor[None] for name, tensor in one.read().items() if not name.startswith("decoder_")}
        labels = torch.tensor([one.labels])
        judged = int((labels != NOT_JUDGED).sum())
        with torch.inference_mode():
            total += judged * float(model(**batch, labels=labels).loss)
        count += judged
    measures = evaluate(source, None, EvalData(data[kind])).measures
    assert measures["loss_a"] == pytest.approx(total / count, rel=1e-4)


def test_accuracy_is_that_of_the_labels(
    tmp_path: Path, data: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    source = save_model("vit", tmp_path / "model")
    inputs = read(source, data["vit"])
    right = [int(logits(source, one).argmax()) == int(one.answer) for one in inputs]
    found = evaluate(source, None, EvalData(data["vit"])).measures
    assert found == {"accuracy_a": pytest.approx(sum(right) / len(right))}
    named = tmp_path / "named"
    for number in range(4):
        (named / f"LABEL_{number % 2}").mkdir(parents=True, exist_ok=True)
        test_images.picture(number).save(named / f"LABEL_{number % 2}" / f"{number}.png")
    assert evaluate(source, None, EvalData(named)).measures.keys() == {"accuracy_a"}
    (named / "LABEL_1").rename(named / "cats")
    with pytest.raises(ConfigError, match="expected labels that are classes of the model, such as LABEL_0, got cats"):
        evaluate(source, None, EvalData(named))
    (named / "LABEL_0").rename(named / "dogs")
    with caplog.at_level(logging.WARNING, "spectral_surgery"):
        assert evaluate(source, source, EvalData(named)).measures.keys() == {"kl", "same_top"}
    assert "cats: not a class in config.json, nor is any other label; accuracy is left out." in caplog.text
    with pytest.raises(ConfigError, match="expected two models to compare, or data that says what is right"):
        evaluate(source, None, EvalData(named))


def test_word_errors_are_those_of_what_is_written(tmp_path: Path, data: dict[str, Path]) -> None:
    for kind in ("whisper", "wav2vec2"):
        source = save_model(kind, tmp_path / kind)
        tokenizer, model = load_tokenizer(source), load_any(source, dtype=torch.float32)
        edits = words = 0
        for one in read(source, data[kind]):
            batch = {name: tensor[None] for name, tensor in one.read().items() if not name.startswith("decoder_")}
            if kind == "whisper":
                longest = min(2 * len(one.labels) + 16, 16)
                written = tokenizer.decode(model.generate(**batch, max_new_tokens=longest)[0], skip_special_tokens=True)
            else:
                written = tokenizer.decode(model(**batch).logits[0].argmax(-1), skip_special_tokens=True)
            edits += word_edits(one.answer.split(), words_of(written))
            words += len(one.answer.split())
        measured = evaluate(source, None, EvalData(data[kind])).measures["wer_a"]
        assert measured == pytest.approx(edits / words)


def test_a_model_that_writes_what_is_said_has_no_errors(
    tmp_path: Path, data: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save_model("whisper", tmp_path / "model")
    texts = iter(
        [one.answer.upper() + "." for one in sorted(read(source, data["whisper"]), key=lambda one: one.tokens)]
    )
    from spectral_surgery.inputs import scores

    monkeypatch.setattr(scores, "_written", lambda *args: [next(texts) for _ in args[3]])
    found = evaluate(source, None, EvalData(data["whisper"])).measures
    assert found["wer_a"] == 0


def test_sounds_without_a_text_have_no_loss(tmp_path: Path) -> None:
    source, silent = save_model("whisper", tmp_path / "model"), tmp_path / "silent"
    silent.mkdir()
    test_sound.write(silent / "a.wav", test_sound.tone(0))
    assert evaluate(source, source, EvalData(silent)).measures.keys() == {"kl", "same_top"}


def test_what_is_refused(tmp_path: Path, data: dict[str, Path]) -> None:
    source, empty = save_model("clip", tmp_path / "model"), tmp_path / "empty"
    with pytest.raises(ConfigError, match="expected two models to compare"):
        evaluate(source, None, EvalData(data["clip"]))
    with pytest.raises(ConfigError, match=r"eval --sts: expected a model that embeds sentences, got one of images\."):
        evaluate(source, source, EvalData(data["clip"], sts=data["t5"]))
    empty.mkdir()
    with pytest.raises(ConfigError, match="empty: expected text, or a folder of images or sound, got a folder"):
        evaluate(source, source, EvalData(empty))
    (empty / "broken.png").write_text("nothing")
    with pytest.raises(ConfigError, match=r"broken\.png: expected an image, .* --unreadable skip"):
        evaluate(source, source, EvalData(empty))
    with pytest.raises(ConfigError, match="empty: expected images that the model reads, got none"):
        evaluate(source, source, replace(EvalData(empty), unreadable="skip"))


def test_by_the_command_line(tmp_path: Path, data: dict[str, Path]) -> None:
    source = save_model("vit", tmp_path / "model")
    compress(source, tmp_path / "small", CompressOptions(Target("bits", 3.0)))
    arguments = ["eval", str(source), str(tmp_path / "small"), "--data", str(data["vit"]), "--samples", "6", "--json"]
    done = CliRunner().invoke(cli, [*arguments, "--baseline", "int8", "--unreadable", "skip"])
    assert done.exit_code == 0, done.output
    models: list[dict[str, Any]] = json.loads(done.stdout)["models"]
    assert [sorted(set(row) & {"accuracy", "kl", "same_top"}) for row in models] == [
        ["accuracy"],
        *[["accuracy", "kl", "same_top"]] * 2,
    ]
