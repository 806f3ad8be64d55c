"""GPU kernels compiled for chips that are not here, and what the compilers made of them."""

from __future__ import annotations

import re
import subprocess
import tempfile
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import product as pairs
from pathlib import Path
from typing import Any, NamedTuple

import torch

from spectral_surgery.codec.encoded import Basis
from spectral_surgery.matmul import gpu_rules
from spectral_surgery.matmul.gpu_rules import Planes

_POINTER = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.uint8: "*u8",
    torch.int8: "*i8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
LAYOUTS = {
    "int8": Planes(True, False, False),
    "int4": Planes(False, True, False),
    "int5": Planes(False, True, True),
    "int12": Planes(True, True, False),
}
_TOKENS = (1, 8, 16, 64, 200)
_WAVE = 64  # threads of a warp of AMD's chips for servers
_SIZE = 4096  # rows and columns


class Chip(NamedTuple):
    """A GPU as its maker's data sheet has it.

    Attributes:
        name: of a product.
        target: backend, architecture and threads of a warp, as Triton wants them.
        bandwidth: of its memory, bytes a second.
        processors: multiprocessors, or compute units.
        clock: in Hz, boosted.
        shared: bytes of shared memory of a multiprocessor.
    """

    name: str
    target: tuple[str, int | str, int]
    bandwidth: float
    processors: int
    clock: float
    shared: int


CHIPS = (
    Chip("A100 80GB", ("cuda", 80, 32), 2.04e12, 108, 1.41e9, 164 << 10),
    Chip("H200", ("cuda", 90, 32), 4.8e12, 132, 1.98e9, 228 << 10),
    Chip("B200", ("cuda", 100, 32), 8.0e12, 148, 1.965e9, 228 << 10),
    Chip("RTX 5090", ("cuda", 120, 32), 1.79e12, 170, 2.41e9, 100 << 10),
    Chip("MI300X", ("hip", "gfx942", 64), 5.3e12, 304, 2.1e9, 64 << 10),
    Chip("RX 7900 XTX", ("hip", "gfx1100", 32), 0.96e12, 96, 2.5e9, 64 << 10),
)


@dataclass(frozen=True)
class Variant:
    """A kernel with what it is compiled for.

    Attributes:
        name: for tables.
        kernel: of Triton.
        types: of its arguments: pointers and integers.
        constants: its arguments in capital letters.
        warps: of a program.
        stages: turns of a loop that are loaded ahead.
        loop_bytes: of codes that a turn of its inner loop reads; 0 where it is not bound by them.
        turns: of that loop in a program, for a matrix of 4096 x 4096.
        usual: as most models have it.
    """

    name: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    warps: int
    stages: int
    loop_bytes: int = 0
    turns: int = 1
    usual: bool = True


@dataclass(frozen=True)
class Compiled:
    """What a compiler made of a variant.

    Attributes:
        registers: of a thread.
        spilled: instructions that move what has no register, or such registers on AMD.
        shared: bytes of shared memory of a program.
        matrix: instructions of matrix units.
        loads: widths of loads from global memory in bytes, and how many instructions have them: of the loop that reads
            codes where it was found, else of all.
        loop: instructions of that loop; 0 where it was not found.
        instructions: of all of it.
    """

    registers: int
    spilled: int
    shared: int
    matrix: int
    loads: dict[int, int] = field(default_factory=dict)
    loop: int = 0
    instructions: int = 0


def variants(chip: Chip) -> list[Variant]:
    """Kernels of every layout, dtype and number of tokens; each further choice is met with several of these."""
    found = []
    for number, (layout, tokens) in enumerate(pairs(LAYOUTS, _TOKENS)):
        found.append(matrix_variant(chip, layout, tokens))
        found.append(matrix_variant(chip, layout, tokens, torch.float32, unusual=number + 1))
    for number, (layout, tokens) in enumerate(pairs(("int8", "int4"), _TOKENS)):
        found.append(matrix_variant(chip, layout, tokens, torch.float16, unusual=31 - number))
    found += [_of_experts(matrix_variant(chip, layout, 8)) for layout in ("int8", "int4")]
    return found + _of_adapters()


