"""How far apart the answers of two models are."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def kl(teacher: Tensor, student: Tensor) -> Tensor:
    """KL(teacher || student) in nats: logits or log-probabilities [..., V] to float32 [...]."""
    logs = (x.float().log_softmax(-1) for x in (student, teacher))
    return functional.kl_div(*logs, reduction="none", log_target=True).sum(-1)
