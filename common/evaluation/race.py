"""RACE (Lai et al., arXiv:1704.04683): questions about an article with four answers each, from middle and high schools.

Read from the folder that its authors distribute (train|dev|test/middle|high/*.txt, each a JSON object) or from the hub
(`ehovy/race`).
"""

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from common.data.text_files import read_text
from common.errors import BadInput
from common.evaluation import hub

HUB = "ehovy/race"
LEVELS = ("middle", "high")
CHOICES = 4


class Questions(NamedTuple):
    """labels (N,): index of the right answer; high (N,) bool: is the question from a high school examination?"""

    articles: list[str]
    article_of: list[int]  # index of the article of each question
    questions: list[str]
    options: list[list[str]]
    labels: np.ndarray
    high: np.ndarray
    hash: str


def read(folder: Path | None, split: str) -> Questions:
    """split: 'train', 'dev' or 'test'. BadInput for a missing folder, a damaged file, a question without four answers."""
    items = _from_hub(split) if folder is None else _from_files(folder, split)
    articles, article_of, questions, options, labels, high = [], [], [], [], [], []
    for where, level, item in items:
        try:
            triples = list(zip(item["questions"], item["options"], item["answers"], strict=True))
            articles.append(item["article"])
            texts = [item["article"], *item["questions"], *(text for choices in item["options"] for text in choices)]
            if not all(isinstance(text, str) for text in texts):
                raise TypeError("not all values are strings")
        except (KeyError, TypeError, ValueError) as error:
            raise BadInput(f"{where}: is not an article with its questions, options and answers ({error})") from None
        for question, choices, answer in triples:
            if len(choices) != CHOICES or answer not in list("ABCD"):
                raise BadInput(f"{where}: answer {answer!r} of {len(choices)} options; RACE has one of A B C D")
            article_of.append(len(articles) - 1)
            questions.append(question)
            options.append(list(choices))
            labels.append("ABCD".index(answer))
            high.append(level == "high")
    if not labels:
        raise BadInput(f"{folder or HUB}: has no questions of {split}")
    content = hashlib.sha256(json.dumps([split, articles, article_of, questions, options, labels]).encode()).hexdigest()
    return Questions(articles, article_of, questions, options, np.array(labels, np.int64), np.array(high), content)


Item = tuple[str, str, dict[str, Any]]  # where it was read, level, article with its questions


def _from_files(folder: Path, split: str) -> list[Item]:
    if not (folder / split).is_dir():
        raise BadInput(f"task.data={folder}: does not hold {split}/middle and {split}/high, which race is read from")
    items: list[Item] = []
    for level in LEVELS:
        for path in sorted((folder / split / level).glob("*.txt")):
            try:
                items.append((str(path), level, json.loads(read_text(path))))
            except (ValueError, RecursionError):
                raise BadInput(f"{path}: is not JSON") from None
    return items


def _from_hub(split: str) -> list[Item]:
    items: list[Item] = []
    for level in LEVELS:
        for row in hub.load_split("race", HUB, level, hub.SPLITS[split]):
            question = {f"{key}s" if key != "options" else key: [row[key]] for key in ("question", "options", "answer")}
            items.append((f"{HUB} {row['example_id']}", level, {"article": row["article"], **question}))
    return items


def counts(high: np.ndarray) -> dict[str, int]:
    """{metric: questions}, for the metrics that are computed from a part of the questions."""
    return {"accuracy_middle": int((~high).sum()), "accuracy_high": int(high.sum())}


def metrics(predictions: np.ndarray, labels: np.ndarray, high: np.ndarray) -> dict[str, float]:
    """predictions, labels, high (N,) -> accuracy, overall and per level of school."""
    right = predictions == labels
    parts = {"accuracy": right, "accuracy_middle": right[~high], "accuracy_high": right[high]}
    return {name: float(values.mean()) for name, values in parts.items() if len(values)}
