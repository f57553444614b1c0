"""Text-to-text tasks: their examples in T5's form, beam search shared among processes, and the published scores.

Inputs and targets are those of Raffel et al. (arXiv:1910.10683, appendix D). Scores: BLEU and chrF by sacrebleu (Post,
arXiv:1804.08771), whose signature is the protocol; ROUGE by Google's rouge_score; GLUE's metrics, with words mapped to labels.
"""

import csv
import hashlib
import io
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from common.data.manifest import fingerprint
from common.data.text_files import json_lines, read_text
from common.errors import BadInput
from common.evaluation import glue, hub, squad
from common.launch.processes import Ranks

DEV = ("val", "valid", "validation", "dev")


class Task(NamedTuple):
    """source, target: columns, or the suffixes of two files with the same number of lines. dev, test: names of files without
    suffix; the first that exists counts."""

    prefix: str
    source: str
    target: str
    scores: tuple[str, ...]  # of SCORES
    hub: tuple[str, str | None] | None = None  # dataset, config
    dev: tuple[str, ...] = DEV
    test: tuple[str, ...] = ("test",)

    def names(self, split: str) -> tuple[str, ...]:
        return {"train": ("train",), "dev": self.dev, "test": self.test}[split]


LANGUAGES = {"en": "English", "de": "German"}


def _translations(name: str, **more: Any) -> dict[str, Task]:
    """Between English and German, in both directions."""
    return {
        f"{name}-{a}-{b}": Task(f"translate {LANGUAGES[a]} to {LANGUAGES[b]}: ", a, b, ("bleu", "chrf"), **more)
        for a, b in (("en", "de"), ("de", "en"))
    }


PAIRS: dict[str, Task] = {
    **_translations("multi30k", hub=("bentrevett/multi30k", None), test=("test_2016_flickr", "test2016", "test")),
    **_translations("wmt14", hub=("wmt/wmt14", "de-en"), dev=("newstest2013", *DEV), test=("newstest2014", "test")),
    "cnn_dm": Task("summarize: ", "article", "highlights", ("rouge",), ("abisee/cnn_dailymail", "3.0.0")),
    "xsum": Task("summarize: ", "document", "summary", ("rouge",), ("EdinburghNLP/xsum", None)),
    "pairs": Task("", "input", "target", ("exact_match", "bleu", "chrf", "rouge")),
}
# GLUE's labels in words, in the order of glue.TASKS; STS-B: the score in steps of 0.2. Not WNLI: T5 treats it as another task
# (it writes the noun that a pronoun stands for), and the paper leaves it out of its average.
WORDS: dict[str, tuple[str, ...]] = {
    "cola": ("unacceptable", "acceptable"), "sst2": ("negative", "positive"), "mrpc": ("not_equivalent", "equivalent"),
    "stsb": (), "qqp": ("not_duplicate", "duplicate"), "mnli": glue.NLI, "qnli": ("entailment", "not_entailment"),
    "rte": ("entailment", "not_entailment"),
}  # fmt: skip
NAMES = (*PAIRS, *WORDS, "squad")


class Examples(NamedTuple):
    """inputs, targets (N,) texts; references: one text or more per example that a prediction is compared with, the target
    first; labels: GLUE's."""

    inputs: list[str]
    targets: list[str]
    references: list[list[str]]
    hash: str  # sha256 of the content that was read
    labels: np.ndarray | None = None
    sizes: tuple[int, ...] = ()  # number of examples in each set that was read (MNLI has two)
    ids: tuple[str, ...] = ()  # the ids of SQuAD's questions
    notes: tuple[str, ...] = ()


def read(
    name: str, folder: Path | None, split: str, prefix: str | None = None, source: str | None = None, target: str | None = None
) -> Examples:
    """The examples of a split, 'train', 'dev' or 'test', from a folder of files or from the hub.

    prefix, source, target: replace the task's own. BadInput for an unknown task or split, for missing or damaged files.
    """
    if name not in NAMES:
        raise BadInput(f"{name}: no such task; there is {', '.join(NAMES)}")
    if split not in hub.SPLITS:
        raise BadInput(f"{name}: no such split: {split!r}; there is {', '.join(hub.SPLITS)}")
    if name not in PAIRS:
        if not prefix is source is target is None:
            raise BadInput(f"{name}: T5 defines its inputs; leave out task.prefix, task.source and task.target")
        if split == "test":
            raise BadInput(f"{name}: the answers of its test set are not public; give task.split=dev")
        return _glue(name, folder, split) if name in WORDS else _squad(folder, split)
    task = PAIRS[name]
    task = task._replace(source=source or task.source, target=target or task.target)
    start = task.prefix if prefix is None else prefix
    inputs, targets, content = _from_hub(name, task, split) if folder is None else _from_files(name, task, folder, split)
    return Examples([start + text for text in inputs], [texts[0] for texts in targets], targets, content)


