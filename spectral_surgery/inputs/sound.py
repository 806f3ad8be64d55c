"""Sound, for models that hear: a folder of files, made into what the model takes by its feature extractor.

A model that writes what it hears is given the text of each file too, see `folders`: its decoder reads it.
"""

from __future__ import annotations

import inspect
import wave
from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from spectral_surgery.files.peft.task import needs_decoder_input
from spectral_surgery.hf.processors import load_feature_extractor
from spectral_surgery.inputs.folders import MediaFile, UnreadableError, holds, media_files, readable
from spectral_surgery.inputs.kind import Kind, Reading
from spectral_surgery.inputs.model_input import NOT_JUDGED, ModelInput
from spectral_surgery.inputs.pairs import decoder_tensors
from spectral_surgery.text.objectives import objective_of
from spectral_surgery.text.sequences import check_vocabulary

SUFFIXES = frozenset((".wav", ".flac", ".ogg", ".mp3", ".aiff"))
_LONGEST = 30  # seconds
_ONE_BIT = 1 / 2**31


def read_sound(path: Path, rate: int) -> Tensor:
    """Sound as [samples] float32 between -1 and 1, at some rate, of all channels the mean; 30 seconds at most.

    WAV files of whole numbers are read by Python, all others by the library soundfile where it is installed.

    Raises:
        UnreadableError: when it is no sound, empty, or of a kind that nobody here reads.
    """
    there, samples = _pcm(path) or _by_soundfile(path)
    if not samples.numel() or not bool(samples.isfinite().all()):
        raise UnreadableError(f"{path}: expected sound, got {'no' if not samples.numel() else 'infinite'} samples.")
    return resampled(samples[: _LONGEST * there], there, rate)[: _LONGEST * rate]


def _pcm(path: Path) -> tuple[int, Tensor] | None:
    """Rate and samples of a WAV file of whole numbers; None for another kind of file."""
    try:
        with wave.open(str(path)) as file:
            width, channels, rate = file.getsampwidth(), file.getnchannels(), file.getframerate()
            content = file.readframes(file.getnframes())
    except (wave.Error, EOFError):
        return None
    count = len(content) // (width * channels) * channels
    parts = np.frombuffer(content[: count * width], np.uint8).reshape(count, width)
    whole = np.zeros((count, 4), np.uint8)
    whole[:, 4 - width :] = parts ^ 128 if width == 1 else parts  # one byte has no sign
    numbers = whole.view("<i4").astype(np.float64).reshape(-1, channels) * _ONE_BIT
    return rate, torch.from_numpy(numbers.mean(1).astype(np.float32))


def _by_soundfile(path: Path) -> tuple[int, Tensor]:
    if find_spec("soundfile") is None:
        raise UnreadableError(
            f"{path}: expected a WAV file of whole numbers, got another kind, or a broken one. Others are read with"
            " pip install 'spectral-surgery[sound]'."
        )
    import soundfile

    try:
        samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except (RuntimeError, OSError) as error:
        raise UnreadableError(f"{path}: expected sound, got none that soundfile reads ({error}).") from None
    return int(rate), torch.from_numpy(samples.mean(1))


def resampled(sound: Tensor, rate: int, wanted: int) -> Tensor:
    """Sound at another rate, without the frequencies that it has no room for.

    Args:
        sound: [samples].
        rate: samples a second that it has.
        wanted: samples a second of the result.
    """
    if rate == wanted:
        return sound
    count = len(sound) * wanted // rate
    spectrum = torch.fft.rfft(sound)[: count // 2 + 1]
    other: Tensor = torch.fft.irfft(spectrum, n=count) * (count / len(sound))
    return other


def _inputs(reading: Reading, items: Sequence[MediaFile], samples: int) -> list[ModelInput]:
    extractor = load_feature_extractor(reading.folder, trust_remote_code=reading.data.trust_remote_code)
    takes = list(inspect.signature(reading.model.forward).parameters)
    writes, classifies = needs_decoder_input(reading.config), objective_of(reading.config).name == "classes"

    def heard(path: Path) -> dict[str, Tensor]:
        sound = read_sound(path, extractor.sampling_rate).numpy()
        made = extractor(sound, sampling_rate=extractor.sampling_rate, return_tensors="pt")
        return {name: tensor[0] for name, tensor in made.items() if name in takes}

    def read(item: MediaFile, said: dict[str, Tensor]) -> dict[str, Tensor]:
        return heard(item.path) | said

    def made(item: MediaFile) -> ModelInput:
        tokens = _tokens(reading, item) if writes else []
        said = decoder_tensors(tokens or [reading.tokenizer.eos_token_id or 0], reading.model.config) if writes else {}
        shapes = {name: tuple(tensor.shape) for name, tensor in read(item, said).items()}
        padding, answer = _padding(reading) if writes else 0, item.label if classifies else item.text
        return ModelInput(shapes, partial(read, item, said), padding, _judged(reading, tokens), answer)

    return readable(reading, items, samples, made)


def _padding(reading: Reading) -> int:
    return int(reading.tokenizer.pad_token_id or 0)


def _tokens(reading: Reading, item: MediaFile) -> list[int]:
    """What the decoder writes for a sound; nothing where it has no text."""
    tokens = reading.tokenizer(item.text)["input_ids"][: reading.longest] if item.text else []
    check_vocabulary([tokens], reading.model, item.path)
    start = getattr(reading.model.config, "decoder_start_token_id", None)
    return tokens[1:] if tokens and tokens[0] == start else tokens  # some tokenizers begin with it


def _judged(reading: Reading, tokens: Sequence[int]) -> tuple[int, ...]:
    """Of what the decoder writes, the words and the end, and not what is said of the sound before."""
    if not tokens:
        return ()
    special = {*reading.tokenizer.all_special_ids} - {reading.tokenizer.eos_token_id}
    return tuple(NOT_JUDGED if token in special else token for token in tokens)


SOUND = Kind(
    "sound",
    "sound",
    64,
    "sounds",
    "there is none for",
    "",
    by_objective=False,
    given=frozenset({"input_features", "input_values"}),
    is_for=lambda folder, _: holds(folder, SUFFIXES),
    items=lambda reading: media_files(reading.data.file, SUFFIXES),
    inputs=_inputs,
)
