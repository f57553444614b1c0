"""One run at a time in OUT: a lock that ends with the process that holds it, whatever ends that process.

The launcher of node 0 holds it from the end of its checks to its own end; without a launcher rank 0 does. The lock is a flock
on OUT/run.lock, whose text names the process that holds it. On NFS the Linux client turns flock into a lock on the server, so
that it works between nodes. A note says so if the file system has no locks.
"""

import contextlib
import errno
import fcntl
import os
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from common.errors import BadInput

NAME = "run.lock"
_SCRATCH = "twinstack_"
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)  # of a file system
_locks: dict[Path, tuple[int, list[Path]]] = {}  # folder -> file descriptor, folders that were created for it


class _Taken(Exception):
    """Another process holds the lock; the message names it."""


def hold(out: Path) -> None:
    """Create OUT and lock it for this process until `release` or the end of the process. BadInput names another holder."""
    if out.resolve() in _locks:
        return
    created = [folder for folder in (out, *out.parents) if not folder.exists()]
    try:
        out.mkdir(parents=True, exist_ok=True)
        descriptor = _acquire(out / NAME)
    except _Taken as taken:
        raise BadInput(
            f"{out}: another run writes there ({taken or 'its process is not known'}); wait for its end, stop it with "
            "SIGTERM, or choose another OUT"
        ) from None
    except OSError as error:
        if error.errno in _NO_LOCKS:
            print(f"note: {out}: cannot be locked ({error.strerror}); start no second run there", file=sys.stderr, flush=True)
            return
        raise BadInput(f"{out}: {error.strerror}; choose another OUT") from None
    _locks[out.resolve()] = descriptor, [folder.absolute() for folder in created]


def release() -> None:
    """Release all locks of this process and leave no trace: remove the folders that were created for them, if empty."""
    for folder, (descriptor, created) in _locks.items():
        with contextlib.suppress(OSError):
            if _is_file(folder / NAME, descriptor):
                os.unlink(folder / NAME)
                for empty in created:
                    empty.rmdir()
        os.close(descriptor)
    _locks.clear()


@contextlib.contextmanager
def locked(out: Path) -> Iterator[None]:
    """Hold the lock of OUT in a `with` block."""
    hold(out)
    try:
        yield
    finally:
        release()


def _acquire(path: Path) -> int:
    """Lock a file and return its descriptor. _Taken if another process has the lock; OSError if there are no locks."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            text = os.read(descriptor, 1000).decode(errors="replace").strip()
            os.close(descriptor)
            raise _Taken(text) from None
        except OSError:
            os.close(descriptor)
            raise
        if _is_file(path, descriptor):  # else its holder has removed the file between open and flock
            os.ftruncate(descriptor, 0)
            since = time.strftime("%Y-%m-%d %H:%M:%S")
            os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}, since {since}\n".encode())
            return descriptor
        os.close(descriptor)


def _is_file(path: Path, descriptor: int) -> bool:
    """Is the open file the one that is at `path`?"""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


# ---- scratch folders


@contextlib.contextmanager
def scratch_folder(parent: Path | None = None) -> Iterator[str]:
    """A folder for this process in `parent`, by default the temporary folder. Those of killed launchers are removed."""
    parent = parent or Path(tempfile.gettempdir())
    for folder in parent.glob(f"{_SCRATCH}*"):
        with contextlib.suppress(OSError, _Taken):
            if folder.stat().st_uid == os.getuid() and (folder / NAME).is_file():
                os.close(_acquire(folder / NAME))
                shutil.rmtree(folder)
    with tempfile.TemporaryDirectory(prefix=_SCRATCH, dir=parent) as name:
        descriptor = None
        with contextlib.suppress(OSError, _Taken):  # without a lock the folder stays if this process is killed
            descriptor = _acquire(Path(name) / NAME)
        yield name
        if descriptor is not None:
            os.close(descriptor)
