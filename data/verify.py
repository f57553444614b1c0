"""Verify every byte of corpora on disk against their checksums.

PREFIX is as in a config (corpora/NAME/train), or a folder, which stands for
every corpus in it. Checked are the index, the checksum of each block
(PREFIX.crc32), the sha256 of both files, the largest id (PREFIX.json) and the
tokenizer's folder. A corpus of Megatron's own tool has no checksums, so only
its index and ids are checked. Training verifies each block when it first reads
the block.

    python -m data.verify corpora/books
    python -m data.verify corpora/books/train corpora/books/valid

Exit code 0: all corpora are intact. 2: some are damaged; stderr has one line
per damage.
"""

import hashlib
import os
import sys
import time
import zlib
from collections.abc import Sequence
from pathlib import Path

from common.command_line import Parser
from common.data.indexed_dataset import IndexedDataset, largest_id
from common.data.manifest import BLOCK
from common.errors import BadInput, exit_cleanly

AT_ONCE = 64 * BLOCK  # bytes per read
SHOWN = 5  # damaged blocks that are named per file
EVERY = 10.0  # seconds between two lines of progress


def corpora_in(path: str) -> list[str]:
    """The prefixes of a folder's corpora, or the prefix itself."""
    if not os.path.isdir(path):
        return [path]
    prefixes = sorted({str(file.with_suffix("")) for suffix in (".idx", ".bin") for file in Path(path).glob(f"*{suffix}")})
    if not prefixes:
        raise BadInput(f"{path}: no corpus in this folder (no .bin, .idx)")
    return prefixes


def problems_of(corpus: IndexedDataset) -> list[str]:
    """What is damaged in a corpus that could be opened."""
    problems = [problem for suffix in ("bin", "idx") for problem in _file_problems(corpus, suffix)]
    if not problems:
        largest = largest_id(corpus)
        if largest != corpus.max_token_id:
            problems.append(f"{corpus.prefix}.json: max_token_id is {corpus.max_token_id:,}, the largest id is {largest:,}")
    return problems + corpus.tokenizer_problems()


def _file_problems(corpus: IndexedDataset, suffix: str) -> list[str]:
    path, expected = f"{corpus.prefix}.{suffix}", corpus.checksums(suffix)
    size, done, shown = os.path.getsize(path), 0, time.monotonic()
    digest, damaged = hashlib.sha256(), []
    with open(path, "rb") as file:
        while chunk := file.read(AT_ONCE):
            digest.update(chunk)
            if expected is not None:
                for begin in range(0, len(chunk), BLOCK):
                    block = (done + begin) // BLOCK
                    if zlib.crc32(memoryview(chunk)[begin : begin + BLOCK]) != expected[block]:
                        damaged.append(block)
            done += len(chunk)
            if time.monotonic() - shown > EVERY:
                shown = time.monotonic()
                print(f"{path}  {done / 1e6:,.0f} of {size / 1e6:,.0f} MB", flush=True)
    problems = [corpus.damage(suffix, block) for block in damaged[:SHOWN]]
    if len(damaged) > SHOWN:
        problems.append(f"{path}: {len(damaged) - SHOWN:,} more blocks are damaged, {len(damaged):,} in all")
    known = corpus.manifest.get("sha256", {}).get(suffix)
    if not problems and known not in (None, digest.hexdigest()):
        problems.append(f"{path} is not the file that {corpus.prefix}.json describes; build or copy all files again")
    return problems


def _checked_by(corpus: IndexedDataset) -> str:
    if not corpus.manifest:
        return "index and ids valid; no manifest, so no checksums to compare with"
    return "intact: sha256" + (", checksums of blocks" if corpus.checksums("bin") is not None else "")


def main(argv: Sequence[str] | None = None) -> None:
    title, _, rest = (__doc__ or "").partition("\n")
    parser = Parser(prog="python -m data.verify", description=title, epilog=rest)
    parser.add_argument("prefixes", metavar="PREFIX", nargs="+", help="prefix of a corpus, or a folder of corpora")
    problems: list[str] = []
    for prefix in [prefix for path in parser.parse_args(argv).prefixes for prefix in corpora_in(path)]:
        try:
            corpus = IndexedDataset(prefix)
            new = problems_of(corpus)
        except BadInput as error:
            new = error.problems
        except OSError as error:
            new = [f"{error.filename or prefix}: cannot be read ({error.strerror})"]
        problems += new
        if not new:
            print(f"{prefix}  {corpus.tokens:,} tokens  {_checked_by(corpus)}", flush=True)
    sys.stdout.flush()
    if problems:
        raise BadInput(problems)


if __name__ == "__main__":
    exit_cleanly(main)
