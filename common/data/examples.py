"""Labelled examples for finetuning: tokenized when a run starts, in the order of common/data/sampler.py, with what
common/preflight.py asks
of a corpus. Small against a corpus for pretraining: all of GLUE's largest task is 20 million tokens."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from common.data.sampler import epoch_key, permute

if TYPE_CHECKING:
    from common.data.batches import MicroBatch


class Source:
    """What common/preflight.py wants to know of where samples come from."""

    def __init__(self, name: str, content_hash: str, folder: str | Path, tokenizer: Any, max_token_id: int):
        self.prefix, self.content_hash = name, content_hash
        self.tokenizer_dir, self.tokenizer_hash = Path(folder), tokenizer.hash
        self.manifest = {"tokenizer_size": tokenizer.size}
        self.max_token_id = max_token_id


class Examples:
    """Examples in the order of a run. A subclass says by `collate` what a batch of them is.

    lengths: (N,) tokens of each example. shuffle: True: endless, each pass a new permutation given by (seed, pass). False: in
    order, once.
    """

    unit = "examples"  # what len() counts

    def __init__(self, source: Source, lengths: np.ndarray, *, seed: int, shuffle: bool, notes: Sequence[str] = ()):
        self.corpora, self.content_hash, self.lengths, self.size = [source], source.content_hash, lengths, len(lengths)
        self.seed, self.shuffle, self.notes = seed, shuffle, list(notes)
        self.vocab_size: int | None = None  # of the model, once `limit_ids` says it

    def __len__(self) -> int:
        return self.size

    def collate(self, numbers: Any) -> "MicroBatch":
        """The examples of these sample numbers as a batch."""
        raise NotImplementedError

    def batch_order(self, numbers: range) -> np.ndarray:
        """Sample numbers by length: micro batches of a step are of like lengths, and little is padding."""
        return np.asarray(numbers)[np.argsort(self.lengths[self.indices(numbers)], kind="stable")]

    def verify(self) -> None:
        """Read whole already."""

    def limit_ids(self, vocab_size: int | None, key: str) -> None:
        """What the model's embedding holds: batches with other ids are refused (common/data/batches.py)."""
        self.vocab_size = vocab_size

    def where(self, number: int) -> str:
        """Sample `number`, for messages."""
        return f"{self.corpora[0].prefix}: example {int(self.indices([number])[0]):,}"

    def indices(self, numbers: np.ndarray | Sequence[int] | range) -> np.ndarray:
        """Sample numbers (B,) -> indices of the examples (B,)."""
        i = np.asarray(numbers, dtype=np.int64)
        if not self.shuffle:
            return i
        epoch, place = np.divmod(i, self.size)
        return permute(place, self.size, epoch_key(self.seed, np.zeros_like(i), epoch))