def each_reference(examples: Examples) -> Examples:
    """One example per reference, for training on inputs with several references."""
    pairs = [(source, text) for source, texts in zip(examples.inputs, examples.references, strict=True) for text in texts]
    several = sum(len(texts) > 1 for texts in examples.references)
    note = f"{several:,} of {len(examples.inputs):,} inputs have several targets: {len(pairs):,} examples"
    inputs, targets = [source for source, _ in pairs], [target for _, target in pairs]
    notes = (*examples.notes, note) if several else examples.notes
    return examples._replace(inputs=inputs, targets=targets, references=[[text] for text in targets], notes=notes)


Sides = tuple[list[str], list[list[str]], str]  # inputs, targets (one or more each), a hash of both


def _from_files(name: str, task: Task, folder: Path, split: str) -> Sides:
    """Read the files of the first of the split's names that exists."""
    if not folder.is_dir():
        raise BadInput(f"{folder}: no such folder; give one with the files of {name}, or leave it out for the hub")
    for stem in task.names(split):
        two = [folder / f"{stem}.{task.source}", folder / f"{stem}.{task.target}"]
        if all(path.is_file() for path in two):
            sources, lines = _lines(*two)
            return sources, [[line] for line in lines], _hash(name, split, [fingerprint(path) for path in two])
        for suffix, rows_of in ((".jsonl", json_lines), (".csv", _csv_rows)):
            path = folder / (stem + suffix)
            if path.is_file():
                rows = [_texts(where, row, task) for where, row in rows_of(path)]
                if not rows:
                    raise BadInput(f"{path}: has no examples")
                return (
                    [source for source, _ in rows],
                    [targets for _, targets in rows],
                    _hash(name, split, [fingerprint(path), task.source, task.target]),
                )
    stem, *others = task.names(split)
    wanted = f"{stem}.{task.source} and {stem}.{task.target}, {stem}.jsonl or {stem}.csv"
    instead = f" (or {', '.join(others)} in place of {stem})" if others else ""
    raise BadInput(f"{folder}: has no {split} examples of {name}: {wanted}{instead}")


