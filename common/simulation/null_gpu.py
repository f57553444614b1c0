"""The null GPU of this process (null_gpu.cpp), where LD_PRELOAD has put it in front of CUDA."""

import ctypes
import os
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from common.simulation import build

_Callback = ctypes.CFUNCTYPE(None, ctypes.c_char_p)
_kept: list[Any] = []  # callbacks that C holds


class Count(NamedTuple):
    kind: str  # kernel, gemm, collective, sync, copy, fill, communicator, fault
    names: tuple[str, ...]  # of a collective: operation, dtype, size of the group
    calls: int
    amount: float  # bytes; of gemm FLOPs


def is_here() -> bool:
    """Is this process one that runs on the null GPU?"""
    return build.LIBRARY in os.path.basename(os.environ.get("LD_PRELOAD", "")) and hasattr(_library(), "null_gpu_record")


@cache
def _library() -> Any:
    return ctypes.CDLL(None)


def record(on: bool) -> None:
    """Count from now on, or no longer."""
    _library().null_gpu_record(int(on))


def clear() -> None:
    """Forget what was counted."""
    _library().null_gpu_clear()


def count(what: str, amount: float = 0.0) -> None:
    _library().null_gpu_count(what.encode(), ctypes.c_double(amount))


def next_group(size: int, rank: int) -> None:
    """What the other ranks would say of the next communicator that is split off: its size, and this rank's place in it."""
    _library().null_gpu_next_group(size, rank)


def on_sync(callback: Callable[[], None]) -> None:
    """Call this in the thread that waits for the device, while the null GPU records."""
    _kept.append(_Callback(lambda _: callback()))
    _library().null_gpu_on_sync(_kept[-1])


def counts() -> list[Count]:
    """All that was counted."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "counts"
        if _library().null_gpu_report(str(path).encode()):
            raise OSError(f"{path}: cannot be written")
        lines = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()]
    return [Count(kind, tuple(names), int(calls), float(amount)) for kind, *names, calls, amount in lines]
