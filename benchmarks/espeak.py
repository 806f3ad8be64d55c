"""Sentences spoken by espeak-ng, from the library that the package espeakng-loader carries."""

from __future__ import annotations

import ctypes
import json
import wave
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spectral_surgery.errors import BackendError
from spectral_surgery.inputs.sound import resampled

PACKAGE = "espeakng-loader"
_MODULE = "espeakng_loader"
_SYNCHRONOUS = 2  # output to the callback, before the call returns
_UTF8 = 1
_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)


def installed() -> bool:
    """Whether there is anybody to speak."""
    return find_spec(_MODULE) is not None


def spoken(sentences: Sequence[str], rate: int) -> list[Tensor]:
    """English sentences as sound: [samples] float32 between -1 and 1 of each.

    The first call of a process gives the same sound in every process; its noise goes on in later ones.

    Args:
        sentences: one text each.
        rate: samples a second.

    Raises:
        BackendError: when espeak-ng does not start.
    """
    loader: Any = import_module(_MODULE)
    library = ctypes.CDLL(loader.get_library_path())
    given = library.espeak_Initialize(_SYNCHRONOUS, 0, str(Path(loader.get_data_path())).encode(), 0)
    if given <= 0:
        raise BackendError(f"espeak-ng: did not start, code {given}. Install {PACKAGE} again.")
    pieces: list[Tensor] = []

    def keep(wave: Any, count: int, _: object) -> int:
        if wave and count:
            pieces.append(torch.tensor(wave[:count], dtype=torch.float32) / 2**15)
        return 0

    callback = _CALLBACK(keep)  # must live until the last sentence
    library.espeak_SetSynthCallback(callback)
    library.espeak_SetVoiceByName(b"en")
    sounds = []
    for sentence in sentences:
        text = sentence.encode()
        library.espeak_Synth(text, ctypes.c_size_t(len(text) + 1), 0, 0, 0, _UTF8, None, None)
        sounds.append(resampled(torch.cat(pieces), given, rate))
        pieces.clear()
    library.espeak_Terminate()
    return sounds


def write_spoken(folder: Path, sentences: Sequence[str], rate: int) -> Path:
    """Write sentences as WAV files, with what is said in them, as `inputs.folders` has it; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number, (sentence, sound) in enumerate(zip(sentences, spoken(sentences, rate), strict=True)):
        rows.append(json.dumps({"file_name": f"{number}.wav", "text": f" {sentence}"}))
        with wave.open(str(folder / f"{number}.wav"), "wb") as file:
            file.setparams((1, 2, rate, 0, "NONE", ""))
            file.writeframes((sound * 2**15).round().clamp(-(2**15), 2**15 - 1).to(torch.int16).numpy().tobytes())
    (folder / "metadata.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return folder
