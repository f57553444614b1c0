"""Texts, or pairs of texts, with a label each: a classification task of one's own.

Read from a folder with train, valid (or dev) and, to evaluate on, test, each a file of JSON lines or a tab-separated one with a
header: train.jsonl or train.tsv. A row has `text`, `label` and, of pairs, `text_pair`; those of test may all lack the label.
"""

import functools
import hashlib
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common.data.manifest import fingerprint
from common.errors import BadInput
from common.evaluation import glue

FILES = {"train": ("train",), "dev": ("valid", "dev"), "test": ("test",)}
COLUMNS = ("text", "text_pair", "label")


class Row(NamedTuple):
    where: str  # file and line
    texts: list[str]
    label: str | None


def read(folder: Path | None, split: str, labels: list[str]) -> glue.Examples:
    """split: 'train', 'dev' or 'test'. The label of an example is its place in `labels`, or -1 where test has none. BadInput
    for missing or damaged files, for a label outside `labels`, for pairs among single texts."""
    path = _file(folder, split)
    found = _rows(path)
    odd = next((row for row in found if len(row.texts) != len(found[0].texts)), None)
    if odd is not None:
        has = "has a text_pair" if len(odd.texts) == 2 else "has no text_pair"
        raise BadInput(f"{odd.where}: {has}, unlike {found[0].where}; give one to all rows or to none")
    number: dict[str | None, int] = {label: i for i, label in enumerate(labels)}
    if split == "test" and all(row.label is None for row in found):
        number[None] = -1
    wrong = next((row for row in found if row.label not in number), None)
    if wrong is not None and wrong.label is None:
        raise BadInput(f"{wrong.where}: has no label; give each row one")
    if wrong is not None:
        raise BadInput(
            f"{wrong.where}: label {wrong.label!r} is none of {', '.join(labels)}; correct it, or add it to task.labels"
        )
    values = np.array([number[row.label] for row in found], np.int64)
    unused = [label for i, label in enumerate(labels) if not (values == i).any()] if split == "train" else []
    note = f"train: no example of {', '.join(unused)}" if unused else None
    texts = [list(column) for column in zip(*(row.texts for row in found), strict=True)]
    content = hashlib.sha256(json.dumps([split, fingerprint(path), labels]).encode()).hexdigest()
    return glue.Examples(texts, values, [len(found)], content, note)


def label_set(folder: Path | None) -> list[str]:
    """The labels of train, sorted, as numbers if all are. BadInput for fewer than two."""
    path = _file(folder, "train")
    found = {row.label for row in _rows(path)}
    if None in found or len(found) < 2:
        has = "rows without a label" if None in found else f"the label {found.pop()!r} alone"
        raise BadInput(f"{path}: has {has}; give each row one of two labels or more")
    return sorted(found, key=int) if all(label.isdecimal() for label in found) else sorted(found)


def metrics(predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """predictions, labels (N,): accuracy, and the mean of the F1 of each class that either has, from 0 to 1."""
    from sklearn.metrics import accuracy_score, f1_score

    macro = f1_score(labels, predictions, average="macro", zero_division=0)
    return {"accuracy": float(accuracy_score(labels, predictions)), "macro_f1": float(macro)}


def _file(folder: Path | None, split: str) -> Path:
    if folder is None:
        raise BadInput("classify: is read from files of your own; give task.data=DIR (or --data DIR)")
    names = [f"{stem}{suffix}" for stem in FILES[split] for suffix in (".jsonl", ".tsv")]
    found = [folder / name for name in names if (folder / name).is_file()]
    if not found:
        raise BadInput(f"task.data={folder}: does not hold {' or '.join(names)}, which classify is read from")
    if len(found) > 1:
        raise BadInput(f"task.data={folder}: holds {' and '.join(path.name for path in found)}; leave one of them")
    return found[0]


def _rows(path: Path) -> list[Row]:
    status = path.stat()
    return _parsed(path, status.st_mtime_ns, status.st_size)


@functools.lru_cache(maxsize=3)  # train is asked for its labels by each split
def _parsed(path: Path, *_version: int) -> list[Row]:
    found = _of_json(path) if path.suffix == ".jsonl" else _of_tsv(path)
    if not found:
        raise BadInput(f"{path}: holds no example")
    return found


def _of_tsv(path: Path) -> list[Row]:
    header = glue.decoded(path).partition("\n")[0].rstrip("\r").split("\t")
    columns = [column for column in COLUMNS if column in header or column == "text"]
    made = []
    for where, values in glue.tab_separated(path, columns):
        label = values.pop() if columns[-1] == "label" else None
        made.append(Row(where, values, label or None))
    return made


def _of_json(path: Path) -> list[Row]:
    made = []
    for number, line in enumerate(glue.decoded(path).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            raise BadInput(f"{where}: is not JSON; each line must be an object with text and label") from None
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            raise BadInput(f"{where}: is no object with a `text`, which must be a string")
        second, label = row.get("text_pair"), row.get("label")
        if not isinstance(second, str | None) or not isinstance(label, str | int | None) or isinstance(label, bool):
            raise BadInput(f"{where}: its text_pair must be a string, its label a string or a whole number")
        made.append(
            Row(where, [row["text"]] if second is None else [row["text"], second], None if label is None else str(label))
        )
    return made
