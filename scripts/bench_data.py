"""Measure the speed of tokenizing text, compared with the bare tokenizer, and of reading batches.

    python -m scripts.bench_data --source DIR --tokenizer DIR

Prints medians of --runs measurements. The two sides alternate, so that drift of the machine affects both equally:
  steady        MB/s of data.build's pipeline, and of one bare `encode_batch_fast` over the same documents
  whole process seconds of `python -m data.text`, and of a script that loads the tokenizer and encodes the same files
  reading       microseconds of `Samples.collate` for a batch of 8 x 257 tokens

Goals: steady within 1.3 x, whole process within 1.5 x.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from common.data import tokenizer as tokenizers
from common.data.indexed_dataset import IndexedDatasetWriter
from data.build import _Pipeline
from data.sources import Errors, Files
from recipes.gpt.samples import Samples

ROOT = Path(__file__).resolve().parents[1]
BARE = """
import sys
from pathlib import Path
from tokenizers import Tokenizer
backend = Tokenizer.from_file(sys.argv[1])
texts = [Path(path).read_text(encoding="utf-8") for path in sys.argv[2:]]
ids = [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]
"""


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def in_turn(work: Callable[[], object], bare: Callable[[], object], runs: int) -> tuple[float, float, float]:
    """Median seconds of each function, and the median ratio, over alternating runs after one warm-up run of each."""
    work(), bare()
    pairs = [(seconds(work), seconds(bare)) for _ in range(runs)]
    a, b = zip(*pairs, strict=True)
    return statistics.median(a), statistics.median(b), statistics.median(x / y for x, y in pairs)


def steady(tokenizer: tokenizers.Tokenizer, texts: list[str], folder: Path, runs: int) -> tuple[float, float, float]:
    def pipeline() -> None:
        writer = IndexedDatasetWriter(folder / "steady", tokenizers.token_dtype(tokenizer.size))
        pipe = _Pipeline(tokenizer, {"train": writer}, append_eod=True)
        for text in texts:
            pipe.add("train", text)
        pipe.flush()
        pipe.close()
        writer.finish()

    return in_turn(pipeline, lambda: tokenizer.backend.encode_batch_fast(texts, add_special_tokens=False), runs)


def whole(source: list[str], paths: list[Path], tokenizer: Path, folder: Path, runs: int) -> tuple[float, float, float]:
    def run(*command: str) -> None:
        subprocess.run([sys.executable, *command], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)

    build = ["-m", "data.text", str(folder / "whole"), "--source", *source, "--tokenizer", str(tokenizer), "--force"]
    bare = ["-c", BARE, str(tokenizer / "tokenizer.json"), *map(str, paths)]
    return in_turn(lambda: run(*build), lambda: run(*bare), runs)


def reading(prefix: Path, batches: int = 500) -> float:
    """Seconds per batch."""
    dataset = Samples(prefix, 256)
    dataset.collate(range(8))
    return seconds(lambda: [dataset.collate(range(8 * k, 8 * k + 8)) for k in range(batches)]) / batches


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--source", nargs="+", required=True, help="text files or folders")
    p.add_argument("--tokenizer", required=True, help="name or folder")
    p.add_argument("--runs", type=int, default=3)
    args = p.parse_args()
    tokenizer = tokenizers.load(args.tokenizer)
    source = Files([Path(path).resolve() for path in args.source])
    texts = [document.text for document in source.documents(0, [], Errors("skip"))]
    mb = sum(len(text.encode()) for text in texts) / 1e6
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer.save(folder / "tokenizer")
        pipeline, bare, ratio = steady(tokenizer, texts, folder, args.runs)
        print(f"steady         {mb / pipeline:6.2f} MB/s   bare {mb / bare:6.2f} MB/s   time ratio {ratio:.2f}")
        names = [str(Path(path).resolve()) for path in args.source]
        build, bare, ratio = whole(names, [path for _, path in source.files], folder / "tokenizer", folder, args.runs)
        print(f"whole process  {build:6.2f} s      bare {bare:6.2f} s      time ratio {ratio:.2f}")
        print(f"reading        {reading(folder / 'whole' / 'train') * 1e6:6.0f} us per batch of 8 x 257 tokens")


if __name__ == "__main__":
    main()
