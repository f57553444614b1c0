"""T5's samples: an input and a target, made from running text or a pair of texts. Each depends only on (seed, number).

Span corruption (Raffel et al., arXiv:1910.10683, section 3.1.4; t5/data/preprocessors.py: random_spans_noise_mask): 15 % of
the tokens, in spans of 3 on average, are replaced in the input by one sentinel per span. The target lists the sentinels, each
followed by the tokens that it replaces. Both end with the end-of-sequence token. 568 raw tokens give 512 and 114.
Prefix language modelling (section 3.2.1; the LM adaptation of Lester et al., arXiv:2104.08691): a text of min(T, S) tokens
is cut at a random point: the input is the part before it, the target the part after it.
In a corpus of text-to-text tasks each document has two sequences: the first is the input, the second the target. Blended with
running text, it gives the paper's multi-task mixture.

Letters in shapes: B samples, T `seq_len` (input), S `target_len`.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from common.data.blended_dataset import BlendedDataset
from common.data.indexed_dataset import IndexedDataset
from common.errors import BadInput
from common.paths import Blend
from common.seeding import derive_seed


def counts_of(raw: int, noise_density: float, mean_noise_span_length: float) -> tuple[int, int]:
    """(noise tokens, spans) of a text of `raw` tokens, rounded as in T5. Two tokens or more give at least one of each."""
    if raw < 2:
        return 0, 0
    noise = min(max(round(raw * noise_density), 1), raw - 1)
    return noise, min(max(round(noise / mean_noise_span_length), 1), noise, raw - noise)


def lengths_of(raw: int, noise_density: float, mean_noise_span_length: float) -> tuple[int, int]:
    """Numbers of (input, target) tokens made from `raw` tokens, with sentinels and end-of-sequence tokens."""
    noise, spans = counts_of(raw, noise_density, mean_noise_span_length)
    return raw - noise + spans + 1, noise + spans + 1


def raw_tokens(seq_len: int, noise_density: float, mean_noise_span_length: float) -> int:
    """The largest number of raw tokens whose input fits into `seq_len` (T5's random_spans_helper): 568 for 512."""

    def fits(raw: int) -> bool:
        return lengths_of(raw, noise_density, mean_noise_span_length)[0] <= seq_len

    least, most = 2, 4  # bisection: once fits is false, it is false for all larger values
    while fits(most):
        least, most = most, 2 * most
    while most - least > 1:
        middle = (least + most) // 2
        least, most = (middle, most) if fits(middle) else (least, middle)
    return least


LEAST = {"span": {"seq_len": 3, "target_len": 3}, "prefix": {"seq_len": 2, "target_len": 2}}


def too_short(objective: Any, data: Any) -> list[str]:
    """Report lengths that are too short. From two tokens, span corruption makes three: a token, a sentinel, the end."""
    return [
        f"data.{name}={getattr(data, name)}: objective.kind={objective.kind} needs {least} or more"
        for name, least in LEAST[objective.kind].items()
        if getattr(data, name) < least
    ]


class Samples(BlendedDataset):
    """Samples of span corruption (kind='span') or prefix language modelling (kind='prefix').

    pack: if true, documents are concatenated and cut every `raw` tokens. If false, each sample is one document.
    sentinels: their ids in order of use.

    Raises BadInput for a corpus shorter than one sample, and for samples that need more sentinels than there are.
    """

    def __init__(
        self, data: Blend, seq_len: int, target_len: int, *, sentinels: np.ndarray, eos: int, pad: int, kind: str,
        noise_density: float, mean_noise_span_length: float, pack: bool, seed: int, shuffle: bool,
    ):  # fmt: skip
        self.seq_len, self.target_len, self.kind, self.pack = seq_len, target_len, kind, pack
        self.sentinels, self.eos, self.pad = sentinels, eos, pad
        self.noise_density, self.mean_noise_span_length = noise_density, mean_noise_span_length
        self.raw = raw_tokens(seq_len, noise_density, mean_noise_span_length) if kind == "span" else min(seq_len, target_len)
        spans = counts_of(self.raw, noise_density, mean_noise_span_length)[1]
        if kind == "span" and spans > len(sentinels):
            raise BadInput(
                f"data.seq_len={seq_len}: a sample has {spans} spans and the tokenizer {len(sentinels)} sentinels; give a "
                "smaller data.seq_len or objective.noise_density, a larger objective.mean_noise_span_length, or a "
                "SentencePiece tokenizer with more sentinels"
            )
        super().__init__(data, seed=seed, shuffle=shuffle)

    def count_samples(self, corpus: IndexedDataset) -> int:
        if corpus.has_sentence_bounds:
            if (np.diff(corpus.bounds) != 2).any():
                raise BadInput(
                    f"{corpus.prefix}: has documents of several sequences, but not of two (input, target); build it without "
                    "--sentences, or as pairs (python -m data.pairs)"
                )
            return corpus.documents
        samples = corpus.tokens // self.raw if self.pack else corpus.documents
        if samples < 1:
            raise BadInput(
                f"{corpus.prefix}: {corpus.tokens:,} tokens, less than one sample ({self.raw:,}); give more text, a smaller "
                "data.seq_len, or data.pack=false"
            )
        return samples

    def collate(self, numbers: np.ndarray | Sequence[int] | range) -> dict[str, np.ndarray]:
        """Assemble the samples with these numbers into a micro batch.

        inputs (B, T) and targets (B, S) int64: padded. input_lengths (B,) int64. loss_mask (B, S) bool: whether target s
        counts. lengths (B,) int64: number of input and target tokens without padding.
        """
        corpus, index = self.indices(numbers)
        inputs = np.full((len(index), self.seq_len), self.pad, np.int64)
        targets = np.full((len(index), self.target_len), self.pad, np.int64)
        lengths = np.empty((len(index), 2), np.int64)
        for row, (number, c, j) in enumerate(zip(numbers, corpus.tolist(), index.tolist(), strict=True)):
            source, target = self._sample(self.corpora[c], j, int(number))
            inputs[row, : len(source)], targets[row, : len(target)] = source, target
            lengths[row] = len(source), len(target)
        loss_mask = np.arange(self.target_len) < lengths[:, 1:]
        return {
            "inputs": inputs, "targets": targets, "loss_mask": loss_mask, "input_lengths": lengths[:, 0],
            "lengths": lengths.sum(1),
        }  # fmt: skip

    def _sample(self, corpus: IndexedDataset, j: int, number: int) -> tuple[np.ndarray, np.ndarray]:
        if corpus.has_sentence_bounds:
            first, middle, end = corpus.starts[2 * j : 2 * j + 3]
            source = corpus.read(first, min(middle, first + self.seq_len - 1))
            target = corpus.read(middle, min(end, middle + self.target_len - 1))
            return self._ended(source), self._ended(target)
        ids = corpus.read(j * self.raw, (j + 1) * self.raw) if self.pack else corpus.get(j, self.raw)
        rng = np.random.Generator(np.random.Philox(key=derive_seed("t5", self.seed, number)))
        return self._spans(ids, rng) if self.kind == "span" else self._prefix(ids, rng)

    def _ended(self, ids: np.ndarray) -> np.ndarray:
        return np.append(ids.astype(np.int64), self.eos)

    def _spans(self, ids: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        noise, spans = counts_of(len(ids), self.noise_density, self.mean_noise_span_length)
        if not spans:
            return self._ended(ids), np.empty(0, np.int64)
        visible, hidden = pieces(len(ids) - noise, spans, rng), pieces(noise, spans, rng)
        ends = np.cumsum(np.stack([visible, hidden], 1).reshape(-1))  # visible, hidden, visible, hidden, ...
        hides = np.repeat(np.tile([False, True], spans), np.diff(ends, prepend=0))
        ids, sentinels = ids.astype(np.int64), self.sentinels[:spans]
        # in the input a sentinel replaces each hidden piece; in the target it precedes the piece
        source = np.insert(ids[~hides], np.cumsum(visible), sentinels)
        target = np.insert(ids[hides], np.cumsum(hidden) - hidden, sentinels)
        return self._ended(source), self._ended(target)

    def _prefix(self, ids: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        if len(ids) < 2:
            return self._ended(ids[: self.seq_len - 1]), np.empty(0, np.int64)
        cut = 1 + int(rng.random() * (len(ids) - 1))
        return self._ended(ids[:cut]), self._ended(ids[cut:])


def pieces(tokens: int, number: int, rng: np.random.Generator) -> np.ndarray:
    """Lengths (number,) of a random division of `tokens` into pieces of at least one. Every division is equally likely."""
    bounds = np.sort(np.argsort(rng.random(tokens - 1))[: number - 1]) + 1
    return np.diff(bounds, prepend=0, append=tokens)


def open_dataset(cfg: Any, data: Blend, shuffle: bool, tokenizer: Any, name: str) -> Samples:
    """The samples that a config of recipes/t5/task.py describes. name: the corpus's name for messages."""
    o, d = cfg.objective, cfg.data
    if too_short(o, d):
        raise BadInput(too_short(o, d))
    if tokenizer.eod_id is None or not len(tokenizer.sentinels()):
        raise BadInput(
            f"{name}: its tokenizer has no </s> or no sentinels; T5 takes a SentencePiece tokenizer: build "
            "the corpus with --tokenizer t5, or with --tokenizer-type sentencepiece --vocab-size N"
        )
    return Samples(
        data, d.seq_len, d.target_len, sentinels=tokenizer.sentinels(), eos=tokenizer.eod_id,
        pad=tokenizer.pad_id or 0, kind=o.kind, noise_density=o.noise_density,
        mean_noise_span_length=o.mean_noise_span_length, pack=d.pack,
        seed=cfg.train.seed, shuffle=shuffle,
    )  # fmt: skip
