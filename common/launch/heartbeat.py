"""Heartbeats: each rank records its progress, and the launcher of its node reads the record (common/launch/watch.py).

A record is a few bytes of a memory-mapped file in the launcher's scratch folder, so that a step has no system call and no
synchronization for it. Without a launcher (a bare torchrun) the functions for ranks do nothing.
"""

import faulthandler
import json
import mmap
import os
import re
import signal
import struct
import sys
import time
import traceback
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

SCRATCH = "TWINSTACK_SCRATCH"  # environment variable: the launcher's folder on this node
SWAP_FOLDER = "TWINSTACK_SWAP"  # environment variable: the launcher's folder in deepspeed.nvme
DUMP_STACKS = signal.SIGUSR1  # a rank that gets it writes the Python stack of each of its threads
WAITING = "waiting: "  # prefix of the phases in which a rank waits for the others
DONE = "done"
_RECORD = struct.Struct("=qqqd48s")

# What gloo, NCCL and torch's store say when another process has ended, in whatever exception it comes
_LOST_CONNECTION = re.compile(
    r"gloo|nccl|Dist(Backend|Network|Store)Error|ProcessGroup|TCPStore|connection (was )?(closed|reset|refused)|broken pipe",
    re.I,
)


class Record(NamedTuple):
    """The progress of a rank."""

    pid: int
    step: int  # 0: before its first step
    beats: int  # since that step began
    time: float  # of the last beat, in seconds since 1970
    phase: str  # what it does now

    @property
    def waits(self) -> bool:
        return self.phase.startswith(WAITING)

    def __str__(self) -> str:
        where = f"step {self.step} ({self.phase})" if self.step else f"the start ({self.phase})"
        return f"{where} since {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(self.time))}"


class Crash(NamedTuple):
    """The exception that ended a rank."""

    message: str
    trace: str
    time: float
    is_lost_connection: bool  # a consequence: another process has ended


_map: mmap.mmap | None = None
_step = _beats = 0


# ---- in a rank


def begin() -> None:
    """Open this rank's record, first of all, and leave tracebacks to the launcher, which shows the one that matters."""
    global _map
    folder, rank = os.environ.get(SCRATCH), os.environ.get("RANK")
    if not folder or not rank or _map is not None:
        return
    file = os.open(_path(Path(folder), int(rank), "record"), os.O_RDWR | os.O_CREAT, 0o600)
    os.ftruncate(file, _RECORD.size)
    _map = mmap.mmap(file, _RECORD.size)
    os.close(file)
    stacks = open(_path(Path(folder), int(rank), "stacks"), "w", encoding="utf-8")  # noqa: SIM115  open until the process ends
    faulthandler.enable(stacks)  # a crash below Python, such as SIGSEGV
    faulthandler.register(DUMP_STACKS, stacks)
    sys.excepthook = _crash
    beat("imports")


def beat(phase: str, step: int | None = None) -> None:
    """Record that this rank has made progress and begins `phase`, and `step` if a new one begins. Takes about a microsecond."""
    global _step, _beats
    if _map is None:
        return
    if step is not None:
        _step, _beats = step, 0
    _beats += 1
    _RECORD.pack_into(_map, 0, os.getpid(), _step, _beats, time.time(), phase.encode()[:48])


def wait(what: str) -> None:
    """Record that this rank waits for the others, from here to its next beat."""
    beat(WAITING + what)


def _crash(error_type: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    text = "".join(traceback.format_exception(error_type, error, trace))
    message = "".join(traceback.format_exception_only(error_type, error)).strip()
    crash = Crash(message, text, time.time(), bool(_LOST_CONNECTION.search(message)))
    try:
        path = _path(Path(os.environ[SCRATCH]), int(os.environ["RANK"]), "crash")
        path.with_suffix(".tmp").write_text(json.dumps(crash), encoding="utf-8")
        path.with_suffix(".tmp").rename(path)
    except OSError:  # a full disk
        sys.stderr.write(text)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(1)  # a normal exit would wait seconds for worker threads of the stacks


# ---- in the launcher


def read(folder: Path, rank: int) -> Record | None:
    """The record of a rank; None before the rank has begun."""
    try:
        pid, step, beats, when, phase = _RECORD.unpack(_path(folder, rank, "record").read_bytes())
    except (FileNotFoundError, struct.error):
        return None
    return Record(pid, step, beats, when, phase.rstrip(b"\0").decode(errors="replace")) if pid else None


def crash(folder: Path, rank: int) -> Crash | None:
    """The exception that ended a rank; None if none has."""
    try:
        return Crash(*json.loads(_path(folder, rank, "crash").read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None


def stacks(folder: Path, rank: int) -> str:
    """What a rank wrote on a crash below Python or on DUMP_STACKS, the newest last."""
    try:
        return _path(folder, rank, "stacks").read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return ""


def _path(folder: Path, rank: int, what: str) -> Path:
    return folder / f"rank_{rank}.{what}"
