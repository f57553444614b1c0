"""Compare corpora on disk, whole, with the checksums that their builder wrote: every byte of .bin and .idx is read.

PREFIX is as in a config (corpora/NAME/train), or a folder, of which every corpus is taken. Checked are the index, the
checksum of each block (PREFIX.crc32), the sha256 of both files and the largest id (PREFIX.json), and the tokenizer's folder. A
corpus by Megatron's own tool has no checksums: its index and the ids alone are checked.

    python -m data.verify corpora/books
    python -m data.verify corpora/books/train corpora/books/valid

Exit code: 0 whole, 2 damaged; what is damaged stands on stderr, a line each. Training verifies a block when it first reads it.
"""

import argparse
import hashlib
import os
import sys
import time
import zlib
from collections.abc import Sequence
from pathlib import Path

from common.data.indexed_dataset import IndexedDataset, largest_id
from common.data.manifest import BLOCK
from common.errors import BadInput, exit_cleanly

AT_ONCE = 64 * BLOCK  # bytes
SHOWN = 5  # damaged blocks of a file that are named
EVERY = 10.0  # seconds between two lines of progress


def corpora_in(given: str) -> list[str]:
    """The prefixes of a folder's corpora, or the prefix itself."""
    if not os.path.isdir(given):
        return [given]
    found = sorted({str(path.with_suffix("")) for suffix in (".idx", ".bin") for path in Path(given).glob(f"*{suffix}")})
    if not found:
        raise BadInput(f"{given}: no corpus in this folder (no .bin, .idx)")
    return found


def problems_of(corpus: IndexedDataset) -> list[str]:
    """What differs from the manifest of a corpus that could be opened."""
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
            for begin in range(0, len(chunk), BLOCK) if expected is not None else ():
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
        return "index and ids sound; no manifest, so nothing to compare the contents with"
    return "whole: sha256" + (", checksums of blocks" if corpus.checksums("bin") is not None else "")


def main(argv: Sequence[str] | None = None) -> None:
    title, _, rest = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        prog="python -m data.verify", description=title, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("prefixes", metavar="PREFIX", nargs="+", help="of a corpus, or a folder of corpora")
    problems: list[str] = []
    for prefix in [prefix for given in parser.parse_args(argv).prefixes for prefix in corpora_in(given)]:
        try:
            corpus = IndexedDataset(prefix)
            found = problems_of(corpus)
        except BadInput as error:
            found = error.problems
        except OSError as error:
            found = [f"{error.filename or prefix}: cannot be read ({error.strerror})"]
        problems += found
        if not found:
            print(f"{prefix}  {corpus.tokens:,} tokens  {_checked_by(corpus)}", flush=True)
    sys.stdout.flush()
    if problems:
        raise BadInput(problems)


if __name__ == "__main__":
    exit_cleanly(main)
