"""The task `classify`, on the user's own data: texts, or pairs of texts, with a label each.

Read from a folder with train, valid (or dev) and, to evaluate on, test. Each is a file of JSON lines (train.jsonl) or a
tab-separated file with a header (train.tsv). A row has `text`, `label` and, for pairs, `text_pair`; test may lack all labels.
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
    """split: 'train', 'dev' or 'test'. The label of an example is its index in `labels`, or -1 where test has no labels.
    BadInput for missing or damaged files, for a label outside `labels`, for pairs among single texts."""
    path = _file(folder, split)
    rows = _rows(path)
    odd = next((row for row in rows if len(row.texts) != len(rows[0].texts)), None)
    if odd is not None:
        has = "has a text_pair" if len(odd.texts) == 2 else "has no text_pair"
        raise BadInput(f"{odd.where}: {has}, unlike {rows[0].where}; give one to all rows or to none")
    number: dict[str | None, int] = {label: i for i, label in enumerate(labels)}
    if split == "test" and all(row.label is None for row in rows):
        number[None] = -1
    wrong = next((row for row in rows if row.label not in number), None)
    if wrong is not None and wrong.label is None:
        raise BadInput(f"{wrong.where}: has no label; give each row one")
    if wrong is not None:
        raise BadInput(
            f"{wrong.where}: label {wrong.label!r} is not one of {', '.join(labels)}; correct it, or add it to task.labels"
        )
    values = np.array([number[row.label] for row in rows], np.int64)
    unused = [label for i, label in enumerate(labels) if not (values == i).any()] if split == "train" else []
    note = f"train: no example of {', '.join(unused)}" if unused else None
    texts = [list(column) for column in zip(*(row.texts for row in rows), strict=True)]
    content = hashlib.sha256(json.dumps([split, fingerprint(path), labels]).encode()).hexdigest()
    return glue.Examples(texts, values, [len(rows)], content, note)


def label_set(folder: Path | None) -> list[str]:
    """The labels of train, sorted (as numbers if all of them are numbers). BadInput for fewer than two labels."""
    path = _file(folder, "train")
    rows = _rows(path)
    labels = {row.label for row in rows if row.label is not None}
    if len(labels) < 2 or any(row.label is None for row in rows):
        has = "rows without a label" if any(row.label is None for row in rows) else f"the label {labels.pop()!r} alone"
        raise BadInput(f"{path}: has {has}; give each row one of two labels or more")
    return sorted(labels, key=int) if all(label.isdecimal() for label in labels) else sorted(labels)


def metrics(predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """predictions, labels (N,): accuracy, and the mean F1 over the classes that occur in either, from 0 to 1."""
    from sklearn.metrics import accuracy_score, f1_score

    macro = f1_score(labels, predictions, average="macro", zero_division=0)
    return {"accuracy": float(accuracy_score(labels, predictions)), "macro_f1": float(macro)}


def _file(folder: Path | None, split: str) -> Path:
    if folder is None:
        raise BadInput("classify: is read from your own files; give task.data=DIR (or --data DIR)")
    names = [f"{stem}{suffix}" for stem in FILES[split] for suffix in (".jsonl", ".tsv")]
    paths = [folder / name for name in names if (folder / name).is_file()]
    if not paths:
        raise BadInput(f"task.data={folder}: does not hold {' or '.join(names)}, which classify is read from")
    if len(paths) > 1:
        raise BadInput(f"task.data={folder}: has {' and '.join(path.name for path in paths)}; leave one of them")
    return paths[0]


def _rows(path: Path) -> list[Row]:
    status = path.stat()
    return _parsed(path, status.st_mtime_ns, status.st_size)


@functools.lru_cache(maxsize=3)  # the labels of train are needed for each split
def _parsed(path: Path, *_version: int) -> list[Row]:
    rows = _json_rows(path) if path.suffix == ".jsonl" else _tsv_rows(path)
    if not rows:
        raise BadInput(f"{path}: has no examples")
    return rows


def _tsv_rows(path: Path) -> list[Row]:
    header = glue.decoded(path).partition("\n")[0].rstrip("\r").split("\t")
    columns = [column for column in COLUMNS if column in header or column == "text"]
    rows = []
    for where, values in glue.tab_separated(path, columns):
        label = values.pop() if columns[-1] == "label" else None
        rows.append(Row(where, values, label or None))
    return rows


def _json_rows(path: Path) -> list[Row]:
    rows = []
    for number, line in enumerate(glue.decoded(path).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            raise BadInput(f"{where}: is not JSON; each line must be an object with text and label") from None
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            raise BadInput(f"{where}: must be an object with a `text`, which must be a string")
        second, label = row.get("text_pair"), row.get("label")
        if not isinstance(second, str | None) or not isinstance(label, str | int | None) or isinstance(label, bool):
            raise BadInput(f"{where}: its text_pair must be a string, its label a string or a whole number")
        rows.append(
            Row(where, [row["text"]] if second is None else [row["text"], second], None if label is None else str(label))
        )
    return rows
