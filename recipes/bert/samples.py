"""BERT's samples: which sentences make up a sample, and which of its tokens are masked. Each depends only on (seed, number).

A corpus is divided once into chunks: runs of whole sentences that fill a sample. A pass over the data visits each chunk once,
in the order of common/data/sampler.py. The random choices for a sample are its length, where its pair is cut, whether the
second segment comes from another document or the two are swapped, and what is masked. These choices are made again in
each pass (dynamic masking: RoBERTa, arXiv:1907.11692, section 4.1).

Letters in shapes: B samples, T `seq_len`.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from common.data import tables
from common.data.blended_dataset import BlendedDataset
from common.data.indexed_dataset import IndexedDataset
from common.data.tokenizer import Tokenizer
from common.errors import BadInput
from common.paths import Blend
from common.seeding import Streams

NGRAMS = {"token": 1, "whole_word": 1, "ngram": 3}  # largest number of words in a masked piece
PART_SENTENCES = 2**20  # divided into chunks at once
SAMPLES_PER_RUN = 64  # without pairs, documents are concatenated in runs of about this many samples


class Special(NamedTuple):
    """The special tokens and vocabulary of a tokenizer, as samples need them."""

    cls: int
    sep: int
    mask: int
    pad: int
    continues: np.ndarray  # (ids,) bool: whether the token continues a word
    ordinary: np.ndarray  # ids that may replace a masked token: all except the special ones


def special_ids(tokenizer: Tokenizer, name: str) -> Special:
    """The special tokens of a tokenizer. Raises BadInput, which names each one that is missing."""
    ids = {role: getattr(tokenizer, f"{role}_id") for role in ("cls", "sep", "mask", "pad")}
    missing = [f"[{role.upper()}]" for role, value in ids.items() if value is None]
    if missing:
        raise BadInput(
            f"{name}: its tokenizer has no {' '.join(missing)}; build the corpus with a WordPiece tokenizer "
            "(--tokenizer bert-base-uncased, or --tokenizer-type wordpiece --vocab-size N)"
        )
    excluded = {*ids.values(), tokenizer.backend.token_to_id("[UNK]")} - {None}
    ordinary = np.setdiff1d(np.arange(tokenizer.size), np.array(sorted(excluded)))
    return Special(**ids, continues=tokenizer.continues(), ordinary=ordinary)


class Samples(BlendedDataset):
    """Samples of one or two segments with masked tokens.

    pair: 'nsp', 'sop' or 'none' (full sentences, across documents). masking: 'token', 'whole_word' or 'ngram'.
    notes: notes for the user about the corpora.

    Raises BadInput for corpora without sentence boundaries, or without a pair of sentences.
    """

    def __init__(
        self, data: Blend, seq_len: int, special: Special, *, pair: str, masking: str, masked_lm_prob: float,
        short_seq_prob: float, seed: int, shuffle: bool,
    ):  # fmt: skip
        self.seq_len, self.special, self.pair = seq_len, special, pair
        self.masking, self.masked_lm_prob, self.short_seq_prob = masking, masked_lm_prob, short_seq_prob
        self.room = seq_len - (2 if pair == "none" else 3)  # tokens besides [CLS] and [SEP]
        self.notes: list[str] = []
        # prefix -> for each chunk, its first sentence and the one after its last: (chunks, 2)
        self._chunks: dict[str, np.ndarray] = {}
        super().__init__(data, seed=seed, shuffle=shuffle)

    # ---- which sentences

    def count_samples(self, corpus: IndexedDataset) -> int:
        if not corpus.has_sentence_bounds:
            raise BadInput(
                f"{corpus.prefix}: has no sentence boundaries (one sequence per document); build it again with --sentences"
            )
        if not corpus.documents:
            raise BadInput(f"{corpus.prefix}: has no documents; build it from text")
        if self.room < 2:
            raise BadInput(f"data.seq_len={self.seq_len}: leaves {self.room} tokens besides [CLS] and [SEP]; give more")
        if self.pair != "none":
            self._check_pairs(corpus)
        divide = whole_sentences if self.pair == "none" else pairs_of_sentences
        chunks = tables.opened(corpus, divide.__name__, {"room": self.room}, lambda: divide(corpus, self.room))
        self._chunks[corpus.prefix] = chunks
        return len(chunks)

    def _check_pairs(self, corpus: IndexedDataset) -> None:
        single = sum(int((sizes < 2).sum()) for _, sizes in corpus.document_sizes())
        why = f"a pair needs two sentences of one document (objective.pair={self.pair})"
        instead = "give longer documents, or objective.pair=none"
        if single == corpus.documents:
            raise BadInput(f"{corpus.prefix}: each document has one sentence; {why}; {instead}")
        if self.pair == "nsp" and corpus.documents < 2:
            raise BadInput(
                f"{corpus.prefix}: one document; objective.pair=nsp takes every other second segment from another document; "
                "give more documents, or objective.pair=sop or none"
            )
        if single:
            self.notes.append(f"{corpus.prefix}: {single:,} documents of one sentence are left out; {why}")

    # ---- one sample

    def collate(self, numbers: np.ndarray | Sequence[int] | range) -> dict[str, np.ndarray]:
        """Assemble the samples with these numbers into a micro batch.

        tokens (B, T) int64: the model's input. labels (B, T) int64: the tokens before masking. mlm_mask (B, T) bool: the tokens
        to predict. token_types (B, T) int64: 0 or 1. lengths (B,) int64: number of tokens without padding. With pairs also
        pair_label (B,) int64: 1 for a segment of another document or a swapped pair; and pair_mask (B,) bool.
        """
        corpus, index = self.indices(numbers)
        rows, special, streams = len(index), self.special, Streams()
        labels = np.full((rows, self.seq_len), special.pad, np.int64)
        token_types, lengths = np.zeros_like(labels), np.empty(rows, np.int64)
        changed = np.empty(rows, np.int64)
        uniform = np.empty((rows, self._draws))  # for the masks
        for row, (number, c, j) in enumerate(zip(numbers, corpus.tolist(), index.tolist(), strict=True)):
            rng = streams("bert", self.seed, int(number))
            segments, changed[row] = self._segments(self.corpora[c], j, rng)
            end = 0
            for kind, segment in enumerate(segments):  # [CLS] A [SEP] B [SEP]
                begin = end + (kind == 0)
                end = begin + len(segment) + 1
                labels[row, begin : end - 1], labels[row, end - 1] = segment, special.sep
                token_types[row, begin:end] = kind
            lengths[row] = end
            rng.random(out=uniform[row])
        labels[:, 0] = special.cls
        tokens, chosen = self.mask(labels, lengths, uniform)
        out = {"labels": labels, "mlm_mask": chosen, "token_types": token_types, "lengths": lengths, "tokens": tokens}
        return out if self.pair == "none" else out | {"pair_label": changed, "pair_mask": np.ones(rows, bool)}

    def _segments(self, corpus: IndexedDataset, j: int, rng: np.random.Generator) -> tuple[list[np.ndarray], bool]:
        """The segments of chunk j, and whether the second is not the one that follows the first in the text."""
        first, end = self._chunks[corpus.prefix][j].tolist()
        if self.pair == "none":
            return [self._full_sentences(corpus, first, end, rng)], False
        return self._pair_segments(corpus, first, end, rng)

    def _length(self, rng: np.random.Generator) -> int:
        """Target length of a sample: all tokens that fit, or for a share of samples any number from 2 (BERT, appendix A.2)."""
        if rng.random() >= self.short_seq_prob:
            return self.room
        return 2 + int(rng.random() * (self.room - 1))

    def _full_sentences(self, corpus: IndexedDataset, first: int, end: int, rng: np.random.Generator) -> np.ndarray:
        """The sentences of a chunk, with [SEP] between documents (RoBERTa's FULL-SENTENCES), cut to the target length."""
        begin = corpus.start(first)
        ids = corpus.read(begin, corpus.start(end))
        inner = range(corpus.document_of(first) + 1, corpus.document_of(end - 1) + 1)  # documents that begin within the chunk
        if inner:
            starts = [corpus.start(corpus.sequences_of(document)[0]) for document in inner]
            ids = np.insert(ids.astype(np.int64), np.array(starts) - begin, self.special.sep)
        return ids[: self._length(rng)]

    def _pair_segments(
        self, corpus: IndexedDataset, first: int, end: int, rng: np.random.Generator
    ) -> tuple[list[np.ndarray], bool]:
        """Segments A and B. Sentences of the chunk are taken up to the target length and cut at a random one."""
        begin, target = corpus.start(first), self._length(rng)
        end = min(max(corpus.first_from(begin + target, first + 1, end), first + 2), end)
        cut = first + 1 + int(rng.random() * (end - first - 1))
        middle = corpus.start(cut)
        a, b = corpus.read(begin, middle), corpus.read(middle, corpus.start(end))
        changed = rng.random() < 0.5
        if changed and self.pair == "sop":  # ALBERT, arXiv:1909.11942, section 3.1
            a, b = b, a
        elif changed:
            # as long as the true one, so that the lengths do not give the label away
            b = self._other_segment(corpus, first, max(1, min(target - len(a), len(b))), rng)
        return shorten(a, b, self.room, rng), changed

    def _other_segment(self, corpus: IndexedDataset, first: int, tokens: int, rng: np.random.Generator) -> np.ndarray:
        """Whole sentences of another document from a random one on, at least `tokens` tokens; all of it if it is shorter."""
        other = int(rng.random() * (corpus.documents - 1))
        other += other >= corpus.document_of(first)
        begin, end = corpus.sequences_of(other)
        stop = corpus.start(end)
        last = corpus.first_from(stop - tokens + 1, begin, end) - begin - 1  # after it, too few tokens are left
        start = begin + int(rng.random() * (max(last, 0) + 1))
        position = corpus.start(start)
        return corpus.read(position, corpus.start(min(corpus.first_from(position + tokens, start + 1, end), end)))

    # ---- which tokens are masked

    def mask(self, labels: np.ndarray, lengths: np.ndarray, uniform: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Tokens with masks (B, T) int64, and which tokens to predict (B, T) bool. All samples are masked at once.

        labels (B, T), lengths (B,): samples without masks. uniform (B, draws): random numbers of each sample, which takes as
        many of them as it needs, in order.
        """
        candidates = (labels != self.special.cls) & (labels != self.special.sep)
        candidates &= np.arange(self.seq_len) < lengths[:, None]
        chosen, used = self.choose(labels, candidates, uniform)
        rows, columns = np.nonzero(chosen)
        counts = chosen.sum(1)
        position = np.arange(len(rows)) + (used - np.cumsum(counts) + counts)[rows]  # in `uniform`, after what is used
        tokens = labels.copy()
        tokens[rows, columns] = self._replace_masked(
            labels[rows, columns], uniform[rows, position], uniform[rows, position + counts[rows]]
        )
        return tokens, chosen

    @property
    def _draws(self) -> int:
        """The most random numbers that the mask of a sample takes: a word takes one, a token that is masked two."""
        pieces = 1 + int(self.masked_lm_prob * self.seq_len)
        return 1 + pieces + 3 * self.seq_len

    def choose(self, ids: np.ndarray, candidates: np.ndarray, uniform: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Choose which `candidates` (B, T) bool of `ids` (B, T) to predict: a share masked_lm_prob of the words on average, at
        least one piece. Returns them, (B, T) bool, and how many of the random numbers (B, draws) each sample has taken.

        A piece is one token, one whole word, or 1 to 3 whole words with probability proportional to 1/n (ALBERT, section
        4.1; SpanBERT finds longer pieces harder). First the lengths of the pieces are drawn. Then the pieces are placed among
        the words so that every arrangement is equally likely. Nothing is redrawn, so the lengths keep their distribution.
        """
        begins = candidates.copy()
        if self.masking != "token":
            begins[:, 1:] &= ~(self.special.continues[ids[:, 1:]] & candidates[:, :-1])  # no [SEP] between
        word = np.cumsum(begins, 1) - 1  # of each candidate
        words = word[:, -1] + 1
        longest = NGRAMS[self.masking]
        odds = 1 / np.arange(1, longest + 1)
        odds /= odds.sum()
        wanted = self.masked_lm_prob * words / float(odds @ np.arange(1, longest + 1))
        pieces = np.maximum(1, (wanted + uniform[:, 0]).astype(np.int64))
        lengths = 1 + np.searchsorted(np.cumsum(odds)[:-1], uniform[:, 1 : 1 + pieces.max()], "right")
        number = np.arange(lengths.shape[1])
        # a short sample may not have room for all pieces
        fit = (number < pieces[:, None]) & (np.cumsum(lengths, 1) <= words[:, None])
        fit[:, 0] = True
        lengths = np.where(fit, np.minimum(lengths, words[:, None]), 0)
        laid = fit.sum(1)
        slots = laid + words - lengths.sum(1)  # of pieces and of the words between them
        used = 1 + pieces + slots
        taken = _smallest(uniform, 1 + pieces, slots, laid)  # slots of the pieces, in order
        before = np.cumsum(lengths, 1) - lengths - number
        rows, pieces = np.nonzero(fit)
        first = np.nonzero(taken)[1] + before[rows, pieces]  # word at which each piece begins
        hidden = np.zeros((len(ids), int(words.max()) + 1), np.int64)
        hidden[rows, first] += 1
        hidden[rows, first + lengths[rows, pieces]] -= 1
        is_hidden = np.cumsum(hidden, 1) > 0
        return candidates & is_hidden[np.arange(len(ids))[:, None], word], used

    def _replace_masked(self, ids: np.ndarray, how: np.ndarray, which: np.ndarray) -> np.ndarray:
        """Replace each token by [MASK] (80 %) or by an ordinary token (10 %), or keep it (10 %) (BERT, section 3.1).

        how, which: a random number for each token.
        """
        ordinary = self.special.ordinary
        others = ordinary[(which * len(ordinary)).astype(np.int64)]
        return np.where(how < 0.8, self.special.mask, np.where(how < 0.9, others, ids))


def _smallest(uniform: np.ndarray, begin: np.ndarray, number: np.ndarray, laid: np.ndarray) -> np.ndarray:
    """In each row of `uniform` (B, draws), mark the `laid` smallest of the `number` values from `begin` on: (B, most) bool."""
    column, row = np.arange(int(number.max())), np.arange(len(uniform))[:, None]
    values = uniform[row, begin[:, None] + column]
    values[column >= number[:, None]] = 2.0  # larger than any
    order = np.argsort(values, 1)[:, : int(laid.max())]
    marks = np.zeros(values.shape, bool)
    marks[row, order] = np.arange(order.shape[1]) < laid[:, None]
    return marks


def pairs_of_sentences(corpus: IndexedDataset, room: int) -> Iterator[np.ndarray]:
    """Chunks of at least two sentences within one document: first sentence and the one after the last, (k, 2) int64 at a time.

    A chunk takes sentences until they reach `room` tokens; pairs are then shortened to that. A pair is shorter only at the end
    of its document or where a short length was drawn (BERT's create_pretraining_data.py). A single last sentence is added to
    the chunk before it.
    """
    for bounds in _parts(corpus.bounds.astype(np.int64)):
        first, begin, end = bounds[0], bounds[:-1] - bounds[0], bounds[1:] - bounds[0]
        enough = end - begin >= 2
        starts = corpus.positions(np.arange(first, bounds[-1] + 1))
        yield first + _divide(starts, begin[enough], end[enough], room, least=2)


def whole_sentences(corpus: IndexedDataset, room: int) -> Iterator[np.ndarray]:
    """Chunks of the sentences that fit into `room` tokens, across documents. A document boundary takes one token."""
    documents = corpus.bounds.astype(np.int64)  # aligned, to be searched

    def starts_of(sentences: np.ndarray) -> np.ndarray:  # with one token for each document that has ended
        return corpus.positions(sentences) + np.searchsorted(documents[1:], sentences, "right")

    at = starts_of(documents)
    runs = documents[np.unique(np.searchsorted(at, np.arange(0, at[-1], SAMPLES_PER_RUN * room)))]
    for bounds in _parts(np.unique(np.append(runs, documents[-1]))):
        first, begin, end = bounds[0], bounds[:-1] - bounds[0], bounds[1:] - bounds[0]
        starts = starts_of(np.arange(first, bounds[-1] + 1))
        yield first + _divide(starts, begin, end, room, least=1, within=True)


def _parts(bounds: np.ndarray) -> Iterator[np.ndarray]:
    """`bounds` in parts of about PART_SENTENCES, which limits memory; the last bound of a part is the first of the next."""
    cuts = np.searchsorted(bounds, np.arange(0, bounds[-1], PART_SENTENCES))
    for first, last in pairwise(np.unique(np.append(cuts, len(bounds) - 1)).tolist()):
        yield bounds[first : last + 1]


def _divide(starts: np.ndarray, begin: np.ndarray, end: np.ndarray, room: int, least: int, within: bool = False) -> np.ndarray:
    """Divide each run of sentences [begin, end) into chunks of at least `least` sentences: (chunks, 2), in order. A chunk takes
    sentences until it reaches `room` tokens, or with `within` as many as fit into them. All runs are divided at once."""
    chunks = [np.empty((0, 2), np.int64)]
    while len(begin):
        full = starts[begin] + room
        reached = np.searchsorted(starts, full, "right") - 1 if within else np.searchsorted(starts, full)
        after = np.minimum(np.maximum(reached, begin + least), end)
        after = np.where(end - after < least, end, after)
        chunks.append(np.stack([begin, after], 1))
        more = after < end
        begin, end = after[more], end[more]
    table = np.concatenate(chunks)
    return table[np.argsort(table[:, 0], kind="stable")]


def shorten(a: np.ndarray, b: np.ndarray, room: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Shorten the longer of two segments, then both equally, until they fit. Each token is cut from the front or the back."""
    if len(a) + len(b) <= room:
        return [a, b]
    half = room // 2
    keep_a = room - len(b) if len(b) <= half else min(len(a), room - half)
    shortened = []
    for segment, keep in ((a, keep_a), (b, room - keep_a)):
        excess = len(segment) - keep
        front = int(np.count_nonzero(rng.random(excess) < 0.5))
        shortened.append(segment[front : front + keep])
    return shortened


def open_dataset(cfg: Any, data: Blend, shuffle: bool, tokenizer: Tokenizer, name: str) -> Samples:
    """The samples that a config of recipes/bert/task.py describes. name: the tokenizer's name for messages."""
    o = cfg.objective
    return Samples(
        data, cfg.data.seq_len, special_ids(tokenizer, name), pair=o.pair, masking=o.masking, masked_lm_prob=o.masked_lm_prob,
        short_seq_prob=o.short_seq_prob, seed=cfg.train.seed, shuffle=shuffle,
    )  # fmt: skip
