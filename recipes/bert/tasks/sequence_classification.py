"""Sequence classification and regression: a class or a score of one text or two (GLUE, or your own texts and labels).

The head: dropout and a linear layer on the pooled [CLS]. Letters in shapes as in base.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

import numpy as np

from common.data.batches import MicroBatch
from common.evaluation import glue, labelled

from .base import Head, Split, TaskDataset, Texts, example_columns, largest_id, note_truncated, truncated, used

if TYPE_CHECKING:
    import torch

    from .base import Batch


def loss_sum(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Logits (B, L), labels (B,): cross entropy; logits (B, 1): the squared errors of a score."""
    import torch.nn.functional as F

    labels, is_target = batch["labels"], batch["loss_mask"]
    if logits.shape[-1] == 1:
        return ((logits.float()[:, 0] - labels) ** 2 * is_target).sum()
    return (F.cross_entropy(logits.float(), labels, reduction="none") * is_target).sum()


def predictions(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    """The most likely class, or the score: (B, 1)."""
    return logits if logits.shape[-1] == 1 else logits.argmax(-1, keepdim=True)


HEAD = Head(
    trained_class="ForSequenceClassification", exported_class="ForSequenceClassification", loss_sum=loss_sum,
    predictions=predictions, labels_have_names=True,
)  # fmt: skip


class TextDataset(TaskDataset):
    """Examples of one or two texts with a label or a score."""

    def __init__(self, split: Split, examples: glue.Examples, indices: np.ndarray, notes: list[str]):
        """indices: the examples to use. Adds to `notes` how many are truncated."""
        ids = [split.tokenizer.encode_batch([column[i] for i in indices.tolist()]) for column in examples.texts]
        pairs: list[Texts] = list(zip(*ids, strict=True))
        self.sequences = [truncated(texts, split.seq_len) for texts in pairs]
        lengths = np.array([sum(map(len, texts)) for texts in self.sequences])
        whole = np.array([sum(map(len, texts)) for texts in pairs])
        note_truncated(split, notes, "examples", int((lengths < whole).sum()), len(indices))
        super().__init__(split, examples.hash, largest_id(*ids), lengths, notes)
        self.labels, self.sizes, self.task = examples.labels[indices], examples.sizes, split.task

    def collate(self, numbers: np.ndarray | range) -> MicroBatch:
        """As `pad`, with labels (B,) int64, or float32 for scores, and loss_mask (B,) bool."""
        indices = self.indices(numbers)
        batch = self.pad([self.sequences[i] for i in indices.tolist()]) | example_columns(indices)
        return batch | {"labels": self.labels[indices], "loss_mask": np.ones(len(indices), bool)}


class GlueDataset(TextDataset):
    """A task of GLUE."""

    @classmethod
    def open(cls, split: Split) -> Self:
        examples = glue.read(split.task, split.folder, split.name)
        notes = [examples.note] if examples.note else []
        return cls(split, examples, used(split, len(examples.labels), notes), notes)

    def metrics(self, predictions: np.ndarray) -> dict[str, float]:
        return glue.metrics(self.task, predictions[:, 0], self.labels[: len(predictions)], self.sizes)

    def counts(self, n: int) -> dict[str, int]:
        return glue.counts(self.task, n, self.sizes)

    def files(self, predictions: np.ndarray) -> dict[str, str]:
        return glue.files(self.task, predictions[:, 0], self.sizes)


class LabelledDataset(TextDataset):
    """Your own texts or pairs, with the labels of task.labels."""

    names: list[str]  # of the labels

    @classmethod
    def open(cls, split: Split) -> Self:
        examples = labelled.read(split.folder, split.name, split.labels)
        notes = [examples.note] if examples.note else []
        dataset = cls(split, examples, used(split, len(examples.labels), notes), notes)
        dataset.names = split.labels
        return dataset

    def metrics(self, predictions: np.ndarray) -> dict[str, float]:
        return labelled.metrics(predictions[:, 0].astype(int), self.labels[: len(predictions)])

    def files(self, predictions: np.ndarray) -> dict[str, str]:
        lines = [f"{i}\t{self.names[int(label)]}" for i, label in enumerate(predictions[:, 0])]
        return {"classify.tsv": "\n".join(["index\tprediction", *lines]) + "\n"}
