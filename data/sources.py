"""Where documents come from: files on disk, a dataset of the Hugging Face hub or a local copy of one.

A source is read front to back and can begin anywhere: each document carries a cursor, and `documents(part, cursor)`
goes on behind it. That is what makes an interrupted build continue.
"""

import gzip
import hashlib
import io
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from common.data.manifest import fingerprint
from common.errors import BadInput

TEXT_SUFFIXES = frozenset(
    ".txt .text .md .rst .tex .html .htm .xml .csv .tsv .raw .tokens "
    ".py .c .h .cc .cpp .hpp .cu .rs .go .java .js .ts .sh .sql".split()
)
JSON_SUFFIXES = frozenset({".jsonl", ".ndjson"})
PACKED_SUFFIXES = frozenset({".gz", ".zst"})
TEXT_MB = 256  # 10^6 bytes: a longer document is refused unless --max-document-mb says otherwise; it is held in memory whole
JSON_MB = 32  # the same of a JSON line, which may take 20 times its size when it is parsed


class Document(NamedTuple):
    text: str
    where: str  # for messages: file and line, or dataset and row
    cursor: list[int]  # where to go on behind this document


class Errors:
    """What to do about input that cannot be used: `stop` raises BadInput, `skip` counts it by kind in `counts`."""

    def __init__(self, on_error: str = "stop", counts: dict[str, int] | None = None):
        self.on_error = on_error
        self.counts: Counter[str] = Counter(counts or {})

    def bad(self, where: str, kind: str, detail: str = "") -> None:
        """kind: what is wrong, in a few words that serve as the name of its count too."""
        if self.on_error != "skip":
            told = f" ({detail})" if detail else ""
            raise BadInput(f"{where}: {kind}{told}; mend it, or give --on-error skip to leave out and count such input")
        self.counts[kind] += 1


class Source(Protocol):
    """parts: which split each part is for, None where shares decide. whole_files: files that are one document each, or
    None where documents are smaller than files. total_bytes: of all text, or None where unknown."""

    parts: list[str | None]
    whole_files: int | None
    total_bytes: int | None

    def identity(self) -> Any:
        """What the content depends on, without names of folders: equal for copies of one source."""

    def names(self) -> list[str]:
        """For the manifest."""

    def documents(self, part: int, cursor: list[int], errors: Errors) -> Iterator[Document]:
        """The documents of a part behind `cursor` ([] is its beginning)."""


# ---- files ----------------------------------------------------------------------------------------------------------


