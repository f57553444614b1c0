"""Tokenized corpora on disk, and the order in which training reads them.

On disk a corpus is PREFIX.bin (ids end to end) and PREFIX.idx (lengths of sequences, bounds of documents), the format of
Megatron's IndexedDataset, plus our PREFIX.json (the manifest: counts, checksums, tokenizer). Files by Megatron's own builder,
without a manifest, are read as well.

The order is a pure function (law 3 of the house): sample number i of a run is the same sample of the same corpus
whoever asks, and there is no index to build, no state to save: the position in the data is the sample number.

Letters in shapes: B samples asked for, T `seq_len`.
"""

import hashlib
import json
import os
import struct
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import BadInput, Missing

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")  # magic, version, type code, number of sequences, number of document bounds
_DTYPE_OF_CODE: dict[int, type[np.generic]] = {
    1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16
}  # fmt: skip
_CODE_OF_DTYPE = {dtype: code for code, dtype in _DTYPE_OF_CODE.items()}

Blend = str | Path | Sequence[str | Path | Sequence[float | str]]
"""A prefix, a list of prefixes, or a list of [weight, prefix]."""


# ---- files ----------------------------------------------------------------------------------------------------------


class Writer:
    """Writes PREFIX.bin and PREFIX.idx under temporary names, which `finish` renames: half a corpus never looks whole.

    A document is one sequence, or several where `append` is told so (BERT: a sentence is a sequence). `sync` returns a
    state; `Writer(prefix, dtype, resume=state)` continues from it after an interruption, dropping what was written later.
    """

    def __init__(self, prefix: str | Path, dtype: type[np.generic], resume: dict[str, int] | None = None):
        if dtype not in _CODE_OF_DTYPE:
            raise ValueError(f"dtype {dtype}: the format knows {[d.__name__ for d in _CODE_OF_DTYPE]}")
        self.prefix = str(prefix)
        self.dtype = np.dtype(dtype)
        state = resume or {"documents": 0, "tokens": 0}
        self.documents, self.tokens = state["documents"], state["tokens"]
        self.sequences = state.get("sequences", self.documents)
        self._open_tokens = 0  # written of a sequence that has not ended
        self._bound = self.sequences  # sequences before the document that has not ended
        Path(self.prefix).parent.mkdir(parents=True, exist_ok=True)
        self._bin = self._open(".bin.part", self.tokens * self.dtype.itemsize, resume is None)
        self._lengths = self._open(".lengths.part", self.sequences * 4, resume is None)
        self._bounds: Any = None  # ends of documents in sequences, int64; there once a document has several
        if self.sequences > self.documents:
            self._bounds = self._open(".bounds.part", self.documents * 8, new=False)

    def _open(self, suffix: str, size: int, new: bool) -> Any:
        whole = self.prefix + suffix.removesuffix(".part")
        if not new and not os.path.exists(self.prefix + suffix) and os.path.exists(whole):
            os.replace(whole, self.prefix + suffix)  # interrupted inside `finish`
        file = open(self.prefix + suffix, "wb" if new else "r+b")
        file.seek(0, os.SEEK_END)
        if file.tell() < size:
            file.close()
            raise BadInput(f"{self.prefix}{suffix}: shorter than when last saved; delete its folder to begin anew")
        file.truncate(size)
        file.seek(size)
        return file

    def append(
        self, ids: np.ndarray, ends: np.ndarray | Sequence[int], documents: np.ndarray | Sequence[int] | None = None
    ) -> None:
        """Append ids; `ends` are the places in `ids` (0 < end <= len) at which a sequence ends, in rising order.

        documents: how many of these ends lie before each end of a document (1 <= number <= len(ends)), in rising order:
        ends 3, 8, 9 and documents 2, 3 are a document of 3 + 5 ids and one of 1; sequences without ids, and documents
        without sequences, are left out. None: every sequence is a document.
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
            filled = np.concatenate([[0], np.cumsum(lengths > 0)])  # before each sequence, and before the end
            bounds = np.unique(self.sequences + filled[np.asarray(documents, dtype=np.int64)])
            bounds, lengths = bounds[bounds > self._bound], lengths[lengths > 0]
        if lengths.max(initial=0) >= 2**31:
            raise BadInput(f"{self.prefix}: a sequence of {lengths.max():,} tokens; at most 2^31 - 1; split it")
        self._lengths.write(lengths.astype("<i4").tobytes())
        self.sequences += len(lengths)
        self._end_documents(bounds)

    def _end_documents(self, bounds: np.ndarray) -> None:
        """bounds: number of sequences, from the corpus's beginning, at which documents end."""
        if not len(bounds):
            return
        if self._bounds is None and bounds[-1] > self.documents + len(bounds):  # the first of several sequences
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
        """Append one whole document, each of its sentences (their ids) a sequence; those without ids are left out."""
        ids = np.concatenate([np.empty(0, self.dtype), *(np.asarray(s, dtype=self.dtype) for s in sentences)])
        self.append(ids, np.cumsum([len(sentence) for sentence in sentences]), [len(sentences)])

    def _files(self) -> list[Any]:
        return [file for file in (self._bin, self._lengths, self._bounds) if file is not None]

    def sync(self) -> dict[str, int]:
        """Put everything on disk and return the state to resume from. Between documents only."""
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

    def finish(self) -> None:
        """Write the index and give both files their names."""
        self.sync()
        self.close()
        lengths = np.fromfile(self.prefix + ".lengths.part", dtype="<i4")
        pointers = (np.cumsum(lengths, dtype=np.int64) - lengths) * self.dtype.itemsize  # bytes
        bounds = np.arange(1, len(lengths) + 1, dtype="<i8")
        if self._bounds is not None:
            bounds = np.fromfile(self.prefix + ".bounds.part", dtype="<i8")
        with open(self.prefix + ".idx.part", "wb") as file:
            code = _CODE_OF_DTYPE[self.dtype.type]
            file.write(_HEADER.pack(_MAGIC, 1, code, len(lengths), len(bounds) + 1))
            file.write(lengths.tobytes())
            file.write(pointers.astype("<i8").tobytes())
            file.write(bytes(8) + bounds.tobytes())
            file.flush()
            os.fsync(file.fileno())
        Path(self.prefix + ".json").unlink(missing_ok=True)  # of an earlier corpus of this name
        os.replace(self.prefix + ".bin.part", self.prefix + ".bin")
        os.replace(self.prefix + ".idx.part", self.prefix + ".idx")
        os.unlink(self.prefix + ".lengths.part")
        Path(self.prefix + ".bounds.part").unlink(missing_ok=True)


