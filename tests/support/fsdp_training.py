"""Train an adapter for a few steps, sharded by FSDP2 over the processes of torchrun or in one process; write it.

python -m tests.support.fsdp_training METHOD OUT
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

from spectral_surgery.adapters import METHODS
from spectral_surgery.adapters.base import AdapterSpec
from spectral_surgery.files.peft.adapter_files import write_adapter
from spectral_surgery.live.attach import inject, state_of
from spectral_surgery.training.trainer import whole
from tests.live.test_attach import Model

SETTINGS = {"fourierft": {"n_frequency": 7, "scaling": 20.0}, "lora": {"r": 2}}
STEPS, BATCH = 5, 4


def main(method: str, out: Path) -> None:
    world = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = Model()
    row = METHODS[method]
    spec = inject(model, AdapterSpec(row, row.config(**SETTINGS[method])))
    if world > 1:
        dist.init_process_group("gloo")
        for layer in model.layers:
            fully_shard(layer)
        fully_shard(model)
    # not Adam, which makes full steps of gradients that are nothing but rounding
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05, momentum=0.9)
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(STEPS):
        ids = torch.randint(0, 11, (BATCH, 6), generator=generator)
        own = ids.chunk(world)[rank]
        loss = model(own).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach().clone()
        if world > 1:
            dist.all_reduce(total)
        losses.append(float(total) / world)
    state = state_of(model, spec, full=whole)
    if rank == 0:
        write_adapter(state, out)
        (out / "losses.json").write_text(json.dumps(losses))
    if world > 1:
        dist.barrier()  # a process that leaves while the other still writes may abort in gloo's threads
        dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
