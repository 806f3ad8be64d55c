"""FP8 weights with scales beside them, as DeepSeek-V3 has them for blocks, and others for rows or whole matrices.

Source: DeepSeek-V3, arXiv 2412.19437, section 3.3; the names are those that transformers reads.
"""

from __future__ import annotations

from spectral_surgery.errors import CheckpointError
from spectral_surgery.files.header import FLOATS8, TensorInfo, named
from spectral_surgery.files.sources.base import Settings, SourceKind, Tensors, stands_for, wrong
from spectral_surgery.files.sources.scaled import scaled

_USUAL = (128, 128)
_BESIDE = ("_scale_inv", "_scale")  # behind the name of a weight
_INSTEAD = (".weight_scale_inv", ".weight_scale", ".scale", ".qscale_weight")  # in place of ".weight"
# of activations and caches, which no weight needs
_OTHER_SCALES = ("activation_scale", "input_scale", "output_scale", "qscale_act", ".k_scale", ".v_scale")


def read_fp8(tensors: Tensors, settings: Settings) -> dict[str, TensorInfo]:
    """The plain tensors of a checkpoint with FP8 weights.

    Raises CheckpointError when the scales of a weight are missing or do not fit, or scales have no FP8 weight.
    """
    block = _block(settings)
    scales = {name: _scales_of(info, tensors) for name, info in tensors.items() if info.dtype in FLOATS8}
    used = {info.name for info in scales.values()}
    plain: dict[str, TensorInfo] = {}
    for name, info in tensors.items():
        if name in scales:
            plain[name] = stands_for(info, scaled(info, scales[name], block))
        elif name not in used and not name.endswith(_OTHER_SCALES):
            if name.endswith(("weight_scale_inv", "weight_scale")):
                raise wrong(info, "is the scale of a weight that is missing or not FP8; expected an FP8 weight.")
            plain[name] = info
    return plain


def looks_fp8(tensors: Tensors) -> bool:
    """Whether weights are FP8 with scales beside them, where no configuration says so, as of a lone file."""
    return any(name.endswith(_BESIDE[0]) and f"{name.removesuffix(_BESIDE[0])}" in tensors for name in tensors)


def _scales_of(info: TensorInfo, tensors: Tensors) -> TensorInfo:
    stem = info.name.removesuffix(".weight")
    names = [info.name + suffix for suffix in _BESIDE]
    names += [stem + suffix for suffix in _INSTEAD] if stem != info.name else []
    found = next((tensors[name] for name in names if name in tensors), None)
    if found is None:
        raise wrong(info, f"is {info.dtype} and has no scales; expected {named([names[0]])} beside it.")
    return found


def _block(settings: Settings) -> tuple[int, int] | None:
    sizes = settings.get("weight_block_size", _USUAL)
    if sizes is None:
        return None
    if not isinstance(sizes, list | tuple) or len(sizes) != 2 or not all(type(n) is int and n > 0 for n in sizes):
        raise CheckpointError(
            f"config.json: weight_block_size is {named([sizes])}; expected two sizes. Download it again."
        )
    return (sizes[0], sizes[1])


FP8 = SourceKind("fp8", read_fp8)
FBGEMM_FP8 = SourceKind("fbgemm_fp8", read_fp8)
