"""The processes that work on one model together under torch.distributed; one alone is the first of one."""

from __future__ import annotations

from torch import Tensor, distributed


def _joined() -> bool:
    return distributed.is_available() and distributed.is_initialized()


def rank() -> int:
    """Number of this process; the first one, 0, writes and reports."""
    return distributed.get_rank() if _joined() else 0


def world() -> int:
    """How many processes there are."""
    return distributed.get_world_size() if _joined() else 1


def wait_for_all() -> None:
    """Go on when every process has come here."""
    if world() > 1:
        distributed.barrier()


def average(tensor: Tensor) -> Tensor:
    """The mean over all processes of a tensor of the same shape, in place."""
    if world() > 1:
        distributed.all_reduce(tensor)
        tensor /= world()
    return tensor
