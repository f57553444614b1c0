"""SQuAD 1.1 and 2.0 (Rajpurkar et al., arXiv:1606.05250, arXiv:1806.03822): the files, and the scores of the official
evaluation scripts, in percent as those scripts print them.

Read from a folder with train-v1.1.json and dev-v1.1.json (2.0: -v2.0), from a single file in that format (a tenth of its
paragraphs becomes the dev set), or from the hub (`rajpurkar/squad`, `rajpurkar/squad_v2`).
"""

import hashlib
import json
import re
import string
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from common.errors import BadInput
from common.evaluation import hub

HUB = {"squad": "rajpurkar/squad", "squad2": "rajpurkar/squad_v2"}
FILES = {
    "squad": {"train": "train-v1.1.json", "dev": "dev-v1.1.json"},
    "squad2": {"train": "train-v2.0.json", "dev": "dev-v2.0.json"},
}
DRAW_SEED, DEV_SHARE = 1234, 0.1  # of the paragraphs of a single file


class Question(NamedTuple):
    id: str
    text: str
    context: int  # index in Questions.contexts
    answers: list[str]  # []: the context has no answer (2.0)
    span: tuple[int, int] | None  # characters [start, end) of the first answer whose text is where the file says


class Questions(NamedTuple):
    contexts: list[str]
    questions: list[Question]
    hash: str
    notes: list[str]


def read(name: str, data: Path | None, split: str) -> Questions:
    """name: 'squad' or 'squad2'; split: 'train' or 'dev'. BadInput for a missing file or another format.

    Answers whose text is not where the file says are counted in the notes. They are not trained on (a question without another
    answer is left out of train); in dev their texts count like every answer's. For 'squad', questions without an answer are
    left out and counted too.
    """
    notes: list[str] = []
    if data is None:
        paragraphs, content = _from_hub(name, split)
        where = HUB[name]
    else:
        path, drawn = _file(name, data, split)
        where, raw = str(path), path.read_bytes()
        paragraphs = _paragraphs(path, raw)
        content = hashlib.sha256(raw).hexdigest()
        if drawn:
            order = np.random.default_rng(DRAW_SEED).permutation(len(paragraphs))
            count = max(1, round(DEV_SHARE * len(paragraphs)))
            chosen = order[:count] if split == "dev" else order[count:]
            paragraphs = [paragraphs[i] for i in np.sort(chosen)]
            notes.append(f"{path.name}: {count} of its {len(order):,} paragraphs are dev, drawn by seed {DRAW_SEED}")
    questions: list[Question] = []
    misplaced = unanswered = 0
    for number, (context, items) in enumerate(paragraphs):
        for key, text, answers in items:
            spans = [(answer, start, start + len(answer)) for answer, start in answers]
            valid = [(start, end) for answer, start, end in spans if answer and context[start:end] == answer]
            misplaced += len(answers) - len(valid)
            unanswered += name == "squad" and not answers
            if valid or (answers and split == "dev") or (not answers and name == "squad2"):
                questions.append(Question(key, text, number, [answer for answer, _ in answers], valid[0] if valid else None))
    twice = next((key for key, count in Counter(q.id for q in questions).items() if count > 1), None)
    if twice is not None and split == "dev":  # predictions are stored by id
        raise BadInput(f"{where}: several questions have the id {twice!r}; give each a different one")
    if misplaced:
        notes.append(f"{split}: {misplaced:,} answers do not stand in their context where the file says; not trained on")
    if unanswered:
        notes.append(f"{split}: {unanswered:,} questions have no answer and are left out (squad2 has such)")
    if not questions:
        raise BadInput(f"{where}: has no question with an answer")
    content_hash = hashlib.sha256(f"{name} {split} {content}".encode()).hexdigest()
    return Questions([context for context, _ in paragraphs], questions, content_hash, notes)


def _file(name: str, data: Path, split: str) -> tuple[Path, bool]:
    """The file of a split, and whether the split is drawn from it. A dev file alone has no train."""
    if data.is_file():
        return _single(name, data, split)
    if not data.is_dir():
        raise BadInput(f"task.data={data}: no such folder or file; give one in SQuAD's format, or leave it out for the hub")
    if all((data / file).is_file() for file in FILES[name].values()):
        return data / FILES[name][split], False
    single = sorted(data.glob("*.json"))
    if len(single) == 1:
        return _single(name, single[0], split)
    raise BadInput(f"task.data={data}: does not hold {' and '.join(FILES[name].values())}, which {name} is read from")


def _single(name: str, path: Path, split: str) -> tuple[Path, bool]:
    is_dev = path.name == FILES[name]["dev"]
    if is_dev and split == "train":
        raise BadInput(f"task.data={path}: is {name}'s dev set; give a folder with {FILES[name]['train']} beside it")
    return path, not is_dev


Paragraph = tuple[str, list[tuple[str, str, list[tuple[str, int]]]]]  # context, its questions: id, text, answers: text, start


