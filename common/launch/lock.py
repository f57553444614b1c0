"""One run at a time in OUT: a lock that ends with the process that holds it, whatever ends that process.

The launcher of node 0 holds it from the end of its checks to its own end; without a launcher rank 0 does. It is a flock on
OUT/run.lock, whose text says who holds it. On NFS the Linux client turns flock into a lock on the server, so that it holds
between nodes; a file system without locks is named in a note.
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
_held: dict[Path, tuple[int, list[Path]]] = {}  # folder -> file descriptor, the folders that were made for it


class _Taken(Exception):
    """Another process holds the lock; its text says which."""


def hold(out: Path) -> None:
    """Lock OUT for this process until `release` or its end, and make the folder. BadInput names the process that holds it."""
    if out.resolve() in _held:
        return
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    try:
        out.mkdir(parents=True, exist_ok=True)
        descriptor = _acquire(out / NAME)
    except _Taken as taken:
        raise BadInput(
            f"{out}: another run writes there ({taken or 'its process is not known'}); wait for its end, stop it by "
            "SIGTERM, or choose another OUT"
        ) from None
    except OSError as error:
        if error.errno in _NO_LOCKS:
            print(f"note: {out}: cannot be locked ({error.strerror}); start no second run there", file=sys.stderr, flush=True)
            return
        raise BadInput(f"{out}: {error.strerror}; choose another OUT") from None
    _held[out.resolve()] = descriptor, [folder.absolute() for folder in made]


def release() -> None:
    """Give back all locks of this process, and leave no trace: folders that were made for them go where they are empty."""
    for folder, (descriptor, made) in _held.items():
        with contextlib.suppress(OSError):
            if _is_file(folder / NAME, descriptor):
                os.unlink(folder / NAME)
                for empty in made:
                    empty.rmdir()
        os.close(descriptor)
    _held.clear()


@contextlib.contextmanager
def held(out: Path) -> Iterator[None]:
    """`hold` for a block, then `release`."""
    hold(out)
    try:
        yield
    finally:
        release()


def _acquire(path: Path) -> int:
    """The descriptor of the locked file. _Taken if another process has it; OSError where there are no locks."""
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
        if _is_file(path, descriptor):  # else its holder removed it between open and flock
            os.ftruncate(descriptor, 0)
            since = time.strftime("%Y-%m-%d %H:%M:%S")
            os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}, since {since}\n".encode())
            return descriptor
        os.close(descriptor)


def _is_file(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


# ---- scratch folders


@contextlib.contextmanager
def scratch_folder() -> Iterator[str]:
    """A temporary folder of this process; those of launchers that were killed are removed."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_SCRATCH}*"):
        with contextlib.suppress(OSError, _Taken):
            if folder.stat().st_uid == os.getuid() and (folder / NAME).is_file():
                os.close(_acquire(folder / NAME))
                shutil.rmtree(folder)
    with tempfile.TemporaryDirectory(prefix=_SCRATCH) as name:
        descriptor = None
        with contextlib.suppress(OSError, _Taken):  # without a lock it is not removed if this process is killed
            descriptor = _acquire(Path(name) / NAME)
        yield name
        if descriptor is not None:
            os.close(descriptor)
