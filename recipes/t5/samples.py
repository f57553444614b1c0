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
from common.seeding import Streams


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
            if any((sizes != 2).any() for _, sizes in corpus.document_sizes()):
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
        corpora, index = self.indices(numbers)
        rows, streams = len(index), Streams()
        inputs = np.full((rows, self.seq_len), self.pad, np.int64)
        targets = np.full((rows, self.target_len), self.pad, np.int64)
        lengths = np.empty((rows, 2), np.int64)
        texts, uniform = np.empty((rows, self.raw), np.int64), np.empty((rows, self.raw))  # for span corruption
        sizes = np.full(rows, -1)
        for row, (number, c, j) in enumerate(zip(numbers, corpora.tolist(), index.tolist(), strict=True)):
            corpus = self.corpora[c]
            if corpus.has_sentence_bounds:
                source, target = self._pair(corpus, j)
            else:
                ids = corpus.read(j * self.raw, (j + 1) * self.raw) if self.pack else corpus.get(j, self.raw)
                rng = streams("t5", self.seed, int(number))
                if self.kind == "span":
                    sizes[row], texts[row, : len(ids)] = len(ids), ids
                    rng.random(out=uniform[row])
                    continue
                source, target = self._prefix(ids, rng)
            inputs[row, : len(source)], targets[row, : len(target)] = source, target
            lengths[row] = len(source), len(target)
        for size in np.unique(sizes[sizes >= 0]).tolist():  # texts of one length at once
            same = np.flatnonzero(sizes == size)
            sources, hidden = self._spans(texts[same, :size], uniform[same])
            inputs[same, : sources.shape[1]], targets[same, : hidden.shape[1]] = sources, hidden
            lengths[same] = sources.shape[1], hidden.shape[1]
        loss_mask = np.arange(self.target_len) < lengths[:, 1:]
        return {
            "inputs": inputs, "targets": targets, "loss_mask": loss_mask, "input_lengths": lengths[:, 0],
            "lengths": lengths.sum(1),
        }  # fmt: skip

    def _pair(self, corpus: IndexedDataset, j: int) -> tuple[np.ndarray, np.ndarray]:
        first, middle, end = (corpus.start(sequence) for sequence in range(2 * j, 2 * j + 3))
        source = corpus.read(first, min(middle, first + self.seq_len - 1))
        target = corpus.read(middle, min(end, middle + self.target_len - 1))
        return self._ended(source), self._ended(target)

    def _ended(self, ids: np.ndarray) -> np.ndarray:
        return np.append(ids.astype(np.int64), self.eos)

    def _spans(self, texts: np.ndarray, uniform: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets of texts (B, n), each with its random numbers (B, at least n - 2)."""
        rows, size = texts.shape
        noise, spans = counts_of(size, self.noise_density, self.mean_noise_span_length)
        if not spans:
            return np.append(texts, np.full((rows, 1), self.eos), 1), np.empty((rows, 0), np.int64)
        shown = size - noise  # tokens of the text that stay in the input
        visible = pieces(shown, spans, uniform[:, : shown - 1])
        hidden = pieces(noise, spans, uniform[:, shown - 1 : size - 2])
        alternating = np.stack([visible, hidden], 2).reshape(-1)
        hides = np.repeat(np.tile([False, True], rows * spans), alternating).reshape(texts.shape)
        # in the input a sentinel replaces each hidden piece; in the target it precedes the piece
        source = self._with_sentinels(texts[~hides], np.cumsum(visible, 1))
        target = self._with_sentinels(texts[hides], np.cumsum(hidden, 1) - hidden)
        return source, target

    def _with_sentinels(self, tokens: np.ndarray, before: np.ndarray) -> np.ndarray:
        """tokens (B x m,): m of each row. before (B, spans): how many of them precede each sentinel. (B, m + spans + 1)."""
        rows, spans = before.shape
        out = np.empty((rows, len(tokens) // rows + spans + 1), np.int64)
        is_token = np.ones(out.shape, bool)
        is_token[:, -1] = False
        np.put_along_axis(is_token, before + np.arange(spans), False, 1)
        out[is_token] = tokens
        np.put_along_axis(out, before + np.arange(spans), self.sentinels[None, :spans], 1)
        out[:, -1] = self.eos
        return out

    def _prefix(self, ids: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        if len(ids) < 2:
            return self._ended(ids[: self.seq_len - 1]), np.empty(0, np.int64)
        cut = 1 + int(rng.random() * (len(ids) - 1))
        return self._ended(ids[:cut]), self._ended(ids[cut:])


def pieces(tokens: int, number: int, uniform: np.ndarray) -> np.ndarray:
    """Lengths (B, number) of random divisions of `tokens` into pieces of at least one, from random numbers (B, tokens - 1).

    Every division is equally likely.
    """
    bounds = np.sort(np.argsort(uniform, 1)[:, : number - 1], 1) + 1
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
