"""Resolves the paths of a config or command line: relative to the current folder, else to the repository's root."""

import difflib
import os
from pathlib import Path
from typing import Any

from common.errors import BadInput

ROOT = Path(__file__).resolve().parent.parent
NAME_BYTES = 255 - len(".crc32")  # limit on a file's name, before an ending is added to it (NAME_MAX is 255)
PATH_BYTES = 4000  # limit on a path, before an ending is added to it (PATH_MAX is 4096)
SHOWN = 60  # characters that a message shows of a path that is too long

Blend = str | Path | list[Any]
"""A prefix, a list of prefixes, or a list of [weight, prefix]."""


def find(path: str) -> Path:
    """The path itself if it exists relative to the current folder, or does not exist at all; else its place under the
    repository's root. BadInput for a path that is too long."""
    longest = max(len(part.encode(errors="replace")) for part in path.split("/"))
    if longest > NAME_BYTES or len(path) > PATH_BYTES:
        what = f"a name in it has {longest:,} bytes; at most {NAME_BYTES}"
        if longest <= NAME_BYTES:
            what = f"has {len(path):,} bytes; at most {PATH_BYTES:,}"
        raise BadInput(f"{path[:SHOWN]}...: {what}")

    def exists(place: Path) -> bool:
        return any(os.path.exists(f"{place}{suffix}") for suffix in ("", ".bin", ".idx"))  # False for a name too long

    return ROOT / path if exists(ROOT / path) and not exists(Path(path)) else Path(path)


def near(path: str | Path, suffix: str) -> str:
    """' did you mean out/tiny?' if the first part of `path` that does not exist resembles a name beside it, with which the
    path, and `suffix` behind it, exists; else ''."""
    path = Path(path)
    missing = next((part for part in [*reversed(path.parents), path] if not os.path.exists(part)), path)
    try:
        names = {name for entry in missing.parent.iterdir() for name in (entry.name, entry.name.removesuffix(suffix))}
    except OSError:
        return ""
    for name in difflib.get_close_matches(missing.name, sorted(names)):
        other = missing.parent / name / path.relative_to(missing)
        if os.path.exists(f"{other}{suffix}"):
            return f" did you mean {other}?"
    return ""


def find_blend(blend: Blend) -> Blend:
    """The blend of data.train with each of its paths as `find` gives it."""
    if isinstance(blend, str | Path):
        return str(find(str(blend)))
    return [[entry[0], str(find(entry[1]))] if isinstance(entry, list) else str(find(entry)) for entry in blend]


def prefixes(blend: Blend) -> list[str]:
    """The prefixes of a blend, without their weights."""
    if isinstance(blend, str | Path):
        return [str(blend)]
    return [entry if isinstance(entry, str) else entry[1] for entry in blend]


def first_prefix(blend: Blend) -> str:
    """The first prefix of a blend."""
    return prefixes(blend)[0]
