"""Builds the corpora `train`, `valid` and `test`, their tokenizer and their manifest from the documents of a source.

OUT receives train.{bin,idx,json,crc32}, valid.*, test.* (with --test-share), tokenizer/ and finally manifest.json. Unfinished
work is in OUT/.partial, where the state is saved every PART_BYTES of text. So the same command continues after an interruption,
and returns at once if OUT is finished.

Shares. If a source has splits, they are taken. Otherwise a hash of (seed, text) determines the split of a document. The hash
depends on nothing else, so a document stays in its split when others are added. Few large files (`--split-by auto`: whole files
as documents, and fewer than FEW_DOCUMENTS expected in a split) would give poor shares. Then each file is cut instead: its last
lines are `test`, those before them `valid`, the rest `train`.

A document is one sequence that ends in the end of document id, or with `--sentences` one sequence per sentence without that id.
A pair (data/pairs.py) is two sequences.
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
from typing import TYPE_CHECKING, Any

import numpy as np

from common.command_line import Parser
from common.data import fast_bpe, tokenizer as tokenizers, tokenizer_training
from common.data.indexed_dataset import FILES, IndexedDataset, IndexedDatasetWriter, write_manifest
from common.errors import BadInput
from common.json_files import write_json
from data import sentences
from data.sources import BETWEEN, JSON_MB, TEXT_MB, Document, Errors, Source

if TYPE_CHECKING:
    from rich.progress import Progress

PIECE_CHARS = 4_000  # long documents are encoded in pieces of this size, which keeps all cores busy and caches warm
BATCH_CHARS = 2_000_000  # characters per call of the tokenizer
BATCHES_AHEAD = 3  # batches in flight: while one is encoded (outside Python), another is read or written
PART_BYTES = 64 * 2**20  # bytes of text between two saved states
TRAINING_BYTES = 256 * 2**20  # a tokenizer is trained on at most the first so many bytes of the train split
TRAINING_BYTES_SENTENCEPIECE = 64 * 2**20  # its trainer needs 45 bytes of memory per byte of text, others a few
FEW_DOCUMENTS = 5  # if fewer whole files are expected in a split, files are cut instead
MAX_MB = 1e12
MAX_IDS = 2_000_000  # of a tokenizer trained here: the trainers allocate memory for as many, and abort if that fails
MAX_WORKERS = 1024  # threads that the tokenizer starts
SMALL_VALID = 64 * 64  # tokens: the 64 samples of 64 tokens with which the tiny configs are evaluated
FAMILIES = {"bpe": "BPE", "wordpiece": "WordPiece", "sentencepiece": "SentencePiece"}  # of a tokenizer trained here

EncodedBatch = tuple[np.ndarray, np.ndarray, np.ndarray | None]  # arguments of IndexedDatasetWriter.append
Cut = list[tuple[str, str]]  # (split, text) of each part a document is cut into
Splitter = Callable[[str, bytes], Cut]  # text, and the same as UTF-8


@dataclass
class Options:
    """What to build, and how. All fields but `out`, `workers`, `on_error`, `max_document_mb`, `force` and `command` affect the
    content."""

    out: Path
    corpus: str  # name of the module
    tokenizer: str | None = None  # name or folder; 'char': the characters of the text; None: train one with vocab_size ids
    vocab_size: int = 4096
    tokenizer_type: str = "bpe"  # of a trained tokenizer: bpe, wordpiece or sentencepiece
    sentences: bool = False  # one sequence per sentence, not one per document
    pairs: bool = False  # two sequences per document, input and target
    shares: dict[str, float] = field(default_factory=dict)  # of valid and test, of the documents or characters
    split_by: str = "auto"
    seed: int = 1234
    append_eod: bool = True
    max_mb: float | None = None  # limit on the text of each part of the source, 10^6 bytes
    max_document_mb: float | None = None  # longer documents are errors; None: the defaults of data/sources.py
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
    """The options of every corpus. doc: the module's docstring. The other parameters are defaults. valid_share: None if the
    source has splits. sentences: None if the option does not apply."""
    title, _, rest = (doc or "").strip().partition("\n")
    p = Parser(
        prog=f"python -m data.{Path(sys.argv[0]).stem}",
        description=title,
        epilog=rest,
    )
    p.add_argument("out", metavar="OUT", type=Path, help="folder to fill, such as corpora/NAME")
    group = p.add_mutually_exclusive_group(required=tokenizer is None and vocab_size is None)
    text = "gpt2, bert-base-uncased, t5, char, or a folder with tokenizer.json"
    group.add_argument("--tokenizer", metavar="NAME_OR_DIR", help=text + (f" (default: {tokenizer})" if tokenizer else ""))
    text = "train a tokenizer of N ids"
    group.add_argument("--vocab-size", metavar="N", type=int, help=text + (f" (default: {vocab_size})" if vocab_size else ""))
    text = "type of the trained tokenizer: bpe (byte-level), wordpiece (BERT, uncased) or sentencepiece (T5)"
    p.add_argument("--tokenizer-type", metavar="TYPE", choices=tuple(FAMILIES), help=f"{text} (default: {tokenizer_type})")
    if sentences is not None:
        text = "one sequence per sentence, as BERT needs" + (" (default)" if sentences else "")
        p.add_argument("--sentences", action=argparse.BooleanOptionalAction, default=sentences, help=text)
    p.set_defaults(default_tokenizer=tokenizer, default_vocab_size=vocab_size, default_tokenizer_type=tokenizer_type)
    if valid_share is not None:
        p.add_argument(
            "--valid-share", metavar="X", type=float, default=valid_share, help="share of valid (default: %(default)s)"
        )
        p.add_argument("--test-share", metavar="X", type=float, default=0.0, help="share of test (default: none)")
        text = "move whole documents to a split, or each file's tail (default: auto, tail for few large files)"
        p.add_argument("--split-by", choices=("auto", "document", "tail"), default="auto", help=text)
        p.add_argument("--seed", metavar="N", type=int, default=1234, help="seed of the shares (default: %(default)s)")
    p.add_argument("--max-mb", metavar="MB", type=float, help="take only the first MB of text")
    text = f"longer documents are errors (default: {TEXT_MB}, for a JSON line {JSON_MB})"
    p.add_argument("--max-document-mb", metavar="MB", type=float, help=text)
    text = "stop at input that cannot be read, or skip and count it (default: stop)"
    p.add_argument("--on-error", choices=("stop", "skip"), default="stop", help=text)
    p.add_argument("--workers", metavar="N", type=int, help="processor cores to use (default: all)")
    p.add_argument("--force", action="store_true", help="replace what OUT holds")
    return p


def options(args: argparse.Namespace, corpus: str) -> Options:
    """Options from parsed arguments. BadInput for values out of range."""
    shares = {"valid": getattr(args, "valid_share", 0.0), "test": getattr(args, "test_share", 0.0)}
    problems = []
    if not (all(share >= 0 for share in shares.values()) and sum(shares.values()) < 1):  # NaN fails both
        problems.append(
            f"--valid-share {shares['valid']} --test-share {shares['test']}: must be at least 0 each and below 1 together"
        )
    if args.workers is not None and not 1 <= args.workers <= MAX_WORKERS:
        problems.append(f"--workers {args.workers}: must be from 1 to {MAX_WORKERS:,}")
    for name in ("max_mb", "max_document_mb"):
        value = getattr(args, name)
        if value is not None and not 0 < value < MAX_MB:
            problems.append(f"--{name.replace('_', '-')} {value}: must be above 0, in 10^6 bytes")
    if not -(2**63) <= getattr(args, "seed", 0) < 2**63:
        problems.append(f"--seed {args.seed}: must fit 64 bits")
    if args.vocab_size is not None and not 1 <= args.vocab_size <= MAX_IDS:
        problems.append(f"--vocab-size {args.vocab_size}: must be from 1 to {MAX_IDS:,}")
    name, size, sentences = args.tokenizer, args.vocab_size, getattr(args, "sentences", False)
    if name is None and size is None:
        name, size = args.default_tokenizer, args.default_vocab_size
    if name is not None and args.tokenizer_type:
        problems.append(
            f"--tokenizer-type {args.tokenizer_type}: {name} is not trained; give --vocab-size N, or leave the option out"
        )
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
    """Build the corpora of `source` in opt.out and return the content of manifest.json.

    splitter: how a document is cut into splits, if not by shares. BadInput for a folder with other content, input that cannot
    be read, an empty split, or a full disk.
    """
    if opt.workers is not None:
        os.environ["RAYON_NUM_THREADS"] = str(opt.workers)  # read by the tokenizer's thread pool when it first starts
    try:
        return _build(opt, source, splitter)
    except OSError as error:
        where = error.filename or opt.out
        raise BadInput(f"{where}: {error.strerror or error}; correct that, and the same command continues") from None


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
            raise BadInput(f"{opt.out}: another process is building there; wait for it, or choose another OUT") from None
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
    """Everything that affects the content, after a round trip through JSON. Equal requests give equal files."""
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
    } | {name: True for name in ("sentences", "pairs") if getattr(opt, name)}  # absent if false, as in earlier manifests
    return json.loads(json.dumps(request))


def _finished(opt: Options, request: dict[str, Any]) -> dict[str, Any] | None:
    """The manifest of OUT if it is this corpus, None if OUT is free to use. BadInput if it is another corpus."""
    path = opt.out / "manifest.json"
    if opt.force or not opt.out.exists():
        return None
    if not opt.out.is_dir():
        raise BadInput(f"{opt.out}: is a file, not a folder; choose another OUT")
    if not path.is_file():
        if any(entry.name != ".partial" for entry in opt.out.iterdir()) and not (opt.out / ".partial").exists():
            raise BadInput(f"{opt.out}: is not empty and contains no corpus; choose another OUT, or give --force")
        return None
    manifest = _read(path, _is_manifest, "not a manifest of a corpus; choose another OUT, or give --force")
    _require_same(manifest["request"], request, f"{opt.out}: contains another corpus", "--force replaces it")
    for split in manifest["splits"]:
        try:
            corpus = IndexedDataset(opt.out / split)
            corpus.verify(manifest["tokenizer_size"])
            if corpus.tokenizer_problems():
                raise BadInput(corpus.tokenizer_problems())
        except BadInput as error:
            raise BadInput([f"{line}; here, repeat the same command with --force" for line in error.problems]) from None
    return manifest


def _read(path: Path, valid: Callable[[dict[str, Any]], bool], message: str) -> dict[str, Any]:
    """The object in a JSON file of the builder. BadInput, which ends in `message`, if it is not a valid one."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(values, dict) and valid(values):
            return values
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError):
        pass
    raise BadInput(f"{path}: {message}") from None


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


