"""load_compressed: a compressed folder as a model of transformers, in the form and the memory that are asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from spectral_surgery.errors import CheckpointError, LimitError, required
from spectral_surgery.files.compressed.checkpoint import CompressedCheckpoint, is_compressed, open_compressed
from spectral_surgery.files.compressed.manifest import SUFFIXES
from spectral_surgery.files.compressed.settings import AUTO
from spectral_surgery.files.peft.task import class_for
from spectral_surgery.hf.deltas import switch_delta
from spectral_surgery.hf.load_errors import loading
from spectral_surgery.hf.models import check_head, class_named, load_any
from spectral_surgery.hf.quantizer.fill_weights import NARROW, STREAMED, resident_bytes, residents_for
from spectral_surgery.matmul import STREAM_BYTES

BLOCK_BYTES = 8 << 20  # of one block of rows while it is decoded and multiplied: 2^20 codes and what becomes of them

_NARROW_BITS = 3.25  # stored bits of a weight: of more, too many codes are beyond half a byte


def load_compressed(
    folder: Path | str,
    resident: str = AUTO,
    *,
    delta: Path | str | None = None,
    auto_class: str | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    max_memory: int | None = None,
    trust_remote_code: bool = False,
) -> Any:
    """Load a compressed folder without decoding its weights.

    Returns a PreTrainedModel in eval mode. ``model.dequantize()`` makes it dense, ``save_pretrained`` keeps it
    compressed.

    Args:
        folder: written by compress, or by save_pretrained of a compressed model; with delta, a plain checkpoint too.
        resident: ``int8``, ``int12``, ``int4``, ``int5``, ``coded``, ``streamed`` (in host memory, and on the device
            block by block; coded where codes do not fit 8 bits), or ``auto``: int8 where the codes fit, else int12,
            else coded.
        delta: folder of differences to this base, which are put on: see `switch_delta`. None for the base alone.
        auto_class: class of transformers, such as ``AutoModelForCausalLM``, see `class_for`; None for the one in
            config.json.
        dtype: of activations and of what is not compressed; None for the stored one.
        device: where to, or a ``device_map`` such as ``auto``.
        max_memory: bytes that the weights may take on the device, with the blocks of rows under way; with ``auto``, as
            many weights are int8 as fit, of the others those with narrow codes int4 or int5, and what does not fit is
            coded, or streamed to a GPU.
        trust_remote_code: run the code that a model brings along.

    Raises:
        BackendError: when transformers is not installed.
        CheckpointError: when the folder is not a compressed model.
        ConfigError: when there is no such resident form, or codes do not fit it.
        LimitError: when the weights do not fit max_memory.
    """
    folder, base = Path(folder), None
    if delta is not None and max_memory is None and not is_compressed(folder):
        base = folder
        model = load_any(folder, auto_class or "", dtype=dtype, trust_remote_code=trust_remote_code).to(device)
    else:
        model = _loaded(
            folder,
            resident,
            auto_class=auto_class,
            dtype=dtype,
            device=device,
            max_memory=max_memory,
            trust_remote_code=trust_remote_code,
        )
    if delta is not None:
        switch_delta(model, delta, base=base, resident=resident)
    return model


def _loaded(
    folder: Path,
    resident: str,
    *,
    auto_class: str | None,
    dtype: torch.dtype | None,
    device: torch.device | str,
    max_memory: int | None,
    trust_remote_code: bool,
) -> Any:
    checkpoint = open_compressed(folder)
    residents = residents_for(checkpoint, resident)
    if max_memory is not None:
        residents = _within(checkpoint, residents, resident, max_memory, str(device))
    transformers = required("transformers", "run models")
    local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": trust_remote_code}
    with loading(folder, "transformers cannot load it"):
        config = transformers.AutoConfig.from_pretrained(folder, **local)
        named = str((config.architectures or ["AutoModel"])[0])
        cls = class_named(transformers, config, class_for(checkpoint.index.config, auto_class) if auto_class else named)
        if cls is None:
            raise CheckpointError(
                f"{folder.name}: expected a class of transformers, got {auto_class or named}. Name one with auto_class."
            )
        config.quantization_config = {**config.quantization_config, "resident": residents}
        device_map = None if str(device) == "cpu" else device
        settings = {"dtype": dtype or "auto", "device_map": device_map, "output_loading_info": True}
        model, report = cls.from_pretrained(folder, config=config, **settings, **local)
    if auto_class:
        check_head(folder, model, report["missing_keys"])
    return model.eval()


def _within(
    checkpoint: CompressedCheckpoint, residents: dict[str, str], resident: str, limit: int, device: str
) -> dict[str, str]:
    """Resident forms that fit a limit: those that are there, or faster and faster ones for as long as they fit."""
    spectra = {f"{name}.{suffix}" for name in residents for suffix in SUFFIXES}
    rest = sum(info.nbytes for name, info in checkpoint.index.tensors.items() if name not in spectra)
    smallest = STREAMED if device.startswith("cuda") else "coded"
    fixed = rest + (STREAM_BYTES if smallest == STREAMED else torch.get_num_threads() * BLOCK_BYTES)
    chosen = dict.fromkeys(residents, smallest) if resident == AUTO else residents
    needed = fixed + sum(resident_bytes(checkpoint, name, form) for name, form in chosen.items())
    if needed > limit:
        remedy = f"Use resident {smallest}" if set(chosen.values()) != {smallest} else "Compress to fewer bits"
        raise LimitError(
            f"max_memory: expected {needed} bytes or more for the weights and the blocks of rows under way, got"
            f" {limit}. {remedy}."
        )
    for form in (NARROW, AUTO) if resident == AUTO else ():
        for name, held in chosen.items():
            more = resident_bytes(checkpoint, name, form) - resident_bytes(checkpoint, name, held)
            fits = form == AUTO or checkpoint.manifest.tensors[name].report.bits_per_weight <= _NARROW_BITS
            if fits and needed + more <= limit:
                chosen[name], needed = form, needed + more
    return chosen