def _of_adapters() -> list[Variant]:
    """Kernels of FourierFT and of FouRA."""
    from spectral_surgery.gpu import low_rank
    from spectral_surgery.gpu.mix_bins import BINS, ROWS, mix_bins

    found = []
    pointers = {"out": "*fp32", "parts": "*fp32", "x_parts": "*fp32", "y_parts": "*fp32", "coefficients": "*fp32"}
    pointers |= {"x_out": "*fp32", "y_out": "*fp32", "signs": "*fp32", "x_factors": "*i64", "y_factors": "*i64"}
    pointers |= {"order": "*i64", "source": "*i64", "target": "*i64", "scale": "fp32"}
    cut = {"SPLITS": 2, "T": low_rank.TOKENS, "J": low_rank.RANKS, "N": low_rank.POINTS}
    wide = {**cut, "J": low_rank.INTO, "N": low_rank.OUT}
    kernels = (
        *((low_rank.components, {**cut, "WAVES": waves}) for waves in (True, False)),
        *((low_rank.expand, {**wide, "WAVES": waves, "ADD": add}) for waves, add in ((True, True), (False, False))),
        (low_rank.both_components, cut),
    )
    for kernel, constants in kernels:
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            factors = "*i64" if constants.get("WAVES", True) else "*fp32"
            given = {**pointers, "x": _POINTER[dtype], "y": _POINTER[dtype], "factors": factors}
            types = {name: given.get(name, "i32") for name in kernel.arg_names}
            name = f"{kernel.__name__} of {'waves' if factors == '*i64' else 'factors'}, {str(dtype)[6:]}"
            stages = low_rank.OUT_STAGES if kernel is low_rank.expand else low_rank.STAGES
            usual = dtype == torch.bfloat16
            found.append(Variant(name, kernel, types, constants, low_rank.WARPS, stages, usual=usual))
    kernel = low_rank.coefficient_sums
    types = {name: pointers.get(name, "i32") for name in kernel.arg_names}
    found.append(Variant(kernel.__name__, kernel, types, {"SPLITS": 2, "K": low_rank.SUMS}, 4, 2))
    for real in ("fp32", "fp64"):
        values = {"spectrum": f"*{real}", "out": f"*{real}", "coefficients": f"*{real}", "factors": "*fp32"}
        types = {name: {**pointers, **values}.get(name, "i32") for name in mix_bins.arg_names}
        constants = {"ROWS": ROWS, "BINS": BINS, "HALVINGS": 10}
        found.append(Variant(f"mix_bins {real}", mix_bins, types, constants, 4, 2))
    return found


