"""The parts that all task types share: the description of a head, the split to read, and the layout of texts in a batch.

Letters in shapes: B samples, C sequences per sample (1 except for multiple choice), T positions, L labels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Self

import numpy as np

from common.data import examples
from common.data.batches import MicroBatch
from common.errors import BadInput

from ..samples import Special

if TYPE_CHECKING:
    import torch

    from common.data.tokenizer import Tokenizer

    Batch = dict[str, torch.Tensor]

MIN_SEQ_LEN = 8  # tokens of a sequence
SUBSET_SEED = 1234
Texts = Sequence[list[int]]  # ids of the one or two texts of a sequence


class Head(NamedTuple):
    """A head on BERT, as transformers builds it: a linear layer with one output per label."""

    trained_class: str  # the transformers class that is trained, without "Bert" or "MegatronBert"
    exported_class: str  # the class that the config.json of an export names
    loss_sum: Callable[[torch.Tensor, Batch], torch.Tensor]  # (logits, batch) -> fp32 loss, summed where loss_mask is true
    predictions: Callable[[torch.Tensor, Batch], torch.Tensor]  # (logits, batch) -> (B, at most prediction_width)
    prediction_width: Callable[[int], int] = lambda seq_len: 1  # numbers per prediction
    parameter: str = "classifier"  # name of the linear layer
    labels_have_names: bool = False  # whether id2label of an export names the outputs
    pooled: bool = True  # applied to the pooled [CLS], else to each position
    dropout: bool = True
    sequences: int = 1  # C


class Split(NamedTuple):
    """A split of a task, and how its texts become sequences. Values of the config that a task type does not use are ignored."""

    task: str
    name: str  # train, dev or test
    folder: Path | None  # folder of the data; None: the hub
    labels: list[str]
    tokenizer_dir: str | Path
    tokenizer: Tokenizer
    special: Special
    seq_len: int
    pad_to_seq_len: bool  # needed because pipeline stages pass hidden states of one length
    seed: int
    shuffle: bool
    length_window: int  # steps whose samples are sorted by length
    global_batch: int
    pad_multiple: int
    subset: int | None = None  # number of examples to use, drawn with SUBSET_SEED; None: all
    stride: int = 128  # question answering: tokens by which the window moves over a context
    question_len: int = 64  # question answering: tokens of a question
    null_threshold: float = 0.0  # SQuAD 2.0: above this difference of scores, no answer is predicted


class TaskDataset(examples.Examples):
    """The tokenized examples of a split, which `open` reads, and the scores of predictions on them."""

    unit = "examples"  # what len() counts

    def __init__(self, split: Split, content_hash: str, largest: int, lengths: np.ndarray, notes: Sequence[str]):
        """lengths: (N,) tokens per example. largest: the largest token id."""
        name = f"{split.task} {split.name}"
        source = examples.Source(name, content_hash, split.tokenizer_dir, split.tokenizer, largest)
        super().__init__(
            source, lengths, seed=split.seed, shuffle=split.shuffle, notes=notes, length_window=split.length_window,
            global_batch=split.global_batch, pad_multiple=split.pad_multiple,
        )  # fmt: skip
        self.special, self.seq_len, self.pad_to_seq_len = split.special, split.seq_len, split.pad_to_seq_len

    @classmethod
    def open(cls, split: Split) -> Self:
        """Read and tokenize a split. Raises BadInput for an unknown task, a missing or damaged file, or an unknown label."""
        raise NotImplementedError

    def pad(self, sequences: Sequence[Texts]) -> MicroBatch:
        """Ids of one or two texts per sequence -> tokens, token_types (B x C, T) int64, lengths (B x C,) int64: [CLS] first
        [SEP], or [CLS] first [SEP] second [SEP]. T is the longest length, rounded up, or with pad_to_seq_len it is seq_len."""
        lengths = np.array([sum(map(len, texts)) + len(texts) + 1 for texts in sequences])
        width = self.seq_len if self.pad_to_seq_len else min(self.seq_len, self.rounded(int(lengths.max())))
        tokens = np.full((len(sequences), width), self.special.pad, np.int64)
        types = np.zeros_like(tokens)
        for row, texts in enumerate(sequences):
            ids = [self.special.cls, *texts[0], self.special.sep]
            first = len(ids)
            for text in texts[1:]:
                ids += [*text, self.special.sep]
            tokens[row, : len(ids)] = ids
            types[row, first : len(ids)] = 1
        return {"tokens": tokens, "token_types": types, "lengths": lengths}

    def metrics(self, predictions: np.ndarray) -> dict[str, float]:
        """Predictions (n, width) of the first n examples -> scores by name."""
        raise NotImplementedError

    def scored(self, n: int) -> int:
        """Number of answers from which the scores of the first n examples are computed."""
        return n

    def counts(self, n: int) -> dict[str, int]:
        """{metric: number of answers}, for metrics that use only some of the answers to the first n examples."""
        return {}

    def files(self, predictions: np.ndarray) -> dict[str, str]:
        """Predictions (n, width) -> {name: text} of prediction files in the benchmark's format."""
        raise NotImplementedError


def example_columns(indices: np.ndarray) -> MicroBatch:
    """example_mask (B,) bool: whether the example counts. indices (B,) int64: its index in the split."""
    return {"example_mask": np.ones(len(indices), bool), "indices": indices}


def used(split: Split, size: int, notes: list[str]) -> np.ndarray:
    """Indices of the examples to use: all, or a fixed subset. Adds a note about a subset to `notes`."""
    if split.subset is None:
        return np.arange(size)
    if split.subset > size:
        raise BadInput(f"task.train_examples={split.subset}: train has only {size:,}; give at most that")
    notes.append(f"{split.subset:,} of {size:,} examples of train, drawn by seed {SUBSET_SEED}")
    return np.sort(np.random.default_rng(SUBSET_SEED).permutation(size)[: split.subset])


def truncated(texts: Texts, seq_len: int) -> list[list[int]]:
    """Ids of one or two texts, shortened until they fit with [CLS] and [SEP]: the longer of two is shortened first (BERT's
    run_classifier.py, _truncate_seq_pair)."""
    room = seq_len - 1 - len(texts)
    if len(texts) == 1:
        return [texts[0][:room]]
    a, b = map(len, texts)
    if a + b > room:
        a, b = (a, room - a) if a <= room // 2 else (room - b, b) if b <= room // 2 else (room - room // 2, room // 2)
    return [texts[0][:a], texts[1][:b]]


def note_truncated(split: Split, notes: list[str], what: str, count: int, size: int) -> None:
    """Add to `notes` how many examples of a split are truncated."""
    if count:
        notes.append(f"{split.name}: {count:,} of {size:,} {what} are cut to data.seq_len={split.seq_len}")


def largest_id(*columns: Sequence[Sequence[int]]) -> int:
    return max((max(ids, default=0) for column in columns for ids in column), default=0)
