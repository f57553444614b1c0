"""The manifest of an indexed dataset (PREFIX.json), and the checksums of its blocks (PREFIX.crc32)."""

import hashlib
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import BadInput

BLOCK = 2**14
"""Bytes of a file per checksum. A sample reads one or two blocks, and the kernel reads that much ahead in any case. CRC-32 of a
block takes 13 us (zlib, 1.3 GB/s) and finds every change of up to 32 adjacent bits."""

MANIFEST_BYTES = 2**24  # limit; a manifest has a few thousand


def _is_count(value: Any, least: int = 0) -> bool:
    return type(value) is int and least <= value < 2**63


def _is_digest(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def _are_digests(value: Any) -> bool:
    return isinstance(value, dict) and value.keys() == {"bin", "idx"} and all(map(_is_digest, value.values()))


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and "\0" not in value


_REQUIRED: dict[str, Callable[[Any], bool]] = {
    "eod_id": lambda value: value is None or _is_count(value),
    "tokenizer": lambda value: value is None or _is_text(value),
    "tokenizer_hash": lambda value: value is None or _is_text(value),
    "tokenizer_size": lambda value: value is None or _is_count(value),
    "max_token_id": lambda value: _is_count(value, -1),
    "sha256": _are_digests,
    "fingerprint": _are_digests,
}
_OPTIONAL: dict[str, Callable[[Any], bool]] = {
    "tokens": _is_count,
    "documents": _is_count,
    "sentences": _is_count,
    "dtype": _is_text,
    "checksum": _is_digest,
    "blocks": lambda value: (
        isinstance(value, dict) and value.keys() == {"bytes", "crc32"} and all(map(_is_count, value.values()))
    ),
}


def read_manifest(prefix: str) -> dict[str, Any]:
    """Content of PREFIX.json; {} if there is no such file. BadInput, which names the key, for invalid content."""
    path = prefix + ".json"
    remedy = "build or copy the corpus again; without this file it is read as one of Megatron's own tool, its tokenizer unknown"
    if os.path.exists(path) and not os.path.isfile(path):
        raise BadInput(f"{path}: not a file; {remedy}")
    try:
        with open(path, "rb") as file:
            raw = file.read(MANIFEST_BYTES + 1)
        manifest = json.loads(raw) if len(raw) <= MANIFEST_BYTES else None
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError):
        raise BadInput(f"{path}: not a manifest (no JSON object); {remedy}") from None
    if not isinstance(manifest, dict):
        raise BadInput(f"{path}: not a manifest (no JSON object); {remedy}")
    together = ("blocks", "checksum") if manifest.keys() & {"blocks", "checksum"} else ()  # earlier versions wrote neither
    missing = [name for name in (*_REQUIRED, *together) if name not in manifest]
    wrong = [name for name, valid in (_REQUIRED | _OPTIONAL).items() if name in manifest and not valid(manifest[name])]
    if missing or wrong:
        faults = [f"{what}: {', '.join(names)}" for what, names in (("missing", missing), ("not valid", wrong)) if names]
        raise BadInput(f"{path}: not a manifest ({'; '.join(faults)}); {remedy}")
    if manifest["eod_id"] is not None and manifest["eod_id"] >= (manifest["tokenizer_size"] or 2**63):
        raise BadInput(f"{path}: its eod_id {manifest['eod_id']} is not below its tokenizer_size; {remedy}")
    if "checksum" in manifest and manifest["checksum"] != checksum(manifest):
        raise BadInput(f"{path}: has changed since it was written (its checksum differs); {remedy}")
    return manifest


def checksum(manifest: dict[str, Any]) -> str:
    """sha256 (hex) of a manifest's content without the key `checksum`."""
    content = {key: value for key, value in manifest.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def crc32(checksums: np.ndarray) -> int:
    """CRC-32 of an array of checksums, as the manifest records it."""
    return zlib.crc32(np.ascontiguousarray(checksums))


def write_checksums(prefix: str) -> int:
    """Write PREFIX.crc32: the CRC-32 of each block of .bin, then of .idx, uint32. Returns the CRC-32 of that file."""
    part = f"{prefix}.crc32.part"
    values = (value for suffix in ("bin", "idx") for value in block_checksums(f"{prefix}.{suffix}"))
    checksums = np.fromiter(values, "<u4")
    with open(part, "wb") as file:
        file.write(checksums.tobytes())
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, f"{prefix}.crc32")
    return crc32(checksums)


def block_checksums(path: str) -> Iterator[int]:
    """CRC-32 of each block of a file."""
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            yield zlib.crc32(block)


def fingerprint(path: str | Path, blocks: int = 16, block_size: int = 65_536) -> str:
    """sha256 (hex) of a file's size and of `blocks` blocks of `block_size` bytes, spread over it with both ends included."""
    size = os.path.getsize(path)
    digest = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        for k in range(blocks if size > blocks * block_size else 1):
            file.seek(k * (size - block_size) // (blocks - 1) if size > blocks * block_size else 0)
            digest.update(file.read(block_size if size > blocks * block_size else size))
    return digest.hexdigest()


def sha256(path: str) -> str:
    """sha256 (hex) of a whole file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