class Files:
    """Text and JSON-lines files, each also packed as .gz or .zst; folders are searched for known suffixes, sorted.

    split_documents (text): 'none', a file is a document; 'blank-line', documents are separated by blank lines; 'line'.
    text_key (JSON lines): the field that holds the text; a line is a document.
    max_document_mb: 10^6 bytes of a document, unpacked, at most. Default: TEXT_MB, of a JSON line JSON_MB. Longer ones are
    errors; what is read of one is bounded, whatever a packed file expands to.
    """

    def __init__(
        self,
        sources: Sequence[str | Path],
        text_key: str = "text",
        split_documents: str = "none",
        max_document_mb: float | None = None,
    ):
        self.text_key, self.split_documents, self.max_document_mb = text_key, split_documents, max_document_mb
        self.parts: list[str | None] = [None]
        self.files = [pair for source in sources for pair in find_files(Path(source))]  # (name, path)
        whole = split_documents == "none" and not any(_is_json(path) for _, path in self.files)
        self.whole_files = len(self.files) if whole else None
        packed = any(path.suffix in PACKED_SUFFIXES for _, path in self.files)
        self.total_bytes = None if packed else sum(path.stat().st_size for _, path in self.files)

    def identity(self) -> Any:
        return [hash_of_files(self.files), self.text_key, self.split_documents]

    def names(self) -> list[str]:
        return [name for name, _ in self.files]

    def documents(self, part: int, cursor: list[int], errors: Errors) -> Iterator[Document]:
        """A cursor is [file, lines of it that are done]."""
        first, done = cursor or (0, 0)
        for number in range(first, len(self.files)):
            path = self.files[number][1]
            if _is_json(path):
                yield from self._of_json_lines(path, number, done, errors)
            elif self.split_documents == "none":
                text = read_text(path, errors, self.max_document_mb)
                if text is not None:
                    yield Document(text, str(path), [number + 1, 0])
            else:
                yield from self._of_lines(path, number, done, errors)
            done = 0

    def _of_json_lines(self, path: Path, number: int, done: int, errors: Errors) -> Iterator[Document]:
        count, most = 0, self.max_document_mb or JSON_MB
        for count, line in enumerate(_lines(path, most), 1):
            if count <= done or not line or line.isspace():
                continue
            where = f"{path}:{count}"
            if len(line) > most * 1e6:
                _too_long(where, most, errors)
                continue
            try:
                text = self._text_of(json.loads(line.decode("utf-8-sig" if count == 1 else "utf-8")))
            except UnicodeDecodeError as error:
                errors.bad(where, "not UTF-8", f"byte {error.start} of the line")
            except NoText as error:
                errors.bad(where, error.kind, str(error))
            except (ValueError, RecursionError) as error:
                errors.bad(where, "not JSON", str(error))
            else:
                yield Document(text, where, [number, count])
        if not count:
            errors.bad(str(path), "empty file")

    def _text_of(self, record: Any) -> str:
        """Of a JSON line; NoText where there is none."""
        return string_under(record, self.text_key, "--text-key")

    def _of_lines(self, path: Path, number: int, done: int, errors: Errors) -> Iterator[Document]:
        by_line = self.split_documents == "line"
        held: list[str] = []  # lines of the document being read
        count, most = 0, self.max_document_mb or TEXT_MB
        size = 0  # of the document, in bytes; beyond `most` its lines are dropped
        for count, raw in enumerate(_lines(path, most), 1):
            if count <= done:
                continue
            blank = raw.isspace()
            before, size = size, size + (0 if blank else len(raw))
            if size > most * 1e6:
                if before <= most * 1e6:
                    _too_long(f"{path}:{count}", most, errors)
                held, size = [], 0 if by_line or blank else size
                continue
            try:
                line = raw.decode("utf-8-sig" if count == 1 else "utf-8")
            except UnicodeDecodeError as error:
                errors.bad(f"{path}:{count}", "not UTF-8", f"byte {error.start} of the line")
                continue
            if line.strip():
                held.append(line)
            if held and (by_line or not line.strip()):
                yield Document("".join(held), f"{path}:{count}", [number, count])
                held, size = [], 0
        if held:
            yield Document("".join(held), f"{path}:{count}", [number, count])
        if not count:
            errors.bad(str(path), "empty file")


BETWEEN = "\x1e"  # ASCII's record separator: between the input and the target of a pair, in neither of which it may stand


class NoText(Exception):
    """What a JSON line lacks; kind: the name of its count."""

    def __init__(self, told: str, kind: str = "no such text field"):
        super().__init__(told)
        self.kind = kind


def string_under(record: Any, key: str, option: str) -> str:
    if not isinstance(record, dict) or not isinstance(record.get(key), str):
        raise NoText(f"{option} {key}: no string under this key")
    return record[key]


class Pairs(Files):
    """JSON lines with an input and a target each; `prefix` goes before every input ("translate English to German: ")."""

    def __init__(
        self,
        sources: Sequence[str | Path],
        input_key: str,
        target_key: str,
        prefix: str,
        max_document_mb: float | None = None,
    ):
        super().__init__(sources, text_key=input_key, max_document_mb=max_document_mb)
        self.input_key, self.target_key, self.prefix = input_key, target_key, prefix
        other = [str(path) for _, path in self.files if not _is_json(path)]
        if other:
            raise BadInput(f"--source {other[0]}: not JSON lines (.jsonl, .ndjson), which pairs are read from")

    def identity(self) -> Any:
        return [hash_of_files(self.files), self.input_key, self.target_key, self.prefix]

    def _text_of(self, record: Any) -> str:
        texts = [string_under(record, self.input_key, "--input-key"), string_under(record, self.target_key, "--target-key")]
        for key, text in zip((self.input_key, self.target_key), texts, strict=True):
            if not text.strip():
                raise NoText(f"{key} is blank", "empty text")
            if BETWEEN in text:
                raise NoText(f"{key} holds U+001E, which separates input and target in the corpus", "U+001E in a text")
        return f"{self.prefix}{texts[0]}{BETWEEN}{texts[1]}"