def _require_same(before: dict[str, Any], request: dict[str, Any], what: str, remedy: str) -> None:
    """BadInput, which lists the differences, unless an earlier request is equal to this one."""
    keys = [key for key in before | request if before.get(key) != request.get(key)]
    if keys:
        differences = "; ".join(f"{key} was {_short(before.get(key))}, is {_short(request.get(key))}" for key in keys)
        raise BadInput(f"{what} ({differences}); choose another OUT, or {remedy}")


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _state(opt: Options, partial: Path, request: dict[str, Any]) -> dict[str, Any]:
    """The state of an interrupted run of this command, or that of a new one."""
    path = partial / "progress.json"
    state = None
    if path.is_file():
        try:
            state = _read(path, _is_state, "not the state of an interrupted build; choose another OUT, or --force discards it")
        except BadInput:
            if not opt.force:
                raise
    if state is not None:
        if state["request"] == request:
            _say(f"{opt.out}: continues at {state['bytes'] / 1e6:,.1f} MB")
            return state
        if state["bytes"] and not opt.force:
            _require_same(
                state["request"], request, f"{opt.out}: an interrupted build of another corpus", "--force discards it"
            )
    for entry in partial.iterdir():
        if entry.name != "lock":
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    return {
        "request": request, "encoded": False, "part": 0, "cursor": [], "bytes_in_part": 0, "bytes": 0,
        "skipped": {}, "writers": {},
    }  # fmt: skip


