"""Extractive question answering (SQuAD): a span of the context. Long contexts are cut into overlapping windows.

The head: a linear layer with two outputs on each position, for the start and the end of the span. Letters in shapes as in
base.py.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, Self

import numpy as np

from common.data.batches import MicroBatch
from common.evaluation import squad

from .base import Head, Split, TaskDataset, example_columns, largest_id, used

if TYPE_CHECKING:
    import torch

    from .base import Batch

MAX_ANSWER_LEN = 30  # tokens (BERT's run_squad.py, max_answer_length)


def loss_sum(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Logits (B, T, 2): the mean of the two cross entropies, over the positions that are not padding. In transformers and
    in BERT's own code, the loss includes padding, whose amount depends on the layout."""
    import torch
    import torch.nn.functional as F

    scores = logits.float().masked_fill(~batch["attention_mask"][..., None], torch.finfo(torch.float32).min)
    losses = F.cross_entropy(scores, batch["labels"], reduction="none")  # (B, T, 2), (B, 2) -> (B, 2)
    return (losses.mean(-1) * batch["loss_mask"]).sum()


def predictions(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    """The best span: its first and last token, its score, and the score of [CLS], which means no answer: (B, 4)."""
    import torch

    scores = logits.double()
    starts = scores[..., 0].masked_fill(~batch["start_mask"], -torch.inf)
    ends = scores[..., 1].masked_fill(~batch["end_mask"], -torch.inf)
    # the best end for each start, at most MAX_ANSWER_LEN tokens long
    reach = min(MAX_ANSWER_LEN, ends.shape[1])
    padded = torch.nn.functional.pad(ends, (0, reach - 1), value=-torch.inf).unfold(1, reach, 1)  # (B, T, reach)
    best, further = padded.max(-1)
    score, start = (starts + best).max(-1)
    end = start + further.gather(1, start[:, None])[:, 0]
    return torch.stack([start.double(), end.double(), score, scores[:, 0].sum(-1)], -1)


HEAD = Head(
    trained_class="ForQuestionAnswering", exported_class="ForQuestionAnswering", loss_sum=loss_sum, predictions=predictions,
    prediction_width=lambda seq_len: 4, parameter="qa_outputs", pooled=False, dropout=False,
)  # fmt: skip


class Part(NamedTuple):
    """Tokens [start, end) of a context. Answers may start in [first, last): no other part has more context around these tokens
    (BERT's run_squad.py, _check_is_max_context)."""

    start: int
    end: int
    first: int
    last: int


class Window(NamedTuple):
    """A part of a context, with its question."""

    question: int
    part: Part
    label: tuple[int, int]  # first and last token of the answer in the sequence; (0, 0), [CLS], where it is not in the window


class SquadDataset(TaskDataset):
    """The windows of a split of SQuAD 1.1 or 2.0."""

    unit = "windows"

    @classmethod
    def open(cls, split: Split) -> Self:
        return cls(split, squad.read(split.task, split.folder, split.name))

    def __init__(self, split: Split, read: squad.Questions):
        notes = list(read.notes)
        self.questions = [read.questions[i] for i in used(split, len(read.questions), notes).tolist()]
        self.texts, self.contexts = read.contexts, split.tokenizer.encode_with_offsets(read.contexts)
        encoded = split.tokenizer.encode_batch([question.text for question in self.questions])
        self.question_ids = [ids[: split.question_len] for ids in encoded]
        shortened = sum(len(ids) > split.question_len for ids in encoded)
        if shortened:
            notes.append(
                f"{split.name}: {shortened:,} of {len(encoded):,} questions are cut to task.question_len={split.question_len}"
            )
        self.windows: list[Window] = []
        for i, (question, ids) in enumerate(zip(self.questions, self.question_ids, strict=True)):
            tokens, offsets = self.contexts[question.context]
            answer = answer_token_span(offsets, question.span)
            parts = context_parts(len(tokens), split.seq_len - len(ids) - 3, split.stride)
            self.windows += [Window(i, part, answer_label(part, len(ids) + 2, answer)) for part in parts]
        answerable = {window.question for window in self.windows if window.label != (0, 0)}
        lost = sum(question.span is not None and i not in answerable for i, question in enumerate(self.questions))
        if lost and split.name == "train":
            notes.append(f"train: the answers of {lost:,} questions do not fit into one window: trained on as unanswerable")
        lengths = np.array([len(self.question_ids[w.question]) + w.part.end - w.part.start for w in self.windows])
        largest = largest_id(self.question_ids, [tokens for tokens, _ in self.contexts])
        super().__init__(split, read.hash, largest, lengths, notes)
        self.task, self.null_threshold = split.task, split.null_threshold

    def collate(self, numbers: np.ndarray | range) -> MicroBatch:
        """As `pad`, with labels (B, 2) int64: first and last token of the answer; loss_mask (B,) bool; start_mask, end_mask
        (B, T) bool: where an answer may start and end."""
        indices = self.indices(numbers)
        windows = [self.windows[i] for i in indices.tolist()]
        batch = self.pad([self._texts(window) for window in windows]) | example_columns(indices)
        start_mask, end_mask = np.zeros(batch["tokens"].shape, bool), np.zeros(batch["tokens"].shape, bool)
        for row, window in enumerate(windows):
            part, offset = window.part, self._context_offset(window)
            start_mask[row, offset + part.first : offset + part.last] = True
            end_mask[row, offset + part.start : offset + part.end] = True
        labels = np.array([window.label for window in windows], np.int64)
        masks = {"loss_mask": np.ones(len(indices), bool), "start_mask": start_mask, "end_mask": end_mask}
        return batch | {"labels": labels} | masks

    def _texts(self, window: Window) -> list[list[int]]:
        ids = self.contexts[self.questions[window.question].context][0]
        return [self.question_ids[window.question], ids[window.part.start : window.part.end]]

    def _context_offset(self, window: Window) -> int:
        """Position in the sequence minus position in the context, which follows [CLS] question [SEP]."""
        return len(self.question_ids[window.question]) + 2 - window.part.start

    def best_answers(self, predictions: np.ndarray) -> tuple[dict[str, str], dict[str, float]]:
        """For each question, its best non-empty answer over all windows and the score of no answer minus that of the answer."""
        best: dict[str, tuple[float, str]] = {}
        null: dict[str, float] = {}
        for window, (start, end, score, none) in zip(self.windows, predictions.tolist(), strict=False):
            question = self.questions[window.question]
            null[question.id] = min(null.get(question.id, np.inf), none)
            if question.id in best and score <= best[question.id][0]:
                continue
            offsets, offset = self.contexts[question.context][1], self._context_offset(window)
            text = self.texts[question.context]
            answer = text[offsets[int(start) - offset][0] : offsets[int(end) - offset][1]] if np.isfinite(score) else ""
            best[question.id] = (score, answer)
        # JSON needs finite numbers, but a window in which no answer may start has a score of -inf
        null_odds = {key: null[key] - max(score, -1e9) for key, (score, _) in best.items()}
        return {key: text for key, (_, text) in best.items()}, null_odds

    def scored(self, n: int) -> int:
        return len({window.question for window in self.windows[:n]})

    def counts(self, n: int) -> dict[str, int]:
        return squad.counts([self.questions[i] for i in sorted({window.question for window in self.windows[:n]})])

    def answers(self, predictions: np.ndarray) -> dict[str, str]:
        """The best answers. '' if, in SQuAD 2.0, the threshold selects no answer."""
        texts, null_odds = self.best_answers(predictions)
        if self.task == "squad":
            return texts
        return {key: "" if null_odds[key] > self.null_threshold else text for key, text in texts.items()}

    def metrics(self, predictions: np.ndarray) -> dict[str, float]:
        answers = self.answers(predictions)
        questions = [question for question in self.questions if question.id in answers]
        scores = squad.metrics(self.task, questions, answers)
        if self.task == "squad2":
            scores |= squad.best_thresholds(questions, *self.best_answers(predictions))
        return scores

    def files(self, predictions: np.ndarray) -> dict[str, str]:
        """predictions.json, as both official scripts read it. For 2.0 also best_answers.json, without a threshold, and
        null_odds.json: evaluate-v2.0.py computes best_f1 and best_exact from them (--na-prob-file null_odds.json)."""
        texts, null_odds = self.best_answers(predictions)
        files = {"predictions.json": json.dumps(self.answers(predictions), indent=1, ensure_ascii=False)}
        if self.task == "squad2":
            files["best_answers.json"] = json.dumps(texts, indent=1, ensure_ascii=False)
            files["null_odds.json"] = json.dumps(null_odds, indent=1)
        return files


def answer_token_span(offsets: Sequence[tuple[int, int]], span: tuple[int, int] | None) -> tuple[int, int] | None:
    """First and last token that overlap with the characters [start, end) of a context. None without an answer."""
    if span is None:
        return None
    touched = [i for i, (start, end) in enumerate(offsets) if start < span[1] and end > span[0]]
    return (touched[0], touched[-1]) if touched else None


def context_parts(tokens: int, room: int, stride: int) -> list[Part]:
    """Parts of at most `room` tokens, `stride` apart. An answer may start at a token in only one of the parts
    that contain it: the first one in which the token is farthest from the nearer end. Raises ValueError without room."""
    if room < 1:
        raise ValueError(f"room for {room} tokens of a context")
    spans, start = [], 0
    while True:
        spans.append((start, min(tokens, start + room)))
        if spans[-1][1] == tokens:
            break
        start += min(spans[-1][1] - start, stride)
    parts, first = [], 0
    for number, (start, end) in enumerate(spans):
        last = end
        if number + 1 < len(spans):
            next_start, next_end = spans[number + 1]
            shared = range(next_start, end)
            # the smaller distance to an end, in this part and in the next; a little is added for longer parts, as in BERT
            here = [min(i - start, end - 1 - i) + 0.01 * (end - start) for i in shared]
            there = [min(i - next_start, next_end - 1 - i) + 0.01 * (next_end - next_start) for i in shared]
            last = next_start + next((k for k in range(len(here)) if there[k] > here[k]), len(here))
        parts.append(Part(start, end, first, last))
        first = last
    return parts


def answer_label(part: Part, first: int, answer: tuple[int, int] | None) -> tuple[int, int]:
    """The answer's first and last token in the sequence; (0, 0) if the part does not contain all of it. first: position of
    the part's first token in the sequence. answer: first and last token in the context."""
    if answer is None or answer[0] < part.start or answer[1] >= part.end:
        return 0, 0
    return first + answer[0] - part.start, first + answer[1] - part.start
