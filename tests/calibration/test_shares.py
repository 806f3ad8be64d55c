"""Moments of shares of the samples add up to those of all of them, also when a share is lost and begun anew."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

from spectral_surgery.calibration import layer_moments as module
from spectral_surgery.calibration.block_streaming import load_lazily
from spectral_surgery.calibration.layer_moments import layer_moments
from spectral_surgery.calibration.shares import sharing
from spectral_surgery.engines.base import Share, Split, Sums
from spectral_surgery.engines.shares import added_up
from spectral_surgery.errors import CheckpointError
from spectral_surgery.files.index import read_index
from spectral_surgery.inputs.plain_text import token_inputs
from tests.calibration.test_layer_moments import TOKENS, changed, opened, sequences
from tests.commands.test_expert_calibration import model_of


@dataclass
class Here:
    """Shares that are run in this process; the first one is lost before each of some changes."""

    shares: list[Share]
    losses: Sequence[int]
    fresh: list[Share] = field(init=False)
    changes: list[list[Tensor]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.fresh = [copy(share) for share in self.shares]

    def total(self, sums: Sums) -> Sums:
        for share in self.shares:
            sums = added_up(sums, share.sums([partial(list, change) for change in self.changes]))
        return sums

    def tell(self, change: Sequence[Tensor]) -> None:
        if len(self.changes) in self.losses:
            self.shares[0] = copy(self.fresh[0])
        self.changes.append([weight.clone() for weight in change])


@contextmanager
def here(count: int, losses: Sequence[int], split: Split) -> Iterator[Here]:
    yield Here(list(split(count)), losses)


def moments(folder: Path, names: list[str], count: int = 0, losses: Sequence[int] = ()) -> dict[str, Tensor]:
    """By tensor; of shares, or of all samples at once."""
    index = read_index(folder)
    lazy = load_lazily(folder, index, "AutoModel")
    shared = sharing(lazy, names, {}, partial(here, count, losses)) if count else None
    found = {}
    for turn in layer_moments(lazy, token_inputs(sequences()), names, sharing=shared):
        found[f"{turn.tensor}{turn.rows}"] = turn.moment.clone()
        turn.matrix.put(changed(turn.matrix.weight))
    return found


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize(("count", "losses"), [(1, ()), (2, (0,)), (3, (0, 1)), (50, ())])
def test_they_are_those_of_all_samples(
    kind: str, count: int, losses: Sequence[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BATCH_TOKENS", TOKENS)
    _, names = opened(kind, tmp_path / "model")
    wanted, found = moments(tmp_path / "model", names), moments(tmp_path / "model", names, count, losses)
    assert found.keys() == wanted.keys()
    for name, moment in wanted.items():
        torch.testing.assert_close(found[name], moment, rtol=1e-4, atol=1e-5 * float(moment.abs().max()), msg=name)


def test_experts_that_only_some_shares_come_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BATCH_TOKENS", 9)  # a sequence each
    monkeypatch.setattr(module, "EXPERT_MOMENTS", 4 * 64**2)  # one expert at a time
    model_of("by expert").save_pretrained(tmp_path / "model")
    names = [name for name, info in read_index(tmp_path / "model").tensors.items() if len(info.shape) == 2]
    wanted, found = moments(tmp_path / "model", names), moments(tmp_path / "model", names, 50, (2, 3))
    assert found.keys() == wanted.keys()
    assert sum("experts" in name for name in found) > 3
    for name, moment in wanted.items():
        torch.testing.assert_close(found[name], moment, rtol=1e-4, atol=1e-5 * float(moment.abs().max()), msg=name)


def test_tensors_with_two_names_are_added_once() -> None:
    one, two, three = (torch.full((2, 2), float(value)) for value in (1, 2, 4))
    found = added_up({"q": one, "k": one, "down": two}, {"q": three, "k": three, "up": two})
    assert found["q"] is found["k"]
    assert {name: float(total[0, 0]) for name, total in found.items()} == {"q": 5, "k": 5, "down": 2, "up": 2}


def test_a_share_refuses_other_files_than_those_of_the_driver(tmp_path: Path) -> None:
    lazy, names = opened("llama", tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"

    @contextmanager
    def nobody(split: Split) -> Iterator[Here]:
        (share,) = split(1)
        with pytest.raises(CheckpointError, match=r"model\.safetensors: expected the file of 7 bytes"):
            share.sums([])
        assert share.memory > 4 * sum(p.numel() for p in lazy.chain.stacks[0].blocks[0].parameters())
        yield Here([share], ())

    with sharing(lazy, names, {file: 7}, nobody)([token_inputs(sequences())[:2]]):
        pass
