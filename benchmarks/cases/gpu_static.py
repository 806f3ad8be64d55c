"""What compilers make of the GPU kernels, for chips that need not be here, beside what their data sheets allow.

The time of arithmetic is that of issuing the instructions of the loop over codes, one a cycle for each of the four
schedulers of a multiprocessor; that of memory is for the codes alone. Nothing here was run on a GPU.
"""

from __future__ import annotations

from benchmarks.case import CheckFailedError, Inputs, Row, chosen
from benchmarks.compiled_kernels import CHIPS, Chip, Compiled, Variant, compiled, variants

_SCHEDULERS = 4  # of a multiprocessor of NVIDIA
_WIDE = 16  # bytes


def run(inputs: Inputs) -> list[Row]:
    """A row for each kernel and chip; every other variant is compiled too, and must not spill registers."""
    by_name = {chip.name: chip for chip in CHIPS}
    rows: list[Row] = []
    for name in chosen((), list(by_name), ["H200"], inputs):
        results = [(variant, compiled(variant, by_name[name])) for variant in variants(by_name[name])]
        spilled = [variant.name for variant, result in results if result.spilled]
        if spilled:
            raise CheckFailedError(f"{name}: registers of {len(spilled)} kernels are spilled: {'; '.join(spilled)}")
        rows += [_row(by_name[name], variant, result) for variant, result in results if variant.usual]
    return rows


def over_memory(chip: Chip, variant: Variant, result: Compiled, *, whole: bool = False) -> float:
    """Time of the instructions of the loop over that of reading its codes.

    Args:
        whole: with those before and after it, as if every program were the last of its rows, which adds up.
    """
    around = (result.instructions - result.loop) / variant.turns if whole else 0
    cycles = (result.loop + around) * variant.warps / _SCHEDULERS
    return cycles * chip.bandwidth / (chip.processors * chip.clock * variant.loop_bytes)


def _row(chip: Chip, variant: Variant, result: Compiled) -> Row:
    counted = variant.loop_bytes > 0 and result.loop > 0
    wide = sum(count for width, count in result.loads.items() if width >= _WIDE)
    ratio = over_memory(chip, variant, result) if counted else 0.0
    return {
        "chip": chip.name,
        "kernel": variant.name,
        "registers": result.registers,
        "spilled": result.spilled,
        "shared bytes": result.shared,
        "programs at once": min(chip.shared // max(result.shared, 1), 16),
        "matrix instructions": result.matrix,
        "loads of 16 bytes, in the loop": wide / max(sum(result.loads.values()), 1),
        "instructions of the loop": result.loop or "",
        "arithmetic over memory": ratio if counted else "",
        "with start and end": over_memory(chip, variant, result, whole=True) if counted else "",
        "target": "< 0.5" if counted else "",
        "met": ratio < 0.5 if counted else "",
    }
