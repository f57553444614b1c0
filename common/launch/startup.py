"""What a launched run says until its first step: each part of the start with its seconds, on rank 0."""

import os
import time
from typing import TYPE_CHECKING

from common.screen import field

if TYPE_CHECKING:
    import torch

LAUNCHED = "TWINSTACK_LAUNCHED"  # environment variable: when the launcher started, in seconds since 1970; 0: of elastic ranks
HEADER = "TWINSTACK_HEADER"  # environment variable: the number of ranks for which the launcher has printed the header

_since: float | None = None  # when the current part began; None: nothing is to be said


def begin() -> None:
    """The start of a rank that the launcher has started. Otherwise, and on other ranks, nothing is said."""
    global _since
    launched = os.environ.pop(LAUNCHED, None)  # once, as a process may run many recipes
    _since = None
    if launched is not None and os.environ.get("RANK") == "0":
        import psutil

        _since = float(launched) or psutil.Process().create_time()  # elastic ranks are started again and again


def done(part: str) -> None:
    """A part of the start is done, and the next one begins."""
    global _since
    if _since is not None:
        now = time.time()
        print(field("start", f"{part}, {max(0.0, now - _since):.1f} s"), flush=True)
        _since = now


def processes(world: int, device: "torch.device") -> str:
    """'8 processes on NVIDIA H100 80GB HBM3'"""
    import torch

    place = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({os.cpu_count()} cores)"
    return f"{world} process{'es' * (world > 1)} on {place}"
