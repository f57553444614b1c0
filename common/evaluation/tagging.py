"""Token classification: words with one tag each, in the format of CoNLL-2003 (Tjong Kim Sang and De Meulder, 2003): one word
per line, in the first column, and its tag in the last; an empty line ends a sentence.

Read from a folder with train.txt, valid.txt (or dev.txt) and test.txt, or from the hub (`tomaarsen/conll2003`).
"""

import hashlib
import json
import re
from pathlib import Path
from typing import NamedTuple

from common.errors import BadInput
from common.evaluation import hub

HUB = "tomaarsen/conll2003"
FILES = {"train": ("train.txt",), "dev": ("valid.txt", "dev.txt"), "test": ("test.txt",)}


class Sentences(NamedTuple):
    words: list[list[str]]
    tags: list[list[str]]
    hash: str


def read(folder: Path | None, split: str) -> Sentences:
    """split: 'train', 'dev' or 'test'. BadInput for missing files, or a line without a tag."""
    words, tags = _from_hub(split) if folder is None else _from_files(folder, split)
    if not words:
        raise BadInput(f"{folder or HUB}: has no sentences of {split}")
    return Sentences(words, tags, hashlib.sha256(json.dumps([split, words, tags]).encode()).hexdigest())


def _from_files(folder: Path, split: str) -> tuple[list[list[str]], list[list[str]]]:
    path = next((folder / file for file in FILES[split] if (folder / file).is_file()), None)
    if path is None:
        raise BadInput(f"task.data={folder}: does not hold {' or '.join(FILES[split])}, which ner is read from")
    try:
        lines = path.read_bytes().decode("utf-8-sig").split("\n")  # not at U+2028 and the like
    except UnicodeDecodeError as error:
        raise BadInput(f"{path}: not UTF-8 (byte {error.start:,})") from None
    words: list[list[str]] = [[]]
    tags: list[list[str]] = [[]]
    for number, line in enumerate(lines, 1):
        columns = re.split("[ \t]+", line.strip(" \t\r"))  # a no-break space, U+3000 and the like are parts of words
        if columns == [""] or columns[0] == "-DOCSTART-":
            if words[-1]:
                words.append([])
                tags.append([])
            continue
        if len(columns) < 2:
            raise BadInput(f"{path}:{number}: {line!r} has no tag; a line must be a word and its tag")
        words[-1].append(columns[0])
        tags[-1].append(columns[-1])
    return [w for w in words if w], [t for t in tags if t]


def _from_hub(split: str) -> tuple[list[list[str]], list[list[str]]]:
    rows = hub.load_split("ner", HUB, None, hub.SPLITS[split])
    names = rows.features["ner_tags"].feature.names
    return [list(row["tokens"]) for row in rows], [[names[i] for i in row["ner_tags"]] for row in rows]


def metrics(predictions: list[list[str]], tags: list[list[str]]) -> dict[str, float]:
    """F1, precision and recall of whole entities, as the CoNLL script counts them (seqeval)."""
    from seqeval.metrics import f1_score, precision_score, recall_score

    scores = {"f1": f1_score, "precision": precision_score, "recall": recall_score}
    return {name: float(score(tags, predictions, zero_division=0)) for name, score in scores.items()}
