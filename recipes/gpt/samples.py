"""The samples that GPT is pretrained on: windows of seq_len tokens over running text, or one document per sample.

Letters in shapes: B samples, T `seq_len`.
"""

from collections.abc import Sequence

import numpy as np

from common.data.blended_dataset import BlendedDataset
from common.data.indexed_dataset import IndexedDataset
from common.errors import BadInput
from common.paths import Blend


class Samples(BlendedDataset):
    """Samples of running text, for models that predict the next token.

    seq_len: T, the number of tokens that a sample predicts.
    pack: if true, the documents of a corpus are concatenated and sample j is tokens [j*T, j*T + T]. If false, sample j is
        document j, truncated to T+1 tokens and padded (with `pad_id`, else the end-of-document id, else 0).
    eod_mask_loss: the token after an end of document is not a target, since it cannot be predicted.
    reset_attention: batches also contain `segment` and `position`.
    eod_id: the end-of-document id of corpora without a manifest.

    Raises BadInput as BlendedDataset does, and for a corpus shorter than one sample or a missing end-of-document id.
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
        self.eod_id = self._find_eod_id(eod_id)
        self.pad_id = next((i for i in (pad_id, self.eod_id) if i is not None), 0)

    def _find_eod_id(self, default: int | None) -> int | None:
        """The end-of-document id in the manifests, else `default`. Raises BadInput if an option needs one and there is none."""
        known = [c for c in self.corpora if c.manifest]
        eod_id = known[0].eod_id if known else default
        if not (self.eod_mask_loss or self.reset_attention):
            return eod_id
        if eod_id is None:
            remedy = "build the corpus with a tokenizer that has one (a character tokenizer does not)"
            if not known:
                remedy = "give the tokenizer that the corpus was built with, if it has one: data.tokenizer=DIR"
            raise BadInput(
                f"{self.corpora[0].prefix} names no end of document id; data.eod_mask_loss and data.reset_attention "
                f"need it: set both to false, or {remedy}"
            )
        for corpus in self.corpora:
            if not corpus.manifest:
                _check_ends(corpus, eod_id)
        return eod_id

    def count_samples(self, corpus: IndexedDataset) -> int:
        samples = (corpus.tokens - 1) // self.seq_len if self.pack else corpus.documents
        if samples < 1:
            raise BadInput(
                f"{corpus.prefix}: {corpus.tokens:,} tokens, less than one sample ({self.seq_len + 1:,}); "
                "give more text or a smaller data.seq_len"
            )
        return samples

    def collate(self, numbers: np.ndarray | Sequence[int] | range) -> dict[str, np.ndarray]:
        """Assemble the samples with these numbers into a micro batch.

        tokens (B, T+1) int64: inputs are [:, :-1], targets [:, 1:]. loss_mask (B, T) bool: whether target t counts. lengths
        (B,) int64: number of inputs without padding. With reset_attention also segment (B, T) int32: number of the document
        of input t within the sample; and position (B, T) int64: position of input t in that document.
        """
        corpus, index = self.indices(numbers)
        tokens = np.full((len(index), self.seq_len + 1), self.pad_id, dtype=np.int64)
        lengths = np.empty(len(index), dtype=np.int64)  # tokens of each sample, without padding
        for row, (c, j) in enumerate(zip(corpus.tolist(), index.tolist(), strict=True)):
            ids = self._ids(self.corpora[c], j)
            tokens[row, : len(ids)] = ids
            lengths[row] = len(ids)
        loss_mask = np.arange(1, self.seq_len + 1) < lengths[:, None]
        batch = {"tokens": tokens, "loss_mask": loss_mask, "lengths": np.minimum(lengths, self.seq_len)}
        if self.eod_mask_loss:
            loss_mask &= tokens[:, :-1] != self.eod_id
        if self.reset_attention:
            batch["segment"], batch["position"] = self._segments(tokens, lengths)
        return batch

    def _ids(self, corpus: IndexedDataset, j: int) -> np.ndarray:
        if not self.pack:
            return corpus.get(j, self.seq_len + 1)
        return corpus.read(j * self.seq_len, (j + 1) * self.seq_len + 1)

    def _segments(self, tokens: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """tokens (B, T+1), lengths without padding (B,) -> segment, position (B, T). Padding adds at most one segment."""
        positions = np.arange(self.seq_len)
        begins = np.zeros((len(tokens), self.seq_len), dtype=bool)
        begins[:, 1:] = (tokens[:, : self.seq_len - 1] == self.eod_id) & (positions[:-1] < lengths[:, None])
        start = np.maximum.accumulate(np.where(begins, positions, 0), axis=1)
        return np.cumsum(begins, axis=1, dtype=np.int32), positions - start


def _check_ends(corpus: IndexedDataset, eod_id: int, documents: int = 100) -> None:
    """Raise BadInput unless the first documents end with this id (Megatron's tool appends it only with --append-eod)."""
    for number in range(min(documents, corpus.documents)):
        ids = corpus.get(number)
        if len(ids) and ids[-1] != eod_id:
            raise BadInput(
                f"{corpus.prefix}: document {number} ends in id {ids[-1]}, the tokenizer's end of document is {eod_id}; "
                "tokenize with it (Megatron's tool: --append-eod), give the tokenizer that the corpus was built with "
                "(data.tokenizer=DIR), or set data.eod_mask_loss and data.reset_attention to false"
            )
