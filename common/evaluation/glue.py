"""GLUE (Wang et al., arXiv:1804.07461): its nine tasks, their files and their metrics.

A task is read from a folder of files, or from the hub (`nyu-mll/glue`). Publishers' files differ in their names, in their
columns and in whether they have a dev set; FORMS lists each known form.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from common.data.manifest import fingerprint
from common.errors import BadInput
from common.evaluation import hub

HUB = "nyu-mll/glue"
NLI = ("entailment", "neutral", "contradiction")


class Task(NamedTuple):
    hub_columns: tuple[str, ...]  # one sentence or two
    labels: tuple[str, ...]  # in the order of the hub's numbers; (): a number from 0 to 5 is predicted
    metrics: tuple[str, ...]  # the first decides which checkpoint is the best
    files: tuple[str, ...]  # of predictions, as the benchmark's server names them: one per dev set
    dev: tuple[str, ...] = ("validation",)  # splits of the hub


TASKS = {
    "cola": Task(("sentence",), ("0", "1"), ("matthews",), ("CoLA",)),
    "sst2": Task(("sentence",), ("0", "1"), ("accuracy",), ("SST-2",)),
    "mrpc": Task(("sentence1", "sentence2"), ("0", "1"), ("f1", "accuracy"), ("MRPC",)),
    "stsb": Task(("sentence1", "sentence2"), (), ("pearson", "spearman"), ("STS-B",)),
    "qqp": Task(("question1", "question2"), ("0", "1"), ("f1", "accuracy"), ("QQP",)),
    "mnli": Task(
        ("premise", "hypothesis"),
        NLI,
        ("accuracy", "accuracy_mismatched"),
        ("MNLI-m", "MNLI-mm"),
        ("validation_matched", "validation_mismatched"),
    ),
    "qnli": Task(("question", "sentence"), ("entailment", "not_entailment"), ("accuracy",), ("QNLI",)),
    "rte": Task(("sentence1", "sentence2"), ("entailment", "not_entailment"), ("accuracy",), ("RTE",)),
    "wnli": Task(("sentence1", "sentence2"), ("0", "1"), ("accuracy",), ("WNLI",)),
}


# The words for the numbers in the files, as on the hub. The heads of other models use them as the names of their labels.
WORDS = {
    "cola": ("unacceptable", "acceptable"), "sst2": ("negative", "positive"), "mrpc": ("not_equivalent", "equivalent"),
    "qqp": ("not_duplicate", "duplicate"), "wnli": ("not_entailment", "entailment"),
}  # fmt: skip


class Form(NamedTuple):
    """Tab-separated files. columns: names in the header, or indices where there is no header; the label comes last."""

    train: tuple[str, ...]
    dev: tuple[str, ...]  # (): DEV_DRAWN examples are drawn from train
    columns: tuple[str, ...] | tuple[int, ...]


# GLUE's own test files; only its server has their labels. Their columns have the same names as on the hub, except for these.
TEST_FILES = {"mnli": ("test_matched.tsv", "test_mismatched.tsv")}  # the others: test.tsv
TEST_COLUMNS = {"mrpc": ("#1 String", "#2 String"), "mnli": ("sentence1", "sentence2")}

DEV_DRAWN = 408  # MRPC: as many as GLUE's dev set, whose ids (mrpc_dev_ids.tsv) are not part of the corpus
DRAW_SEED = 1234

FORMS = {
    "cola": [
        Form(("train.tsv",), ("dev.tsv", "dev_out_of_domain.tsv"), (3, 1)),  # CoLA 1.1: the two are GLUE's dev set
        Form(("train.tsv",), ("dev.tsv",), (3, 1)),
    ],
    "sst2": [
        Form(("train.tsv",), ("dev.tsv",), ("sentence", "label")),
        Form(("alps_train.tsv", "alps_heldout_of_train.tsv"), ("dev.tsv",), ("sentence", "label")),  # GLUE's train in two
    ],
    "mrpc": [
        Form(("train.tsv",), ("dev.tsv",), ("#1 String", "#2 String", "Quality")),
        Form(("msr_paraphrase_train.txt",), (), ("#1 String", "#2 String", "Quality")),
    ],
    "stsb": [
        Form(("train.tsv",), ("dev.tsv",), ("sentence1", "sentence2", "score")),
        Form(("sts-train.csv",), ("sts-dev.csv",), (5, 6, 4)),  # STSbenchmark
    ],
    "qqp": [Form(("train.tsv",), ("dev.tsv",), ("question1", "question2", "is_duplicate"))],
    "mnli": [Form(("train.tsv",), ("dev_matched.tsv", "dev_mismatched.tsv"), ("sentence1", "sentence2", "gold_label"))],
    "qnli": [Form(("train.tsv",), ("dev.tsv",), ("question", "sentence", "label"))],
    "rte": [Form(("train.tsv",), ("dev.tsv",), ("sentence1", "sentence2", "label"))],
    "wnli": [Form(("train.tsv",), ("dev.tsv",), ("sentence1", "sentence2", "label"))],
}  # fmt: skip


class Examples(NamedTuple):
    """texts: one list per column; labels (N,) int64, or float32 from 0 to 5 (-1 in test: unknown); sizes: number of examples in
    each file or split that was read; hash: sha256 of the content."""

    texts: list[list[str]]
    labels: np.ndarray
    sizes: list[int]
    hash: str
    note: str | None = None


def read(name: str, folder: Path | None, split: str) -> Examples:
    """split: 'train', 'dev' or 'test'. BadInput for an unknown task, missing files, a label outside the set."""
    if name not in TASKS:
        raise BadInput(f"task.name={name}: no such task; there is {', '.join(TASKS)}")
    if folder is None:
        return _from_hub(name, split)
    return _test_from_files(name, folder) if split == "test" else _from_files(name, folder, split)


def _test_from_files(name: str, folder: Path) -> Examples:
    paths = [folder / file for file in TEST_FILES.get(name, ("test.tsv",))]
    if not all(path.is_file() for path in paths):
        wanted = " and ".join(path.name for path in paths)
        raise BadInput(f"{folder}: does not hold {wanted}, which GLUE's test set of {name} is read from")
    columns = TEST_COLUMNS.get(name, TASKS[name].hub_columns)
    parts = [[row for _, row in tab_separated(path, columns)] for path in paths]
    rows = [row for part in parts for row in part]
    if not rows:
        raise BadInput(f"{paths[0]}: has no examples")
    content = hashlib.sha256(json.dumps([name, "test", *map(fingerprint, paths)]).encode()).hexdigest()
    texts = [[row[column] for row in rows] for column in range(len(columns))]
    return Examples(texts, np.full(len(rows), -1, np.int64), [len(part) for part in parts], content)


def _from_files(name: str, folder: Path, split: str) -> Examples:
    form = _form(name, folder, split)
    dev_is_drawn = not form.dev
    files = [folder / file for file in (form.train if split == "train" or dev_is_drawn else form.dev)]
    incomplete: list[str] | None = [] if name == "qqp" else None
    parts = [tab_separated(path, form.columns, incomplete) for path in files]
    rows, sizes = [row for part in parts for row in part], [len(part) for part in parts]
    note: str | None = None
    content: list[Any] = [fingerprint(path) for path in files]
    if incomplete:
        note = f"{split}: {len(incomplete):,} lines that lack columns are left out ({incomplete[0]} is the first)"
    if dev_is_drawn:
        if len(rows) <= DEV_DRAWN:
            raise BadInput(f"{files[0]}: {len(rows)} examples, too few to draw a dev set of {DEV_DRAWN} from")
        chosen = np.random.default_rng(DRAW_SEED).permutation(len(rows))[:DEV_DRAWN]
        is_dev = np.isin(np.arange(len(rows)), chosen)
        rows = [row for row, dev in zip(rows, is_dev, strict=True) if dev == (split == "dev")]
        sizes = [len(rows)]
        note = f"{folder} has no dev set: {DEV_DRAWN} examples of train, drawn with seed {DRAW_SEED}, replace it"
        content.append([split, DRAW_SEED, DEV_DRAWN])
    if not rows:
        raise BadInput(f"{files[0]}: has no examples")
    texts = [[row[column] for _, row in rows] for column in range(len(form.columns) - 1)]
    labels = _labels(name, [row[-1] for _, row in rows], [where for where, _ in rows])
    return Examples(texts, labels, sizes, hashlib.sha256(json.dumps([name, content]).encode()).hexdigest(), note)


def _form(name: str, folder: Path, split: str) -> Form:
    if not folder.is_dir():
        raise BadInput(f"task.data={folder}: no such folder; give one with the files of {name}, or leave it out for the hub")
    for form in FORMS[name]:
        if all((folder / file).is_file() for file in form.train + form.dev):
            return form
    dev_only = [form for form in FORMS[name] if form.dev and all((folder / file).is_file() for file in form.dev)]
    if split == "dev" and dev_only:  # to evaluate on
        return dev_only[0]
    wanted = " or ".join(" and ".join(form.train + form.dev) for form in FORMS[name])
    raise BadInput(f"task.data={folder}: does not hold {wanted}, which {name} is read from")


def tab_separated(path: Path, columns: Sequence[str | int], incomplete: list[str] | None = None) -> list[tuple[str, list[str]]]:
    """(file and line, values of the columns) per line. No quoting: a quotation mark is a character of the text. A line that
    lacks columns is refused, or left out and added to `incomplete`: GLUE's own QQP has some (TFDS leaves them out too)."""
    lines = [line.removesuffix("\r").split("\t") if line else [] for line in decoded(path).split("\n")]
    has_header = isinstance(columns[0], str)
    missing = [column for column in columns if isinstance(column, str) and column not in lines[0]]
    if missing:
        raise BadInput(f"{path}: has no column {missing[0]!r}; it has {', '.join(lines[0])[:200]}")
    places = [lines[0].index(column) if isinstance(column, str) else column for column in columns]
    rows = []
    for number, line in enumerate(lines[has_header:], has_header + 1):
        if not line:
            continue
        if len(line) <= max(places):
            if incomplete is None:
                raise BadInput(f"{path}:{number}: {len(line)} columns, and {max(places) + 1} are needed")
            incomplete.append(f"{path.name}:{number}")
            continue
        rows.append((f"{path}:{number}", [line[place].strip() for place in places]))
    return rows


