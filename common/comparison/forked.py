"""Runs functions as the ranks of a process group, forked from this process, which has imported what they need."""

import os
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

GRACE = 2.0  # seconds that the other ranks have for words of their own after the first one has failed
LIMIT = 60.0  # seconds of an attempt
RANKS, STEPS = 2, 3  # of a script in alone_STACK.py
VOCAB, POSITIONS, LENGTH = 64, 32, 16  # of its model and samples


def attempt(call: Callable[[], object], folder: Path, ranks: int) -> tuple[int, list[str], list[str]]:
    """(exit code of the first rank that failed, or 0; what all ranks wrote to standard output, and to standard error)"""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    files = [tempfile.TemporaryFile(dir=folder) for _ in range(2 * ranks)]
    streams = [file.fileno() for file in files]
    running = {_fork(call, rank, ranks, port, *streams[rank::ranks]) for rank in range(ranks)}
    code, end = 0, time.monotonic() + LIMIT
    while running:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            running.discard(pid)
            if os.waitstatus_to_exitcode(status) and not code:
                code, end = os.waitstatus_to_exitcode(status), time.monotonic() + GRACE
        elif time.monotonic() > end:
            for other in running:
                os.kill(other, signal.SIGKILL)
            code, end = code or -signal.SIGKILL, time.monotonic() + LIMIT
        else:
            time.sleep(0.02)
    texts: list[list[str]] = []
    for file in files:
        file.seek(0)
        texts.append(file.read().decode(errors="replace").splitlines())
        file.close()
    return code, sum(texts[:ranks], []), sum(texts[ranks:], [])


def _fork(call: Callable[[], object], rank: int, ranks: int, port: int, stdout: int, stderr: int) -> int:
    pid = os.fork()
    if pid == 0:
        _execute(call, rank, ranks, port, stdout, stderr)
    return pid


def _execute(call: Callable[[], object], rank: int, ranks: int, port: int, stdout: int, stderr: int) -> NoReturn:
    os.dup2(stdout, 1)
    os.dup2(stderr, 2)
    given = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in given.items()} | {"MASTER_ADDR": "127.0.0.1"})
    code = 0
    try:
        call()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


# ---- what an attempt shows


def does(what: str) -> None:
    """Say what the stack does in place of an error."""
    print(f"does: {what}", flush=True)


def flip(folder: Path, weight: Any) -> None:
    """Change one byte of this weight wherever a checkpoint has it, on the first rank, while the others wait."""
    import torch.distributed as dist

    dist.barrier()
    if dist.get_rank() == 0:
        content = weight.numpy().tobytes()
        for path in (path for path in folder.rglob("*") if path.is_file()):
            before, found, after = path.read_bytes().partition(content)
            if found:
                path.write_bytes(before + bytes([content[0] ^ 64]) + content[1:] + after)
    dist.barrier()


def differences(saved: Any, weight: Any) -> int:
    """How many elements of a weight are not as they were saved."""
    return int((saved != weight.detach()).sum())
