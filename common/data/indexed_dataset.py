"""Tokenized corpora on disk, in the format of Megatron's IndexedDataset.

A corpus is PREFIX.bin (ids end to end) and PREFIX.idx (lengths of sequences, bounds of documents). This project adds
PREFIX.json (the manifest: counts, checksums, tokenizer) and PREFIX.crc32 (a checksum per block of both files, verified when
the block is first read). Corpora without these two, from Megatron's own tool or from earlier versions, are read unchecked.
"""

import hashlib
import os
import shlex
import struct
import zlib
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from common.data.manifest import BLOCK, checksum, crc32, fingerprint, read_manifest, sha256, write_checksums
from common.errors import BadInput, Missing
from common.json_files import write_json
from common.paths import ROOT, near
from common.yaml_files import read_yaml

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")  # magic, version, type code, number of sequences, number of document bounds
_DTYPE_OF_CODE: dict[int, type[np.generic]] = {
    1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16
}  # fmt: skip
_CODE_OF_DTYPE = {dtype: code for code, dtype in _DTYPE_OF_CODE.items()}

FILES = (".bin", ".idx", ".crc32", ".json")
"""Endings of the files of a corpus."""


class IndexedDatasetWriter:
    """Writes PREFIX.bin and PREFIX.idx under temporary names, which `finish` renames, so half a corpus never looks complete.

    A document is one sequence, or several where `append` gets `documents` (BERT: a sentence is a sequence). `sync` returns a
    state; `IndexedDatasetWriter(prefix, dtype, resume=state)` continues from it after an interruption and drops what was
    written later.
    """

    def __init__(self, prefix: str | Path, dtype: type[np.generic], resume: dict[str, int] | None = None):
        if dtype not in _CODE_OF_DTYPE:
            raise ValueError(f"dtype {dtype}: the format knows {[d.__name__ for d in _CODE_OF_DTYPE]}")
        self.prefix = str(prefix)
        self.dtype = np.dtype(dtype)
        state = resume or {"documents": 0, "tokens": 0}
        self.documents, self.tokens = state["documents"], state["tokens"]
        self.sequences = state.get("sequences", self.documents)
        self._open_tokens = 0  # already written, of a sequence that has not ended
        self._bound = self.sequences  # sequences before the document that has not ended
        Path(self.prefix).parent.mkdir(parents=True, exist_ok=True)
        self._bin = self._open(".bin.part", self.tokens * self.dtype.itemsize, resume is None)
        self._lengths = self._open(".lengths.part", self.sequences * 4, resume is None)
        self._bounds: Any = None  # ends of documents in sequences, int64; None until a document has several
        if self.sequences > self.documents:
            self._bounds = self._open(".bounds.part", self.documents * 8, new=False)

    def _open(self, suffix: str, size: int, new: bool) -> Any:
        final = self.prefix + suffix.removesuffix(".part")
        if not new and not os.path.exists(self.prefix + suffix) and os.path.exists(final):
            os.replace(final, self.prefix + suffix)  # interrupted inside `finish`
        file = open(self.prefix + suffix, "wb" if new else "r+b")
        file.seek(0, os.SEEK_END)
        if file.tell() < size:
            file.close()
            raise BadInput(f"{self.prefix}{suffix}: shorter than when last saved; delete its folder to start over")
        file.truncate(size)
        file.seek(size)
        return file

    def append(
        self, ids: np.ndarray, ends: np.ndarray | Sequence[int], documents: np.ndarray | Sequence[int] | None = None
    ) -> None:
        """Append ids. `ends` are the positions in `ids` (0 < end <= len) at which a sequence ends, in ascending order.

        documents: for each document the number of ends up to its own end (1 <= number <= len(ends)), in ascending order. Ends
        3, 8, 9 with documents 2, 3 are a document of 3 + 5 ids and one of 1 id. Sequences without ids and documents without
        sequences are left out. None: every sequence is a document.
        """
        ends = np.asarray(ends, dtype=np.int64)
        self._bin.write(memoryview(np.ascontiguousarray(ids, dtype=self.dtype)).cast("B"))
        self.tokens += len(ids)
        lengths = np.diff(ends, prepend=0)
        if len(ends):
            lengths[0] += self._open_tokens
            self._open_tokens = 0
        self._open_tokens += len(ids) - int(ends[-1] if len(ends) else 0)
        if documents is None:
            bounds = self.sequences + np.arange(1, len(lengths) + 1)
        else:
            nonempty = np.concatenate([[0], np.cumsum(lengths > 0)])  # sequences before each sequence, and before the end
            bounds = np.unique(self.sequences + nonempty[np.asarray(documents, dtype=np.int64)])
            bounds, lengths = bounds[bounds > self._bound], lengths[lengths > 0]
        if lengths.max(initial=0) >= 2**31:
            raise BadInput(f"{self.prefix}: a sequence of {lengths.max():,} tokens; at most 2^31 - 1; split it")
        self._lengths.write(lengths.astype("<i4").tobytes())
        self.sequences += len(lengths)
        self._end_documents(bounds)

    def _end_documents(self, bounds: np.ndarray) -> None:
        """bounds: number of sequences, from the start of the corpus, at which documents end."""
        if not len(bounds):
            return
        if self._bounds is None and bounds[-1] > self.documents + len(bounds):  # the first document of several sequences
            self._bounds = self._open(".bounds.part", 0, new=True)
            self._bounds.write(np.arange(1, self.documents + 1, dtype="<i8").tobytes())
        if self._bounds is not None:
            self._bounds.write(bounds.astype("<i8").tobytes())
        self.documents += len(bounds)
        self._bound = int(bounds[-1])

    def add(self, ids: np.ndarray | Sequence[int]) -> None:
        """Append one whole document."""
        self.append(np.asarray(ids, dtype=self.dtype), [len(ids)])

    def add_sentences(self, sentences: Sequence[np.ndarray | Sequence[int]]) -> None:
        """Append one whole document of sentences (their ids), each a sequence; sentences without ids are left out."""
        ids = np.concatenate([np.empty(0, self.dtype), *(np.asarray(s, dtype=self.dtype) for s in sentences)])
        self.append(ids, np.cumsum([len(sentence) for sentence in sentences]), [len(sentences)])

    def _files(self) -> list[Any]:
        return [file for file in (self._bin, self._lengths, self._bounds) if file is not None]

    def sync(self) -> dict[str, int]:
        """Flush everything to disk and return the state to resume from. Only between documents."""
        if self._open_tokens or self._bound != self.sequences:
            raise ValueError("sync inside a document")
        for file in self._files():
            file.flush()
            os.fsync(file.fileno())
        return {"documents": self.documents, "sequences": self.sequences, "tokens": self.tokens}

    def close(self) -> None:
        """Close the files without finishing."""
        for file in self._files():
            file.close()

    def _saved(self, suffix: str, dtype: str) -> Iterator[np.ndarray]:
        """The numbers in a file of this writer, in parts."""
        with open(self.prefix + suffix, "rb") as file:
            while part := file.read(2**20):
                yield np.frombuffer(part, dtype)

    def _counted(self) -> Iterator[np.ndarray]:
        """Ends of documents of one sequence each, in parts."""
        for first in range(1, self.documents + 1, 2**17):
            yield np.arange(first, min(first + 2**17, self.documents + 1), dtype="<i8")

    def finish(self) -> None:
        """Write the index and give both files their final names. Memory does not grow with the corpus."""
        self.sync()
        self.close()
        with open(self.prefix + ".idx.part", "wb") as file:
            code = _CODE_OF_DTYPE[self.dtype.type]
            file.write(_HEADER.pack(_MAGIC, 1, code, self.sequences, self.documents + 1))
            for lengths in self._saved(".lengths.part", "<i4"):
                file.write(lengths)
            end = 0  # of the sequences so far, in bytes
            for lengths in self._saved(".lengths.part", "<i4"):
                ends = end + np.cumsum(lengths, dtype=np.int64) * self.dtype.itemsize
                file.write((ends - lengths * np.int64(self.dtype.itemsize)).astype("<i8"))
                end = int(ends[-1])
            file.write(bytes(8))
            for bounds in self._saved(".bounds.part", "<i8") if self._bounds is not None else self._counted():
                file.write(bounds)
            file.flush()
            os.fsync(file.fileno())
        for suffix in (".json", ".crc32"):  # of an earlier corpus of this name
            Path(self.prefix + suffix).unlink(missing_ok=True)
        os.replace(self.prefix + ".bin.part", self.prefix + ".bin")
        os.replace(self.prefix + ".idx.part", self.prefix + ".idx")
        os.unlink(self.prefix + ".lengths.part")
        Path(self.prefix + ".bounds.part").unlink(missing_ok=True)