def _own_tokenizer(opt: Options, partial: Path, source: Source, splitter: Splitter) -> tokenizers.Tokenizer:
    """Train the tokenizer on the text: characters on all splits, others on train only. Saved in case of an interruption."""
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
    """(split, bytes, text) of every document; errors are handled as in the build but not counted."""
    errors = Errors(opt.on_error)
    for part, split in enumerate(source.parts):
        for document, raw in _taken(opt, source, part, [], 0, errors):
            for name, text in [(split, document.text)] if split else splitter(document.text, raw):
                yield name, len(raw), text


def _taken(
    opt: Options, source: Source, part: int, cursor: list[int], used: int, errors: Errors
) -> Iterator[tuple[Document, bytes]]:
    """Documents of a part that are not blank, and their UTF-8, up to --max-mb. used: bytes taken before."""
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
    """Moves whole documents; the split is a pure function of (seed, text)."""
    key = seed.to_bytes(16, "little", signed=True)

    def split(text: str, raw: bytes) -> Cut:
        position = int.from_bytes(hashlib.blake2b(raw, digest_size=8, key=key).digest(), "little") / 2**64  # in [0, 1)
        for name, share in shares.items():
            if position < share:
                return [(name, text)]
            position -= share
        return [("train", text)]

    return split


def by_tail(shares: dict[str, float]) -> Splitter:
    """Cuts each document at line ends, by characters: train first, then valid, then test."""

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
    encoder: fast_bpe.Encoder, pieces: list[str], last: list[bool], eod_id: int | None, sequences: bool
) -> EncodedBatch:
    """Pieces of documents -> the arguments of IndexedDatasetWriter.append.

    last[k]: piece k ends its document. sequences: each piece is a sequence.
    """
    ids, lengths = encoder.encode_flat(pieces)
    ends = np.cumsum(lengths)
    if sequences:
        return ids, ends, np.flatnonzero(last) + 1
    ends = ends[np.array(last)]
    if eod_id is None:
        return ids, ends, None
    return np.insert(ids, ends, eod_id), ends + np.arange(1, len(ends) + 1), None


