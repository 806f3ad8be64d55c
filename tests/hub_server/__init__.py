"""A Hub on 127.0.0.1 with the standard library alone: the calls that huggingface_hub makes without Xet.

The real huggingface_hub talks to it, in a process of its own (`client`). It counts every byte that it gets and sends,
and fails on request, so what pushes, pulls and reads of headers move is measured rather than claimed.
"""

from tests.hub_server.faults import Fault
from tests.hub_server.hub import TOKEN, LoopbackHub
from tests.hub_server.server import serving

__all__ = ["TOKEN", "Fault", "LoopbackHub", "serving"]