def _integers(stored: np.ndarray) -> Sequence[int]:
    """A view of stored bytes as 64-bit integers, which need not be aligned."""
    return memoryview(stored).cast("q") if len(stored) else ()


class IndexedDataset:
    """A corpus, read through a memory map. Opening it reads the whole index (10 million sequences: 0.3 s) but no ids.

    documents, tokens: counts. lengths: tokens of each sequence, int32. bounds: (documents + 1,) number of the first sequence
    of each document; a document is one sequence, or one sequence per sentence if it was built with --sentences (BERT).
    manifest: content of PREFIX.json, {} if there is none. flat: ids of all documents end to end, (tokens,), unchecked; `read`
    and `get` check what they return.

    BadInput, which names the file, if a file is missing, truncated or damaged, or belongs to another corpus.
    """

    def __init__(self, prefix: str | Path):
        self.prefix = str(prefix).removesuffix(".bin").removesuffix(".idx")
        self.key = ""  # of the config that names this corpus, for messages: see `limit_ids`
        self.vocab_size: int | None = None  # of the model; None: ids are not compared with it
        self._require_files()
        try:
            self._open()
        except OSError as error:  # no permission, a disk that fails
            raise BadInput(f"{error.filename or self.prefix}: cannot be read ({error.strerror})") from None

    def _open(self) -> None:
        bin_size = os.path.getsize(self.prefix + ".bin")  # bytes
        self._read_index()
        self.tokens = self._check_index(bin_size) // self.dtype.itemsize
        if bin_size != self.tokens * self.dtype.itemsize:
            raise BadInput(
                f"{self.prefix}.bin has {bin_size:,} bytes, {self.prefix}.idx describes "
                f"{self.tokens * self.dtype.itemsize:,}: one is cut or of another corpus; build or copy both again"
            )
        self.flat = np.empty(0, self.dtype)
        if self.tokens:  # a plain array over the map: slicing it does not go through memmap's Python code
            self.flat = np.asarray(np.memmap(self.prefix + ".bin", self.dtype, "r"))
        self.manifest = read_manifest(self.prefix)
        self._compare_counts()
        self._checksums = self._read_checksums(bin_size)  # per block of .bin, then of .idx; None without PREFIX.crc32
        self._check_index_blocks(-(-bin_size // BLOCK))
        self._per_block = BLOCK // self.dtype.itemsize  # ids
        self._checked = np.zeros(-(-bin_size // BLOCK), bool)  # blocks of .bin that this process has checked

    def _require_files(self) -> None:
        missing = [suffix for suffix in (".bin", ".idx") if not os.path.isfile(self.prefix + suffix)]
        if len(missing) == 1:
            raise BadInput(f"{self.prefix}{missing[0]} is missing although its other half exists; build or copy both again")
        if missing and os.path.isfile(os.path.join(self.prefix, "train.bin")):
            raise BadInput(f"{self.prefix} is a folder of corpora; give one of them, such as {self.prefix}/train")
        if missing:
            folder = os.path.dirname(self.prefix) or "corpora/NAME"
            if os.path.exists(self.prefix):  # perhaps the text itself
                command = shlex.join(["python", "-m", "data.text", "corpora/NAME", "--source", self.prefix])
                raise Missing(
                    f"no corpus at {self.prefix} ({self.prefix}.bin and .idx); if it is text, build a corpus of it "
                    f"({command} --vocab-size 8192) and give corpora/NAME/train"
                )
            how = _made_by_quickstart(folder) or f"python -m data.NAME {folder}; the modules are in data/"
            close = near(self.prefix, ".idx")
            raise Missing(
                f"no corpus at {self.prefix} ({self.prefix}.bin and .idx);{close} build it ({how}), or give "
                "the prefix of an existing one"
            )

    def _read_index(self) -> None:
        path = self.prefix + ".idx"
        size = os.path.getsize(path)
        with open(path, "rb") as file:
            head = file.read(_HEADER.size)
        if len(head) < _HEADER.size or not head.startswith(_MAGIC):
            raise BadInput(f"{path}: not the index of a corpus (it begins {head[:9]!r}); build it again")
        _, version, code, sequences, bounds = _HEADER.unpack(head)
        if version != 1 or code not in _DTYPE_OF_CODE:
            raise BadInput(f"{path}: version {version}, type code {code}; known: version 1, codes {[*_DTYPE_OF_CODE]}")
        expected = _HEADER.size + sequences * 12 + bounds * 8
        if size not in (expected, expected + sequences):  # one byte more per sequence if it records modes (images)
            raise BadInput(f"{path}: {size:,} bytes where its header announces {expected:,}; build or copy it again")
        self.dtype = np.dtype(_DTYPE_OF_CODE[code])
        # The three arrays are not aligned to their item size; numpy reads them all the same.
        self._index = np.asarray(np.memmap(path, np.uint8, "r"))
        first, second = _HEADER.size + sequences * 4, _HEADER.size + sequences * 12
        self.lengths = self._index[_HEADER.size : first].view("<i4")
        self._pointers = self._index[first:second].view("<i8")  # byte at which each sequence begins
        self.bounds = self._index[second : second + bounds * 8].view("<i8")
        self.documents = max(bounds - 1, 0)
        # The same for access one by one, faster than in numpy, which copies a whole array that is not aligned to search it.
        self._first_bytes = _integers(self._index[first:second])
        self._first_sequences = _integers(self._index[second : second + bounds * 8])

    def _check_index(self, bin_size: int, chunk: int = 2**20) -> int:
        """Bytes of ids that the index describes. BadInput unless sequences are contiguous and documents are in order."""
        path, remedy = self.prefix + ".idx", "the file is damaged: build or copy it again"
        end = 0  # of the sequences so far, in bytes
        for first in range(0, len(self.lengths), chunk):
            lengths = self.lengths[first : first + chunk].astype(np.int64)
            if lengths.min() < 0:
                number = first + int(np.argmax(lengths < 0))
                raise BadInput(f"{path}: sequence {number:,} has a length of {self.lengths[number]:,}; {remedy}")
            begins = end + (np.cumsum(lengths) - lengths) * self.dtype.itemsize
            wrong = begins != self._pointers[first : first + chunk]
            if wrong.any():
                position = int(np.argmax(wrong))
                raise BadInput(
                    f"{path}: sequence {first + position:,} begins at byte {self._pointers[first + position]:,}, the one "
                    f"before it ends at {begins[position]:,}; {remedy}"
                )
            end = int(begins[-1] + lengths[-1] * self.dtype.itemsize)
            if end > bin_size:
                break  # the comparison of sizes reports it; no sum overflows
        sequences, bounds = len(self.lengths), self.bounds
        if not len(bounds) or bounds[0] or any((sizes < 0).any() for _, sizes in self.document_sizes(chunk)):
            raise BadInput(f"{path}: its documents do not follow one another from sequence 0 on; {remedy}")
        if bounds[-1] != sequences:
            raise BadInput(f"{path}: {sequences:,} sequences, documents end at {bounds[-1]:,}; {remedy}")
        for first, sizes in self.document_sizes(chunk) if sequences <= self.documents else ():
            if sizes.max() > 1:
                raise BadInput(
                    f"{path}: {sequences:,} sequences for {self.documents:,} documents, and document "
                    f"{first + int(np.argmax(sizes > 1)):,} has several; {remedy}"
                )
        return end

    def document_sizes(self, chunk: int = 2**20) -> Iterator[tuple[int, np.ndarray]]:
        """Number of sequences of each document, (chunk,) int64, in parts of `chunk` documents, each with its first document."""
        for first in range(0, self.documents, chunk):
            yield first, np.diff(self.bounds[first : first + chunk + 1])

    def _compare_counts(self) -> None:
        """BadInput unless the manifest has the counts of these files."""
        counts = {"tokens": self.tokens, "documents": self.documents, "sentences": self.sentences, "dtype": self.dtype.name}
        for name, value in counts.items():
            if self.manifest.get(name, value) != value:
                raise BadInput(
                    f"{self.prefix}.json describes another corpus: {name} is {self.manifest[name]} there, {value} in "
                    f"{self.prefix}.idx; build or copy all files of the corpus again"
                )

    def _read_checksums(self, bin_size: int) -> np.ndarray | None:
        recorded = self.manifest.get("blocks")
        if recorded is None:  # built by a version without block checksums
            return None
        path, remedy = self.prefix + ".crc32", "build or copy all files of the corpus again"
        if recorded["bytes"] != BLOCK:
            raise BadInput(f"{path}: has blocks of {recorded['bytes']} bytes; this version reads blocks of {BLOCK}; {remedy}")
        if not os.path.isfile(path):
            raise BadInput(f"{path}: is missing although {self.prefix}.json names it; {remedy}")
        try:
            checksums = np.asarray(np.memmap(path, "<u4", "r"))
        except (OSError, ValueError) as error:  # ValueError: empty, or not a whole number of checksums
            raise BadInput(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error}); {remedy}") from None
        if len(checksums) != -(-bin_size // BLOCK) + -(-len(self._index) // BLOCK) or crc32(checksums) != recorded["crc32"]:
            raise BadInput(f"{path} is not the file that {self.prefix}.json describes; {remedy}")
        return checksums

    def checksums(self, suffix: str) -> np.ndarray | None:
        """CRC-32 of each block of PREFIX.bin ('bin') or .idx ('idx'), uint32; None without PREFIX.crc32."""
        if self._checksums is None:
            return None
        blocks = len(self._checked)
        return self._checksums[:blocks] if suffix == "bin" else self._checksums[blocks:]

    def _check_index_blocks(self, before: int) -> None:
        """before: number of blocks of .bin, whose checksums come first."""
        if self._checksums is not None:
            for number, expected in enumerate(self._checksums[before:].tolist()):
                if zlib.crc32(self._index[number * BLOCK : (number + 1) * BLOCK]) != expected:
                    raise BadInput(self.damage("idx", number))

    def damage(self, suffix: str, block: int) -> str:
        """The message for a block of PREFIX.bin or .idx that is not as it was built."""
        size = os.path.getsize(f"{self.prefix}.{suffix}")
        begin, end = block * BLOCK, min((block + 1) * BLOCK, size)
        return (
            f"{self._name}.{suffix}: block {block:,} (bytes {begin:,} to {end - 1:,}) does not have its checksum in "
            f"{self.prefix}.crc32: the file has changed since it was built; copy it again, or build the corpus again"
        )

    @property
    def _name(self) -> str:
        return f"{self.key}: {self.prefix}" if self.key else self.prefix

    def limit_ids(self, vocab_size: int | None, key: str) -> None:
        """From now on `read` refuses ids of `vocab_size` or more. key: of the config, for messages."""
        self.vocab_size, self.key = vocab_size, key
        self._checked[:] = False

    def read(self, start: int, end: int) -> np.ndarray:
        """Ids `start` to `end` - 1 of all documents end to end, (end - start,): a view, in the stored type.

        When this process reads a block of the file for the first time, it checks the block's checksum and ids. BadInput names
        the block, or the document of an id outside the model's vocabulary. Safe to call from several threads.
        """
        if end > start:
            for block in range(int(start) // self._per_block, (int(end) - 1) // self._per_block + 1):
                if not self._checked[block]:
                    self._check(block)
        return self.flat[start:end]

    def _check(self, block: int) -> None:
        ids = self.flat[block * self._per_block : (block + 1) * self._per_block]
        if self._checksums is not None and zlib.crc32(ids) != self._checksums[block]:
            raise BadInput(self.damage("bin", block))
        vocab_size = self.vocab_size
        # viewed as unsigned, so that ids below 0 are large
        if vocab_size is not None and int(ids.view(f"u{ids.itemsize}").max()) >= vocab_size:
            unknown = (ids < 0) | (ids >= vocab_size)
            self._refuse(block * self._per_block + int(np.argmax(unknown)), vocab_size)
        self._checked[block] = True

    def _refuse(self, position: int, vocab_size: int) -> NoReturn:
        """position: in `flat`, of an id outside the model's vocabulary."""
        document = self.document_of(self.first_from(position + 1, 0, self.sentences) - 1)
        remedy = "tokenize the corpus with the model's tokenizer, or set model.vocab_size above it"
        if self.flat[position] < 0:
            remedy = "the file is damaged, or of another type than its index says: build or copy it again"
        raise BadInput(
            f"{self._name}: document {document:,} holds token id {int(self.flat[position]):,}, "
            f"the model knows ids from 0 to {vocab_size - 1:,}; {remedy}"
        )

    def start(self, sequence: int) -> int:
        """Position in `flat` at which a sequence begins; `tokens` for the number after the last."""
        return self._first_bytes[sequence] // self.dtype.itemsize if sequence < len(self._first_bytes) else self.tokens

    def first_from(self, position: int, begin: int, end: int) -> int:
        """The first of the sequences from `begin` to `end` - 1 that begins at `position` in `flat` or later; else `end`."""
        return bisect_left(self._first_bytes, position * self.dtype.itemsize, begin, end)

    def document_of(self, sequence: int) -> int:
        """The document that a sequence belongs to."""
        return bisect_right(self._first_sequences, sequence) - 1

    def sequences_of(self, document: int) -> tuple[int, int]:
        """The first sequence of a document, and the one after its last."""
        return self._first_sequences[document], self._first_sequences[document + 1]

    def get(self, document: int, limit: int | None = None) -> np.ndarray:
        """Ids of a document, (tokens,), at most the first `limit`, checked as in `read`."""
        if not 0 <= document < self.documents:
            raise IndexError(f"document {document} of {self.documents}")
        start, end = map(self.start, self.sequences_of(document))
        return self.read(start, end if limit is None else min(end, start + limit))

    @property
    def sentences(self) -> int:
        """Number of sequences: of sentences if their bounds are recorded, else of documents."""
        return len(self.lengths)

    @property
    def has_sentence_bounds(self) -> bool:
        """Whether each sentence is a sequence: the builder recorded so, or a document has several sequences."""
        return self.sentences > self.documents or "sentences" in self.manifest

    def positions(self, sequences: np.ndarray) -> np.ndarray:
        """`start` of each of these sequences, (n,) int64."""
        starts = np.full(len(sequences), self.tokens, np.int64)
        inside = sequences < self.sentences
        starts[inside] = self._pointers[sequences[inside]] // self.dtype.itemsize
        return starts

    @property
    def starts(self) -> np.ndarray:
        """Position in `flat` at which each sequence begins, followed by `tokens`: (sentences + 1,) int64, a copy."""
        return self.positions(np.arange(self.sentences + 1))

    @property
    def eod_id(self) -> int | None:
        """The id that ends every document; None if there is none, or no manifest."""
        return self.manifest.get("eod_id")

    @property
    def tokenizer_hash(self) -> str | None:
        """`Tokenizer.hash` of the tokenizer that it was made with; None without a manifest."""
        return self.manifest.get("tokenizer_hash")

    @property
    def tokenizer_dir(self) -> Path | None:
        """Folder of the tokenizer that it was made with; None without a manifest."""
        relative = self.manifest.get("tokenizer")
        return None if relative is None else Path(self.prefix).parent / relative

    def tokenizer_problems(self) -> list[str]:
        """What is wrong with the tokenizer's folder, if it exists: it must hold the tokenizer that the corpus was made with."""
        folder = self.tokenizer_dir
        if folder is None or not os.path.isdir(folder):
            return []
        from common.data import tokenizer

        try:
            folder_hash = tokenizer.load(folder).hash
        except BadInput as error:
            return error.problems
        if folder_hash == self.tokenizer_hash:
            return []
        return [
            f"{self.prefix} was made with tokenizer {str(self.tokenizer_hash)[:12]}, its folder {folder} holds "
            f"{folder_hash[:12]}; put the tokenizer back, build the corpus again, or give the tokenizer that it was made with: "
            "data.tokenizer=DIR"
        ]

    @cached_property
    def max_token_id(self) -> int:
        """The largest id, from the manifest or by reading the corpus once; -1 if it is empty. BadInput for ids below 0."""
        return self.manifest["max_token_id"] if self.manifest else largest_id(self)

    @cached_property
    def content_hash(self) -> str:
        """sha256 (hex) of the sha256 of .bin and .idx, from the manifest or by reading both once."""
        sums = self.manifest["sha256"] if self.manifest else {s: sha256(f"{self.prefix}.{s}") for s in ("bin", "idx")}
        return hashlib.sha256(f"{sums['bin']} {sums['idx']}".encode()).hexdigest()

    def verify(self, vocab_size: int | None = None) -> None:
        """Compare size and sampled blocks of both files with the manifest; check that every id is below `vocab_size`.

        About a megabyte is read, which finds files that were swapped, cut or rebuilt. A byte changed elsewhere is found when
        its block is first read, or by `python -m data.verify`. BadInput names the file.
        """
        for suffix, expected in self.manifest.get("fingerprint", {}).items():
            if fingerprint(f"{self.prefix}.{suffix}") != expected:
                raise BadInput(
                    f"{self.prefix}.{suffix} is not the file that {self.prefix}.json describes; build or copy all three again"
                )
        if vocab_size is not None and self.max_token_id >= vocab_size:
            raise BadInput(
                f"{self.prefix} holds token id {self.max_token_id:,}, the model knows ids below {vocab_size:,}; "
                "tokenize the corpus with the model's tokenizer, or set the model's vocabulary to the corpus's"
            )


_UNKNOWN = {"eod_id": None, "tokenizer": None, "tokenizer_hash": None, "tokenizer_size": None}


def _made_by_quickstart(folder: str) -> str | None:
    """What makes the corpora of `folder` if a quickstart does: 'bash scripts/quickstart.sh gpt builds it, as does python -m
    data.python_docs corpora/python'."""
    for path in sorted(ROOT.glob("recipes/*/configs/quickstart.yaml")):
        try:
            command = read_yaml(path).get("quickstart", {})["corpus"]
            made = command.split()[3]  # python -m data.NAME FOLDER [options]
        except (BadInput, KeyError, IndexError, TypeError, AttributeError):
            continue  # somebody's draft of a recipe
        if Path(made) == Path(folder):
            return f"bash scripts/quickstart.sh {path.parent.parent.name} builds it, as does {command}"
    return None


def write_manifest(prefix: str | Path, metadata: dict[str, Any]) -> dict[str, Any]:
    """Write PREFIX.crc32 (checksums of blocks) and PREFIX.json: counts, checksums and the largest id of the files, and
    `metadata`. Returns the content of PREFIX.json.

    metadata: eod_id, tokenizer (its folder, relative to the manifest), tokenizer_hash, tokenizer_size, each None if unknown,
    and whatever else the builder records (command, sources, what it skipped).
    """
    prefix = str(prefix)
    for suffix in (".json", ".crc32"):
        Path(prefix + suffix).unlink(missing_ok=True)
    corpus = IndexedDataset(prefix)
    manifest = (
        {
            "tokens": corpus.tokens,
            "documents": corpus.documents,
            **({"sentences": corpus.sentences} if corpus.has_sentence_bounds else {}),
            "dtype": corpus.dtype.name,
            "max_token_id": largest_id(corpus),
            "sha256": {suffix: sha256(f"{prefix}.{suffix}") for suffix in ("bin", "idx")},
            "fingerprint": {suffix: fingerprint(f"{prefix}.{suffix}") for suffix in ("bin", "idx")},
            "blocks": {"bytes": BLOCK, "crc32": write_checksums(prefix)},
        }
        | _UNKNOWN
        | metadata
    )
    manifest["checksum"] = checksum(manifest)
    write_json(prefix + ".json", manifest)
    return manifest


def largest_id(corpus: IndexedDataset, chunk: int = 2**24) -> int:
    """The largest id; -1 if there are no ids. BadInput for an id below 0."""
    largest = -1
    for start in range(0, corpus.tokens, chunk):
        ids = corpus.flat[start : start + chunk]
        if ids.min() < 0:
            raise BadInput(f"{corpus.prefix}.bin: holds token id {ids.min()}; ids start at 0: build the corpus again")
        largest = max(largest, int(ids.max()))
    return largest