def _hash(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _lines(*paths: Path) -> list[list[str]]:
    """The lines of parallel files."""
    files = [read_text(path).replace("\r\n", "\n").removesuffix("\n").split("\n") for path in paths]
    counts = [len(lines) for lines in files]
    if len(set(counts)) > 1:
        sizes = " and ".join(f"{path} has {count:,} lines" for path, count in zip(paths, counts, strict=True))
        raise BadInput(f"{sizes}; each line of one must belong to the same line of the other")
    for path, lines in zip(paths, files, strict=True):
        if lines == [""]:
            raise BadInput(f"{path}: is empty")
        blank = next((number for number, line in enumerate(lines, 1) if not line.strip()), None)
        if blank:
            raise BadInput(f"{path}:{blank}: the line is blank; each must have a text")
    return files


def _csv_rows(path: Path) -> Iterator[tuple[str, Any]]:
    csv.field_size_limit(sys.maxsize)  # articles are longer than its default
    try:
        for number, row in enumerate(csv.DictReader(io.StringIO(read_text(path), newline=""), strict=True), 1):
            yield f"{path}, row {number}", row
    except csv.Error as error:
        raise BadInput(f"{path}: is not CSV: {error}") from None


def _texts(where: str, row: Any, task: Task) -> tuple[str, list[str]]:
    """Input and targets of a row. `target` may be a list: alternatives, all of which are right."""
    if not isinstance(row, dict):
        raise BadInput(f"{where}: must be an object, is {type(row).__name__}")
    [source] = _strings(where, row, "source", task.source)
    return source, _strings(where, row, "target", task.target)


def _strings(where: str, row: dict[str, Any], option: str, key: str) -> list[str]:
    value = row.get(key)
    texts: list[Any] = value if option == "target" and isinstance(value, list) and value else [value]
    if not all(isinstance(text, str) for text in texts):
        has = ", ".join(map(str, row)) or "nothing"
        if key in row:
            allowed = "a string or a list of strings" if option == "target" else "a string"
            raise BadInput(f"{where}: {key!r} must be {allowed}, is {json.dumps(value, ensure_ascii=False)[:40]}")
        raise BadInput(f"{where}: no text under {key!r}; it has {has}: give task.{option}=KEY")
    if not all(text.strip() for text in texts):
        raise BadInput(f"{where}: {key} is blank; each must have a text")
    return texts


def _from_hub(name: str, task: Task, split: str) -> Sides:
    if task.hub is None:
        raise BadInput(f"{name}: is read from files; give task.data=DIR (or --data) with their .jsonl")
    rows = hub.load_split(name, *task.hub, hub.SPLITS[split])
    pairs = rows["translation"] if "translation" in rows.column_names else rows  # WMT: {de: ..., en: ...} per row
    inputs, targets = [row[task.source] for row in pairs], [row[task.target] for row in pairs]
    return inputs, [[text] for text in targets], _hash(name, split, inputs, targets)


def _glue(name: str, folder: Path | None, split: str) -> Examples:
    """'mrpc sentence1: ... sentence2: ...' -> 'equivalent': columns in the order of their names, as in T5's code."""
    examples = glue.read(name, folder, split)
    columns = sorted(zip(glue.TASKS[name].hub_columns, examples.texts, strict=True))
    inputs = [
        " ".join([name, *(f"{column}: {text}" for (column, _), text in zip(columns, row, strict=True))])
        for row in zip(*(texts for _, texts in columns), strict=True)
    ]
    words = WORDS[name]
    targets = [words[int(y)] if words else f"{np.round(y * 5) / 5:.1f}" for y in examples.labels]
    notes = (examples.note,) if examples.note else ()
    references = [[target] for target in targets]
    return Examples(inputs, targets, references, examples.hash, examples.labels, tuple(examples.sizes), notes=notes)


def _squad(folder: Path | None, split: str) -> Examples:
    """'question: ... context: ...' -> the first answer; all answers are references."""
    read = squad.read("squad", folder, split)
    answered = [q for q in read.questions if q.answers]
    inputs = [f"question: {q.text} context: {read.contexts[q.context].strip()}" for q in answered]
    references = [q.answers for q in answered]
    ids = tuple(q.id for q in answered)
    return Examples(inputs, [answers[0] for answers in references], references, read.hash, notes=tuple(read.notes), ids=ids)


# ---- scores ----------------------------------------------------------------------------------------------------------

Score = tuple[str, float, str]  # metric, value, how it was computed


def _streams(references: Sequence[Sequence[str]]) -> list[list[str | None]]:
    """The references in sacrebleu's form: all first references, all second references, ...; None where an example has fewer."""
    return [list(texts) for texts in zip_longest(*references)]


def bleu(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[Score]:
    """BLEU with sacrebleu's default tokenizer, and with its tokenizer `intl`, as in T5's paper."""
    from sacrebleu.metrics import BLEU

    scores = []
    for name, tokenizer in (("bleu", "13a"), ("bleu_intl", "intl")):
        metric = BLEU(tokenize=tokenizer)
        score = metric.corpus_score(list(predictions), _streams(references))
        scores.append((name, score.score, f"sacrebleu {metric.get_signature()}"))
    return scores


def chrf(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[Score]:
    from sacrebleu.metrics import CHRF

    metric = CHRF()
    score = metric.corpus_score(list(predictions), _streams(references))
    return [("chrf", score.score, f"sacrebleu {metric.get_signature()}")]


ROUGE = ("rouge1", "rouge2", "rougeL", "rougeLsum")


def rouge(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[Score]:
    """Mean F in percent, with Porter's stemmer; the best over several references. rougeLsum takes ' . ' as the end of a
    sentence, as in CNN/DM and in T5's code."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(ROUGE, use_stemmer=True)
    rows = [
        scorer.score_multi([_sentences(text) for text in texts], _sentences(prediction))
        for prediction, texts in zip(predictions, references, strict=True)
    ]
    return [(name, 100 * float(np.mean([row[name].fmeasure for row in rows])), "rouge_score, stemmed") for name in ROUGE]


def _sentences(text: str) -> str:
    return text.replace(" . ", " .\n")


def exact_match(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[Score]:
    right = [_words(prediction) in map(_words, texts) for prediction, texts in zip(predictions, references, strict=True)]
    return [("exact_match", 100 * float(np.mean(right)), "the text of a reference, as the vocabulary writes it, blanks as one")]


def _words(text: str) -> str:
    return " ".join(text.split())


def answers(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[Score]:
    """SQuAD's F1 and exact match, the best over the references."""
    rows = [squad.scores("squad", prediction, texts) for prediction, texts in zip(predictions, references, strict=True)]
    exact, f1 = (100 * float(np.mean(column)) for column in zip(*rows, strict=True))
    return [("f1", f1, "squad-v1.1"), ("exact_match", exact, "squad-v1.1")]


SCORES: dict[str, Callable[[Sequence[str], Sequence[Sequence[str]]], list[Score]]] = {
    "bleu": bleu, "chrf": chrf, "rouge": rouge, "exact_match": exact_match, "answers": answers,
}  # fmt: skip


def classes(name: str, predictions: Sequence[str], labels: np.ndarray) -> np.ndarray:
    """Texts -> GLUE's labels (N,). As in T5's code, a text that is not a label becomes a wrong label, and a text that is not a
    score becomes -1."""
    words = WORDS[name]
    if not words:
        return np.array([_number(text) for text in predictions])
    number = {word: i for i, word in enumerate(words)}
    wrong = (labels + 1) % len(words)
    return np.array([number.get(text.strip(), int(other)) for text, other in zip(predictions, wrong, strict=True)])


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        return -1.0
    return value if np.isfinite(value) else -1.0


def scores(name: str, predictions: Sequence[str], examples: Examples, tokenizer: Any = None) -> list[Score]:
    """All scores of a task. GLUE's are from 0 to 1, the others percentages, as they are published.

    tokenizer: that of the model. An exact match compares with the reference as the vocabulary can write it; `unknown` counts
    the references that the vocabulary cannot write.
    """
    if examples.labels is not None:
        values = glue.metrics(name, classes(name, predictions, examples.labels), examples.labels, examples.sizes)
        unknown = sum(text.strip() not in WORDS[name] for text in predictions) if WORDS[name] else 0
        return [(metric, value, f"{unknown} texts are no label: wrong") for metric, value in values.items()]
    names = PAIRS[name].scores if name in PAIRS else ("answers",)
    references = dict.fromkeys(names, examples.references)
    if tokenizer and "exact_match" in names:
        references["exact_match"] = [_decoded(tokenizer, tokenizer(texts)["input_ids"]) for texts in examples.references]
    return [score for each in names for score in SCORES[each](predictions, references[each])]


def counts(name: str, n: int, examples: Examples) -> dict[str, int]:
    """{metric: examples}, for the metrics that are computed from a part of the first n examples: MNLI's."""
    return glue.counts(name, n, examples.sizes)


def unknown(tokenizer: Any, targets: Sequence[str], split: str) -> tuple[str, ...]:
    """A note if the vocabulary of a transformers tokenizer cannot write some of the targets, else ()."""
    count = sum(tokenizer.unk_token_id in ids for ids in tokenizer(list(targets), verbose=False)["input_ids"])
    return (unknown_note(count, len(targets), f"targets of {split}"),) if count else ()


def unknown_note(count: int, whole: int, what: str) -> str:
    return f"{count:,} of {whole:,} {what} hold what the vocabulary cannot write (<unk>)"


def files(name: str, predictions: Sequence[str], examples: Examples) -> dict[str, str]:
    """{file name: text} in the format of the benchmark: GLUE's labels, by `classes`, and SQuAD's answers by question."""
    if examples.labels is not None:
        return glue.files(name, classes(name, predictions, examples.labels), examples.sizes)
    if name == "squad":
        return {"predictions.json": json.dumps(dict(zip(examples.ids, predictions, strict=True)), indent=1, ensure_ascii=False)}
    return {}


# ---- beam search -----------------------------------------------------------------------------------------------------


class Search(NamedTuple):
    beams: int
    length_penalty: float  # log probabilities are divided by length ^ this
    tokens: int  # most tokens to generate, including the end of sequence
    batch: int  # inputs per batch

    def __str__(self) -> str:
        return f"beam {self.beams}, length penalty {self.length_penalty:g}, at most {self.tokens} tokens"


def write(
    net: Any, tokenizer: Any, inputs: Sequence[str], seq_len: int | None, search: Search, ranks: Ranks,
    report: Callable[[int], bool | None],
) -> list[str]:  # fmt: skip
    """The output of a transformers encoder-decoder for each input, on every rank. Inputs are cut to seq_len tokens.

    The batches, of inputs of similar lengths, do not depend on the number of ranks, and one rank generates each, so 2 ranks
    give the same texts as 1. report: called with the number of each batch. If it returns True, this rank stops, and its
    remaining texts stay empty.
    """
    import torch
    import torch.distributed as dist

    ids = tokenizer(list(inputs), truncation=seq_len is not None, max_length=seq_len, verbose=False)["input_ids"]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    batches = [order[i : i + search.batch] for i in range(0, len(order), search.batch)]
    pad = tokenizer.pad_token_id
    written = torch.zeros(len(ids), search.tokens + 1, dtype=torch.int64, device=ranks.device)  # ids less pad
    for number in range(ranks.rank, len(batches), ranks.world):
        if report(number):
            break
        batch = tokenizer.pad({"input_ids": [ids[i] for i in batches[number]]}, return_tensors="pt").to(ranks.device)
        output = net.generate(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=search.tokens,
            num_beams=search.beams, length_penalty=search.length_penalty, do_sample=False,
        )  # fmt: skip
        written[batches[number], : output.shape[1]] = output - pad  # (B, decoder start and tokens)
    if ranks.world > 1:
        dist.all_reduce(written)  # each row plus zeros: exact
    return _decoded(tokenizer, (written + pad).tolist())


def _decoded(tokenizer: Any, ids: list[list[int]]) -> list[str]:
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return [_words(text) for text in texts]