class _Pipeline:
    """Reads ahead while batches are encoded, and writes them in the order of their arrival."""

    def __init__(
        self, tokenizer: tokenizers.Tokenizer, writers: dict[str, IndexedDatasetWriter], append_eod: bool,
        cut: Callable[[str], list[str]] | None = None,
    ):  # fmt: skip
        """cut: splits a document into its sequences; None: a document is one sequence."""
        self.tokenizer, self.writers, self.cut = tokenizer, writers, cut
        self.encoder = fast_bpe.Encoder(tokenizer)
        self.eod_id = tokenizer.eod_id if append_eod else None
        self.pool = ThreadPoolExecutor(2)
        self.running: deque[tuple[str, Future[EncodedBatch]]] = deque()
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
                self._submit(split, keep=1)  # the newest piece stays, because it may not be the last of its document
                pieces, last = self.waiting[split]
        if last:  # empty if the document has no sentence and the batch has no piece yet
            last[-1] = True

    def _submit(self, split: str, keep: int = 0) -> None:
        pieces, last = self.waiting[split]
        end = len(pieces) - keep
        self.waiting[split] = (pieces[end:], last[end:])
        self.chars[split] = sum(map(len, pieces[end:]))
        future = self.pool.submit(_encode_batch, self.encoder, pieces[:end], last[:end], self.eod_id, self.cut is not None)
        self.running.append((split, future))
        while len(self.running) > BATCHES_AHEAD:
            self._write_oldest()

    def _write_oldest(self) -> None:
        split, future = self.running.popleft()
        self.writers[split].append(*future.result())

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
    """How a document becomes several sequences; None: it is one sequence."""
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
    """Encode the rest of the source, and save the state on the way."""
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
    """Complete .partial: the corpora, their manifests, the tokenizer and manifest.json."""
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
    metadata = {
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
        if not (partial / f"{name}.idx").exists():  # else interrupted after this
            IndexedDatasetWriter(partial / name, tokenizers.token_dtype(tokenizer.size), counts).finish()
        sequences = {"sentences": counts["sequences"]} if _cut(opt) else {}
        splits[name] = write_manifest(partial / name, metadata | sequences)
    counted = ["tokens", "documents", *(["sentences"] if _cut(opt) else [])]
    manifest = (
        {
            "corpus": opt.corpus,
            **{key: sum(split[key] for split in splits.values()) for key in counted},
            "bytes_of_text": state["bytes"],
            "splits": {name: {key: m[key] for key in (*counted, "sha256")} for name, m in splits.items()},
        }
        | metadata
        | {"source_names": names, "request": state["request"]}
    )
    write_json(partial / "manifest.json", manifest)


def _publish(out: Path, partial: Path) -> dict[str, Any]:
    """Move the content of .partial to OUT, manifest.json last: then OUT is finished."""
    remedy = f"delete {partial} and repeat the command"
    manifest = _read(partial / "manifest.json", _is_manifest, f"not a manifest of a corpus; {remedy}")
    (out / "manifest.json").unlink(missing_ok=True)
    for split in ("train", "valid", "test"):
        if split not in manifest["splits"]:
            for suffix in FILES:  # of the corpus that is replaced
                (out / (split + suffix)).unlink(missing_ok=True)
    for table in out.glob("*.table"):  # common/data/tables.py
        table.unlink()
    moves = [f"{split}{suffix}" for split in manifest["splits"] for suffix in FILES]
    for name in moves:
        if (partial / name).exists():  # else it was moved before an interruption
            os.replace(partial / name, out / name)
    if (partial / "tokenizer").exists():
        shutil.rmtree(out / "tokenizer", ignore_errors=True)
        os.replace(partial / "tokenizer", out / "tokenizer")
    os.replace(partial / "manifest.json", out / "manifest.json")
    shutil.rmtree(partial)
    return manifest


# ---- output ---------------------------------------------------------------------------------------------------------


def _say(line: str) -> None:
    print(line, flush=True)


def _report(out: Path, manifest: dict[str, Any], how: str) -> None:
    for name, split in manifest["splits"].items():
        sentences = f"  {split['sentences']:>12,} sentences" if "sentences" in split else ""
        documents = f"{split['documents']:>11,} document{'s' * (split['documents'] != 1)}"
        _say(f"{out / name!s:<28}  {split['tokens']:>14,} tokens  {documents}{sentences}")
    for kind, count in manifest["skipped"].items():
        _say(f"skipped: {count:,} x {kind}")
    if note := _small_valid(manifest):
        _say(note)
    text = f"{manifest['bytes_of_text'] / 1e6:,.1f} MB of text"
    _say(f"{how}: {out} ({text}, tokenizer of {manifest['tokenizer_size']:,} ids)")


def _small_valid(manifest: dict[str, Any]) -> str | None:
    """A note if `valid` is a share of the text and too small to evaluate on."""
    share, tokens = manifest["request"]["shares"].get("valid"), manifest["splits"].get("valid", {}).get("tokens", 0)
    if share is None or tokens >= SMALL_VALID:
        return None
    what = "--valid-share 0.1 --force gives more" if share < 0.1 else "more text gives more"
    return f"note: valid has {tokens:,} tokens; {what}"


class _Progress:
    """A progress bar on a terminal, else one line every 10 s: 10^6 bytes of text encoded, and 10^6 bytes per second."""

    def __init__(self, total: int | None, done: int):
        self.total, self.first, self.done = total, done, done
        self.start = self.shown = time.monotonic()
        self.bar = self._bar() if sys.stdout.isatty() else None
        if self.bar:
            self.task = self.bar.add_task("", total=self.total, completed=self.done)
            self.bar.start()

    def _bar(self) -> "Progress | None":
        try:
            from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn
        except ImportError:
            return None  # plain lines will do
        return Progress(BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn(), transient=True)

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
