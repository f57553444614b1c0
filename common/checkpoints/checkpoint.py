"""A run's training state, by Hugging Face name: any layout of any stack can write and read it (invariants 6, 7).

    OUT/step_N/state.json            written last; step_N.tmp is renamed to step_N when all is on disk
    OUT/step_N/NAME.safetensors      one per parameter, fp32: `weight` (the master), `exp_avg`, `exp_avg_sq` (or the state of
                                     another optimizer)

With one file per parameter no process holds more than one whole parameter, each rank writes its share, and any tool can read
a value by name. The order of the data and all random states are functions of (seed, step), so that of them only the step is
saved.
"""

import json
import os
import re
import shutil
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from common import screen
from common.checkpoints import integrity, parameters
from common.checkpoints.parameters import Shapes
from common.errors import EXIT_BAD_INPUT, EXIT_NOT_FINITE, BadInput
from common.json_files import is_count, read_object
from common.launch import heartbeat

if TYPE_CHECKING:
    import torch

PARTS = ("weight", "exp_avg", "exp_avg_sq")
Entry = tuple[str, "dict[str, torch.Tensor] | None"]  # name and parts on the rank that writes them, None on the others


class Checkpoint(NamedTuple):
    """A finished step_N on disk."""

    path: Path
    meta: dict[str, Any]  # step, samples, seed, stack, layout, hyperparameters, files: {name: {bytes, crc32, shape}}, crc32

    @property
    def step(self) -> int:
        return self.meta["step"]

    def read(self, name: str, parts: Iterable[str] | None = None) -> "dict[str, torch.Tensor]":
        """The parts of one parameter (default: all) as fp32 CPU tensors; BadInput if the bytes are not those written, or if
        a value is NaN or infinite."""
        from safetensors.torch import load

        path = self.path / f"{name}.safetensors"
        entry = self.meta["files"].get(name)
        if entry is None:
            raise BadInput(f"{self.path}: holds no parameter {name}; it is a checkpoint of another model")
        try:
            data = path.read_bytes()
        except OSError as error:
            raise BadInput(
                f"{path}: cannot be read ({error.strerror}); does another run write into {self.path.parent}?"
            ) from None
        if zlib.crc32(data) != entry["crc32"]:
            raise BadInput(f"{path}: its bytes have changed since it was written; remove {self.path} to use the one before")
        stored = load(data)
        read = {part: stored[part] for part in parts or stored}
        for part, tensor in read.items():
            if not integrity.is_finite(tensor):
                raise BadInput(
                    f"{path}: its {part} holds NaN or infinite values, the training had diverged by step {self.step}; remove "
                    f"{self.path} to continue from the step before, or begin in another OUT with a lower optim.lr"
                )
        return read

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """Those of the run that wrote it, {section.key: value}, under the names that the keys had then."""
        return _hyperparameters(self.meta)

    def names(self) -> list[str]:
        return list(self.meta["files"])

    def shapes(self) -> Shapes:
        """Full shape by name, as state.json records them."""
        return {name: file["shape"] for name, file in self.meta["files"].items()}


