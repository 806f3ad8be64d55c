"""How far apart the answers of two models are."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def kl(teacher: Tensor, student: Tensor) -> Tensor:
    """KL(teacher || student) in nats: logits or log-probabilities [..., V] to float32 [...]."""
    wanted, logs = (logits.float().log_softmax(-1) for logits in (teacher, student))
    return functional.kl_div(logs, wanted, reduction="none", log_target=True).sum(-1)