class Corpus:
    """A corpus, read through a memory map: opening it costs the same whatever its size.

    documents, tokens: counts. flat: ids of all documents end to end, (tokens,). lengths: tokens of each sequence,
    int32. bounds: (documents + 1,) number of the first sequence of each document; a document is one sequence, or where
    sentences are kept (--sentences, BERT) one a sentence. manifest: content of PREFIX.json, {} without one.

    BadInput, naming the file, when one is missing, truncated, or does not belong to the other.
    """

    def __init__(self, prefix: str | Path):
        self.prefix = str(prefix).removesuffix(".bin").removesuffix(".idx")
        self._require_files()
        bin_size = os.path.getsize(self.prefix + ".bin")  # bytes
        self._read_index()
        self.tokens = 0
        if len(self.lengths):
            self.tokens = int(self._pointers[-1]) // self.dtype.itemsize + int(self.lengths[-1])
        if bin_size != self.tokens * self.dtype.itemsize:
            raise BadInput(
                f"{self.prefix}.bin has {bin_size:,} bytes, {self.prefix}.idx describes "
                f"{self.tokens * self.dtype.itemsize:,}: one is cut or of another corpus; build or copy both again"
            )
        self.flat = np.empty(0, self.dtype)
        if self.tokens:  # as a plain array over the map: slicing it does not pass through memmap's Python code
            self.flat = np.asarray(np.memmap(self.prefix + ".bin", self.dtype, "r"))
        self.manifest = self._read_manifest()

    def _require_files(self) -> None:
        missing = [suffix for suffix in (".bin", ".idx") if not os.path.isfile(self.prefix + suffix)]
        if len(missing) == 1:
            raise BadInput(f"{self.prefix}{missing[0]} is missing beside its other half; build or copy both again")
        if missing and os.path.isfile(os.path.join(self.prefix, "train.bin")):
            raise BadInput(f"{self.prefix} is a folder of corpora; give one of them, such as {self.prefix}/train")
        if missing:
            folder = os.path.dirname(self.prefix) or "corpora/NAME"
            raise Missing(
                f"no corpus at {self.prefix} ({self.prefix}.bin and .idx); build it (python -m data.NAME {folder}; "
                "the modules are in data/), or give the prefix of one that is there"
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
        if size not in (expected, expected + sequences):  # a byte a sequence more where modes are kept (images)
            raise BadInput(f"{path}: {size:,} bytes where its head announces {expected:,}; build or copy it again")
        self.dtype = np.dtype(_DTYPE_OF_CODE[code])
        # The three arrays do not lie at multiples of their item size; numpy reads them all the same.
        raw = np.asarray(np.memmap(path, np.uint8, "r"))
        first, second = _HEADER.size + sequences * 4, _HEADER.size + sequences * 12
        self.lengths = raw[_HEADER.size : first].view("<i4")
        self._pointers = raw[first:second].view("<i8")  # byte at which each sequence begins
        self.bounds = raw[second : second + bounds * 8].view("<i8").astype(np.int64)  # aligned: it is searched
        self.documents = max(bounds - 1, 0)
        if bounds and int(self.bounds[-1]) != sequences:
            raise BadInput(f"{path}: {sequences:,} sequences, documents end at {self.bounds[-1]:,}; build it again")

    def _read_manifest(self) -> dict[str, Any]:
        path = Path(self.prefix + ".json")
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
            if not _FACTS.keys() | {"sha256", "fingerprint", "max_token_id"} <= manifest.keys():
                raise ValueError
            return manifest
        except FileNotFoundError:
            return {}
        except (ValueError, AttributeError):
            raise BadInput(f"{path}: not a manifest; build the corpus again or delete this file") from None

    def _start(self, document: int) -> int:
        sequence = int(self.bounds[document])
        return int(self._pointers[sequence]) // self.dtype.itemsize if sequence < len(self.lengths) else self.tokens

    def get(self, document: int, limit: int | None = None) -> np.ndarray:
        """Ids of a document, (tokens,), at most the first `limit`; a view, in the stored type."""
        if not 0 <= document < self.documents:
            raise IndexError(f"document {document} of {self.documents}")
        start, end = self._start(document), self._start(document + 1)
        return self.flat[start : end if limit is None else min(end, start + limit)]

    @property
    def sentences(self) -> int:
        """Number of sequences: of sentences where their bounds are kept, else of documents."""
        return len(self.lengths)

    @property
    def has_sentence_bounds(self) -> bool:
        """Whether documents are kept as one sequence a sentence: their builder says so, or a document has several."""
        return self.sentences > self.documents or "sentences" in self.manifest

    @cached_property
    def starts(self) -> np.ndarray:
        """Place in `flat` at which each sequence begins, and at the end `tokens`: (sentences + 1,) int64."""
        return np.append(self._pointers // self.dtype.itemsize, np.int64(self.tokens))

    @property
    def eod_id(self) -> int | None:
        """Id that ends every document, or None where there is none, or no manifest to tell."""
        return self.manifest.get("eod_id")

    @property
    def tokenizer_hash(self) -> str | None:
        """`Tokenizer.hash` of the tokenizer it was made with; None without a manifest."""
        return self.manifest.get("tokenizer_hash")

    @property
    def tokenizer_dir(self) -> Path | None:
        """Folder of the tokenizer it was made with; None without a manifest."""
        relative = self.manifest.get("tokenizer")
        return None if relative is None else Path(self.prefix).parent / relative

    @cached_property
    def max_token_id(self) -> int:
        """The largest id; from the manifest, else by reading the corpus once. -1 when empty."""
        return self.manifest["max_token_id"] if self.manifest else _largest(self.flat)

    @cached_property
    def content_hash(self) -> str:
        """sha256 (hex) over those of .bin and .idx; from the manifest, else by reading both once."""
        sums = self.manifest["sha256"] if self.manifest else {s: _sha256(f"{self.prefix}.{s}") for s in ("bin", "idx")}
        return hashlib.sha256(f"{sums['bin']} {sums['idx']}".encode()).hexdigest()

    def verify(self, vocab_size: int | None = None) -> None:
        """Compare size and sampled blocks of both files with the manifest; check that every id is below `vocab_size`.

        About a megabyte is read, so a changed byte may pass where `content_hash` of the files would not; files swapped,
        cut or built anew are found. BadInput names the file.
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


_FACTS = {"eod_id": None, "tokenizer": None, "tokenizer_hash": None, "tokenizer_size": None}


def write_manifest(prefix: str | Path, facts: dict[str, Any]) -> dict[str, Any]:
    """Write PREFIX.json: what the files tell (counts, checksums, largest id) and `facts`; return all of it.

    facts: eod_id, tokenizer (its folder, relative to the manifest), tokenizer_hash, tokenizer_size, each None where
    unknown, and whatever else the builder knows (command, sources, what was skipped).
    """
    prefix = str(prefix)
    Path(prefix + ".json").unlink(missing_ok=True)
    corpus = Corpus(prefix)
    manifest = (
        {
            "tokens": corpus.tokens,
            "documents": corpus.documents,
            **({"sentences": corpus.sentences} if corpus.has_sentence_bounds else {}),
            "dtype": corpus.dtype.name,
            "max_token_id": corpus.max_token_id,
            "sha256": {suffix: _sha256(f"{prefix}.{suffix}") for suffix in ("bin", "idx")},
            "fingerprint": {suffix: fingerprint(f"{prefix}.{suffix}") for suffix in ("bin", "idx")},
        }
        | _FACTS
        | facts
    )
    write_json(prefix + ".json", manifest)
    return manifest


def write_json(path: str | Path, values: dict[str, Any]) -> None:
    """Write a JSON file so that a reader sees the old one or the new one, never half of it."""
    part = f"{path}.part"
    with open(part, "w", encoding="utf-8") as file:
        file.write(json.dumps(values, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def fingerprint(path: str | Path, blocks: int = 16, block_size: int = 65_536) -> str:
    """sha256 (hex) of a file's size and of `blocks` blocks of `block_size` bytes spread over it, both ends included."""
    size = os.path.getsize(path)
    digest = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        for k in range(blocks if size > blocks * block_size else 1):
            file.seek(k * (size - block_size) // (blocks - 1) if size > blocks * block_size else 0)
            digest.update(file.read(block_size if size > blocks * block_size else size))
    return digest.hexdigest()


def _sha256(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _largest(ids: np.ndarray, chunk: int = 2**24) -> int:
    return max((int(ids[start : start + chunk].max()) for start in range(0, len(ids), chunk)), default=-1)


# ---- order ----------------------------------------------------------------------------------------------------------

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_ROUNDS = 6


def _mix(x: np.ndarray) -> np.ndarray:
    """splitmix64's finalizer: every bit of the result depends on every bit of x, (...) uint64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permute(i: np.ndarray | Sequence[int], n: int, key: np.ndarray | int) -> np.ndarray:
    """Where a random permutation of 0..n-1 puts each i: (B,) int64 in [0, n). O(1) memory, no table.

    i: (B,), each in [0, n). key: the permutation's number, one for all or (B,), read as uint64.

    A Feistel network permutes 0..2^bits-1, the smallest such range that holds n. A result beyond n is put through it
    again until it lies below (cycle walking): that leaves a permutation of 0..n-1, at most 2 turns on average.
    """
    x = np.array(i, dtype=np.uint64, ndmin=1)
    keys = np.array(key, dtype=np.uint64, ndmin=1)[:, None]
    keys = np.broadcast_to(_mix(keys + _GOLDEN * np.arange(1, _ROUNDS + 1, dtype=np.uint64)), (len(x), _ROUNDS))
    bits = max(1, (n - 1).bit_length())
    shift = np.uint64(bits // 2)
    low, high = np.uint64((1 << bits // 2) - 1), np.uint64((1 << bits - bits // 2) - 1)
    todo = np.arange(len(x))
    while len(todo):
        left, right = x[todo] >> shift, x[todo] & low
        for r in range(0, _ROUNDS, 2):
            left = left ^ (_mix(right + keys[todo, r]) & high)
            right = right ^ (_mix(left + keys[todo, r + 1]) & low)
        x[todo] = (left << shift) | right
        todo = todo[x[todo] >= n]
    return x.astype(np.int64)


def epoch_key(seed: int, corpus: np.ndarray, epoch: np.ndarray) -> np.ndarray:
    """One key for each (seed, corpus number, epoch), (B,) uint64."""
    start = _mix(np.array([seed % 2**64], dtype=np.uint64) + _GOLDEN)
    return _mix(_mix(start + _GOLDEN * corpus.astype(np.uint64)) ^ (epoch.astype(np.uint64) * _GOLDEN))


class _Pattern:
    """Which corpus sample i of a blend comes from: a cycle of `length`, in which each corpus has its exact share.

    The next place goes to the corpus that lags its share most, so every prefix is close to the shares too.
    """

    def __init__(self, weights: Sequence[float], length: int = 10_000):
        exact = np.array(weights, dtype=np.float64) / np.sum(weights) * length
        self.counts = np.floor(exact).astype(np.int64)  # places of each corpus in a cycle
        rest = length - int(self.counts.sum())
        self.counts[np.argsort(self.counts - exact, kind="stable")[:rest]] += 1
        self.length = length
        self.corpus = np.empty(length, dtype=np.int64)  # corpus at each place
        self.rank = np.empty(length, dtype=np.int64)  # how often it came before in the cycle
        shares, placed = [int(c) for c in self.counts], [0] * len(self.counts)
        for place in range(length):
            c = max(range(len(shares)), key=lambda c: shares[c] * (place + 1) - placed[c] * length)
            self.corpus[place], self.rank[place] = c, placed[c]
            placed[c] += 1

    def locate(self, i: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Sample numbers (B,) -> corpus of each, and how many samples of that corpus came before."""
        cycle, place = np.divmod(i, self.length)
        corpus = self.corpus[place]
        return corpus, cycle * self.counts[corpus] + self.rank[place]


class Order:
    """The samples of one or several corpora, numbered 0, 1, 2, ... over all steps of a run: sample k of step s is
    s * global_batch + k. A family says by `_samples_in` and `rows` what a sample is.

    data: prefix, list of prefixes (blended by their number of samples), or list of [weight, prefix].
    shuffle: True: endless; each pass over a corpus is a new permutation of its samples, given by (seed, pass).
        False (validation): file order, one corpus after the other, `len` samples and no more.

    `len(order)` is the number of samples in one pass over all its corpora. BadInput for a corpus without a sample, corpora
    of different tokenizers, or weights in file order.
    """

    def __init__(self, data: Blend, *, seed: int, shuffle: bool):
        prefixes, weights = _read_blend(data)
        self.corpora = [Corpus(prefix) for prefix in prefixes]
        self.seed, self.shuffle = seed, shuffle
        self._one_tokenizer()
        self.sizes = np.array([self._samples_in(corpus) for corpus in self.corpora])  # samples in each corpus
        if weights is not None and not shuffle:
            raise BadInput(f"data {data!r}: weights have no meaning in file order (validation); give prefixes")
        self.given_weights = weights
        self.weights = [float(n) for n in self.sizes] if weights is None else weights
        self._pattern = _Pattern(self.weights) if shuffle and len(prefixes) > 1 else None
        if self._pattern is not None and not self._pattern.counts.all():
            lost = prefixes[int(self._pattern.counts.argmin())]
            raise BadInput(f"{lost}: under 1/{self._pattern.length:,} of the blend; raise its weight or leave it out")

    def _samples_in(self, corpus: Corpus) -> int:
        """How many samples a corpus has; BadInput if none."""
        raise NotImplementedError

    def _one_tokenizer(self) -> None:
        known = [c for c in self.corpora if c.manifest]
        for other in known[1:]:
            if other.tokenizer_hash != known[0].tokenizer_hash:
                raise BadInput(
                    f"{known[0].prefix} and {other.prefix} were made with different tokenizers; build the second again "
                    f"with --tokenizer {known[0].tokenizer_dir}"
                )

    def __len__(self) -> int:
        return int(self.sizes.sum())

    @cached_property
    def content_hash(self) -> str:
        """sha256 (hex) over the contents and given weights of the corpora, not their names; settings are not in it."""
        weights = self.given_weights or [None] * len(self.corpora)
        parts = [[weight, corpus.content_hash] for weight, corpus in zip(weights, self.corpora, strict=True)]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def verify(self, vocab_size: int | None = None) -> None:
        """`Corpus.verify` of each corpus."""
        for corpus in self.corpora:
            corpus.verify(vocab_size)

    def locate(self, numbers: np.ndarray | Sequence[int] | range) -> tuple[np.ndarray, np.ndarray]:
        """Sample numbers (B,) -> corpus number (B,) and sample index in that corpus (B,), int64."""
        i = np.asarray(numbers, dtype=np.int64)
        if len(i) and (i.min() < 0 or not self.shuffle and i.max() >= len(self)):
            raise IndexError(f"sample numbers {i.min()} to {i.max()}; there are {len(self)} from 0 on")
        if not self.shuffle:
            ends = np.cumsum(self.sizes)
            corpus = np.searchsorted(ends, i, side="right")
            return corpus, i - (ends - self.sizes)[corpus]
        corpus, before = self._pattern.locate(i) if self._pattern else (np.zeros_like(i), i)
        epoch, place = np.divmod(before, self.sizes[corpus])
        key = epoch_key(self.seed, corpus, epoch)
        index = np.empty_like(i)
        for c, n in enumerate(self.sizes):
            mine = corpus == c
            if mine.any():
                index[mine] = permute(place[mine], int(n), key[mine])
        return corpus, index

    def samples(self, first: int, count: int) -> list[tuple[int, int]]:
        """(corpus number, sample index in it) of samples first .. first+count-1."""
        corpus, index = self.locate(range(first, first + count))
        return list(zip(corpus.tolist(), index.tolist(), strict=True))


class Stream(Order):
    """Samples of running text, for models that predict the next token.

    seq_len: T, tokens predicted in a sample.
    pack: True: sample j of a corpus is its tokens [j*T, j*T + T], documents end to end. False: sample j is document j,
        cut to T+1 tokens and padded (`pad_id`, else the end of document id, else 0).
    eod_mask_loss: the token after an end of document, unpredictable, is no target.
    reset_attention: rows carry `segment` and `position` too.
    eod_id: only for corpora without a manifest.

    BadInput besides Order's: a corpus shorter than a sample, a missing end of document id.
    """

    def __init__(
        self,
        data: Blend,
        seq_len: int,
        *,
        pack: bool = True,
        seed: int = 1234,
        shuffle: bool = True,
        eod_mask_loss: bool = False,
        reset_attention: bool = False,
        eod_id: int | None = None,
        pad_id: int | None = None,
    ):
        self.seq_len, self.pack = seq_len, pack
        self.eod_mask_loss, self.reset_attention = eod_mask_loss, reset_attention
        super().__init__(data, seed=seed, shuffle=shuffle)
        self.eod_id = self._one_eod(eod_id)
        self.pad_id = next((i for i in (pad_id, self.eod_id) if i is not None), 0)

    def _one_eod(self, given: int | None) -> int | None:
        known = [c for c in self.corpora if c.manifest]
        eod_id = given if given is not None else known[0].eod_id if known else None
        if eod_id is None and (self.eod_mask_loss or self.reset_attention):
            raise BadInput(
                f"{self.corpora[0].prefix} names no end of document id; data.eod_mask_loss, data.reset_attention need "
                "it: set both to false, or build the corpus with a tokenizer that has one (characters have none)"
            )
        return eod_id

    def _samples_in(self, corpus: Corpus) -> int:
        samples = (corpus.tokens - 1) // self.seq_len if self.pack else corpus.documents
        if samples < 1:
            raise BadInput(
                f"{corpus.prefix}: {corpus.tokens:,} tokens, less than one sample ({self.seq_len + 1:,}); "
                "give more text or a smaller data.seq_len"
            )
        return samples

    def rows(self, numbers: np.ndarray | Sequence[int] | range) -> dict[str, np.ndarray]:
        """The samples of these numbers:

        tokens (B, T+1) int64: input is [:, :-1], target [:, 1:]; loss_mask (B, T) bool: target t counts; lengths (B,)
        int64: inputs that are no padding;
        with reset_attention also segment (B, T) int32: number in the row of the document that input t is of, and
        position (B, T) int64: its place in that document.
        """
        corpus, index = self.locate(numbers)
        tokens = np.full((len(index), self.seq_len + 1), self.pad_id, dtype=np.int64)
        lengths = np.empty(len(index), dtype=np.int64)  # real tokens of each row
        for row, (c, j) in enumerate(zip(corpus.tolist(), index.tolist(), strict=True)):
            ids = self._ids(self.corpora[c], j)
            tokens[row, : len(ids)] = ids
            lengths[row] = len(ids)
        loss_mask = np.arange(1, self.seq_len + 1) < lengths[:, None]
        out = {"tokens": tokens, "loss_mask": loss_mask, "lengths": np.minimum(lengths, self.seq_len)}
        if self.eod_mask_loss:
            loss_mask &= tokens[:, :-1] != self.eod_id
        if self.reset_attention:
            out["segment"], out["position"] = self._segments(tokens, lengths)
        return out

    def _ids(self, corpus: Corpus, j: int) -> np.ndarray:
        if not self.pack:
            return corpus.get(j, self.seq_len + 1)
        return corpus.flat[j * self.seq_len : (j + 1) * self.seq_len + 1]

    def _segments(self, tokens: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(B, T+1) tokens, (B,) real lengths -> segment, position, each (B, T). Padding is one segment at most."""
        places = np.arange(self.seq_len)
        begins = np.zeros((len(tokens), self.seq_len), dtype=bool)
        begins[:, 1:] = (tokens[:, : self.seq_len - 1] == self.eod_id) & (places[:-1] < lengths[:, None])
        start = np.maximum.accumulate(np.where(begins, places, 0), axis=1)
        return np.cumsum(begins, axis=1, dtype=np.int32), places - start


def _read_blend(data: Blend) -> tuple[list[str], list[float] | None]:
    """Prefixes, and their weights where given."""
    if isinstance(data, str | Path):
        return [str(data)], None
    pairs = [entry for entry in data if not isinstance(entry, str | Path)]
    if not data or pairs and len(pairs) != len(data):
        raise BadInput(f"data {list(data)!r}: give a prefix, a list of prefixes, or a list of [weight, prefix]")
    if not pairs:
        return [str(entry) for entry in data], None
    if not all(len(pair) == 2 and isinstance(pair[0], int | float) and pair[0] > 0 for pair in pairs):
        raise BadInput(f"data {list(data)!r}: each entry must be [weight above 0, prefix]")
    return [str(pair[1]) for pair in pairs], [float(pair[0]) for pair in pairs]
