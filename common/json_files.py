"""Small JSON files: read an object, or write one whole."""

import json
import os
from pathlib import Path
from typing import Any


def read_object(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file; None if the file cannot be read or holds something else."""
    try:
        if not path.is_file():  # reading a pipe would wait for its writer
            return None
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return values if isinstance(values, dict) else None


def write_json(path: str | Path, values: Any) -> None:
    """Write a JSON file; a reader sees the old file or the new one, never half of it."""
    part = f"{path}.part"
    with open(part, "w", encoding="utf-8") as file:
        file.write(json.dumps(values, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def is_count(value: Any) -> bool:
    """Is the value a whole number from 0 to 2^63 - 1? JSON's true and false are not."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63