def decoded(path: Path) -> str:
    """The text of a file, without its byte order mark. BadInput where it is blank or not UTF-8."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadInput(f"{path}: not UTF-8 (byte {error.start:,})") from None
    if not text.strip():
        raise BadInput(f"{path}: is empty")
    return text


def _labels(name: str, texts: Sequence[str], where: Sequence[str]) -> np.ndarray:
    labels = TASKS[name].labels
    if not labels:
        return np.array([_score(text, line) for text, line in zip(texts, where, strict=True)], np.float32)
    number = {label: i for i, label in enumerate(labels)}
    wrong = next((i for i, text in enumerate(texts) if text not in number), None)
    if wrong is not None:
        raise BadInput(f"{where[wrong]}: label {texts[wrong]!r} is outside the set of {name}: {', '.join(labels)}")
    return np.array([number[text] for text in texts], np.int64)


def _score(text: str, where: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 5:
        raise BadInput(f"{where}: score {text!r} is not a number from 0 to 5")
    return value


def _from_hub(name: str, split: str) -> Examples:
    task = TASKS[name]
    splits = {"train": ("train",), "dev": task.dev, "test": tuple(s.replace("validation", "test") for s in task.dev)}[split]
    parts = [hub.load_split(name, HUB, name, s) for s in splits]
    texts = [[text for part in parts for text in part[column]] for column in task.hub_columns]
    labels = np.array([label for part in parts for label in part["label"]], np.int64 if task.labels else np.float32)
    content = hashlib.sha256(json.dumps([name, split, texts, labels.tolist()]).encode()).hexdigest()
    return Examples(texts, labels, [len(part) for part in parts], content)


# ---- metrics ---------------------------------------------------------------------------------------------------------


def metrics(name: str, predictions: np.ndarray, labels: np.ndarray, sizes: Sequence[int] = ()) -> dict[str, float]:
    """GLUE's metrics of the task, from 0 to 1 (correlations: -1 to 1). predictions, labels: (N,) classes or scores; sizes: of
    the dev sets that are read one after the other (MNLI has two, each with its accuracy)."""
    if name == "mnli":
        first = counts(name, len(labels), sizes)["accuracy"]
        parts = {"accuracy": slice(first), "accuracy_mismatched": slice(first, None)}
        return {m: float(METRICS["accuracy"](labels[p], predictions[p])) for m, p in parts.items() if len(labels[p])}
    return {metric: float(METRICS[metric](labels, predictions)) for metric in TASKS[name].metrics}


def counts(name: str, n: int, sizes: Sequence[int] = ()) -> dict[str, int]:
    """{metric: examples}, for the metrics that are computed from a part of the first n examples: MNLI's."""
    if name != "mnli":
        return {}
    first = min(sizes[0] if sizes else n, n)
    return {"accuracy": first, "accuracy_mismatched": n - first}


