"""Checkpoints without a run: of this version, and of those that wrote a file for each parameter."""

import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import save

from common.checkpoints import checkpoint, pieces, sharded

Parameters = Mapping[str, Mapping[str, torch.Tensor]]  # parts by name


def write_step(folder: Path, meta: dict[str, Any], parameters: Parameters) -> Path:
    """OUT/step_N as one rank writes it."""
    tmp = folder.with_name(f"{folder.name}.tmp")
    tmp.mkdir(parents=True)
    held = [
        piece
        for name, parts in parameters.items()
        for part, tensor in parts.items()
        for piece in pieces.cut(pieces.whole(name, tensor.shape), part, tensor.reshape(-1))
    ]
    shapes = {name: tuple(parts["weight"].shape) for name, parts in parameters.items()}
    with mock.patch.object(sharded.integrity, "is_finite", lambda tensor: True):  # also what a run would not save
        written = sharded.write(tmp / "00000.safetensors", held)
    checkpoint.finish(tmp, folder, meta | sharded.index([[written]], shapes))
    return folder


def older_file(path: Path, parts: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Write the file of a parameter; returns its entry in state.json."""
    data = save({part: tensor.contiguous() for part, tensor in parts.items()})
    path.write_bytes(data)
    return {"bytes": len(data), "crc32": zlib.crc32(data), "shape": list(parts["weight"].shape)}


def write_older_step(folder: Path, meta: dict[str, Any], parameters: Parameters) -> Path:
    """OUT/step_N of an earlier version."""
    tmp = folder.with_name(f"{folder.name}.tmp")
    tmp.mkdir(parents=True)
    files = {name: older_file(tmp / f"{name}.safetensors", parts) for name, parts in parameters.items()}
    checkpoint.finish(tmp, folder, meta | {"files": files})
    return folder
