"""A run's training state, by Hugging Face name: any layout of any stack can write and read it (invariants 6, 7).

    OUT/step_N/state.json            the index, written last; step_N.tmp is renamed to step_N when all is on disk
    OUT/step_N/RANK.safetensors      what this rank held, fp32: `weight` (the master), `exp_avg`, `exp_avg_sq` (or the state of
                                     another optimizer) of parameters or rectangles of them (common/checkpoints/sharded.py)

Each rank writes and reads its share. The order of the data and all random states are functions of (seed, step), so that of
them only the step is saved.
"""

import json
import os
import re
import shutil
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from common.checkpoints import integrity, pieces
from common.checkpoints.parameters import Shapes
from common.checkpoints.pieces import Batches
from common.errors import EXIT_NOT_FINITE, BadInput
from common.json_files import is_count, read_object
from common.launch import heartbeat

if TYPE_CHECKING:
    import torch

PARTS = ("weight", "exp_avg", "exp_avg_sq")
FORMAT = 2  # of state.json: an index of pieces
DAMAGED = "damaged.txt"  # in a step whose bytes were found changed: which


class Checkpoint(NamedTuple):
    """A finished step_N on disk."""

    path: Path
    meta: dict[str, Any]  # state.json: what state.meta has, and what common/checkpoints/sharded.py lists

    @property
    def step(self) -> int:
        return self.meta["step"]

    def read(self, name: str, parts: Iterable[str] | None = None) -> "dict[str, torch.Tensor]":
        """The parts of one parameter (default: all), whole, as fp32 CPU tensors; BadInput if the bytes are not those written,
        or if a value is NaN or infinite."""
        if not self.is_sharded:
            return _read_file(self, name, parts)
        from common.checkpoints import sharded

        return sharded.read_whole(self, name, parts)

    @property
    def is_sharded(self) -> bool:
        """Has it an index of pieces (common/checkpoints/sharded.py)? Earlier versions wrote one file per parameter."""
        return "pieces" in self.meta

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """Those of the run that wrote it, {section.key: value}, under the names that the keys had then."""
        return _hyperparameters(self.meta)

    def names(self) -> list[str]:
        return list(self.shapes())

    def shapes(self) -> Shapes:
        """Full shape by name, as state.json records them."""
        if self.is_sharded:
            return {name: parts["weight"] for name, parts in self.meta["parameters"].items()}
        return {name: file["shape"] for name, file in self.meta["files"].items()}


Report = Callable[..., None]  # (step, save_ms=..., saved_ms=...): how long training waited, and when all was on disk


def save(
    out: Path, batches: Batches, shapes: Shapes, meta: dict[str, Any], keep: int, report: Report = lambda *_, **__: None,
    in_background: bool = False,
) -> Path:  # fmt: skip
    """Write one step; every rank calls this with the pieces that it holds.

    shapes: the parameters that are trained; BadInput, and nothing saved, unless all ranks together hold each of them.
    in_background: return once the pieces are copied to host memory, and write them while the training goes on. One save at a
    time: the next one waits, and raises the faults of this one.

    A process killed at any moment leaves the previous steps whole: what is not finished is named step_N.tmp. NaN or infinity
    in a parameter or its optimizer state ends the run (exit code 3), and nothing is saved.
    """
    import torch.distributed as dist

    from common.checkpoints import sharded

    wait()
    begun = time.perf_counter()
    step, final, tmp = meta["step"], out / f"step_{meta['step']}", out / f"step_{meta['step']}.tmp"

    def begin() -> None:
        shutil.rmtree(tmp, ignore_errors=True)
        try:
            tmp.mkdir()  # not OUT itself: where its disk is gone, it must not appear on another
        except OSError as error:
            raise BadInput(sharded.disk_error(tmp, "be created", error)) from None

    def complete(index: dict[str, Any]) -> None:
        try:
            finish(tmp, final, meta | index)
        except OSError as error:
            raise BadInput(sharded.disk_error(final, "be finished", error)) from None
        _remove_old(out, step, keep)

    writer = sharded.Writer(tmp, dist.get_rank(), shapes, begin, complete)
    if in_background:
        global _pending
        _pending = _Pending(sharded.save_in_background(writer, batches), step, begun, tmp, report)
        report(step, save_ms=(time.perf_counter() - begun) * 1e3)
        return final
    with _undone_on_failure(step, tmp):
        sharded.save(writer, batches)
    heartbeat.beat("saved")
    passed = (time.perf_counter() - begun) * 1e3
    report(step, save_ms=passed, saved_ms=passed)
    return final