def files(name: str, predictions: np.ndarray, sizes: Sequence[int]) -> dict[str, str]:
    """{file name: text} in the format of the benchmark's server. sizes: as in `metrics`."""
    labels, files, start = TASKS[name].labels, {}, 0
    texts = [labels[int(p)] for p in predictions] if labels else [f"{p:.6f}" for p in np.clip(predictions, 0, 5)]
    ends = [*np.cumsum(sizes[: len(TASKS[name].files) - 1]).tolist(), len(texts)]
    for file, end in zip(TASKS[name].files, ends, strict=True):
        lines = ["index\tprediction", *(f"{i}\t{text}" for i, text in enumerate(texts[start:end]))]
        files[f"{file}.tsv"] = "\n".join(lines) + "\n"
        start = end
    return files


def _sklearn(metric: str) -> Callable[[Any, Any], float]:
    def value(labels: np.ndarray, predictions: np.ndarray) -> float:
        from sklearn import metrics

        return getattr(metrics, metric)(labels, predictions)

    return value


def _scipy(metric: str) -> Callable[[Any, Any], float]:
    def value(labels: np.ndarray, predictions: np.ndarray) -> float:
        from scipy import stats

        if not np.ptp(predictions) or not np.ptp(labels):  # a constant correlates with nothing
            return 0.0
        return getattr(stats, metric)(labels, predictions).statistic

    return value


METRICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "accuracy": _sklearn("accuracy_score"), "f1": _sklearn("f1_score"), "matthews": _sklearn("matthews_corrcoef"),
    "pearson": _scipy("pearsonr"), "spearman": _scipy("spearmanr"),
}  # fmt: skip