def matrix_variant(  # noqa: PLR0917
    chip: Chip,
    layout: str,
    tokens: int,
    dtype: torch.dtype = torch.bfloat16,
    unusual: int = 0,
    cut: gpu_rules.Cut | None = None,
) -> Variant:
    """One of a 4096 x 4096 matrix, or of one where the bits of ``unusual`` say what is not as in most models.

    Args:
        cut: another than the rules have.
    """
    from spectral_surgery.gpu.few_tokens import few_tokens
    from spectral_surgery.gpu.product import product

    has = [bool(unusual >> bit & 1) for bit in range(5)]
    columns = _SIZE + (160 if has[0] else 0)  # a smaller tile at the end, and nibbles that begin within a tile
    planes = LAYOUTS[layout]
    if planes.NIBBLES and not planes.BYTES and has[4]:
        planes = planes._replace(PARTS=10, SHIFT=-1)
    basis = Basis("dct", 64, (0, 1) if not has[3] or has[0] else ())
    matrix = gpu_rules.Matrix(_SIZE, columns, planes, basis, has[1], has[1], has[2])
    kind, few, backend = kind_of(chip), tokens <= gpu_rules.few_at_most(matrix, dtype, kind_of(chip)), chip.target[0]
    if few:
        cut = cut or gpu_rules.few_cut(matrix, tokens, dtype, kind)
        constants = gpu_rules.few_constants(matrix, cut, dtype, not has[3], backend)
    else:
        cut = cut or gpu_rules.many_cut(matrix, tokens, dtype, kind)
        constants = gpu_rules.many_constants(matrix, cut, dtype, backend)
    kernel = few_tokens if few else product
    narrow, mixing = planes.NIBBLES and not planes.BYTES, gpu_rules.mixing(dtype)
    pointers = {"x": dtype, "y": dtype, "bias": dtype, "forward": mixing, "inverse": mixing, "starts": torch.int64}
    pointers |= {"counters": torch.int32, "partial": torch.float32, "scale": torch.float32, "row_scale": torch.float32}
    pointers |= {"codes": torch.int8, "lowest": torch.uint8 if planes.BITS else torch.int8, "places": torch.int32}
    pointers |= {"beyond": torch.int8 if narrow else torch.float32}
    types = {name: _POINTER[pointers[name]] if name in pointers else "i32" for name in kernel.arg_names}
    name = f"{kernel.__name__} {str(dtype)[6:]} {layout} {cut.tokens} tokens"
    named = ("ragged", "scales of rows and columns", "outliers", "no bias", "points")
    words = [word for word, one in zip(named, has, strict=True) if one]
    read = int(cut.rows * cut.blocks * cut.terms * _bytes_of(planes)) if few else 0
    turns = -(-matrix.width // (matrix.turn * cut.splits))
    return Variant(", ".join([name, *words]), kernel, types, constants, cut.warps, cut.stages, read, turns, not unusual)


def _of_experts(one: Variant) -> Variant:
    """The same for many matrices in one launch."""
    from spectral_surgery.gpu.experts import experts

    types = {name: "*i64" if name == "jobs" else one.types.get(name, "i32") for name in experts.arg_names}
    constants = one.constants | {"BIAS": False, "WIDE": False}
    return replace(one, name=f"{one.name}, experts", kernel=experts, types=types, constants=constants)


def _bytes_of(planes: Planes) -> float:
    """What a turn reads of a row for each term that is transformed at a time: that of two columns."""
    return 2 * (planes.BYTES + planes.NIBBLES / 2 + planes.BITS / 8)


def kind_of(chip: Chip) -> gpu_rules.Chip:
    """What rules call a chip."""
    if chip.target[0] == "hip":
        return "amd" if chip.target[2] == _WAVE else "rdna"
    return gpu_rules.chip_of(divmod(int(chip.target[1]), 10))


def compiled(variant: Variant, chip: Chip) -> Compiled:
    """Compile a variant for a chip; Triton keeps what it compiled before."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = variant.kernel.arg_names
    constants = dict(variant.constants)
    if "c1" in names:
        constants["c1"] = 1
    types = {name: "constexpr" if name in constants else variant.types[name] for name in names}
    ragged = {"terms", "width", "x0", "c0"} if constants.get("RAGGED") else set()
    whole = {name for name, kind in types.items() if kind[0] == "*" or (kind == "i32" and name not in ragged)}
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in whole - {"tokens", "bins", "rows"}}
    source = ASTSource(
        variant.kernel, types, {(names.index(name),): value for name, value in constants.items()}, attributes
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of defaults that change in a later version
        built = triton.compile(
            source, target=GPUTarget(*chip.target), options={"num_warps": variant.warps, "num_stages": variant.stages}
        )
    if chip.target[0] == "hip":
        return _of_amd(built)
    return _of_nvidia(built, Path(triton.__file__).parent / "backends" / "nvidia" / "bin")


def _of_nvidia(built: Any, tools: Path) -> Compiled:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(built.asm["cubin"])
        usage = _output(tools / "cuobjdump", "-res-usage", file)
        lines = [
            (int(address, 16), re.sub(r"^@!?U?P\w+ ", "", text.strip()))
            for address, text in re.findall(
                r"/\*([0-9a-f]{4,5})\*/\s+(.*?);", _output(tools / "cuobjdump", "-sass", file)
            )
        ]
    registers = int(re.findall(r"REG:(\d+)", usage)[-1])
    words = Counter(text.split()[0] for _, text in lines)
    matrix = sum(count for word, count in words.items() if "MMA" in word)
    spilled = sum(count for word, count in words.items() if word.startswith(("STL", "LDL")))
    loop = _loop(lines)
    loads: Counter[int] = Counter()
    for text in loop or [text for _, text in lines]:
        word = text.split()[0]
        if word.startswith(("LDGSTS", "LDG.")):
            loads[next((int(part) for part in word.split(".") if part in ("128", "64")), 32) // 8] += 1
    return Compiled(registers, spilled, built.metadata.shared, matrix, dict(loads), len(loop), len(lines))


def _loop(lines: Sequence[tuple[int, str]]) -> list[str]:
    """The shortest loop that loads from global memory and multiplies matrices, of integers if any."""
    integers = any("IMMA" in text or "IGMMA" in text for _, text in lines)
    unit = ("IMMA", "IGMMA") if integers else ("MMA",)
    found = []
    for address, text in lines:
        to = re.search(r"^BRA.*?(0x[0-9a-f]+)", text)
        if to and int(to[1], 16) < address:
            body = [word for at, word in lines if int(to[1], 16) <= at <= address]
            multiplies = any(name in word.split()[0] for word in body for name in unit)
            if multiplies and any(word.startswith("LDG") for word in body):
                found.append(body)
    return min(found, key=len, default=[])


def _of_amd(built: Any) -> Compiled:
    text = built.asm["amdgcn"]
    registers, *spills = (
        int(re.findall(rf"\.{name}: *(\d+)", text)[-1])
        for name in ("vgpr_count", "vgpr_spill_count", "sgpr_spill_count")
    )
    matrix = len(re.findall(r"\bv_(?:mfma|wmma)_", text))
    sizes = {"b128": 16, "dwordx4": 16, "b96": 12, "dwordx3": 12, "b64": 8, "dwordx2": 8, "b32": 4, "dword": 4}
    loads: Counter[int] = Counter()
    for kind in re.findall(r"\b(?:global|buffer)_load_(\w+)", text):
        loads[sizes.get(kind, 2)] += 1
    return Compiled(registers, sum(spills), built.metadata.shared, matrix, dict(loads))


def _output(*command: object) -> str:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True).stdout  # noqa: S603, tools of Triton
