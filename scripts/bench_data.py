"""Measure the speed of tokenizing text and of assembling samples, each beside the plain way to do it.

    python -m scripts.bench_data tokenize --source DIR --tokenizer DIR
    python -m scripts.bench_data samples --bert PREFIX --t5 PREFIX [--batch 8] [--seq-len 128]

The two sides alternate, so that drift of the machine affects both equally. Each line gives the median of --runs measurements
and the median ratio of the plain way's time to ours (above 1: ours is faster) with the least and the greatest.
tokenize:
  steady        data.build's pipeline, and one bare `encode_batch_fast` of tokenizers over the same documents
  whole process `python -m data.text`, and a script that loads the tokenizer and encodes the same files
samples, microseconds of processor time each:
  bert          samples with one segment and with pairs, and transformers' DataCollatorForLanguageModeling, in numpy and in
                torch, by token and by whole word. It is given chunks that were cut before; ours are read and cut here
  t5            span corruption, and the collator of transformers' run_t5_mlm_flax.py, given chunks that were cut before
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common.command_line import Parser
from common.data import fast_bpe, tokenizer as tokenizers
from common.data.indexed_dataset import IndexedDataset, IndexedDatasetWriter
from common.errors import BadInput, exit_cleanly
from data.build import _Pipeline
from data.sources import Errors, Files
from recipes.bert import samples as bert_samples
from recipes.t5 import samples as t5_samples

CHUNKS = 64  # samples per measurement
Collate = Callable[[range], object]
Clock = Callable[[], float]
ROOT = Path(__file__).resolve().parents[1]
BARE = """
import sys
from pathlib import Path
from tokenizers import Tokenizer
backend = Tokenizer.from_file(sys.argv[1])
texts = [Path(path).read_text(encoding="utf-8") for path in sys.argv[2:]]
ids = [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]
"""


class Ratio(NamedTuple):
    """Median seconds of ours and of the plain way, and the ratio of the latter to the former: least, median, greatest."""

    ours: float
    plain: float
    ratios: tuple[float, float, float]

    def __str__(self) -> str:
        least, median, greatest = self.ratios
        return f"ratio {median:5.2f} [{least:.2f} .. {greatest:.2f}]"


def seconds(work: Callable[[], object], clock: Clock) -> float:
    start = clock()
    work()
    return clock() - start


def in_turn(ours: Callable[[], object], plain: Callable[[], object], runs: int, clock: Clock = time.perf_counter) -> Ratio:
    """Alternating runs of both functions, after one warm-up run of each."""
    ours(), plain()
    a, b = zip(*((seconds(ours, clock), seconds(plain, clock)) for _ in range(runs)), strict=True)
    ratios = [y / x for x, y in zip(a, b, strict=True)]
    return Ratio(statistics.median(a), statistics.median(b), (min(ratios), statistics.median(ratios), max(ratios)))


# ---- tokenizing ------------------------------------------------------------------------------------------------------


def steady(tokenizer: tokenizers.Tokenizer, texts: list[str], folder: Path, runs: int) -> Ratio:
    def pipeline() -> None:
        writer = IndexedDatasetWriter(folder / "steady", tokenizers.token_dtype(tokenizer.size))
        pipe = _Pipeline(tokenizer, {"train": writer}, append_eod=True)
        for text in texts:
            pipe.add("train", text)
        pipe.flush()
        pipe.close()
        writer.finish()

    return in_turn(pipeline, lambda: tokenizer.backend.encode_batch_fast(texts, add_special_tokens=False), runs)


def whole(source: list[str], paths: list[Path], tokenizer: Path, folder: Path, runs: int) -> Ratio:
    def run(*command: str) -> None:
        subprocess.run([sys.executable, *command], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)

    build = ["-m", "data.text", str(folder / "whole"), "--source", *source, "--tokenizer", str(tokenizer), "--force"]
    bare = ["-c", BARE, str(tokenizer / "tokenizer.json"), *map(str, paths)]
    return in_turn(lambda: run(*build), lambda: run(*bare), runs)


def tokenize(args: argparse.Namespace) -> None:
    tokenizer = tokenizers.load(args.tokenizer)
    source = Files([Path(path).resolve() for path in args.source])
    texts = [document.text for document in source.documents(0, [], Errors("skip"))]
    mb = sum(len(text.encode()) for text in texts) / 1e6
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer.save(folder / "tokenizer")
        result = steady(tokenizer, texts, folder, args.runs)
        library = fast_bpe.Encoder(tokenizer).name
        print(f"steady ({library})  {mb / result.ours:6.2f} MB/s   plain {mb / result.plain:6.2f} MB/s   {result}")
        names = [str(Path(path).resolve()) for path in args.source]
        result = whole(names, [path for _, path in source.files], folder / "tokenizer", folder, args.runs)
        print(f"whole process        {result.ours:6.2f} s      plain {result.plain:6.2f} s      {result}")


# ---- samples ---------------------------------------------------------------------------------------------------------


def samples(args: argparse.Namespace) -> None:
    if args.bert:
        bert(args)
    if args.t5:
        t5(args)


def beside(args: argparse.Namespace, name: str, collate: Collate, plain: Collate) -> None:
    """One line: ours, which takes sample numbers, beside the plain way, which takes the numbers of chunks."""
    batches = [range(first, first + args.batch) for first in range(0, CHUNKS, args.batch)]
    # of this process alone: both sides compute on one thread
    clock = time.process_time
    result = in_turn(lambda: [collate(b) for b in batches], lambda: [plain(b) for b in batches], args.runs, clock)
    ours, other = (1e6 * total / CHUNKS for total in (result.ours, result.plain))
    print(f"{name:<46}  {ours:6.0f} us   plain {other:6.0f} us   {result}", flush=True)


def chunks_of(corpus: IndexedDataset, tokens: int) -> list[list[int]]:
    if corpus.tokens < CHUNKS * tokens:
        raise BadInput(f"{corpus.prefix}: {corpus.tokens:,} tokens; give a corpus of {CHUNKS * tokens:,} or more")
    return [corpus.flat[k * tokens : (k + 1) * tokens].tolist() for k in range(CHUNKS)]


def bert(args: argparse.Namespace) -> None:
    from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerFast

    corpus = IndexedDataset(args.bert)
    tokenizer = tokenizers.load(corpus.tokenizer_dir or "bert-base-uncased")
    special = bert_samples.special_ids(tokenizer, args.bert)
    tokens = {f"{role}_token": f"[{role.upper()}]" for role in ("cls", "sep", "mask", "pad", "unk")}
    words = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend, **tokens)
    edges = [1] + [0] * (args.seq_len - 2) + [1]
    examples = []
    for ids in chunks_of(corpus, args.seq_len - 2):
        row = [special.cls, *ids, special.sep]
        # where the tokens of a word touch, as the offsets of its characters do
        starts = (2 * np.arange(len(row)) - np.cumsum(special.continues[row])).tolist()
        offsets = [
            (start, start + 1 + int(special.continues[i])) for start, i in zip(starts, [*row[1:], special.sep], strict=True)
        ]
        examples.append(
            {"input_ids": row, "attention_mask": [1] * len(row), "special_tokens_mask": edges, "offset_mapping": offsets}
        )
    for masking, by_word in (("token", False), ("whole_word", True)):
        given = examples if by_word else [{k: v for k, v in e.items() if k != "offset_mapping"} for e in examples]
        for kind in ("np", "pt"):
            # by whole word, the collator only masks: it does not replace by other words
            shares = {"mask_replace_prob": 1.0, "random_replace_prob": 0.0} if by_word else {}
            collator = DataCollatorForLanguageModeling(words, whole_word_mask=by_word, return_tensors=kind, **shares)
            for pair in ("none", "nsp"):
                dataset = bert_samples.Samples(
                    args.bert, args.seq_len, special, pair=pair, masking=masking, masked_lm_prob=0.15, short_seq_prob=0.1,
                    seed=1234, shuffle=True,
                )  # fmt: skip
                name = f"bert, pair={pair}, {masking}; collator in {kind}"
                beside(args, name, dataset.collate, lambda b, c=collator, g=given: c([dict(g[k]) for k in b]))


def t5(args: argparse.Namespace) -> None:
    corpus = IndexedDataset(args.t5)
    tokenizer = tokenizers.load(corpus.tokenizer_dir or "t5")
    raw = t5_samples.raw_tokens(args.seq_len, 0.15, 3.0)
    target_len = t5_samples.lengths_of(raw, 0.15, 3.0)[1]
    sentinels, eos = tokenizer.sentinels(), tokenizer.eod_id or 0
    dataset = t5_samples.Samples(
        args.t5, args.seq_len, target_len, sentinels=sentinels, eos=eos, pad=0, kind="span", noise_density=0.15,
        mean_noise_span_length=3.0, pack=True, seed=1234, shuffle=True,
    )  # fmt: skip
    chunks = chunks_of(corpus, raw)
    plain = lambda b: plain_spans([chunks[k] for k in b], int(sentinels[0]), eos)  # noqa: E731
    beside(args, "t5, span corruption; collator in np", dataset.collate, plain)


def plain_spans(chunks: list[list[int]], first_sentinel: int, eos: int) -> dict[str, np.ndarray]:
    """FlaxDataCollatorForT5MLM of transformers (examples/flax/language-modeling/run_t5_mlm_flax.py), without padding."""
    ids = np.array(chunks)
    mask = np.array([_noise_mask(ids.shape[1]) for _ in chunks])
    hidden, shown = _sentinel_ids(mask, first_sentinel), _sentinel_ids(~mask, first_sentinel)
    return {"input_ids": _filtered(ids, hidden, eos), "labels": _filtered(ids, shown, eos)}


def _noise_mask(length: int) -> np.ndarray:
    noise = min(max(int(np.round(length * 0.15)), 1), length - 1)
    spans = max(int(np.round(noise / 3.0)), 1)

    def segmentation(items: int) -> np.ndarray:
        first_in_segment = np.pad(np.random.permutation(np.arange(items - 1) < spans - 1), [[1, 0]])
        return np.unique(np.cumsum(first_in_segment), return_counts=True)[1]

    lengths = np.reshape(np.stack([segmentation(length - noise), segmentation(noise)], 1), [spans * 2])
    starts = np.zeros(length, np.int8)
    starts[np.cumsum(lengths)[:-1]] = True
    return np.equal(np.cumsum(starts) % 2, 1)


def _sentinel_ids(mask: np.ndarray, first_sentinel: int) -> np.ndarray:
    mask = mask.astype(np.int8)
    starts = mask - np.roll(mask, 1, axis=-1) * mask
    starts[:, 0] = mask[:, 0]
    ids = np.where(starts != 0, np.cumsum(starts, axis=-1), starts)
    return np.where(ids != 0, first_sentinel + 1 - ids, 0) - (mask - starts)


def _filtered(ids: np.ndarray, sentinels: np.ndarray, eos: int) -> np.ndarray:
    full = np.where(sentinels != 0, sentinels, ids)
    kept = full[full >= 0].reshape((len(ids), -1))
    return np.concatenate([kept, np.full((len(ids), 1), eos, np.int32)], -1)


def main() -> None:
    p = Parser(prog="python -m scripts.bench_data", description=__doc__)
    commands = p.add_subparsers(required=True)
    text = commands.add_parser("tokenize", help="a corpus of texts")
    text.add_argument("--source", nargs="+", required=True, help="text files or folders")
    text.add_argument("--tokenizer", required=True, help="name or folder")
    text.add_argument("--runs", type=int, default=3)
    text.set_defaults(run=tokenize)
    drawn = commands.add_parser("samples", help="the samples of corpora that were built before")
    drawn.add_argument("--bert", help="prefix of a corpus in sentences, by WordPiece")
    drawn.add_argument("--t5", help="prefix of a corpus by SentencePiece")
    drawn.add_argument("--batch", type=int, default=8, help="samples per micro batch (default: %(default)s)")
    drawn.add_argument("--seq-len", type=int, default=128, help="tokens per sample (default: %(default)s)")
    drawn.add_argument("--runs", type=int, default=15)
    drawn.set_defaults(run=samples)
    args = p.parse_args()
    args.run(args)


if __name__ == "__main__":
    exit_cleanly(main)
