"""Examples for finetuning, in the order of common/data/sampler.py, with the interface that common/preflight.py expects.

They are tokenized when a run starts, since they are few compared with a pretraining corpus: GLUE's largest task has 20 million
tokens.
"""

from collections.abc import Sequence
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
    """

    unit = "examples"  # what len() counts

    def __init__(self, source: Source, lengths: np.ndarray, *, seed: int, shuffle: bool, notes: Sequence[str] = ()):
        self.corpora, self.content_hash, self.lengths, self.size = [source], source.content_hash, lengths, len(lengths)
        self.seed, self.shuffle, self.notes = seed, shuffle, list(notes)
        self.vocab_size: int | None = None  # of the model, once `limit_ids` has set it

    def __len__(self) -> int:
        return self.size

    def collate(self, numbers: Any) -> "MicroBatch":
        """The batch of the examples with these sample numbers."""
        raise NotImplementedError

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
        epoch, place = np.divmod(i, self.size)
        return permute(place, self.size, epoch_key(self.seed, np.zeros_like(i), epoch))
