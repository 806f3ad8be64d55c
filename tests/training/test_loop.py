"""Two processes train as one does on both of their batches, also where each has gradients of other parameters."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, distributed, multiprocessing, nn

from spectral_surgery.training.loop import Batch, LossCurve, Training, train, trained
from spectral_surgery.training.settings import DistillSettings

SETTINGS = DistillSettings(steps=6, eval_every=3, warmup_steps=2, learning_rate=0.1)


def batch_of(step: int, process: int) -> Batch:
    """What a token router might give: the first process has tokens for one expert, the second one for another."""
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(2 * step + process))
    return {"x": x, "expert": torch.tensor(process)}


def experts() -> nn.ModuleList:
    torch.manual_seed(0)
    return nn.ModuleList(nn.Linear(3, 3) for _ in range(2))


def loss_of(model: nn.ModuleList, batch: Batch) -> Tensor:
    return (model[int(batch["expert"])](batch["x"]) - batch["x"].flip(1)).square().mean()


def train_one_of_two(process: int, folder: Path) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=process, world_size=2)
    model = experts()
    work = Training(trained(model), lambda batch: loss_of(model, batch), batch_of, [batch_of(99, 0), batch_of(99, 1)])
    curve = train(work, SETTINGS, lambda *_: None)
    torch.save((model.state_dict(), curve.train, curve.held_out), folder / f"{process}.pt")
    distributed.destroy_process_group()


def train_alone() -> tuple[nn.ModuleList, LossCurve]:
    model = experts()

    def loss(batch: Batch) -> Tensor:
        step = int(batch["step"])
        return (loss_of(model, batch_of(step, 0)) + loss_of(model, batch_of(step, 1))) / 2

    work = Training(trained(model), loss, lambda step, _: {"step": torch.tensor(step)}, [{"step": torch.tensor(99)}])
    return model, train(work, SETTINGS, lambda *_: None)


@pytest.mark.slow
def test_two_processes_train_like_one(tmp_path: Path) -> None:
    multiprocessing.spawn(train_one_of_two, (tmp_path,), nprocs=2)
    (first, train_loss, held_out), (second, *_) = (torch.load(tmp_path / f"{process}.pt") for process in (0, 1))
    model, curve = train_alone()
    for name, values in model.state_dict().items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], values, rtol=1e-5, atol=1e-6)
    for got, wanted in zip(train_loss + held_out, curve.train + curve.held_out, strict=True):
        assert got[0] == wanted[0]
        assert abs(got[1] - wanted[1]) < 1e-6
    assert curve.best < 0.8 * curve.held_out[0][1]


def test_without_held_out_batches_the_last_parameters_are_kept() -> None:
    model = nn.Linear(3, 3)
    seen: list[Tensor] = []

    def loss(batch: Batch) -> Tensor:
        return model(batch["x"]).square().mean()

    curve = train(
        Training(trained(model), loss, lambda step, _: batch_of(step, 0)),
        SETTINGS,
        lambda *_: seen.append(model.weight.detach().clone()),
    )
    assert torch.equal(model.weight, seen[-1])
    assert not torch.equal(model.weight, seen[-2])
    assert (curve.held_out, curve.best_step, [step for step, _ in curve.train]) == ([], 6, [3, 6])
