"""Multiple choice (RACE): one sequence per answer, with the article, the question and that answer.

The head: dropout and a linear layer with one output on the pooled [CLS] of each sequence. Letters in shapes as in base.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

import numpy as np

from common.data.batches import MicroBatch
from common.evaluation import race

from . import sequence_classification
from .base import Head, Split, TaskDataset, example_columns, largest_id, note_truncated, truncated, used

if TYPE_CHECKING:
    import torch

    from .base import Batch


def loss_sum(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Logits (B x C, 1): cross entropy over the answers."""
    return sequence_classification.loss_sum(logits.view(len(batch["labels"]), -1), batch)


def predictions(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    """The most likely answer, (B, 1)."""
    return logits.view(len(batch["labels"]), -1).argmax(-1, keepdim=True)


HEAD = Head(
    trained_class="ForSequenceClassification", exported_class="ForMultipleChoice", loss_sum=loss_sum, predictions=predictions,
    sequences=race.CHOICES,
)  # fmt: skip


class RaceDataset(TaskDataset):
    """Questions with four answers each."""

    @classmethod
    def open(cls, split: Split) -> Self:
        return cls(split, race.read(split.folder, split.name))

    def __init__(self, split: Split, questions: race.Questions):
        notes: list[str] = []
        indices = used(split, len(questions.labels), notes)
        articles = split.tokenizer.encode_batch(questions.articles)
        # if a question has a gap, the answer is put into it
        texts = [
            question.replace("_", f" {option} ", 1) if "_" in question else f"{question} {option}"
            for question, options in zip(questions.questions, questions.options, strict=True)
            for option in options
        ]
        answers = split.tokenizer.encode_batch(texts)
        c = HEAD.sequences
        self.sequences: list[list[list[list[int]]]] = []  # for each question, C sequences of two texts
        shortened = 0  # questions
        for i in indices.tolist():
            article, choices = articles[questions.article_of[i]], answers[c * i : c * (i + 1)]
            pairs = [truncated((article, choice), split.seq_len) for choice in choices]
            shortened += any(len(pair[1]) < len(choice) for pair, choice in zip(pairs, choices, strict=True))
            self.sequences.append(pairs)
        lengths = np.array([max(len(first) + len(second) for first, second in pairs) for pairs in self.sequences])
        note_truncated(split, notes, "questions lose the end of an answer: they", shortened, len(indices))
        super().__init__(split, questions.hash, largest_id(articles, answers), lengths, notes)
        self.labels, self.high = questions.labels[indices], questions.high[indices]

    def collate(self, numbers: np.ndarray | range) -> MicroBatch:
        """As `pad`, with labels (B,) int64 and loss_mask (B,) bool."""
        indices = self.indices(numbers)
        batch = self.pad([pair for i in indices.tolist() for pair in self.sequences[i]]) | example_columns(indices)
        return batch | {"labels": self.labels[indices], "loss_mask": np.ones(len(indices), bool)}

    def metrics(self, predictions: np.ndarray) -> dict[str, float]:
        n = len(predictions)
        return race.metrics(predictions[:, 0].astype(int), self.labels[:n], self.high[:n])

    def counts(self, n: int) -> dict[str, int]:
        return race.counts(self.high[:n])

    def files(self, predictions: np.ndarray) -> dict[str, str]:
        lines = [f"{i}\t{'ABCD'[int(answer)]}" for i, answer in enumerate(predictions[:, 0])]
        return {"race.tsv": "\n".join(["index\tprediction", *lines]) + "\n"}