class _Pending(NamedTuple):
    """A save in the background."""

    written: Any  # common.checkpoints.sharded.Background
    step: int
    begun: float
    tmp: Path
    report: Report

    def tell(self) -> None:
        self.report(self.step, saved_ms=(self.written.ended - self.begun) * 1e3)


_pending: _Pending | None = None


def poll() -> None:
    """Report a save in the background that has succeeded. It raises nothing: the ranks would not raise at the same time."""
    global _pending
    if _pending is not None and _pending.written.has_succeeded():
        _pending.tell()
        _pending = None


def wait() -> None:
    """Wait for a save in the background, and raise its fault on all ranks."""
    global _pending
    if _pending is None:
        return
    pending, _pending = _pending, None
    with _undone_on_failure(pending.step, pending.tmp):
        pending.written.wait()
    heartbeat.beat("saved")
    pending.tell()


def forget() -> None:
    """Leave a save in the background unfinished: the run ends, and its other ranks may not."""
    global _pending
    _pending = None


@contextmanager
def _undone_on_failure(step: int, tmp: Path) -> Iterator[None]:
    """Remove what a save has left that failed, and end the run if a value was not finite."""
    import torch.distributed as dist

    from common.checkpoints import sharded
    from common.launch.processes import Stopped

    try:
        yield
    except Exception as fault:
        if dist.get_rank() == 0:
            shutil.rmtree(tmp, ignore_errors=True)
        if not isinstance(fault, sharded.NotFinite):
            raise
        line = f"{fault} is NaN or infinite after step {step}: stopped, nothing saved"
        raise Stopped(EXIT_NOT_FINITE, f"error: {line}; the last checkpoint is as it was") from None


def _remove_old(out: Path, step: int, keep: int) -> None:
    """Leave the last `keep` steps up to `step`. Later ones are damaged: the run came to this step without them."""
    steps = finished(out)
    upto = [path for path in steps if int(path.name[5:]) <= step]
    for path in {*steps, *out.glob("step_*.tmp")} - set(upto[-keep:]):
        shutil.rmtree(path, ignore_errors=True)


