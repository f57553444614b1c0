"""What others wrote as a program, such as a chat template, run in a child process that may take so much time and memory."""

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

SECONDS = 5  # of CPU, an item
MEMORY = 2**29  # bytes beside what this process has


class Exceeded(Exception):
    """The bounds were not kept."""


def each[T](work: Callable[[T], Any], items: Sequence[T]) -> list[Any]:
    """work(item) of each item, as JSON has it. A BadInput of `work` is raised here; Exceeded where an item takes too much.

    A fork, as torch's DataLoader makes it: nothing is imported or copied. A signal ends even what never comes back to Python.
    """
    read, write = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads: the child calls no library that has some
        pid = os.fork()
    if pid == 0:
        os.close(read)
        _work(work, items, write)
    os.close(write)
    made = []
    try:
        with os.fdopen(read, "rb") as lines:
            for line in lines:
                answer = json.loads(line)
                if "refused" in answer:
                    raise BadInput(answer["refused"])
                made.append(answer["made"])
    finally:
        _, status = os.waitpid(pid, 0)
    if len(made) < len(items):
        slow = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGPROF
        raise Exceeded(f"takes more than {SECONDS} s" if slow else f"takes more than {MEMORY // 2**20} MB of memory")
    return made


def _work(work: Callable[[Any], Any], items: Sequence[Any], write: int) -> None:
    """The child: a line an item. It ends when one takes too long (SIGPROF), too much memory, or nobody reads."""
    try:
        signal.signal(signal.SIGPROF, signal.SIG_DFL)
        with contextlib.suppress(OSError, ValueError):  # no /proc, or a lower limit already
            size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
        with os.fdopen(write, "wb") as out:
            for item in items:
                signal.setitimer(signal.ITIMER_PROF, SECONDS)
                try:
                    answer = {"made": work(item)}
                except BadInput as error:
                    answer = {"refused": error.problems}
                line = json.dumps(answer).encode()
                if len(line) > MEMORY // 8:
                    break
                out.write(line + b"\n")
    finally:
        os._exit(0)
