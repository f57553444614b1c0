"""The samples of one or several corpora in the order in which training reads them.

The order is a pure function (invariant 3): sample number i of a run is the same sample of the same corpus on every rank and
after every resumption. There is no index to build and no state to save: the position in the data is the sample number.

Letters in shapes: B requested samples.
"""

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from common.data.indexed_dataset import IndexedDataset
from common.data.sampler import BlendPattern, epoch_key, permute
from common.errors import BadInput
from common.paths import Blend


class BlendedDataset:
    """The samples of one or several corpora, numbered 0, 1, 2, ... over all steps of a run: sample k of step s is
    s * global_batch + k. A family's subclass defines by `count_samples` and `collate` what a sample is.

    data: a prefix, a list of prefixes (blended by their numbers of samples), or a list of [weight, prefix].
    shuffle: True: endless; each pass over a corpus is a new permutation of its samples, given by (seed, pass).
        False (validation): file order, one corpus after the other, `len` samples and no more.

    `len` is the number of samples in one pass over all corpora. BadInput for a corpus without a sample, corpora with different
    tokenizers, or weights in file order.
    """

    unit = "samples"  # what len() counts

    def __init__(self, data: Blend, *, seed: int, shuffle: bool):
        prefixes, weights = _read_blend(data)
        self.corpora = [IndexedDataset(prefix) for prefix in prefixes]
        self.notes: list[str] = []  # what a user should know of the corpora
        self.vocab_size: int | None = None  # of the model, once `limit_ids` has set it
        self.seed, self.shuffle = seed, shuffle
        self._check_tokenizers()
        self.sizes = np.array([self.count_samples(corpus) for corpus in self.corpora])  # samples in each corpus
        if weights is not None and not shuffle:
            raise BadInput(f"data {data!r}: weights have no meaning in file order (validation); give prefixes")
        self.given_weights = weights
        self.weights = [float(n) for n in self.sizes] if weights is None else weights
        self._pattern = BlendPattern(self.weights) if shuffle and len(prefixes) > 1 else None
        if self._pattern is not None and not self._pattern.counts.all():
            smallest = prefixes[int(self._pattern.counts.argmin())]
            raise BadInput(f"{smallest}: under 1/{self._pattern.length:,} of the blend; raise its weight or leave it out")

    def count_samples(self, corpus: IndexedDataset) -> int:
        """How many samples a corpus has. BadInput if it has none."""
        raise NotImplementedError

    def _check_tokenizers(self) -> None:
        with_manifest = [corpus for corpus in self.corpora if corpus.manifest]
        for other in with_manifest[1:]:
            first = with_manifest[0]
            if other.tokenizer_hash != first.tokenizer_hash:
                raise BadInput(
                    f"{first.prefix} and {other.prefix} were made with different tokenizers; build the second again "
                    f"with --tokenizer {first.tokenizer_dir}"
                )

    def __len__(self) -> int:
        return int(self.sizes.sum())

    @cached_property
    def content_hash(self) -> str:
        """sha256 (hex) of the contents and given weights of the corpora; it does not depend on their names or on settings."""
        weights: Sequence[float | None] = self.given_weights or [None] * len(self.corpora)
        parts = [[weight, corpus.content_hash] for weight, corpus in zip(weights, self.corpora, strict=True)]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def limit_ids(self, vocab_size: int | None, key: str) -> None:
        """`IndexedDataset.limit_ids` of each corpus."""
        self.vocab_size = vocab_size
        for corpus in self.corpora:
            corpus.limit_ids(vocab_size, key)

    def batch_order(self, numbers: range) -> np.ndarray:
        """The sample numbers of a step in the order in which its micro batches take them: unchanged."""
        return np.asarray(numbers)

    def where(self, number: int) -> str:
        """Corpus and index of sample `number`, for messages."""
        corpus, index = self.indices([number])
        return f"{self.corpora[int(corpus[0])].prefix}: sample {int(index[0]):,}"

    def verify(self, vocab_size: int | None = None) -> None:
        """`IndexedDataset.verify` of each corpus."""
        for corpus in self.corpora:
            corpus.verify(vocab_size)

    def indices(self, numbers: np.ndarray | Sequence[int] | range) -> tuple[np.ndarray, np.ndarray]:
        """Sample numbers (B,) -> corpus number (B,) and sample index in that corpus (B,), int64."""
        i = np.asarray(numbers, dtype=np.int64)
        if len(i) and (i.min() < 0 or not self.shuffle and i.max() >= len(self)):
            raise IndexError(f"sample numbers {i.min()} to {i.max()}; valid are 0 to {len(self) - 1}")
        if not self.shuffle:
            ends = np.cumsum(self.sizes)
            corpus = np.searchsorted(ends, i, side="right")
            return corpus, i - (ends - self.sizes)[corpus]
        corpus, before = self._pattern.assign(i) if self._pattern else (np.zeros_like(i), i)
        epoch, position = np.divmod(before, self.sizes[corpus])
        key = epoch_key(self.seed, corpus, epoch)
        index = np.empty_like(i)
        for c, size in enumerate(self.sizes):
            members = corpus == c
            if members.any():
                index[members] = permute(position[members], int(size), key[members])
        return corpus, index


def _read_blend(data: Blend) -> tuple[list[str], list[float] | None]:
    """The prefixes, and their weights if they are given."""
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
