"""Check the size of the files that git tracks: at most 256 KiB per file and 8 MiB in all, so that a clone stays small.

python -m scripts.sizes

Large outputs belong in OUT, which git ignores; scripts/publish.py makes a small record of a run.
"""

import subprocess
import sys
from pathlib import Path

from common.command_line import Parser
from common.errors import BadInput, exit_cleanly

ROOT = Path(__file__).resolve().parent.parent
FILE_BYTES = 256 * 2**10
TOTAL_BYTES = 8 * 2**20


def main() -> int:
    Parser(prog="python -m scripts.sizes", description=__doc__).parse_args()
    sizes = tracked(ROOT)
    errors = problems(sizes)
    for error in errors:
        print(f"error: {error}", file=sys.stderr)
    print(f"{len(sizes):,} files, {sum(sizes.values()):,} bytes")
    return 1 if errors else 0


def tracked(root: Path) -> dict[str, int]:
    """{path: bytes} of the files in git's index, as they are in the working tree."""
    done = subprocess.run(["git", "ls-files", "-z"], cwd=root, capture_output=True, text=True)
    if done.returncode:
        raise BadInput(f"git ls-files: {done.stderr.strip()}")
    return {name: (root / name).lstat().st_size for name in done.stdout.split("\0") if name and (root / name).is_file()}


def problems(sizes: dict[str, int]) -> list[str]:
    large = [f"{name}: {size:,} bytes; at most {FILE_BYTES:,} per file" for name, size in sizes.items() if size > FILE_BYTES]
    total = sum(sizes.values())
    return large + ([f"{total:,} bytes in all; at most {TOTAL_BYTES:,}"] if total > TOTAL_BYTES else [])


if __name__ == "__main__":
    exit_cleanly(main)
