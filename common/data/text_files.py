"""Reads text files and JSON lines: UTF-8, without a byte order mark."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common.errors import BadInput


def read_text(path: Path) -> str:
    """The text of a file, with its line ends as stored. BadInput if it cannot be read or is not UTF-8."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadInput(f"{path}: not UTF-8 (byte {error.start:,})") from None
    except OSError as error:
        raise BadInput(f"{path}: cannot be read: {error.strerror or error}") from None


def json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """(FILE:LINE, value) of each line that is not blank. BadInput for a line that is not JSON."""
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            try:
                yield f"{path}:{number}", json.loads(line)
            except (ValueError, RecursionError) as error:
                raise BadInput(f"{path}:{number}: is not JSON ({error}); each line must be one whole object") from None
