"""Examples for finetuning, in the order of common/data/sampler.py, with the interface that common/preflight.py expects.

They are tokenized when a run starts, since they are few compared with a pretraining corpus: GLUE's largest task has 20 million
tokens.
"""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from common.data.sampler import epoch_key, permute

if TYPE_CHECKING:
    from common.data.batches import MicroBatch


class Source:
    """Where the examples come from. It has the attributes of a corpus that common/preflight.py reads."""

    def __init__(self, name: str, content_hash: str, folder: str | Path, tokenizer: Any, max_token_id: int):
        self.prefix, self.content_hash = name, content_hash
        self.tokenizer_dir, self.tokenizer_hash = Path(folder), tokenizer.hash
        self.manifest = {"tokenizer_size": tokenizer.size}
        self.max_token_id = max_token_id


class Examples:
    """Examples in the order of a run. A subclass defines by `collate` what a batch of them is.

    lengths: (N,) number of tokens of each example.
    shuffle: True: endless; each pass is a new permutation, given by (seed, pass). False: once, in the given order.
    length_window: with `shuffle`, the samples of so many steps, of `global_batch` each, are drawn together, and each of these
        steps gets samples of similar length (as transformers' group_by_length does for 50 steps). 0: of any length.
    pad_multiple: of what a batch's length is a multiple, if it is padded to its longest example.
    """

    unit = "examples"  # what len() counts

    def __init__(
        self, source: Source, lengths: np.ndarray, *, seed: int, shuffle: bool, notes: Sequence[str] = (),
        length_window: int = 0, global_batch: int = 1, pad_multiple: int = 8,
    ):  # fmt: skip
        self.corpora, self.content_hash, self.lengths, self.size = [source], source.content_hash, lengths, len(lengths)
        self.seed, self.shuffle, self.notes = seed, shuffle, list(notes)
        self.length_window, self.global_batch, self.pad_multiple = length_window, global_batch, pad_multiple
        self.vocab_size: int | None = None  # of the model, once `limit_ids` has set it
        self._window_from = lru_cache(4)(self._sort_window)

    def __len__(self) -> int:
        return self.size

    def collate(self, numbers: Any) -> "MicroBatch":
        """The batch of the examples with these sample numbers."""
        raise NotImplementedError

    def rounded(self, length: int) -> int:
        """A length, rounded up to a multiple of pad_multiple."""
        return -(-length // self.pad_multiple) * self.pad_multiple

    def batch_order(self, numbers: range) -> np.ndarray:
        """The sample numbers of a step, sorted by length: each micro batch has similar lengths, and so little padding."""
        return np.asarray(numbers)[np.argsort(self.lengths[self.indices(numbers)], kind="stable")]

    def verify(self) -> None:
        """Nothing to do: all examples were read when the dataset was opened."""

    def limit_ids(self, vocab_size: int | None, key: str) -> None:
        """Set the size of the model's embedding: batches with ids outside it are refused (common/data/batches.py)."""
        self.vocab_size = vocab_size

    def where(self, number: int) -> str:
        """Source and index of sample `number`, for messages."""
        return f"{self.corpora[0].prefix}: example {int(self.indices([number])[0]):,}"

    def indices(self, numbers: np.ndarray | Sequence[int] | range) -> np.ndarray:
        """Sample numbers (B,) -> indices of the examples (B,)."""
        i = np.asarray(numbers, dtype=np.int64)
        if not self.shuffle:
            return i
        return self._permuted(self._exchanged(i) if self.length_window else i)

    def _permuted(self, i: np.ndarray) -> np.ndarray:
        epoch, place = np.divmod(i, self.size)
        return permute(place, self.size, epoch_key(self.seed, np.zeros_like(i), epoch))

    def _exchanged(self, i: np.ndarray) -> np.ndarray:
        """Sample numbers (B,) -> the numbers (B,) whose samples take their places. They are of the same window and pass."""
        firsts = np.maximum(i - i % (self.length_window * self.global_batch), i - i % self.size)
        out = np.empty_like(i)
        for first in np.unique(firsts).tolist():
            members = firsts == first
            out[members] = self._window_from(first)[i[members] - first]
        return out

    def _sort_window(self, first: int) -> np.ndarray:
        """The sample numbers of the window that begins with `first`, in the order in which its steps take them: sorted by
        length and given to the steps in random order. It ends with the pass, so that every pass has each example once."""
        span = self.length_window * self.global_batch
        numbers = np.arange(first, min(first - first % span + span, first - first % self.size + self.size))
        by_length = numbers[np.argsort(self.lengths[self._permuted(numbers)], kind="stable")]
        bounds = np.flatnonzero(np.diff(numbers // self.global_batch)) + 1
        places = np.split(np.arange(len(numbers)), bounds)  # of each step, which a pass may begin and end with a part of
        [key] = epoch_key(self.seed, np.ones(1, np.int64), np.array([first]))
        order = permute(range(len(places)), len(places), key)
        out = np.empty_like(numbers)
        out[np.concatenate([places[step] for step in order])] = by_length
        return out
