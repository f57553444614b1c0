"""The engine of data/: documents in, `train`, `valid` (and `test`) corpora with a tokenizer and a manifest out.

OUT receives train.{bin,idx,json}, valid.*, test.* (if a share was asked), tokenizer/ and, last, manifest.json. Work is
kept in OUT/.partial until it is whole, and saved there every PART_BYTES of text: the same command continues after an
interruption, and returns at once when OUT is finished.

Shares. Where a source brings splits of its own they are taken. Otherwise a document goes to the split that a hash of
(seed, its text) says, which depends on nothing else, so a document never moves when others are added. With few large
files (`--split-by auto`: whole files as documents, and less than 5 to be expected in a split) that would give poor
shares, and each file is cut instead: its last lines are `test`, the ones before it `valid`, the rest `train`.

A document is one sequence that ends in the end of document id, or with `--sentences` one sequence a sentence and no such id;
a pair (data/pairs.py) two sequences.
"""

import argparse
import fcntl
import hashlib
import json
import os
import shlex
import shutil
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from common.data import tokenizer as tokenizers, tokenizer_training
from common.data.indexed_dataset import FILES, IndexedDataset, IndexedDatasetWriter, write_manifest
from common.errors import BadInput
from common.json_files import write_json
from data import sentences
from data.sources import BETWEEN, JSON_MB, TEXT_MB, Document, Errors, Source

PIECE_CHARS = 4_000  # a long document is encoded in pieces of this size, which keeps all cores busy and caches warm
BATCH_CHARS = 2_000_000  # characters that one call of the tokenizer encodes
BATCHES_AHEAD = 3  # in work at once: while one is encoded (outside Python), another is read or written
PART_BYTES = 64 * 2**20  # text between two savings of the state
TRAINING_BYTES = 256 * 2**20  # a tokenizer is trained on this much text at most, the first of the train split
TRAINING_BYTES_SENTENCEPIECE = 64 * 2**20  # its trainer takes 45 bytes of memory for one of text, others a few
FEW_DOCUMENTS = 5  # fewer whole files than this expected in a split: cut files instead
MOST_MB = 1e12
MOST_IDS = 2_000_000  # of a tokenizer trained here: the trainers reserve memory for as many, and abort where they get none
MOST_WORKERS = 1024  # threads that the tokenizer starts
FAMILIES = {"bpe": "BPE", "wordpiece": "WordPiece", "sentencepiece": "SentencePiece"}  # of a tokenizer trained here

Cut = list[tuple[str, str]]  # (split, text) of each part a document is cut into
Splitter = Callable[[str, bytes], Cut]  # text, and the same as UTF-8


@dataclass
class Options:
    """What to make, and how. All but `out`, `workers`, `on_error`, `max_document_mb`, `force` and
    `command` decides the content."""

    out: Path
    corpus: str  # name of the module
    tokenizer: str | None = None  # name or folder; 'char': the characters of this text; None: train one of vocab_size
    vocab_size: int = 4096
    tokenizer_type: str = "bpe"  # of the one that is trained; or wordpiece, sentencepiece
    sentences: bool = False  # one sequence a sentence, not one a document
    pairs: bool = False  # two sequences a document, input and target
    shares: dict[str, float] = field(default_factory=dict)  # of valid and test, in documents or in characters
    split_by: str = "auto"
    seed: int = 1234
    append_eod: bool = True
    max_mb: float | None = None  # at most so much text from each part of the source, 10^6 bytes
    max_document_mb: float | None = None  # longer ones are errors; None: as data/sources.py has it
    on_error: str = "stop"
    workers: int | None = None  # processor cores; None: all
    force: bool = False
    command: str = ""


# ---- the command line -----------------------------------------------------------------------------------------------


