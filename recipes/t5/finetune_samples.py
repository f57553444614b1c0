"""The samples that T5 is finetuned on: tokenized pairs of an input and a target. This module does not import torch.

Letters in shapes: B samples, T positions of the input, S of the target.
"""

from typing import Any

import numpy as np

from common.data import batches, examples
from common.data.tokenizer import Tokenizer

CHUNK = 10_000  # texts per call of the tokenizer
Ids = tuple[np.ndarray, np.ndarray]  # the concatenated ids of N texts, and where each text starts (N + 1,)


class Samples(examples.Examples):
    """Inputs and targets, each ending with the end-of-sequence token."""

    def __init__(self, source: examples.Source, ids: tuple[Ids, Ids], *, eos: int, pad: int, seq_len: int, target_len: int,
                 **order: Any):  # fmt: skip
        super().__init__(source, np.diff(ids[0][1]) + np.diff(ids[1][1]), **order)
        (self.sources, self.targets), self.eos, self.pad = ids, eos, pad
        self.seq_len, self.target_len = seq_len, target_len

    def collate(self, numbers: np.ndarray | range) -> batches.MicroBatch:
        """As samples.Samples.collate: inputs (B, T) and targets (B, S) int64, input_lengths (B,), loss_mask (B, S) bool,
        lengths (B,). T and S are the longest lengths in the batch, rounded up."""
        indices = self.indices(numbers).tolist()
        sources, input_lengths = self._padded(self.sources, indices, self.seq_len)
        targets, target_lengths = self._padded(self.targets, indices, self.target_len)
        loss_mask = np.arange(targets.shape[1]) < target_lengths[:, None]
        return {
            "inputs": sources, "targets": targets, "loss_mask": loss_mask, "input_lengths": input_lengths,
            "lengths": input_lengths + target_lengths,
        }  # fmt: skip

    def _padded(self, ids: Ids, indices: list[int], limit: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids (B, T) int64 of these texts, truncated to `limit` tokens with the end of sequence, and their lengths (B,)."""
        flat, starts = ids
        lengths = np.array([min(int(starts[i + 1] - starts[i]) + 1, limit) for i in indices])
        width = min(limit, self.rounded(int(lengths.max())))
        padded = np.full((len(indices), width), self.pad, np.int64)
        for row, (i, length) in enumerate(zip(indices, lengths.tolist(), strict=True)):
            padded[row, : length - 1] = flat[starts[i] : starts[i] + length - 1]
            padded[row, length - 1] = self.eos
        return padded, lengths


def encoded(tokenizer: Tokenizer, texts: list[str]) -> Ids:
    parts = [tokenizer.encode_flat(texts[i : i + CHUNK]) for i in range(0, len(texts), CHUNK)]
    lengths = np.concatenate([lengths for _, lengths in parts])
    return np.concatenate([ids for ids, _ in parts]), np.concatenate([[0], np.cumsum(lengths)])
