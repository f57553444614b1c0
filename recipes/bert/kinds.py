"""The kinds of tasks that BERT is finetuned on: how examples become rows, the loss of the head, what is predicted and scored.

text     a class or a score of one text or two (GLUE): dropout and a linear layer on the pooled [CLS]
labelled a class, with texts and labels of one's own: the same
choice   one of several answers (RACE): the same with one output for each answer, whose texts are sequences of a batch
token    a tag for each word (NER): dropout and a linear layer on each position
span     a span of a text (SQuAD): a linear layer with two outputs on each position, its begin and its end

The heads are transformers' own. Letters in shapes: B samples, C sequences of a sample (1 but for choice), T positions,
L labels.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from common.data import batches, examples
from common.errors import BadInput
from common.evaluation import glue, labelled, metrics, race, squad, tagging
from common.paths import find

from .samples import Special

if TYPE_CHECKING:
    import torch

    from common.data.tokenizer import Tokenizer

    from . import finetune

LEAST = 8  # tokens of a sequence
ROUND = 8  # a micro batch is padded to its longest sequence, rounded up to a multiple of this
SUBSET_SEED = 1234


class Reader(NamedTuple):
    """What reading a split takes."""

    cfg: finetune.Config
    folder: Path | None  # of the data
    split: str
    tokenizer_dir: str | Path
    tokenizer: Tokenizer
    special: Special
    shuffle: bool

    @property
    def order(self) -> dict[str, Any]:
        return {"seed": self.cfg.train.seed, "shuffle": self.shuffle}


class Kind(examples.Examples):
    """The examples of a split, and what their kind of head does. `open` reads them."""

    hf_class_name = "ForSequenceClassification"  # trained, behind Bert or MegatronBert
    export_class = hf_class_name  # what config.json of an export says
    parameter = "classifier"  # name of the linear layer in transformers
    named = False  # do the outputs of the linear layer stand for labels, which id2label of an export names?
    pooled = True
    dropout = True
    sequences = 1  # C
    unit = "examples"  # what len() counts

    def __init__(self, reader: Reader, content_hash: str, largest: int, lengths: np.ndarray, notes: Sequence[str]):
        """lengths: (N,) tokens of each example. largest: token id."""
        source = examples.Source(
            f"{reader.cfg.task.name} {reader.split}", content_hash, reader.tokenizer_dir, reader.tokenizer, largest
        )
        super().__init__(source, lengths, notes=notes, **reader.order)
        self.special, self.seq_len = reader.special, reader.cfg.data.seq_len
        self.whole = reader.cfg.megatron.pp > 1  # pipeline stages pass hidden states of one length

    @classmethod
    def open(cls, reader: Reader) -> Kind:
        """BadInput for a task, a file or a label that does not do."""
        raise NotImplementedError

    @classmethod
    def width(cls, cfg: finetune.Config) -> int:
        """Numbers that one prediction takes."""
        return 1

    def lay_out(self, pieces: Sequence[Sequence[list[int]]]) -> batches.MicroBatch:
        """Ids of one text or two a sequence -> tokens, token_types (B x C, T) int64, lengths (B x C,) int64: [CLS] first [SEP],
        or [CLS] first [SEP] second [SEP]. T: the longest rounded up; seq_len where all batches must have one length."""
        lengths = np.array([sum(map(len, piece)) + len(piece) + 1 for piece in pieces])
        longest = self.seq_len if self.whole else min(self.seq_len, -(-int(lengths.max()) // ROUND) * ROUND)
        tokens = np.full((len(pieces), longest), self.special.pad, np.int64)
        types = np.zeros_like(tokens)
        for row, piece in enumerate(pieces):
            ids = [self.special.cls, *piece[0], self.special.sep]
            first = len(ids)
            for more in piece[1:]:
                ids += [*more, self.special.sep]
            tokens[row, : len(ids)] = ids
            types[row, first : len(ids)] = 1
        return {"tokens": tokens, "token_types": types, "lengths": lengths}

    @staticmethod
    def of_examples(places: np.ndarray) -> batches.MicroBatch:
        """example_mask (B,) bool: counts; places (B,) int64: in the split."""
        return {"example_mask": np.ones(len(places), bool), "places": places}

    @staticmethod
    def loss_sum(logits: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Loss in fp32, summed over what loss_mask counts."""
        raise NotImplementedError

    @staticmethod
    def predictions(logits: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """(B, width): what the model says of each example."""
        raise NotImplementedError

    def metrics(self, predictions: np.ndarray) -> dict[str, float]:
        """Predictions (n, width) of the first n examples -> scores by name."""
        raise NotImplementedError

    def scored(self, n: int) -> int:
        """How many answers the scores of the first n examples are of."""
        return n

    def counts(self, n: int) -> dict[str, int]:
        """{metric: answers it is of}, for those of the first n examples that are of a part of these answers."""
        return {}

    def files(self, predictions: np.ndarray) -> dict[str, str]:
        """The same -> {name: text} of prediction files in the benchmark's format."""
        raise NotImplementedError


def kept(reader: Reader, size: int, notes: list[str]) -> np.ndarray:
    """Places of the examples that are used: all, or task.train_examples of train. Adds to `notes`."""
    wanted = reader.cfg.task.train_examples if reader.shuffle else None
    if wanted is None:
        return np.arange(size)
    if wanted > size:
        raise BadInput(f"task.train_examples={wanted}: train has {size:,}; give at most that")
    notes.append(f"{wanted:,} of {size:,} examples of train, drawn by seed {SUBSET_SEED}")
    return np.sort(np.random.default_rng(SUBSET_SEED).permutation(size)[:wanted])


def cut(texts: Sequence[list[int]], seq_len: int) -> list[list[int]]:
    """Ids of one or two texts, so many that they fit with [CLS] and [SEP]: of two the longer is cut first (BERT's
    run_classifier.py, _truncate_seq_pair)."""
    room = seq_len - 1 - len(texts)
    if len(texts) == 1:
        return [texts[0][:room]]
    a, b = map(len, texts)
    if a + b > room:
        a, b = (a, room - a) if a <= room // 2 else (room - b, b) if b <= room // 2 else (room - room // 2, room // 2)
    return [texts[0][:a], texts[1][:b]]


def note_cut(reader: Reader, notes: list[str], what: str, count: int, of: int) -> None:
    """Add to `notes` that so many of a split are cut."""
    if count:
        notes.append(f"{reader.split}: {count:,} of {of:,} {what} are cut to data.seq_len={reader.cfg.data.seq_len}")


def largest_id(*texts: Sequence[Sequence[int]]) -> int:
    return max((max(ids, default=0) for column in texts for ids in column), default=0)


# ---- text ------------------------------------------------------------------------------------------------------------


class Text(Kind):
    """GLUE. Logits (B, L), or (B, 1) of a score."""

    named = True

    @classmethod
    def open(cls, reader: Reader) -> Text:
        found = cls.read(reader)
        notes = [found.note] if found.note else []
        keep = kept(reader, len(found.labels), notes)
        ids = [reader.tokenizer.encode_batch([column[i] for i in keep.tolist()]) for column in found.texts]
        pieces = [cut(row, reader.cfg.data.seq_len) for row in zip(*ids, strict=True)]
        lengths = np.array([sum(map(len, p)) for p in pieces])
        whole = [sum(map(len, row)) for row in zip(*ids, strict=True)]
        note_cut(reader, notes, "examples", int((lengths < whole).sum()), len(keep))
        self = cls(reader, found.hash, largest_id(*ids), lengths, notes)
        self.pieces, self.labels, self.sizes, self.name = pieces, found.labels[keep], found.sizes, reader.cfg.task.name
        return self

    @classmethod
    def read(cls, reader: Reader) -> glue.Examples:
        return glue.read(reader.cfg.task.name, reader.folder, reader.split)

    def collate(self, numbers: Any) -> batches.MicroBatch:
        """As lay_out; labels (B,) int64, or float32 of scores; loss_mask (B,) bool."""
        places = self.indices(numbers)
        made = self.lay_out([self.pieces[i] for i in places.tolist()])
        return made | self.of_examples(places) | {"labels": self.labels[places], "loss_mask": np.ones(len(places), bool)}

    @staticmethod
    def loss_sum(logits: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Cross entropy, or squared errors of a score."""
        import torch.nn.functional as F

        labels, counted = batch["labels"], batch["loss_mask"]
        if logits.shape[-1] == 1:
            return ((logits.float()[:, 0] - labels) ** 2 * counted).sum()
        return (F.cross_entropy(logits.float(), labels, reduction="none") * counted).sum()

    @staticmethod
    def predictions(logits: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """The likeliest class, or the score."""
        return logits if logits.shape[-1] == 1 else logits.argmax(-1, keepdim=True)

    def metrics(self, predictions: np.ndarray) -> dict[str, float]:
        return glue.metrics(self.name, predictions[:, 0], self.labels[: len(predictions)], self.sizes)

    def counts(self, n: int) -> dict[str, int]:
        return glue.counts(self.name, n, self.sizes)

    def files(self, predictions: np.ndarray) -> dict[str, str]:
        return glue.files(self.name, predictions[:, 0], self.sizes)


class Labelled(Text):
    """Texts or pairs of one's own, with the labels of task.labels. Logits (B, L)."""

    @classmethod
    def read(cls, reader: Reader) -> glue.Examples:
        return labelled.read(reader.folder, reader.split, labels(reader.cfg.task))

    @classmethod
    def open(cls, reader: Reader) -> Labelled:
        self = super().open(reader)
        self.names = labels(reader.cfg.task)
        return self

    def metrics(self, predictions: np.ndarray) -> dict[str, float]:
        return labelled.metrics(predictions[:, 0].astype(int), self.labels[: len(predictions)])

    def files(self, predictions: np.ndarray) -> dict[str, str]:
        lines = [f"{i}\t{self.names[int(label)]}" for i, label in enumerate(predictions[:, 0])]
        return {"classify.tsv": "\n".join(["index\tprediction", *lines]) + "\n"}


# ---- choice ----------------------------------------------------------------------------------------------------------


class Choice(Kind):
    """RACE: a sequence for each answer, of the article and the question with it. Logits (B x C, 1)."""

    export_class = "ForMultipleChoice"
    sequences = race.CHOICES

    @classmethod
    def open(cls, reader: Reader) -> Choice:
        found = race.read(reader.folder, reader.split)
        notes: list[str] = []
        keep = kept(reader, len(found.labels), notes)
        articles = reader.tokenizer.encode_batch(found.articles)
        # a question with a gap is a text with the answer in it
        texts = [
            q.replace("_", f" {option} ", 1) if "_" in q else f"{q} {option}"
            for q, options in zip(found.questions, found.options, strict=True) for option in options
        ]  # fmt: skip
        asked, seq_len = reader.tokenizer.encode_batch(texts), reader.cfg.data.seq_len
        pieces = [
            [cut((articles[found.article_of[i]], ids), seq_len) for ids in asked[cls.sequences * i : cls.sequences * (i + 1)]]
            for i in keep.tolist()
        ]
        lengths = np.array([max(len(a) + len(b) for a, b in four) for four in pieces])
        cuts = sum(
            any(len(b) < len(asked[cls.sequences * i + c]) for c, (_, b) in enumerate(four))
            for i, four in zip(keep.tolist(), pieces, strict=True)
        )
        note_cut(reader, notes, "questions lose the end of an answer: they", cuts, len(keep))
        self = cls(reader, found.hash, largest_id(articles, asked), lengths, notes)
        self.pieces, self.labels, self.high = pieces, found.labels[keep], found.high[keep]
        return self

    def collate(self, numbers: Any) -> batches.MicroBatch:
        """As lay_out; labels (B,) int64; loss_mask (B,) bool."""
        places = self.indices(numbers)
        made = self.lay_out([piece for i in places.tolist() for piece in self.pieces[i]])
        return made | self.of_examples(places) | {"labels": self.labels[places], "loss_mask": np.ones(len(places), bool)}

    @staticmethod
    def loss_sum(logits: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Cross entropy over the answers."""
        return Text.loss_sum(logits.view(len(batch["labels"]), -1), batch)

    @staticmethod
    def predictions(logits: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return logits.view(len(batch["labels"]), -1).argmax(-1, keepdim=True)

    def metrics(self, predictions: np.ndarray) -> dict[str, float]:
        n = len(predictions)
        return race.metrics(predictions[:, 0].astype(int), self.labels[:n], self.high[:n])

    def counts(self, n: int) -> dict[str, int]:
        return race.counts(self.high[:n])

    def files(self, predictions: np.ndarray) -> dict[str, str]:
        lines = [f"{i}\t{'ABCD'[int(answer)]}" for i, answer in enumerate(predictions[:, 0])]
        return {"race.tsv": "\n".join(["index\tprediction", *lines]) + "\n"}


# ---- token -----------------------------------------------------------------------------------------------------------


class Token(Kind):
    """Tags of words; the first piece of a word speaks for it (Devlin et al., section 5.3). Logits (B, T, L)."""

    hf_class_name = export_class = "ForTokenClassification"
    named = True
    pooled = False

    @classmethod
    def open(cls, reader: Reader) -> Token:
        found = tagging.read(reader.folder, reader.split)
        number = {tag: i for i, tag in enumerate(reader.cfg.task.tags)}
        wrong = next((tag for tags in found.tags for tag in tags if tag not in number), None)
        if wrong is not None:
            raise BadInput(f"{reader.split}: tag {wrong!r} is outside task.tags: {', '.join(number)}; add it there")
        notes: list[str] = []
        keep = kept(reader, len(found.words), notes)
        room = reader.cfg.data.seq_len - 2
        pieces, firsts, labels, lost = [], [], [], 0
        for i in keep.tolist():
            words = reader.tokenizer.encode_batch(found.words[i])
            lengths = np.array([*map(len, words)])
            starts = np.cumsum(lengths) - lengths
            seen = (lengths > 0) & (starts < room)
            lost += int((~seen).sum())
            pieces.append([[piece for word in words for piece in word][:room]])
            firsts.append(np.where(seen, starts + 1, 0))  # behind [CLS]
            labels.append(np.array([number[tag] for tag in found.tags[i]]))
        names = list(reader.cfg.task.tags)
        outside = "O" if "O" in names else names[0]
        if lost:
            how = f"not trained on, predicted as {outside}"
            notes.append(f"{reader.split}: {lost:,} words lie beyond data.seq_len or have no piece: {how}")
        largest = largest_id([ids for [ids] in pieces])
        self = cls(reader, found.hash, largest, np.array([len(ids) for [ids] in pieces]), notes)
        # of each word the place of its first piece, 0 where none is seen, and its tag: two arrays a sentence
        self.pieces, self.firsts, self.labels, self.names, self.outside = pieces, firsts, labels, names, outside
        self.words, self.tags = [found.words[i] for i in keep.tolist()], [found.tags[i] for i in keep.tolist()]
        return self

    @classmethod
    def width(cls, cfg: finetune.Config) -> int:
        return cfg.data.seq_len

    def collate(self, numbers: Any) -> batches.MicroBatch:
        """As lay_out; labels (B, T) int64; loss_mask (B, T) bool: the first pieces of words."""
        places = self.indices(numbers)
        made = self.lay_out([self.pieces[i] for i in places.tolist()])
        labels, counted = np.zeros_like(made["tokens"]), np.zeros(made["tokens"].shape, bool)
        for row, i in enumerate(places.tolist()):
            seen = self.firsts[i] > 0
            at = self.firsts[i][seen]
            labels[row, at], counted[row, at] = self.labels[i][seen], True
        return made | self.of_examples(places) | {"labels": labels, "loss_mask": counted}

    @staticmethod
    def loss_sum(logits: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        import torch.nn.functional as F

        losses = F.cross_entropy(logits.float().flatten(0, 1), batch["labels"].flatten(), reduction="none")
        return (losses * batch["loss_mask"].flatten()).sum()

    @staticmethod
    def predictions(logits: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """The likeliest tag of each position, (B, T)."""
        return logits.argmax(-1)

    def _tags(self, predictions: np.ndarray) -> list[list[str]]:
        """Of each word; O where it lies beyond the last position or has no piece."""
        return [
            [self.names[int(row[place])] if place else self.outside for place in firsts.tolist()]
            for firsts, row in zip(self.firsts, predictions, strict=False)
        ]

    def metrics(self, predictions: np.ndarray) -> dict[str, float]:
        return tagging.metrics(self._tags(predictions), self.tags[: len(predictions)])

    def files(self, predictions: np.ndarray) -> dict[str, str]:
        """As CoNLL's script takes them: word, tag, predicted tag."""
        sentences = zip(self.words, self.tags, self._tags(predictions), strict=False)
        return {"ner.txt": "\n".join("".join(f"{w} {t} {p}\n" for w, t, p in zip(*s, strict=True)) for s in sentences)}


# ---- span ------------------------------------------------------------------------------------------------------------


class Window(NamedTuple):
    """Part of a context with its question. tokens [start, end) of the context; own [first, last): those that no other window
    has with more context around them (BERT's run_squad.py, _check_is_max_context)."""

    question: int
    start: int
    end: int
    own: tuple[int, int]
    label: tuple[int, int]  # places of the answer in the sequence; (0, 0), [CLS], where it is not in the window


class Span(Kind):
    """SQuAD: long contexts are cut into windows that move by task.stride tokens. Logits (B, T, 2)."""

    hf_class_name = export_class = "ForQuestionAnswering"
    parameter = "qa_outputs"
    pooled = dropout = False
    unit = "windows"

    @classmethod
    def open(cls, reader: Reader) -> Span:
        cfg = reader.cfg
        found = squad.read(cfg.task.name, reader.folder, reader.split)
        notes = list(found.notes)
        questions = [found.questions[i] for i in kept(reader, len(found.questions), notes).tolist()]
        contexts = reader.tokenizer.encode_with_offsets(found.contexts)
        whole = reader.tokenizer.encode_batch([q.text for q in questions])
        asked = [ids[: cfg.task.question_len] for ids in whole]
        cuts = sum(len(ids) > cfg.task.question_len for ids in whole)
        if cuts:
            notes.append(
                f"{reader.split}: {cuts:,} of {len(whole):,} questions are cut to task.question_len={cfg.task.question_len}"
            )
        windows = []
        for i, (question, ids) in enumerate(zip(questions, asked, strict=True)):
            tokens, offsets = contexts[question.context]
            room = cfg.data.seq_len - len(ids) - 3
            answer = answer_token_span(offsets, question.span)
            windows += [windowed(i, len(ids) + 2, part, answer) for part in parts(len(tokens), room, cfg.task.stride)]
        held = {w.question for w in windows if w.label != (0, 0)}
        lost = sum(question.span is not None and i not in held for i, question in enumerate(questions))
        if lost and reader.split == "train":
            notes.append(f"train: the answers of {lost:,} questions lie whole in no window: trained on as if there were none")
        lengths = np.array([len(asked[w.question]) + w.end - w.start for w in windows])
        largest = largest_id(asked, [tokens for tokens, _ in contexts])
        self = cls(reader, found.hash, largest, lengths, notes)
        self.questions, self.asked, self.windows = questions, asked, windows
        self.texts, self.contexts, self.task = found.contexts, contexts, cfg.task
        return self

    @classmethod
    def width(cls, cfg: finetune.Config) -> int:
        return 4

    def collate(self, numbers: Any) -> batches.MicroBatch:
        """As lay_out; labels (B, 2) int64: first and last token of the answer; loss_mask (B,) bool; begins, ends (B, T) bool:
        where an answer may begin and end."""
        places = self.indices(numbers)
        windows = [self.windows[i] for i in places.tolist()]
        texts = [self.contexts[self.questions[w.question].context][0] for w in windows]
        made = self.lay_out([(self.asked[w.question], ids[w.start : w.end]) for w, ids in zip(windows, texts, strict=True)])
        begins, ends = np.zeros(made["tokens"].shape, bool), np.zeros(made["tokens"].shape, bool)
        for row, w in enumerate(windows):
            first = len(self.asked[w.question]) + 2
            begins[row, first + w.own[0] - w.start : first + w.own[1] - w.start] = True
            ends[row, first : first + w.end - w.start] = True
        labels = np.array([w.label for w in windows], np.int64)
        counted = np.ones(len(places), bool)
        return made | self.of_examples(places) | {"labels": labels, "loss_mask": counted, "begins": begins, "ends": ends}

    @staticmethod
    def loss_sum(logits: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """The mean of the two cross entropies, over the positions that are no padding: else the loss would say how much of it
        there is, which the layout decides (transformers' and BERT's own include it)."""
        import torch
        import torch.nn.functional as F

        scores = logits.float().masked_fill(~batch["attention_mask"][..., None], torch.finfo(torch.float32).min)
        losses = F.cross_entropy(scores, batch["labels"], reduction="none")  # (B, T, 2), (B, 2) -> (B, 2)
        return (losses.mean(-1) * batch["loss_mask"]).sum()

    @staticmethod
    def predictions(logits: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """The best span: its first and last token, its score, and the score of [CLS], which says that there is none: (B, 4)."""
        import torch

        scores = logits.double()
        begins = scores[..., 0].masked_fill(~batch["begins"], -torch.inf)
        ends = scores[..., 1].masked_fill(~batch["ends"], -torch.inf)
        # the best end of each begin, at most ANSWER_LEN tokens on
        reach = min(ANSWER_LEN, ends.shape[1])
        padded = torch.nn.functional.pad(ends, (0, reach - 1), value=-torch.inf).unfold(1, reach, 1)  # (B, T, reach)
        best, further = padded.max(-1)
        score, begin = (begins + best).max(-1)
        end = begin + further.gather(1, begin[:, None])[:, 0]
        return torch.stack([begin.double(), end.double(), score, scores[:, 0].sum(-1)], -1)

    def answers(self, predictions: np.ndarray) -> tuple[dict[str, str], dict[str, float]]:
        """The best answer of each question over its windows that is no empty one, and the score of none less its own."""
        best: dict[str, tuple[float, str]] = {}
        null: dict[str, float] = {}
        for w, (begin, end, score, none) in zip(self.windows, predictions.tolist(), strict=False):
            question = self.questions[w.question]
            null[question.id] = min(null.get(question.id, np.inf), none)
            if question.id in best and score <= best[question.id][0]:
                continue
            offsets = self.contexts[question.context][1]
            first = w.start - len(self.asked[w.question]) - 2
            text = self.texts[question.context]
            found = text[offsets[first + int(begin)][0] : offsets[first + int(end)][1]] if np.isfinite(score) else ""
            best[question.id] = (score, found)
        # finite, as JSON wants it: a window in which nothing may begin has no score
        odds = {key: null[key] - max(score, -1e9) for key, (score, _) in best.items()}
        return {key: text for key, (_, text) in best.items()}, odds

    def scored(self, n: int) -> int:
        return len({w.question for w in self.windows[:n]})

    def counts(self, n: int) -> dict[str, int]:
        return squad.counts([self.questions[i] for i in sorted({w.question for w in self.windows[:n]})])

    def answered(self, predictions: np.ndarray) -> dict[str, str]:
        """With '' where 2.0's threshold says that there is no answer."""
        texts, odds = self.answers(predictions)
        if self.task.name == "squad":
            return texts
        return {key: "" if odds[key] > self.task.null_threshold else text for key, text in texts.items()}

    def metrics(self, predictions: np.ndarray) -> dict[str, float]:
        said = self.answered(predictions)
        questions = [q for q in self.questions if q.id in said]
        made = squad.metrics(self.task.name, questions, said)
        if self.task.name == "squad2":
            made |= squad.best_thresholds(questions, *self.answers(predictions))
        return made

    def files(self, predictions: np.ndarray) -> dict[str, str]:
        """predictions.json, as both official scripts take it. Of 2.0 also best_answers.json, where no question is said to have
        none, and null_odds.json: evaluate-v2.0.py gives best_f1 and best_exact of them (--na-prob-file null_odds.json)."""
        texts, odds = self.answers(predictions)
        made = {"predictions.json": json.dumps(self.answered(predictions), indent=1, ensure_ascii=False)}
        if self.task.name == "squad2":
            made["best_answers.json"] = json.dumps(texts, indent=1, ensure_ascii=False)
            made["null_odds.json"] = json.dumps(odds, indent=1)
        return made


ANSWER_LEN = 30  # tokens of an answer, at most (BERT's run_squad.py, max_answer_length)


def answer_token_span(offsets: Sequence[tuple[int, int]], span: tuple[int, int] | None) -> tuple[int, int] | None:
    """First and last token that the characters [start, end) of a context touch; None without an answer."""
    if span is None:
        return None
    touched = [i for i, (start, end) in enumerate(offsets) if start < span[1] and end > span[0]]
    return (touched[0], touched[-1]) if touched else None


def parts(tokens: int, room: int, stride: int) -> list[tuple[int, int, tuple[int, int]]]:
    """(start, end, own) of windows of at most `room` tokens, `stride` apart. Of the windows that hold a token, that one owns it
    in which the smaller of its distances to the ends is the greatest, the first of equal ones. ValueError without room."""
    if room < 1:
        raise ValueError(f"room for {room} tokens of a context")
    spans, start = [], 0
    while True:
        spans.append((start, min(tokens, start + room)))
        if spans[-1][1] == tokens:
            break
        start += min(spans[-1][1] - start, stride)
    made, first = [], 0
    for number, (start, end) in enumerate(spans):
        last = end
        if number + 1 < len(spans):
            after, until = spans[number + 1]
            # this window's smaller distance, and the next one's; a little is added for the longer window, as in BERT
            ours = [min(i - start, end - 1 - i) + 0.01 * (end - start) for i in range(after, end)]
            theirs = [min(i - after, until - 1 - i) + 0.01 * (until - after) for i in range(after, end)]
            last = after + next((k for k in range(len(ours)) if theirs[k] > ours[k]), len(ours))
        made.append((start, end, (first, last)))
        first = last
    return made


def windowed(question: int, first: int, part: tuple[int, int, tuple[int, int]], answer: tuple[int, int] | None) -> Window:
    """first: place of the window's first token in the sequence. answer: first and last token in the context."""
    start, end, own = part
    inside = answer is not None and start <= answer[0] and answer[1] < end
    label = (first + answer[0] - start, first + answer[1] - start) if inside else (0, 0)
    return Window(question, start, end, own, label)


# ---- tasks -----------------------------------------------------------------------------------------------------------

KINDS: dict[str, type[Kind]] = {"text": Text, "labelled": Labelled, "choice": Choice, "token": Token, "span": Span}
KIND_OF = {
    **dict.fromkeys(glue.TASKS, "text"), "classify": "labelled", "squad": "span", "squad2": "span", "race": "choice",
    "ner": "token",
}  # fmt: skip
OWN_LABELS = {"classify": "labels", "ner": "tags"}  # tasks whose labels a key of the config gives


def labels(task: finetune.Task) -> list[str]:
    """What the outputs of the linear layer stand for: classes, a score, an answer, the ends of a span. BadInput where they are
    the labels of a train split that cannot be read."""
    if task.name in glue.TASKS:
        return list(glue.TASKS[task.name].labels) or ["score"]
    if task.name == "classify":
        return task.labels or labelled.label_set(find(task.data) if task.data else None)
    return {"span": ["begin", "end"], "choice": ["answer"], "token": task.tags}[KIND_OF[task.name]]


def least_seq_len(task: finetune.Task) -> int:
    """Tokens of a sequence: of a span those of the longest question, and a few of its context."""
    return task.question_len + LEAST if KIND_OF[task.name] == "span" else LEAST


def selected_by(task: finetune.Task) -> str:
    """The metric that decides which checkpoint is the best."""
    return next(iter(metrics.TASKS[task.name]))