def _read_file(saved: Checkpoint, name: str, parts: Iterable[str] | None) -> "dict[str, torch.Tensor]":
    """Checkpoint.read where each parameter has a file."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    path = saved.path / f"{name}.safetensors"
    entry = saved.meta["files"].get(name)
    if entry is None:
        raise BadInput(f"{saved.path}: holds no parameter {name}; it is a checkpoint of another model")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror}); does another run write into {saved.path.parent}?") from None
    if zlib.crc32(data) != entry["crc32"]:
        raise BadInput(f"{path}: its bytes have changed since it was written; remove {saved.path} to use the one before")
    try:
        stored = load(data)
    except SafetensorError as error:
        raise BadInput(f"{path}: is no safetensors file ({error}); remove {saved.path} to use the one before") from None
    read = {part: stored[part] for part in parts or stored}
    for part, tensor in read.items():
        if not integrity.is_finite(tensor):
            raise BadInput(
                f"{path}: its {part} holds NaN or infinite values, the training had diverged by step {saved.step}; remove "
                f"{saved.path} to continue from the step before, or begin in another OUT with a lower optim.lr"
            )
    return read


def finish(tmp: Path, final: Path, meta: dict[str, Any]) -> None:
    with open(tmp / "state.json", "w", encoding="utf-8") as file:
        json.dump(integrity.seal(meta), file, separators=(",", ":"))
        file.flush()
        os.fsync(file.fileno())
    integrity.replace_folder(tmp, final)  # `final` is there only if it was damaged, so that latest() has skipped it
    folder = os.open(final.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename itself
    finally:
        os.close(folder)


def finished(out: Path) -> list[Path]:
    """Checkpoint folders of a run, oldest first."""
    steps = [p for p in out.glob("step_*") if re.fullmatch(r"step_[0-9]+", p.name) and p.is_dir()]
    return sorted(steps, key=lambda p: int(p.name[5:]))


def latest(out: Path, notes: list[str] | None = None) -> Checkpoint | None:
    """The newest whole checkpoint. Adds damaged ones, which are skipped, to `notes`. BadInput if all are damaged."""
    problems: list[str] = []
    for path in reversed(finished(out)):
        newest = opened(path)
        if isinstance(newest, Checkpoint):
            if notes is not None:
                notes += [f"{problem}; continuing from {path}" for problem in problems]
            return newest
        problems.append(newest)
    if problems:
        raise BadInput([*problems, f"{out}: no whole checkpoint is left; restore one, or choose another OUT"])
    return None


def opened(path: Path) -> Checkpoint | str:
    """The checkpoint, or what is wrong with it."""
    marker = path / DAMAGED
    if marker.is_file():
        return f"{marker.read_text(encoding='utf-8', errors='replace').strip()[:1000]} (delete {marker} once it is restored)"
    record = path / "state.json"
    if not record.exists():
        return f"{record} is missing"
    meta = read_object(record)
    if meta is None or not _is_meta(meta):
        return f"{record} is not readable"
    if not integrity.is_whole(meta):
        return f"{record} has other contents than were written"
    problem = pieces.index_problem(meta) if "pieces" in meta else None
    if problem:
        return f"{record} is no index of a state: {problem}"
    if path.name != f"step_{meta['step']}":
        return f"{record} is of step {meta['step']}"
    for name, entry in meta["files"].items():
        file = path / (name if "pieces" in meta else f"{name}.safetensors")
        try:
            size = file.stat().st_size
        except FileNotFoundError:
            return f"{file} is missing"
        except (OSError, ValueError):
            return f"{file} is not readable"
        if size != entry["bytes"]:
            return f"{file} has {size} of {entry['bytes']} bytes"
    return Checkpoint(path, meta)


def _hyperparameters(meta: dict[str, Any]) -> Any:
    return meta.get("hyperparameters", meta.get("science", {}))  # `science`: the key of earlier versions


def _is_meta(meta: dict[str, Any]) -> bool:
    """Do the values of a state.json have the types that its readers rely on?"""
    files, layout = meta.get("files"), meta.get("layout", {"world": 1})  # step_0 of an import has no layout
    if "pieces" in meta:  # its checksum, which it has then, proves the pieces themselves
        is_index = meta.get("format") == FORMAT and {"crc32", "hyperparameters"} <= meta.keys()
        entries = {"bytes", "crc32", "header"}
    else:
        is_index, entries = True, {"bytes", "crc32"}
    return (
        is_index
        and is_count(meta.get("step"))
        and is_count(meta.get("samples", 0))
        and isinstance(files, dict)
        and all(isinstance(entry, dict) for entry in files.values())
        and all(is_count(entry.get(key)) for entry in files.values() for key in entries)
        and ("pieces" in meta or all(isinstance(entry.get("shape"), list) for entry in files.values()))
        and all(is_count(size) for entry in files.values() for size in entry.get("shape", []))
        and not any(os.sep in name for name in files)
        and isinstance(layout, dict)
        and is_count(layout.get("world"))
        and isinstance(_hyperparameters(meta), dict)
        and isinstance(meta.get("stack", ""), str)
    )
