"""RACE (Lai et al., arXiv:1704.04683): questions with four answers about an article, of middle and of high schools.

Read from the folder that its authors distribute (train|dev|test/middle|high/*.txt, each a JSON object) or from the hub
(`ehovy/race`).
"""

import hashlib
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common.data.text_files import read_text
from common.errors import BadInput
from common.evaluation import hub

HUB = "ehovy/race"
LEVELS = ("middle", "high")
CHOICES = 4


class Questions(NamedTuple):
    """labels (N,): the right answer, from 0; high (N,) bool: from a high school's examination."""

    articles: list[str]
    places: list[int]  # of the article of each question
    questions: list[str]
    options: list[list[str]]
    labels: np.ndarray
    high: np.ndarray
    hash: str


def read(folder: Path | None, split: str) -> Questions:
    """split: 'train', 'dev' or 'test'. BadInput for what is no such folder, or a question without four answers."""
    found = _from_hub(split) if folder is None else _from_files(folder, split)
    articles, places, questions, options, labels, high = [], [], [], [], [], []
    for where, level, item in found:
        try:
            asked = list(zip(item["questions"], item["options"], item["answers"], strict=True))
            articles.append(item["article"])
            texts = [item["article"], *item["questions"], *(text for given in item["options"] for text in given)]
            if not all(isinstance(text, str) for text in texts):
                raise TypeError("not all are texts")
        except (KeyError, TypeError, ValueError) as error:
            raise BadInput(f"{where}: is not an article with its questions, options and answers ({error})") from None
        for question, given, answer in asked:
            if len(given) != CHOICES or answer not in list("ABCD"):
                raise BadInput(f"{where}: answer {answer!r} of {len(given)} options; RACE has one of A B C D")
            places.append(len(articles) - 1)
            questions.append(question)
            options.append(list(given))
            labels.append("ABCD".index(answer))
            high.append(level == "high")
    if not labels:
        raise BadInput(f"{folder or HUB}: holds no question of {split}")
    content = hashlib.sha256(json.dumps([split, articles, places, questions, options, labels]).encode()).hexdigest()
    return Questions(articles, places, questions, options, np.array(labels, np.int64), np.array(high), content)


def _from_files(folder: Path, split: str) -> list[tuple[str, str, dict]]:
    if not (folder / split).is_dir():
        raise BadInput(f"task.data={folder}: does not hold {split}/middle and {split}/high, which race is read from")
    made = []
    for level in LEVELS:
        for path in sorted((folder / split / level).glob("*.txt")):
            try:
                made.append((str(path), level, json.loads(read_text(path))))
            except (ValueError, RecursionError):
                raise BadInput(f"{path}: is not JSON") from None
    return made


def _from_hub(split: str) -> list[tuple[str, str, dict]]:
    made = []
    for level in LEVELS:
        for row in hub.rows("race", HUB, level, hub.SPLITS[split]):
            asked = {f"{key}s" if key != "options" else key: [row[key]] for key in ("question", "options", "answer")}
            made.append((f"{HUB} {row['example_id']}", level, {"article": row["article"], **asked}))
    return made


def counts(high: np.ndarray) -> dict[str, int]:
    """{metric: questions that it is a mean of}, of those that `metrics` gives of a part of them."""
    return {"accuracy_middle": int((~high).sum()), "accuracy_high": int(high.sum())}


def metrics(predictions: np.ndarray, labels: np.ndarray, high: np.ndarray) -> dict[str, float]:
    """predictions, labels, high (N,) -> accuracy, and that of either kind of school."""
    right = predictions == labels
    kinds = {"accuracy": right, "accuracy_middle": right[~high], "accuracy_high": right[high]}
    return {name: float(values.mean()) for name, values in kinds.items() if len(values)}