def find_files(source: Path) -> list[tuple[str, Path]]:
    """(name relative to the source, path) of a file, or of the files of a folder that can be read."""
    if os.path.isfile(source):
        return [(source.name, source)]
    if not os.path.isdir(source):  # also False for a name that is too long
        raise BadInput(f"--source {source}: no such file or folder")
    found = sorted(
        (path.relative_to(source).as_posix(), path)
        for path in source.rglob("*")
        if path.is_file() and _inner_suffix(path) in TEXT_SUFFIXES | JSON_SUFFIXES
    )
    if not found:
        known = " ".join(sorted(TEXT_SUFFIXES | JSON_SUFFIXES))
        raise BadInput(f"--source {source}: no file of a kind we take ({known}, each also .gz .zst); name the files")
    return found


def _inner_suffix(path: Path) -> str:
    return Path(path.stem).suffix if path.suffix in PACKED_SUFFIXES else path.suffix


def _is_json(path: Path) -> bool:
    return _inner_suffix(path) in JSON_SUFFIXES


def hash_of_files(files: Sequence[tuple[str, Path]]) -> str:
    """sha256 (hex) over names, sizes and sampled content: equal for copies, wherever they lie."""
    parts = [[name, fingerprint(path)] for name, path in files]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _unpacked(path: Path) -> Any:
    if path.suffix == ".gz":
        return gzip.open(path)
    if path.suffix == ".zst":
        return io.BufferedReader(_Zst(path), 2**17)
    return open(path, "rb")


PACKED_AT_ONCE = 2**10  # bytes of a .zst: unpacked they are 32 MiB at most (a block of 4 bytes may stand for 128 KiB)


class _Zst(io.RawIOBase):
    """A .zst file unpacked. The library's reader takes a file cut short for a whole one; this raises EOFError."""

    def __init__(self, path: Path):
        import zstandard

        self._file = open(path, "rb")
        self._new_frame = zstandard.ZstdDecompressor().decompressobj
        self._frame: Any = None  # None between frames
        self._packed = b""
        self._ready = memoryview(b"")  # unpacked and not read yet: taken from the front without a copy

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            self._packed = self._packed or self._file.read(PACKED_AT_ONCE)
            if not self._packed:
                if self._frame is not None:
                    raise EOFError("the file ends inside a frame")
                return 0
            self._frame = self._frame or self._new_frame()
            self._ready = memoryview(self._frame.decompress(self._packed))
            self._packed = self._frame.unused_data
            if self._frame.eof:
                self._frame = None
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def _damage() -> tuple[type[Exception], ...]:
    """What reading a damaged packed file raises."""
    import zlib

    try:
        import zstandard
    except ImportError:
        return (EOFError, gzip.BadGzipFile, zlib.error)
    return (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError)


def _too_long(where: str, most: float, errors: Errors) -> None:
    errors.bad(where, f"a document of over {most:g} MB", "--max-document-mb N allows more; --split-documents, smaller ones")


def _lines(path: Path, most: float) -> Iterator[bytes]:
    """Lines of a file, of one over `most` x 10^6 bytes one byte more than so many: its rest is read and dropped."""
    limit = int(most * 1e6) + 1
    try:
        with _unpacked(path) as file:
            while line := file.readline(limit):
                yield line
                rest = line if len(line) == limit else b""
                while rest and not rest.endswith(b"\n"):
                    rest = file.readline(2**20)
    except _damage() as error:
        raise BadInput(f"{path}: cannot be unpacked: {error}; get the file again") from None


def read_text(path: Path, errors: Errors, max_mb: float | None = None) -> str | None:
    """A file as text, exactly as stored but for a byte order mark; None for one that `errors` skipped, such as one over
    max_mb (default: TEXT_MB), of which no more is read."""
    most, raw = max_mb or TEXT_MB, bytearray()
    try:
        with _unpacked(path) as file:
            while len(raw) <= most * 1e6 and (chunk := file.read(2**20)):
                raw += chunk
    except _damage() as error:
        raise BadInput(f"{path}: cannot be unpacked: {error}; get the file again") from None
    if len(raw) > most * 1e6:
        _too_long(str(path), most, errors)
        return None
    if not raw or raw.isspace():
        errors.bad(str(path), "empty file")
        return None
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        errors.bad(f"{path}:{raw.count(b'\n', 0, error.start) + 1}", "not UTF-8", f"byte {error.start:,} of the file")
        return None


