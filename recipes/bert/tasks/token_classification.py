"""Token classification: one tag per word; the first piece of a word predicts it (Devlin et al., section 5.3).

The head: dropout and a linear layer on each position. Letters in shapes as in base.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

import numpy as np

from common.data.batches import MicroBatch
from common.errors import BadInput
from common.evaluation import tagging

from .base import Head, Split, TaskDataset, example_columns, largest_id, used

if TYPE_CHECKING:
    import torch

    from .base import Batch


def loss_sum(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Logits (B, T, L): cross entropy of the tags."""
    import torch.nn.functional as F

    losses = F.cross_entropy(logits.float().flatten(0, 1), batch["labels"].flatten(), reduction="none")
    return (losses * batch["loss_mask"].flatten()).sum()


def predictions(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    """The most likely tag of each position, (B, T)."""
    return logits.argmax(-1)


HEAD = Head(
    trained_class="ForTokenClassification", exported_class="ForTokenClassification", loss_sum=loss_sum,
    predictions=predictions, prediction_width=lambda seq_len: seq_len, labels_have_names=True, pooled=False,
)  # fmt: skip


class TaggedDataset(TaskDataset):
    """Sentences whose words have tags."""

    @classmethod
    def open(cls, split: Split) -> Self:
        sentences = tagging.read(split.folder, split.name)
        known = set(split.labels)
        unknown = next((tag for tags in sentences.tags for tag in tags if tag not in known), None)
        if unknown is not None:
            allowed = ", ".join(split.labels)
            raise BadInput(f"{split.name}: tag {unknown!r} is outside task.tags: {allowed}; add it there")
        return cls(split, sentences)

    def __init__(self, split: Split, sentences: tagging.Sentences):
        notes: list[str] = []
        indices = used(split, len(sentences.words), notes).tolist()
        room = split.seq_len - 2
        number = {tag: i for i, tag in enumerate(split.labels)}
        self.names = split.labels
        self.default = "O" if "O" in number else split.labels[0]  # tag of words that the model does not see
        self.words, self.tags = [sentences.words[i] for i in indices], [sentences.tags[i] for i in indices]
        self.ids: list[list[int]] = []  # for each sentence
        self.first_pieces: list[np.ndarray] = []  # for each word, position of its first piece, or 0 if not seen
        self.labels: list[np.ndarray] = []  # for each word, the index of its tag
        unseen = 0
        for words, tags in zip(self.words, self.tags, strict=True):
            pieces = split.tokenizer.encode_batch(words)
            lengths = np.array([len(ids) for ids in pieces])
            starts = np.cumsum(lengths) - lengths
            seen = (lengths > 0) & (starts < room)
            unseen += int((~seen).sum())
            self.ids.append([piece for ids in pieces for piece in ids][:room])
            self.first_pieces.append(np.where(seen, starts + 1, 0))  # after [CLS]
            self.labels.append(np.array([number[tag] for tag in tags]))
        if unseen:
            reason = f"not trained on, predicted as {self.default}"
            notes.append(f"{split.name}: {unseen:,} words lie beyond data.seq_len or have no piece: {reason}")
        lengths = np.array([len(ids) for ids in self.ids])
        super().__init__(split, sentences.hash, largest_id(self.ids), lengths, notes)

    def collate(self, numbers: np.ndarray | range) -> MicroBatch:
        """As `pad`, with labels (B, T) int64 and loss_mask (B, T) bool, which is true at the first pieces of words."""
        indices = self.indices(numbers)
        batch = self.pad([[self.ids[i]] for i in indices.tolist()]) | example_columns(indices)
        labels, is_target = np.zeros_like(batch["tokens"]), np.zeros(batch["tokens"].shape, bool)
        for row, i in enumerate(indices.tolist()):
            seen = self.first_pieces[i] > 0
            positions = self.first_pieces[i][seen]
            labels[row, positions], is_target[row, positions] = self.labels[i][seen], True
        return batch | {"labels": labels, "loss_mask": is_target}

    def predicted_tags(self, predictions: np.ndarray) -> list[list[str]]:
        """The predicted tag of each word, or the default tag if the model does not see the word."""
        return [
            [self.names[int(row[position])] if position else self.default for position in positions.tolist()]
            for positions, row in zip(self.first_pieces, predictions, strict=False)
        ]

    def metrics(self, predictions: np.ndarray) -> dict[str, float]:
        return tagging.metrics(self.predicted_tags(predictions), self.tags[: len(predictions)])

    def files(self, predictions: np.ndarray) -> dict[str, str]:
        """Lines of word, tag and predicted tag, as CoNLL's script reads them."""
        sentences = zip(self.words, self.tags, self.predicted_tags(predictions), strict=False)
        return {"ner.txt": "\n".join("".join(f"{w} {t} {p}\n" for w, t, p in zip(*s, strict=True)) for s in sentences)}