def save(out: Path, entries: Iterator[Entry], shapes: Shapes, meta: dict[str, Any], keep: int) -> Path:
    """Write one step; every rank calls this with the same sequence of names (the entries may hold collectives).

    shapes: the parameters that are trained; BadInput, and nothing saved, unless all ranks together wrote each of them once.
    A process killed at any moment leaves the previous steps whole: what is not finished is named step_N.tmp. NaN or infinity
    in a parameter or its optimizer state ends the run (exit code 3), and nothing is saved.
    """
    import torch.distributed as dist

    from common.launch.processes import Stopped

    final = out / f"step_{meta['step']}"
    tmp = out / f"step_{meta['step']}.tmp"
    first = dist.get_rank() == 0
    written: dict[str, Any] = {}
    fault: tuple[int, str] | None = None  # exit code, line
    if first:
        shutil.rmtree(tmp, ignore_errors=True)
        try:
            tmp.mkdir(parents=True)
        except OSError as error:
            fault = EXIT_BAD_INPUT, _disk_error(tmp, "be created", error)
    dist.barrier()
    with screen.progress("saving", len(shapes), "parameters", first) as report:
        for number, (name, parts) in enumerate(entries, 1):
            heartbeat.beat("saving")
            if parts is not None and fault is None:
                try:  # a fault is raised once all ranks are through the collectives
                    if all(map(integrity.is_finite, parts.values())):
                        written[name] = _write(tmp / f"{name}.safetensors", parts)
                    else:
                        fault = EXIT_NOT_FINITE, f"{name} is NaN or infinite after step {meta['step']}: stopped, nothing saved"
                except OSError as error:
                    fault = EXIT_BAD_INPUT, _disk_error(tmp / f"{name}.safetensors", "be written", error)
            report(number)
    heartbeat.wait("save")
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, (written, fault))
    faults = [f for _, f in gathered if f]
    if first and not faults:
        files = {name: info for part, _ in gathered for name, info in part.items()}
        writers = Counter(name for part, _ in gathered for name in part)
        problems = [f"{name} was written by {count} ranks" for name, count in writers.items() if count > 1]
        problems += parameters.differences({name: info["shape"] for name, info in files.items()}, shapes)
        faults = [(EXIT_BAD_INPUT, f"{final}: {problem}; nothing was saved") for problem in problems]
    if first and not faults:
        try:
            _finish(tmp, final, meta | {"files": dict(sorted(files.items()))})
        except OSError as error:
            faults = [(EXIT_BAD_INPUT, _disk_error(final, "be finished", error))]
    agreed = [faults]
    dist.broadcast_object_list(agreed)
    heartbeat.beat("saved")
    if agreed[0]:
        if first:
            shutil.rmtree(tmp, ignore_errors=True)
        code, line = min(agreed[0])
        if code == EXIT_NOT_FINITE:
            raise Stopped(code, f"error: {line}; the last checkpoint is as it was")
        raise BadInput(line)
    if first:
        _remove_old(out, meta["step"], keep)
    return final


def _disk_error(path: Path, what: str, error: OSError) -> str:
    return f"{path}: cannot {what}: {error.strerror or error}; the steps saved before are whole"


def _remove_old(out: Path, step: int, keep: int) -> None:
    """Leave the last `keep` steps up to `step`. Later ones are damaged: the run came to this step without them."""
    steps = finished(out)
    upto = [path for path in steps if int(path.name[5:]) <= step]
    for path in {*steps, *out.glob("step_*.tmp")} - set(upto[-keep:]):
        shutil.rmtree(path, ignore_errors=True)


def _write(path: Path, parts: "dict[str, torch.Tensor]") -> dict[str, Any]:
    from safetensors.torch import save as to_bytes

    data = to_bytes({k: v.contiguous() for k, v in parts.items()})
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": len(data), "crc32": zlib.crc32(data), "shape": list(parts["weight"].shape)}


def _finish(tmp: Path, final: Path, meta: dict[str, Any]) -> None:
    with open(tmp / "state.json", "w", encoding="utf-8") as file:
        json.dump(integrity.seal(meta), file, indent=1)
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
        newest = _open(path)
        if isinstance(newest, Checkpoint):
            if notes is not None:
                notes += [f"{problem}; continuing from {path}" for problem in problems]
            return newest
        problems.append(newest)
    if problems:
        raise BadInput([*problems, f"{out}: no whole checkpoint is left; restore one, or choose another OUT"])
    return None


def _open(path: Path) -> Checkpoint | str:
    """The checkpoint, or what is wrong with it."""
    record = path / "state.json"
    if not record.exists():
        return f"{record} is missing"
    meta = read_object(record)
    if meta is None or not _is_meta(meta):
        return f"{record} is not readable"
    if not integrity.is_whole(meta):
        return f"{record} has other contents than were written"
    if path.name != f"step_{meta['step']}":
        return f"{record} is of step {meta['step']}"
    for name, entry in meta["files"].items():
        file = path / f"{name}.safetensors"
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
    return (
        is_count(meta.get("step"))
        and isinstance(files, dict)
        and all(isinstance(entry, dict) for entry in files.values())
        and all(is_count(entry.get(key)) for entry in files.values() for key in ("bytes", "crc32"))
        and all(isinstance(entry.get("shape"), list) for entry in files.values())
        and all(is_count(size) for entry in files.values() for size in entry["shape"])
        and not any(os.sep in name for name in files)
        and isinstance(layout, dict)
        and is_count(layout.get("world"))
        and isinstance(_hyperparameters(meta), dict)
        and isinstance(meta.get("stack", ""), str)
    )
