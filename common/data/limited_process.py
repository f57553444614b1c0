"""Runs foreign code, such as a chat template, in a child process with limits on time and memory."""

import contextlib
import json
import os
import resource
import signal
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from common.errors import BadInput

SECONDS = 5  # of CPU time per item
MEMORY = 2**29  # bytes beyond those of this process


class Exceeded(Exception):
    """An item needs more than the limits allow."""


def each[T](work: Callable[[T], Any], items: Sequence[T]) -> list[Any]:
    """work(item) for each item, after a round trip through JSON. A BadInput of `work` is raised here, Exceeded if an item needs
    too much time or memory.

    The child is a fork, as in torch's DataLoader: nothing is imported or copied. A signal ends even code that never returns to
    the Python interpreter.
    """
    read, write = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # about threads: the child calls no library that uses them
        pid = os.fork()
    if pid == 0:
        os.close(read)
        _work(work, items, write)
    os.close(write)
    results = []
    try:
        with os.fdopen(read, "rb") as lines:
            for line in lines:
                answer = json.loads(line)
                if "problems" in answer:
                    raise BadInput(answer["problems"])
                results.append(answer["result"])
    finally:
        _, status = os.waitpid(pid, 0)
    if len(results) < len(items):
        slow = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGPROF
        raise Exceeded(f"takes more than {SECONDS} s" if slow else f"takes more than {MEMORY // 2**20} MB of memory")
    return results


def _work(work: Callable[[Any], Any], items: Sequence[Any], write: int) -> None:
    """The child process: writes one line per item. It ends when an item takes too long (SIGPROF) or too much memory, or when
    the parent no longer reads."""
    try:
        signal.signal(signal.SIGPROF, signal.SIG_DFL)
        with contextlib.suppress(OSError, ValueError):  # no /proc, or a lower limit exists
            size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
        with os.fdopen(write, "wb") as out:
            for item in items:
                signal.setitimer(signal.ITIMER_PROF, SECONDS)
                try:
                    answer = {"result": work(item)}
                except BadInput as error:
                    answer = {"problems": error.problems}
                line = json.dumps(answer).encode()
                if len(line) > MEMORY // 8:
                    break
                out.write(line + b"\n")
    finally:
        os._exit(0)