def _paragraphs(path: Path, raw: bytes) -> list[Paragraph]:
    try:
        articles = json.loads(raw)["data"]
        return [(_text(p["context"]), [_asked(q) for q in p["qas"]]) for article in articles for p in article["paragraphs"]]
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        what = f"has no {error}" if isinstance(error, KeyError) else "is not JSON in SQuAD's format"
        raise BadInput(f"{path}: {what}; give a file as {FILES['squad']['dev']} is") from None


def _asked(q: dict[str, Any]) -> tuple[str, str, list[tuple[str, int]]]:
    impossible = bool(q.get("is_impossible"))  # the file lists plausible answers, which are wrong
    answers = [] if impossible else [(_text(a["text"]), int(a["answer_start"])) for a in q["answers"]]
    return str(q["id"]), _text(q["question"]), answers


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


def _from_hub(name: str, split: str) -> tuple[list[Paragraph], str]:
    by_context: dict[str, list[tuple[str, str, list[tuple[str, int]]]]] = {}
    for row in hub.load_split(name, HUB[name], None, "train" if split == "train" else "validation"):
        answers = list(zip(row["answers"]["text"], row["answers"]["answer_start"], strict=True))
        by_context.setdefault(row["context"], []).append((row["id"], row["question"], answers))
    paragraphs = list(by_context.items())
    return paragraphs, hashlib.sha256(json.dumps(paragraphs).encode()).hexdigest()


# ---- scores ----------------------------------------------------------------------------------------------------------

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = set(string.punctuation)


def normalized(text: str) -> str:
    """Lower case, no punctuation, no articles, single spaces: in the order of the official script."""
    text = "".join(c for c in text.lower() if c not in _PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", text).split())


def exact(prediction: str, answer: str) -> float:
    return float(normalized(prediction) == normalized(answer))


def f1(prediction: str, answer: str) -> float:
    """F1 of the common words; 0 if there are none."""
    predicted, expected = normalized(prediction).split(), normalized(answer).split()
    common = sum((Counter(predicted) & Counter(expected)).values())
    if not common:
        return 0.0
    precision, recall = common / len(predicted), common / len(expected)
    return 2 * precision * recall / (precision + recall)


def scores(name: str, prediction: str, answers: Sequence[str]) -> tuple[float, float]:
    """(exact match, F1): the best over the answers, as in the official script of 'squad' or 'squad2'.

    The scripts differ on answers that consist of articles and punctuation alone. In evaluate-v1.1.py such an answer has no
    words, so its F1 is 0. evaluate-v2.0.py drops such answers; if none is left, the right answer is '', and F1 is exact match.
    """
    if name == "squad2":
        answers = [a for a in answers if normalized(a)]
        if not answers:
            right = exact(prediction, "")
            return right, right
    return max(exact(prediction, a) for a in answers), max(f1(prediction, a) for a in answers)


def metrics(name: str, questions: Iterable[Question], predictions: dict[str, str]) -> dict[str, float]:
    """{question id: text} -> f1 and exact_match, in percent. If some questions have no answer, also the two scores of the
    questions with an answer and of those without."""
    table = np.array([(bool(q.answers), *scores(name, predictions[q.id], q.answers)) for q in questions], float)
    values = {"f1": 100 * float(table[:, 2].mean()), "exact_match": 100 * float(table[:, 1].mean())}
    has = table[:, 0] > 0
    if not has.all():
        for part, rows in (("has_answer", table[has]), ("no_answer", table[~has])):
            if len(rows):
                values |= {f"{part}_f1": 100 * float(rows[:, 2].mean()), f"{part}_exact": 100 * float(rows[:, 1].mean())}
    return values


def counts(questions: Sequence[Question]) -> dict[str, int]:
    """{metric: questions}, for the metrics that are computed from a part of the questions."""
    has = sum(bool(q.answers) for q in questions)
    parts = (("has_answer", has), ("no_answer", len(questions) - has))
    return {f"{part}_{metric}": n for part, n in parts for metric in ("f1", "exact")}


def best_thresholds(questions: Sequence[Question], texts: dict[str, str], null_odds: dict[str, float]) -> dict[str, float]:
    """best_f1 and best_exact, in percent, and the threshold of each: the prediction is 'no answer' above it (evaluate-v2.0.py,
    find_best_thresh). If 'no answer' is always best, that script returns 0.0; here the threshold is below all odds.

    texts: the best answers that are not empty. null_odds: score of 'no answer' minus the score of the best answer.
    """
    raw = {q.id: scores("squad2", texts[q.id], q.answers) for q in questions}
    ordered = sorted(questions, key=lambda q: null_odds[q.id])
    values: dict[str, float] = {}
    for metric, column in (("f1", 1), ("exact", 0)):
        total = float(sum(not q.answers for q in ordered))  # with 'no answer' for all questions
        best, threshold = total, min(0.0, null_odds[ordered[0].id] - 1)
        for q in ordered:  # from here on this one is answered too
            total += raw[q.id][column] if q.answers else -1.0 if texts[q.id] else 0.0
            if total > best:
                best, threshold = total, null_odds[q.id]
        values |= {f"best_{metric}": 100 * best / len(ordered), f"best_{metric}_threshold": threshold}
    return values
