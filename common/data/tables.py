"""Tables of integers that are computed from the index of a corpus, once, by one process, and memory-mapped by all others.

A table is a file beside the corpus, PREFIX.NAME_KEY.table, or in the user's cache if that folder cannot be written to. KEY
stands for the content of the corpus and all parameters, so another corpus or parameter has another file. The ranks of a host
share its pages. A file that is deleted or damaged is computed again.
"""

import fcntl
import hashlib
import json
import os
import tempfile
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from common.data.indexed_dataset import IndexedDataset
from common.data.manifest import sha256
from common.launch import heartbeat

VERSION = 1  # of the tables: raise it if the same parameters give another table
LEAST_SEQUENCES = 2**20  # tables of smaller corpora are computed whenever they are opened: under a second, 16 MB
END = 4  # bytes: CRC-32 of what precedes it


def opened(
    corpus: IndexedDataset, name: str, parameters: dict[str, int | str], parts: Callable[[], Iterable[np.ndarray]]
) -> np.ndarray:
    """The table (n, 2) int64 that `parts` computes, one (k, 2) after the other, from the index of the corpus.

    Where no folder can be written to, every process computes its own.
    """
    path = _path(corpus, name, parameters) if corpus.sentences >= LEAST_SEQUENCES else None
    try:
        table = _stored(path, parts) if path else None
    except OSError:  # a full disk
        table = None
    return np.concatenate([np.empty((0, 2), np.int64), *parts()]) if table is None else table


def _stored(path: Path, parts: Callable[[], Iterable[np.ndarray]]) -> np.ndarray | None:
    """The table in a file, written by the first process that gets here."""
    table = _read(path)
    if table is None:
        with open(f"{path}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            table = _read(path)  # perhaps another process has written it since
            if table is None:
                _write(path, parts())
                table = _read(path)
            Path(lock.name).unlink(missing_ok=True)
    return table


def _path(corpus: IndexedDataset, name: str, parameters: dict[str, int | str]) -> Path | None:
    index = corpus.manifest["sha256"]["idx"] if corpus.manifest else sha256(f"{corpus.prefix}.idx")
    key = hashlib.sha256(json.dumps([VERSION, name, parameters, index], sort_keys=True).encode()).hexdigest()[:16]
    beside, cache = Path(corpus.prefix), Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "twinstack"
    for stem in (beside, cache / beside.name):
        path = stem.with_name(f"{stem.name}.{name}_{key}.table")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.is_file():
                return path
            with tempfile.TemporaryFile(dir=path.parent):
                return path
        except OSError:
            continue
    return None


def _read(path: Path) -> np.ndarray | None:
    """The table in a file; None if there is no such file, or if it is damaged."""
    try:
        stored = np.asarray(np.memmap(path, np.uint8, "r"))
    except (OSError, ValueError):  # ValueError: an empty file
        return None
    if len(stored) % 16 != END or stored[-END:].tobytes() != zlib.crc32(stored[:-END]).to_bytes(END, "little"):
        return None
    return stored[:-END].view("<i8").reshape(-1, 2)


def _write(path: Path, parts: Iterable[np.ndarray]) -> None:
    checksum = 0
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f"{path.name}.", delete=False) as file:
        try:
            for part in parts:
                heartbeat.beat("table")
                content = np.ascontiguousarray(part, "<i8")
                checksum = zlib.crc32(content, checksum)
                file.write(memoryview(content).cast("B") if len(content) else b"")
            file.write(checksum.to_bytes(END, "little"))
            file.flush()
            os.fsync(file.fileno())
            os.chmod(file.name, 0o644)  # a temporary file is its owner's alone
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise
