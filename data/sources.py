"""Sources of documents: files on disk, or a dataset from the Hugging Face hub or a local copy of it.

A source is read from front to back. Each document carries a cursor, and `documents(part, cursor)` continues after that
document, so an interrupted build can continue.
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
TEXT_MB = 256  # 10^6 bytes: longer documents are refused without --max-document-mb, because a document is read into memory
JSON_MB = 32  # the same for a JSON line, which may need 20 times its size when it is parsed


class Document(NamedTuple):
    text: str
    where: str  # for messages: file and line, or dataset and row
    cursor: list[int]  # where to continue after this document


class Errors:
    """Handles input that cannot be used: `stop` raises BadInput, `skip` counts it by kind in `counts`."""

    def __init__(self, on_error: str = "stop", counts: dict[str, int] | None = None):
        self.on_error = on_error
        self.counts: Counter[str] = Counter(counts or {})

    def bad(self, where: str, kind: str, detail: str = "") -> None:
        """kind: what is wrong, in a few words that are also the name of its count."""
        if self.on_error != "skip":
            reason = f" ({detail})" if detail else ""
            raise BadInput(f"{where}: {kind}{reason}; correct it, or give --on-error skip to leave out and count such input")
        self.counts[kind] += 1


class Source(Protocol):
    """What the builder reads documents from.

    parts: the split of each part; None if shares decide. whole_files: number of files if each is one document, or None if
    documents are smaller than files. total_bytes: size of all text, None if unknown.
    """

    parts: list[str | None]
    whole_files: int | None
    total_bytes: int | None

    def identity(self) -> Any:
        """What the content depends on, without names of folders: equal for copies of one source."""

    def names(self) -> list[str]:
        """The names of the files or datasets, for the manifest."""

    def documents(self, part: int, cursor: list[int], errors: Errors) -> Iterator[Document]:
        """The documents of a part after `cursor` ([]: from the beginning)."""


# ---- files ----------------------------------------------------------------------------------------------------------


class Files:
    """Text and JSON-lines files, also compressed as .gz or .zst; folders are searched for known suffixes, in sorted order.

    split_documents (text): 'none': a file is a document; 'blank-line': blank lines separate documents; 'line': each line.
    text_key (JSON lines): the field of the text; a line is a document.
    max_document_mb: limit on a document, uncompressed, in 10^6 bytes. Default: TEXT_MB, for a JSON line JSON_MB. Longer
    documents are errors; no more than the limit is read, whatever a compressed file expands to.
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
        """A cursor is [file, number of its lines that are done]."""
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
        count, limit = 0, self.max_document_mb or JSON_MB
        for count, line in enumerate(_lines(path, limit), 1):
            if count <= done or not line or line.isspace():
                continue
            where = f"{path}:{count}"
            if len(line) > limit * 1e6:
                _too_long(where, limit, errors)
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
        """The text of a JSON line. NoText if there is none."""
        return string_under(record, self.text_key, "--text-key")

    def _of_lines(self, path: Path, number: int, done: int, errors: Errors) -> Iterator[Document]:
        by_line = self.split_documents == "line"
        lines: list[str] = []  # of the document that is being read
        count, limit = 0, self.max_document_mb or TEXT_MB
        size = 0  # of the document, in bytes; beyond `limit` its lines are dropped
        for count, raw in enumerate(_lines(path, limit), 1):
            if count <= done:
                continue
            blank = raw.isspace()
            before, size = size, size + (0 if blank else len(raw))
            if size > limit * 1e6:
                if before <= limit * 1e6:
                    _too_long(f"{path}:{count}", limit, errors)
                lines, size = [], 0 if by_line or blank else size
                continue
            try:
                line = raw.decode("utf-8-sig" if count == 1 else "utf-8")
            except UnicodeDecodeError as error:
                errors.bad(f"{path}:{count}", "not UTF-8", f"byte {error.start} of the line")
                continue
            if line.strip():
                lines.append(line)
            if lines and (by_line or not line.strip()):
                yield Document("".join(lines), f"{path}:{count}", [number, count])
                lines, size = [], 0
        if lines:
            yield Document("".join(lines), f"{path}:{count}", [number, count])
        if not count:
            errors.bad(str(path), "empty file")


BETWEEN = "\x1e"  # ASCII's record separator: separates input and target of a pair, neither of which may contain it


class NoText(Exception):
    """A JSON line without a usable text. kind: the name of its count."""

    def __init__(self, message: str, kind: str = "no such text field"):
        super().__init__(message)
        self.kind = kind


def string_under(record: Any, key: str, option: str) -> str:
    """The string under a key of a JSON line. NoText, which names the command line's option, if there is none."""
    if not isinstance(record, dict) or not isinstance(record.get(key), str):
        raise NoText(f"{option} {key}: no string under this key")
    return record[key]


class Pairs(Files):
    """JSON lines with an input and a target each; `prefix` is put before every input ("translate English to German: ")."""

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
                raise NoText(f"{key} contains U+001E, which separates input and target in the corpus", "U+001E in a text")
        return f"{self.prefix}{texts[0]}{BETWEEN}{texts[1]}"


def find_files(source: Path) -> list[tuple[str, Path]]:
    """(name relative to the source, path) of a file, or of the files of a folder that have a known suffix."""
    if os.path.isfile(source):
        return [(source.name, source)]
    if not os.path.isdir(source):  # False for a name that is too long, too
        raise BadInput(f"--source {source}: no such file or folder")
    files = sorted(
        (path.relative_to(source).as_posix(), path)
        for path in source.rglob("*")
        if path.is_file() and _inner_suffix(path) in TEXT_SUFFIXES | JSON_SUFFIXES
    )
    if not files:
        known = " ".join(sorted(TEXT_SUFFIXES | JSON_SUFFIXES))
        raise BadInput(
            f"--source {source}: no file with a known suffix ({known}, each also with .gz or .zst); give the files by name"
        )
    return files


def _inner_suffix(path: Path) -> str:
    return Path(path.stem).suffix if path.suffix in PACKED_SUFFIXES else path.suffix


def _is_json(path: Path) -> bool:
    return _inner_suffix(path) in JSON_SUFFIXES


def hash_of_files(files: Sequence[tuple[str, Path]]) -> str:
    """sha256 (hex) of names, sizes and sampled content: equal for copies, wherever they are."""
    parts = [[name, fingerprint(path)] for name, path in files]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _unpacked(path: Path) -> Any:
    if path.suffix == ".gz":
        return gzip.open(path)
    if path.suffix == ".zst":
        return io.BufferedReader(_Zst(path), 2**17)
    return open(path, "rb")


PACKED_AT_ONCE = 2**10  # bytes of a .zst per read: at most 32 MiB uncompressed (a block of 4 bytes may expand to 128 KiB)


class _Zst(io.RawIOBase):
    """Decompresses a .zst file. The library's reader accepts a truncated file; this one raises EOFError."""

    def __init__(self, path: Path):
        import zstandard

        self._file = open(path, "rb")
        self._new_frame = zstandard.ZstdDecompressor().decompressobj
        self._frame: Any = None  # None between frames
        self._packed = b""
        self._ready = memoryview(b"")  # decompressed but not read yet; taken from the front without a copy

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
    """The exceptions that reading a damaged compressed file raises."""
    import zlib

    try:
        import zstandard
    except ImportError:
        return (EOFError, gzip.BadGzipFile, zlib.error)
    return (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError)


def _too_long(where: str, limit: float, errors: Errors) -> None:
    errors.bad(where, f"a document of over {limit:g} MB", "--max-document-mb N raises the limit; --split-documents cuts files")


def _lines(path: Path, max_mb: float) -> Iterator[bytes]:
    """The lines of a file. A line of over `max_mb` x 10^6 bytes is cut to one byte more than that; its rest is dropped."""
    limit = int(max_mb * 1e6) + 1
    try:
        with _unpacked(path) as file:
            while line := file.readline(limit):
                yield line
                rest = line if len(line) == limit else b""
                while rest and not rest.endswith(b"\n"):
                    rest = file.readline(2**20)
    except _damage() as error:
        raise BadInput(f"{path}: cannot be decompressed: {error}; get the file again") from None


def read_text(path: Path, errors: Errors, max_mb: float | None = None) -> str | None:
    """The text of a file exactly as stored, without a byte order mark; None for a file that `errors` skips, for example one of
    over max_mb (default: TEXT_MB), of which no more is read."""
    limit, raw = max_mb or TEXT_MB, bytearray()
    try:
        with _unpacked(path) as file:
            while len(raw) <= limit * 1e6 and (chunk := file.read(2**20)):
                raw += chunk
    except _damage() as error:
        raise BadInput(f"{path}: cannot be decompressed: {error}; get the file again") from None
    if len(raw) > limit * 1e6:
        _too_long(str(path), limit, errors)
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
    """A dataset that the library `datasets` reads: a name on the hub, streamed, or local folders of the same schema.

    names: one name or folder, or several folders, one after the other. splits: per part (split of the corpus or None, split of
    the dataset): [(None, 'train')] divides the dataset's train by shares, [('valid', 'validation'), ('train', 'train')] takes
    the dataset's splits. text_key: the column of the text, or several names of which the dataset has one. max_document_mb: as
    in Files, in 10^6 characters.
    """

    whole_files: int | None = None
    total_bytes: int | None = None

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
        self.of_part = [(name, hub_split) for _, hub_split in self.splits for name in self.folders]
        self.parts = [split for split, _ in self.splits for _ in self.folders]

    def identity(self) -> Any:
        identities = [self._identity(name) for name in self.folders]
        return identities[0] if len(identities) == 1 else identities

    def _identity(self, name: str) -> Any:
        if os.path.isdir(name):
            files = sorted((p.relative_to(name).as_posix(), p) for p in Path(name).rglob("*") if p.is_file())
            return [hash_of_files(files), self.config, self.splits, self.text_key]
        return [name, self.config, self.splits, self.text_key]

    def names(self) -> list[str]:
        return [f"{name} {self.config or ''} {split}".replace("  ", " ") for name, split in self.of_part]

    def documents(self, part: int, cursor: list[int], errors: Errors) -> Iterator[Document]:
        """A cursor is [number of rows done]."""
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
            raise BadInput(f"{name}: has no column {self.text_key!r}; --text-key may be {' or '.join(batch)}")
        keys = [self.text_key] if isinstance(self.text_key, str) else [key for key in self.text_key if key in batch]
        if not keys:
            raise BadInput(f"{name}: has no column {' or '.join(self.text_key)}; it has {', '.join(batch)}")
        return keys[0]

    def _open(self, name: str, split: str) -> Any:
        import datasets
        from huggingface_hub.utils import logging

        datasets.disable_progress_bars()
        logging.set_verbosity_error()  # hides its retries; a final failure is reported below
        try:
            if os.path.isdir(name) and any((Path(name) / f).is_file() for f in ("dataset_dict.json", "state.json")):
                saved = datasets.load_from_disk(name)
                return saved[split] if isinstance(saved, datasets.DatasetDict) else saved
            return datasets.load_dataset(name, self.config, split=split, streaming=True)
        except KeyError:
            raise BadInput(f"{name}: has no split {split!r}; it has {', '.join(saved)}") from None
        except Exception as error:  # no network, no such name, split or config: each raises another class
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise BadInput(
                f"dataset {name} ({self.config or 'default'}, {split}) cannot be opened: {reason}; check the "
                "name and the network, or give a local copy: --source DIR (for plain .jsonl files: python -m data.text)"
            ) from None