def parser(
    doc: str,
    *,
    valid_share: float | None,
    tokenizer: str | None = None,
    vocab_size: int | None = None,
    tokenizer_type: str = "bpe",
    sentences: bool | None = False,
) -> argparse.ArgumentParser:
    """The options every corpus has. doc: the module's docstring. The others are defaults: tokenizer, vocab_size if there is
    one; valid_share None where the corpus has splits of its own; sentences None where that is no question."""
    title, _, rest = (doc or "").strip().partition("\n")
    p = argparse.ArgumentParser(
        prog=f"python -m data.{Path(sys.argv[0]).stem}",
        description=title,
        epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("out", metavar="OUT", type=Path, help="folder to fill, such as corpora/NAME")
    words = p.add_mutually_exclusive_group(required=tokenizer is None and vocab_size is None)
    default = f" (default: {tokenizer})" if tokenizer else ""
    told = "gpt2, bert-base-uncased, t5, char, or a folder with tokenizer.json" + default
    words.add_argument("--tokenizer", metavar="NAME_OR_DIR", help=told)
    default = f" (default: {vocab_size})" if vocab_size else ""
    words.add_argument("--vocab-size", metavar="N", type=int, help="train a tokenizer of N ids" + default)
    told = "of the tokenizer that is trained: byte-level BPE, BERT's WordPiece, uncased, or T5's SentencePiece"
    p.add_argument("--tokenizer-type", choices=tuple(FAMILIES), help=f"{told} (default: {tokenizer_type})")
    if sentences is not None:
        told = "keep the bounds of sentences, one sequence each: what BERT needs" + (" (default)" if sentences else "")
        p.add_argument("--sentences", action=argparse.BooleanOptionalAction, default=sentences, help=told)
    p.set_defaults(default_tokenizer=tokenizer, default_vocab_size=vocab_size, default_tokenizer_type=tokenizer_type)
    if valid_share is not None:
        p.add_argument("--valid-share", metavar="X", type=float, default=valid_share, help="default: %(default)s")
        p.add_argument("--test-share", metavar="X", type=float, default=0.0, help="default: none")
        told = "whole documents go to a split, or each file's tail does (default: tail for few large files)"
        p.add_argument("--split-by", choices=("auto", "document", "tail"), default="auto", help=told)
        p.add_argument("--seed", metavar="N", type=int, default=1234, help="of the shares (default: %(default)s)")
    p.add_argument("--max-mb", metavar="MB", type=float, help="take only the first MB of text")
    told = f"a longer document is an error (default: {TEXT_MB}, of a JSON line {JSON_MB})"
    p.add_argument("--max-document-mb", metavar="MB", type=float, help=told)
    told = "at input that cannot be read; skip counts it (default: stop)"
    p.add_argument("--on-error", choices=("stop", "skip"), default="stop", help=told)
    p.add_argument("--workers", metavar="N", type=int, help="processor cores to use (default: all)")
    p.add_argument("--force", action="store_true", help="replace what OUT holds")
    return p


def options(args: argparse.Namespace, corpus: str) -> Options:
    """Options from parsed arguments. BadInput for values out of range."""
    shares = {"valid": getattr(args, "valid_share", 0.0), "test": getattr(args, "test_share", 0.0)}
    problems = []
    if not (all(share >= 0 for share in shares.values()) and sum(shares.values()) < 1):  # nan is neither
        problems.append(f"--valid-share {shares['valid']} --test-share {shares['test']}: from 0 to below 1 together")
    if args.workers is not None and not 1 <= args.workers <= MOST_WORKERS:
        problems.append(f"--workers {args.workers}: from 1 to {MOST_WORKERS:,}")
    for name in ("max_mb", "max_document_mb"):
        value = getattr(args, name)
        if value is not None and not 0 < value < MOST_MB:
            problems.append(f"--{name.replace('_', '-')} {value}: above 0, in 10^6 bytes")
    if not -(2**63) <= getattr(args, "seed", 0) < 2**63:
        problems.append(f"--seed {args.seed}: must fit 64 bits")
    if args.vocab_size is not None and not 1 <= args.vocab_size <= MOST_IDS:
        problems.append(f"--vocab-size {args.vocab_size}: from 1 to {MOST_IDS:,}")
    name, size, sentences = args.tokenizer, args.vocab_size, getattr(args, "sentences", False)
    if name is None and size is None:
        name, size = args.default_tokenizer, args.default_vocab_size
    if name is not None and args.tokenizer_type:
        problems.append(f"--tokenizer-type {args.tokenizer_type}: {name} is not trained; give --vocab-size N, or drop it")
    if problems:
        raise BadInput(problems)
    return Options(
        out=args.out,
        corpus=corpus,
        tokenizer=name,
        vocab_size=size or 0,
        tokenizer_type=args.tokenizer_type or args.default_tokenizer_type,
        sentences=sentences,
        shares={split: share for split, share in shares.items() if share},
        split_by=getattr(args, "split_by", "document"),
        seed=getattr(args, "seed", 0),
        append_eod=not sentences,
        max_mb=args.max_mb,
        max_document_mb=args.max_document_mb,
        on_error=args.on_error,
        workers=args.workers,
        force=args.force,
        command=f"python -m data.{corpus} {shlex.join(sys.argv[1:])}",
    )


# ---- the build ------------------------------------------------------------------------------------------------------


def build(opt: Options, source: Source, splitter: Splitter | None = None) -> dict[str, Any]:
    """Make the corpora of `source` in opt.out and return the content of manifest.json.

    splitter: how a document is cut into splits, if not by shares. BadInput for a folder that holds something else,
    input that cannot be read, a split that stays empty, a disk that is full.
    """
    if opt.workers is not None:
        os.environ["RAYON_NUM_THREADS"] = str(opt.workers)  # read by the tokenizer's thread pool when it first starts
    try:
        return _build(opt, source, splitter)
    except OSError as error:
        where = error.filename or opt.out
        raise BadInput(f"{where}: {error.strerror or error}; mend that, and the same command continues") from None


def _build(opt: Options, source: Source, splitter: Splitter | None) -> dict[str, Any]:
    partial = opt.out / ".partial"
    named = None if opt.tokenizer in (None, "char") else tokenizers.load(opt.tokenizer)
    request = _request(opt, source, named)
    done = _finished(opt, request)
    if done is not None:
        _report(opt.out, done, "already there")
        return done
    partial.mkdir(parents=True, exist_ok=True)
    with open(partial / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BadInput(f"{opt.out}: another process builds there; wait for it, or choose another OUT") from None
        state = _state(opt, partial, request)
        splitter = splitter or _splitter(opt, source)
        tokenizer = named or _own_tokenizer(opt, partial, source, splitter)
        if not (partial / "manifest.json").exists():
            if not state["encoded"]:
                _encode(opt, partial, source, splitter, tokenizer, state)
            _finish(opt, partial, source, tokenizer, state)
        done = _publish(opt.out, partial)
    _report(opt.out, done, "done")
    return done


def _request(opt: Options, source: Source, named: tokenizers.Tokenizer | None) -> dict[str, Any]:
    """All that decides the content, as JSON gives it back. Two builds with equal requests give equal files."""
    family = FAMILIES[opt.tokenizer_type]
    request = {
        "corpus": opt.corpus,
        "source": source.identity(),
        "tokenizer": named.hash if named else opt.tokenizer or f"{family} of {opt.vocab_size}",
        "shares": opt.shares,
        "split_by": opt.split_by,
        "seed": opt.seed,
        "append_eod": opt.append_eod,
        "max_mb": opt.max_mb,
    } | {name: True for name in ("sentences", "pairs") if getattr(opt, name)}  # no key else: manifests of before stay equal
    return json.loads(json.dumps(request))


def _finished(opt: Options, request: dict[str, Any]) -> dict[str, Any] | None:
    """The manifest of OUT if it holds this very corpus, None if it is free to use; BadInput if it holds another."""
    path = opt.out / "manifest.json"
    if opt.force or not opt.out.exists():
        return None
    if not opt.out.is_dir():
        raise BadInput(f"{opt.out}: is a file; choose another OUT")
    if not path.is_file():
        if any(entry.name != ".partial" for entry in opt.out.iterdir()) and not (opt.out / ".partial").exists():
            raise BadInput(f"{opt.out}: is not empty and holds no corpus; choose another OUT, or give --force")
        return None
    manifest = _read(path, _is_manifest, "not a manifest of a corpus; choose another OUT, or give --force")
    _same(manifest["request"], request, f"{opt.out}: holds another corpus", "--force replaces it")
    for split in manifest["splits"]:
        try:
            corpus = IndexedDataset(opt.out / split)
            corpus.verify(manifest["tokenizer_size"])
            if corpus.tokenizer_problems():
                raise BadInput(corpus.tokenizer_problems())
        except BadInput as error:
            raise BadInput([f"{line}; here: the same command with --force" for line in error.problems]) from None
    return manifest


def _read(path: Path, fits: Callable[[dict[str, Any]], bool], otherwise: str) -> dict[str, Any]:
    """The object in a JSON file of the builder. BadInput, which ends in `otherwise`, where it is none, or does not fit."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(values, dict) and fits(values):
            return values
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError):
        pass
    raise BadInput(f"{path}: {otherwise}") from None


def _are_counts(*values: Any) -> bool:
    return all(type(value) is int and 0 <= value < 2**63 for value in values)


def _is_manifest(values: dict[str, Any]) -> bool:
    splits = values["splits"]
    return (
        isinstance(values["request"], dict)
        and isinstance(splits, dict)
        and splits.keys() <= {"train", "valid", "test"}
        and all(_are_counts(split["tokens"], split["documents"], split.get("sentences", 0)) for split in splits.values())
        and _are_counts(values["tokenizer_size"], values["bytes_of_text"], *values["skipped"].values())
    )


def _is_state(values: dict[str, Any]) -> bool:
    return (
        isinstance(values["request"], dict)
        and isinstance(values["encoded"], bool)
        and isinstance(values["cursor"], list)
        and _are_counts(values["part"], values["bytes_in_part"], values["bytes"], *values["cursor"])
        and _are_counts(*values["skipped"].values())
        and all(_are_counts(*counts.values(), counts["documents"], counts["tokens"]) for counts in values["writers"].values())
    )


def _same(held: dict[str, Any], request: dict[str, Any], what: str, remedy: str) -> None:
    differ = [key for key in held | request if held.get(key) != request.get(key)]
    if differ:
        told = "; ".join(f"{key} was {_short(held.get(key))}, is {_short(request.get(key))}" for key in differ)
        raise BadInput(f"{what} ({told}); choose another OUT, or {remedy}")


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _state(opt: Options, partial: Path, request: dict[str, Any]) -> dict[str, Any]:
    """How far an earlier try of this command came, or the state of a beginning."""
    path = partial / "progress.json"
    state = None
    if path.is_file():
        try:
            state = _read(path, _is_state, "not the state of an interrupted build; choose another OUT, or --force drops it")
        except BadInput:
            if not opt.force:
                raise
    if state is not None:
        if state["request"] == request:
            _say(f"{opt.out}: continues at {state['bytes'] / 1e6:,.1f} MB")
            return state
        if state["bytes"] and not opt.force:
            _same(state["request"], request, f"{opt.out}: an interrupted build of another corpus", "--force drops it")
    for entry in partial.iterdir():
        if entry.name != "lock":
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    return {
        "request": request, "encoded": False, "part": 0, "cursor": [], "bytes_in_part": 0, "bytes": 0,
        "skipped": {}, "writers": {},
    }  # fmt: skip


def _own_tokenizer(opt: Options, partial: Path, source: Source, splitter: Splitter) -> tokenizers.Tokenizer:
    """Train the tokenizer on the text itself: characters on everything, else on train only. Kept for a continuation."""
    folder = partial / "tokenizer"
    if (folder / "tokenizer_config.json").is_file():
        return tokenizers.load(folder)
    _say("training the tokenizer")
    if opt.tokenizer == "char":
        characters: set[str] = set()
        for _, _, text in _texts(opt, source, splitter):
            characters.update(text)
        trained = tokenizer_training.train_char("".join(characters))
    else:
        train = {
            "bpe": tokenizer_training.train_bpe,
            "wordpiece": tokenizer_training.train_wordpiece,
            "sentencepiece": tokenizer_training.train_sentencepiece,
        }
        trained = train[opt.tokenizer_type](_for_training(opt, source, splitter), opt.vocab_size)
        if trained.size < opt.vocab_size:
            _say(f"the text gives {trained.size:,} ids of the {opt.vocab_size:,} asked for")
    trained.save(folder)
    return tokenizers.load(folder)


def _for_training(opt: Options, source: Source, splitter: Splitter) -> Iterator[str]:
    limit = TRAINING_BYTES_SENTENCEPIECE if opt.tokenizer_type == "sentencepiece" else TRAINING_BYTES
    used = 0
    for split, size, text in _texts(opt, source, splitter):
        if split == "train":
            yield text.replace(BETWEEN, "\n") if opt.pairs else text
            used += size
            if used >= limit:
                return


def _texts(opt: Options, source: Source, splitter: Splitter) -> Iterator[tuple[str, int, str]]:
    """(split, bytes, text) of everything, errors as in the build but not counted."""
    errors = Errors(opt.on_error)
    for part, split in enumerate(source.parts):
        for document, raw in _taken(opt, source, part, [], 0, errors):
            for name, text in [(split, document.text)] if split else splitter(document.text, raw):
                yield name, len(raw), text


def _taken(
    opt: Options, source: Source, part: int, cursor: list[int], used: int, errors: Errors
) -> Iterator[tuple[Document, bytes]]:
    """Documents of a part with something in them, and their UTF-8, up to --max-mb. used: bytes taken before."""
    for document in source.documents(part, cursor, errors):
        try:
            raw = document.text.encode()
        except UnicodeEncodeError:
            errors.bad(document.where, "half of a surrogate pair")
            continue
        if not raw or raw.isspace():
            errors.bad(document.where, "empty text")
            continue
        if opt.max_mb is not None and used + len(raw) > opt.max_mb * 1e6 and used:
            return
        used += len(raw)
        yield document, raw


# ---- shares ---------------------------------------------------------------------------------------------------------


def _splitter(opt: Options, source: Source) -> Splitter:
    how = opt.split_by
    if how == "auto":
        files = source.whole_files
        few = files is not None and any(files * share < FEW_DOCUMENTS for share in opt.shares.values())
        how = "tail" if few else "document"
    if not opt.shares:
        return lambda text, raw: [("train", text)]
    return by_tail(opt.shares) if how == "tail" else by_hash(opt.shares, opt.seed)


def by_hash(shares: dict[str, float], seed: int) -> Splitter:
    """Whole documents; the split is a pure function of (seed, text)."""
    key = seed.to_bytes(16, "little", signed=True)

    def split(text: str, raw: bytes) -> Cut:
        place = int.from_bytes(hashlib.blake2b(raw, digest_size=8, key=key).digest(), "little") / 2**64
        for name, share in shares.items():
            if place < share:
                return [(name, text)]
            place -= share
        return [("train", text)]

    return split


def by_tail(shares: dict[str, float]) -> Splitter:
    """Each document cut at ends of lines: train first, then valid, then test, by characters."""

    def split(text: str, raw: bytes) -> Cut:
        bounds, rest = [len(text)], 1.0
        for name in reversed(shares):
            rest -= shares[name]
            end_of_line = text.rfind("\n", 0, int(len(text) * rest)) + 1
            bounds.append(end_of_line or int(len(text) * rest))
        parts = list(zip(["train", *shares], zip([0, *bounds[:0:-1]], bounds[::-1], strict=True), strict=True))
        return [(name, text[start:end]) for name, (start, end) in parts if text[start:end].strip()]

    return split


# ---- encoding -------------------------------------------------------------------------------------------------------


def _encode_batch(
    tokenizer: tokenizers.Tokenizer, pieces: list[str], last: list[bool], eod_id: int | None, sequences: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Pieces of documents -> the arguments of IndexedDatasetWriter.append.

    last[k]: piece k ends its document. sequences: each piece is a sequence.
    """
    ids, lengths = tokenizer.encode_flat(pieces)
    ends = np.cumsum(lengths)
    if sequences:
        return ids, ends, np.flatnonzero(last) + 1
    ends = ends[np.array(last)]
    if eod_id is None:
        return ids, ends, None
    return np.insert(ids, ends, eod_id), ends + np.arange(1, len(ends) + 1), None


class _Pipeline:
    """Reads ahead while batches are encoded, and writes them in the order they came in."""

    def __init__(
        self, tokenizer: tokenizers.Tokenizer, writers: dict[str, IndexedDatasetWriter], append_eod: bool,
        cut: Callable[[str], list[str]] | None = None,
    ):  # fmt: skip
        """cut: a document into its sequences; None: it is one."""
        self.tokenizer, self.writers, self.cut = tokenizer, writers, cut
        self.eod_id = tokenizer.eod_id if append_eod else None
        self.pool = ThreadPoolExecutor(2)
        self.running: deque[tuple[str, Future]] = deque()
        self.waiting: dict[str, tuple[list[str], list[bool]]] = {split: ([], []) for split in writers}
        self.chars = dict.fromkeys(writers, 0)

    def add(self, split: str, text: str) -> None:
        """One whole document."""
        pieces, last = self.waiting[split]
        for piece in self.cut(text) if self.cut else self.tokenizer.pieces(text, PIECE_CHARS):
            pieces.append(piece)
            last.append(False)
            self.chars[split] += len(piece)
            if self.chars[split] >= BATCH_CHARS and len(pieces) > 1:
                self._submit(split, keep=1)  # the newest piece stays: whether it is the last is not known yet
                pieces, last = self.waiting[split]
        if last:  # else blanks alone, in a batch that has nothing yet: no sentence
            last[-1] = True

    def _submit(self, split: str, keep: int = 0) -> None:
        pieces, last = self.waiting[split]
        cut = len(pieces) - keep
        self.waiting[split] = (pieces[cut:], last[cut:])
        self.chars[split] = sum(map(len, pieces[cut:]))
        job = self.pool.submit(_encode_batch, self.tokenizer, pieces[:cut], last[:cut], self.eod_id, self.cut is not None)
        self.running.append((split, job))
        while len(self.running) > BATCHES_AHEAD:
            self._write_oldest()

    def _write_oldest(self) -> None:
        split, job = self.running.popleft()
        self.writers[split].append(*job.result())

    def flush(self) -> None:
        """Encode and write everything that was added."""
        for split, (pieces, _) in self.waiting.items():
            if pieces:
                self._submit(split)
        while self.running:
            self._write_oldest()

    def close(self) -> None:
        self.pool.shutdown(cancel_futures=True)


def _cut(opt: Options) -> Callable[[str], list[str]] | None:
    """How a document becomes several sequences; None: it is one."""
    if opt.pairs:
        return lambda text: text.split(BETWEEN)
    return sentences.split if opt.sentences else None


def _encode(
    opt: Options,
    partial: Path,
    source: Source,
    splitter: Splitter,
    tokenizer: tokenizers.Tokenizer,
    state: dict[str, Any],
) -> None:
    """Bring the state from where it is to `encoded`, saving it on the way."""
    dtype = tokenizers.token_dtype(tokenizer.size)
    names = ["train", *opt.shares] if None in source.parts else [part for part in source.parts if part]
    writers = {name: IndexedDatasetWriter(partial / name, dtype, state["writers"].get(name)) for name in names}
    errors = Errors(opt.on_error, state["skipped"])
    pipeline = _Pipeline(tokenizer, writers, opt.append_eod, _cut(opt))
    progress = _Progress(source.total_bytes, state["bytes"])

    def save() -> None:
        pipeline.flush()
        state["writers"] = {name: writer.sync() for name, writer in writers.items()}
        state["skipped"] = dict(sorted(errors.counts.items()))
        write_json(partial / "progress.json", state)

    try:
        saved = state["bytes"]
        if not state["writers"]:
            save()
        while state["part"] < len(source.parts):
            split = source.parts[state["part"]]
            for document, raw in _taken(opt, source, state["part"], state["cursor"], state["bytes_in_part"], errors):
                for name, text in [(split, document.text)] if split else splitter(document.text, raw):
                    pipeline.add(name, text)
                state["cursor"] = document.cursor
                state["bytes_in_part"] += len(raw)
                state["bytes"] += len(raw)
                progress.update(state["bytes"])
                if state["bytes"] - saved >= PART_BYTES:
                    save()
                    saved = state["bytes"]
            state.update(part=state["part"] + 1, cursor=[], bytes_in_part=0)
        state["encoded"] = True
        save()
    finally:
        pipeline.close()
        progress.close()
        for writer in writers.values():
            writer.close()


# ---- the end --------------------------------------------------------------------------------------------------------


def _finish(opt: Options, partial: Path, source: Source, tokenizer: tokenizers.Tokenizer, state: dict[str, Any]) -> None:
    """Everything of OUT in .partial, whole: corpora, their manifests, the tokenizer, manifest.json."""
    empty = [name for name, counts in state["writers"].items() if not counts["documents"]]
    if empty:
        documents = sum(counts["documents"] for counts in state["writers"].values())
        shutil.rmtree(partial)
        smaller = "" if opt.pairs else ", smaller documents (--split-documents) or --split-by tail"
        raise BadInput(
            f"no document fell into {' and '.join(empty)} ({documents:,} documents, shares {opt.shares}); "
            f"give more text, larger shares (--valid-share, --test-share){smaller}"
            + "".join(f"; skipped: {count:,} x {kind}" for kind, count in state["skipped"].items())
        )
    tokenizer.save(partial / "tokenizer")
    names = source.names()
    facts = {
        "eod_id": tokenizer.eod_id if opt.append_eod else None,
        "tokenizer": "tokenizer",
        "tokenizer_hash": tokenizer.hash,
        "tokenizer_size": tokenizer.size,
        "command": opt.command,
        "skipped": state["skipped"],
        "sources": len(names),
        "source_names": names[:20],
    }
    splits = {}
    for name, counts in state["writers"].items():
        if not (partial / f"{name}.idx").exists():  # else interrupted behind it
            IndexedDatasetWriter(partial / name, tokenizers.token_dtype(tokenizer.size), counts).finish()
        told = {"sentences": counts["sequences"]} if _cut(opt) else {}
        splits[name] = write_manifest(partial / name, facts | told)
    counted = ["tokens", "documents", *(["sentences"] if _cut(opt) else [])]
    manifest = (
        {
            "corpus": opt.corpus,
            **{key: sum(split[key] for split in splits.values()) for key in counted},
            "bytes_of_text": state["bytes"],
            "splits": {name: {key: m[key] for key in (*counted, "sha256")} for name, m in splits.items()},
        }
        | facts
        | {"source_names": names, "request": state["request"]}
    )
    write_json(partial / "manifest.json", manifest)


def _publish(out: Path, partial: Path) -> dict[str, Any]:
    """Move what .partial holds to OUT, manifest.json last: with it OUT is finished."""
    remedy = f"delete {partial} and repeat the command"
    manifest = _read(partial / "manifest.json", _is_manifest, f"not a manifest of a corpus; {remedy}")
    (out / "manifest.json").unlink(missing_ok=True)
    for split in ("train", "valid", "test"):
        if split not in manifest["splits"]:
            for suffix in FILES:  # of a corpus that is being replaced
                (out / (split + suffix)).unlink(missing_ok=True)
    moves = [f"{split}{suffix}" for split in manifest["splits"] for suffix in FILES]
    for name in moves:
        if (partial / name).exists():  # else moved before an interruption
            os.replace(partial / name, out / name)
    if (partial / "tokenizer").exists():
        shutil.rmtree(out / "tokenizer", ignore_errors=True)
        os.replace(partial / "tokenizer", out / "tokenizer")
    os.replace(partial / "manifest.json", out / "manifest.json")
    shutil.rmtree(partial)
    return manifest


# ---- what is shown --------------------------------------------------------------------------------------------------


def _say(line: str) -> None:
    print(line, flush=True)


def _report(out: Path, manifest: dict[str, Any], how: str) -> None:
    for name, split in manifest["splits"].items():
        kept = f"  {split['sentences']:>12,} sentences" if "sentences" in split else ""
        _say(f"{out / name!s:<28}  {split['tokens']:>14,} tokens  {split['documents']:>11,} documents{kept}")
    for kind, count in manifest["skipped"].items():
        _say(f"skipped: {count:,} x {kind}")
    text = f"{manifest['bytes_of_text'] / 1e6:,.1f} MB of text"
    _say(f"{how}: {out} ({text}, tokenizer of {manifest['tokenizer_size']:,} ids)")


class _Progress:
    """A bar on a terminal, else a line every 10 s. In 10^6 bytes of text read and encoded, and per second."""

    def __init__(self, total: int | None, done: int):
        self.total, self.first, self.done = total, done, done
        self.start = self.shown = time.monotonic()
        self.bar = None
        if sys.stdout.isatty():
            self._start_bar()

    def _start_bar(self) -> None:
        try:
            from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn
        except ImportError:
            return  # plain lines do
        columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        self.bar = Progress(*columns, transient=True)
        self.task = self.bar.add_task("", total=self.total, completed=self.done)
        self.bar.start()

    def update(self, done: int) -> None:
        self.done = done
        now = time.monotonic()
        if now - self.shown < (0.2 if self.bar else 10):
            return
        self.shown = now
        if self.bar:
            self.bar.update(self.task, completed=done)
        else:
            share = f"  {done / self.total:4.0%}" if self.total else ""
            _say(f"{done / 1e6:>10,.0f} MB  {(done - self.first) / 1e6 / (now - self.start):.1f} MB/s{share}")

    def close(self) -> None:
        if self.bar:
            self.bar.stop()
        seconds = time.monotonic() - self.start
        if seconds > 1 and self.done > self.first:
            mb = (self.done - self.first) / 1e6
            _say(f"encoded {mb:,.1f} MB at {mb / seconds:.1f} MB/s")
