"""A run's training state, by Hugging Face name: any layout of any stack writes it, any reads it (laws 6 and 7).

    OUT/step_N/state.json            written last; step_N.tmp is renamed to step_N when all is on disk
    OUT/step_N/NAME.safetensors      one a parameter, fp32: `weight` (the master), `exp_avg`, `exp_avg_sq`

One file a parameter means that no process ever holds more than one whole parameter, that each rank writes its share, and
that any tool reads a value by name. The order of the data and all random states are functions of (seed, step): the step is
all there is to keep of them.
"""

import json
import os
import shutil
import sys
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from common.errors import BadInput

if TYPE_CHECKING:
    import torch

PARTS = ("weight", "exp_avg", "exp_avg_sq")
Entry = tuple[str, "dict[str, torch.Tensor] | None"]  # name and parts on the rank that writes them, None on the others


class Checkpoint(NamedTuple):
    """A finished step_N on disk."""

    path: Path
    meta: dict[str, Any]  # step, samples, seed, stack, layout, science, files: {name: {bytes, crc32, shape}}

    @property
    def step(self) -> int:
        return self.meta["step"]

    def read(self, name: str, parts: Iterable[str] = PARTS) -> "dict[str, torch.Tensor]":
        """The parts of one parameter as fp32 CPU tensors; BadInput if the bytes are not those that were written."""
        from safetensors.torch import load

        path = self.path / f"{name}.safetensors"
        known = self.meta["files"].get(name)
        if known is None:
            raise BadInput(f"{self.path}: holds no parameter {name}; it is a checkpoint of another model")
        data = path.read_bytes()
        if zlib.crc32(data) != known["crc32"]:
            raise BadInput(f"{path}: its bytes have changed since it was written; remove {self.path} to use the one before")
        stored = load(data)
        return {part: stored[part] for part in parts}

    def names(self) -> list[str]:
        return list(self.meta["files"])


def save(out: Path, entries: Iterator[Entry], meta: dict[str, Any], keep: int) -> Path:
    """Write one step; every rank calls this with the same sequence of names (the entries may hold collectives).

    A process killed at any moment leaves the previous steps whole: what is not finished is named step_N.tmp.
    """
    import torch.distributed as dist

    final = out / f"step_{meta['step']}"
    tmp = out / f"step_{meta['step']}.tmp"
    first = dist.get_rank() == 0
    if first:
        shutil.rmtree(tmp, ignore_errors=True)
        tmp.mkdir(parents=True)
    dist.barrier()
    written, fault = {}, None
    for name, parts in entries:
        if parts is not None and fault is None:
            try:
                written[name] = _write(tmp / f"{name}.safetensors", parts)
            except OSError as error:  # told once all ranks are through the collectives
                fault = f"{tmp}: cannot write {name}: {error.strerror or error}; the steps saved before are whole"
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, (written, fault))
    faults = [f for _, f in gathered if f]
    if faults:
        if first:
            shutil.rmtree(tmp, ignore_errors=True)
        raise BadInput(faults[0])
    if first:
        files = {name: info for part, _ in gathered for name, info in part.items()}
        _finish(tmp, final, meta | {"files": dict(sorted(files.items()))})
        for old in finished(out)[:-keep]:
            shutil.rmtree(old, ignore_errors=True)
    dist.barrier()
    return final


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
        json.dump(meta, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    shutil.rmtree(final, ignore_errors=True)  # there only if it was damaged: latest() had passed it over
    os.rename(tmp, final)
    folder = os.open(final.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename itself
    finally:
        os.close(folder)


def finished(out: Path) -> list[Path]:
    """Checkpoint folders of a run, oldest first."""
    found = [p for p in out.glob("step_*") if p.name[5:].isdigit() and p.is_dir()]
    return sorted(found, key=lambda p: int(p.name[5:]))


def latest(out: Path) -> Checkpoint | None:
    """The newest whole checkpoint; says which damaged ones it passes over. BadInput if there are only damaged ones."""
    problems = []
    for path in reversed(finished(out)):
        found = _open(path)
        if isinstance(found, Checkpoint):
            for problem in problems:
                print(f"{problem}; continuing from {path}", file=sys.stderr)
            return found
        problems.append(found)
    if problems:
        raise BadInput([*problems, f"{out}: no whole checkpoint is left; restore one, or choose another OUT"])
    return None


def _open(path: Path) -> Checkpoint | str:
    """The checkpoint, or what is wrong with it."""
    try:
        meta = json.loads((path / "state.json").read_text(encoding="utf-8"))
        files = meta["files"].items()
    except FileNotFoundError:
        return f"{path / 'state.json'} is missing"
    except (ValueError, KeyError, AttributeError):
        return f"{path / 'state.json'} is not readable"
    for name, known in files:
        file = path / f"{name}.safetensors"
        if not file.is_file():
            return f"{file} is missing"
        if file.stat().st_size != known["bytes"]:
            return f"{file} has {file.stat().st_size} of {known['bytes']} bytes"
    return Checkpoint(path, meta)