# ---- datasets -------------------------------------------------------------------------------------------------------


class Hub:
    """A dataset by the library `datasets`: a name on the hub, streamed, or local folders of the same schema.

    names: one name or folder, or several folders, one after the other. splits: for each part (our split or None, theirs):
    [(None, 'train')] shares one split of theirs by our shares, [('valid', 'validation'), ('train', 'train')] takes theirs.
    text_key: the column of the text, or names of which it has one. max_document_mb: as Files has it, in 10^6 characters.
    """

    whole_files = None
    total_bytes = None

    def __init__(
        self,
        names: str | Sequence[str],
        config: str | None,
        splits: Sequence[tuple[str | None, str]],
        text_key: str | Sequence[str] = "text",
        max_document_mb: float | None = None,
    ):
        self.folders = [names] if isinstance(names, str) else list(names)
        self.config, self.splits, self.text_key = config, list(splits), text_key
        self.max_document_mb = max_document_mb or TEXT_MB
        # a part is one split of one folder
        self.of_part = [(name, theirs) for _, theirs in self.splits for name in self.folders]
        self.parts = [ours for ours, _ in self.splits for _ in self.folders]

    def identity(self) -> Any:
        found = [self._identity(name) for name in self.folders]
        return found[0] if len(found) == 1 else found

    def _identity(self, name: str) -> Any:
        if os.path.isdir(name):
            files = sorted((p.relative_to(name).as_posix(), p) for p in Path(name).rglob("*") if p.is_file())
            return [hash_of_files(files), self.config, self.splits, self.text_key]
        return [name, self.config, self.splits, self.text_key]

    def names(self) -> list[str]:
        return [f"{name} {self.config or ''} {theirs}".replace("  ", " ") for name, theirs in self.of_part]

    def documents(self, part: int, cursor: list[int], errors: Errors) -> Iterator[Document]:
        """A cursor is [rows done]."""
        done = cursor[0] if cursor else 0
        name, split = self.of_part[part]
        rows = self._open(name, split)
        rows = rows.skip(done) if done else rows
        for batch in rows.iter(batch_size=1000):
            key = self._key_in(name, batch)
            for text in batch[key]:
                where = f"{name} row {done}"
                done += 1
                if not isinstance(text, str):
                    errors.bad(where, "no text", f"{type(text).__name__} under {key}")
                    continue
                if len(text) > self.max_document_mb * 1e6:
                    _too_long(where, self.max_document_mb, errors)
                    continue
                yield Document(text, where, [done])

    def _key_in(self, name: str, batch: dict[str, Any]) -> str:
        if isinstance(self.text_key, str) and self.text_key not in batch:
            raise BadInput(f"{name}: has no column {self.text_key!r}; --text-key takes {' or '.join(batch)}")
        keys = [self.text_key] if isinstance(self.text_key, str) else [key for key in self.text_key if key in batch]
        if not keys:
            raise BadInput(f"{name}: has no column {' or '.join(self.text_key)}; it has {', '.join(batch)}")
        return keys[0]

    def _open(self, name: str, split: str) -> Any:
        import datasets
        from huggingface_hub.utils import logging

        datasets.disable_progress_bars()
        logging.set_verbosity_error()  # its retries; what fails in the end is told below
        try:
            if os.path.isdir(name) and any((Path(name) / f).is_file() for f in ("dataset_dict.json", "state.json")):
                saved = datasets.load_from_disk(name)
                return saved[split] if isinstance(saved, datasets.DatasetDict) else saved
            return datasets.load_dataset(name, self.config, split=split, streaming=True)
        except KeyError:
            raise BadInput(f"{name}: has no split {split!r}; it has {', '.join(saved)}") from None
        except Exception as error:  # no network, no such name or split or config: each has its own class there
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise BadInput(
                f"dataset {name} ({self.config or 'default'}, {split}) cannot be opened: {reason}; check the "
                "name and the network, or give a local copy: --source DIR (for plain .jsonl files: python -m data.text)"
            ) from None
