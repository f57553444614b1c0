"""What the evaluators of this repository write of perfect predictions: {task: {metric: value}}, by running each of them."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from common.data import tokenizer_training
from common.evaluation import glue, squad, text
from recipes.bert import finetune
from recipes.bert.tasks.registry import TASKS
from recipes.gpt import finetune as of_texts
from tests import warm

ROOT = Path(__file__).resolve().parent.parent
WORDS = "the value of a list is returned if it was given as an argument and raises an error".split()
TEXTS = [" ".join(WORDS[i:] + WORDS[:i]) for i in range(len(WORDS))]
Scores = dict[str, dict[str, float]]


def of_evaluators(folder: Path) -> Scores:
    scores_by_task = of_language_models(folder / "gpt") | of_encoder_decoders() | of_finetuned_texts()
    for name in TASKS:
        scores = of_head(name, folder / "bert")
        assert scores_by_task.get(name, scores).keys() == scores.keys(), name  # of a head and in words: the same names
        scores_by_task[name] = scores
    return scores_by_task


def of_language_models(folder: Path) -> Scores:
    """The command itself on an untrained GPT-2; its values are not perfect."""
    from transformers import GPT2Config, GPT2LMHeadModel

    (folder / "data").mkdir(parents=True)
    for file in ("wiki.test.tokens", "wiki.test.raw"):
        (folder / "data" / file).write_text(" \n ".join(TEXTS), encoding="utf-8")
    lines = "\n".join(json.dumps({"text": line}) for line in TEXTS)
    (folder / "data/lambada_test.jsonl").write_text(lines, encoding="utf-8")
    words = tokenizer_training.train_bpe(TEXTS, 300)
    words.save(folder / "hf")
    shapes = {"n_layer": 1, "n_head": 1, "n_embd": 8, "n_positions": 128, "vocab_size": words.size}
    shapes |= {"bos_token_id": words.eod_id, "eos_token_id": words.eod_id}
    GPT2LMHeadModel(GPT2Config(**shapes)).save_pretrained(folder / "hf")
    tasks = ("wikitext103", "wikitext2", "wikitext2-raw", "lambada")
    where = ["--data", str(folder / "data"), "--out", str(folder)]
    done = warm.run(["-m", "scripts.evaluate", folder / "hf", *tasks, *where], timeout=300)
    assert done.returncode == 0, done.stderr
    scores_by_task: Scores = {}
    for row in json.loads((folder / "eval.json").read_text(encoding="utf-8")):
        scores_by_task.setdefault(row["task"], {})[row["metric"]] = row["value"]
    return scores_by_task


def of_encoder_decoders() -> Scores:
    """Of the targets themselves."""
    scores_by_task = {}
    for name in (*text.PAIRS, "squad"):
        examples = text.Examples(TEXTS, TEXTS, [[target] for target in TEXTS], "")
        scores_by_task[name] = {metric: value for metric, value, _ in text.scores(name, TEXTS, examples)}
    for name in text.WORDS:
        labels = labels_of(name)
        answers = [text.WORDS[name][int(y)] if text.WORDS[name] else str(y) for y in labels]
        examples = text.Examples(answers, answers, [[word] for word in answers], "", labels, (4, 4))
        scores_by_task[name] = {metric: value for metric, value, _ in text.scores(name, answers, examples)}
    return scores_by_task


def labels_of(name: str) -> np.ndarray:
    known = glue.TASKS[name].labels
    return np.arange(8) % len(known) if known else np.arange(8, dtype=np.float32) % 5


def of_finetuned_texts() -> Scores:
    """recipes/gpt/finetune.py after an evaluation without loss."""
    return {name: of_texts.best_results(None, 0.0, len(TEXTS), None).scores for name in ("lm", "sft")}


def of_head(name: str, folder: Path) -> dict[str, float]:
    """A dev set of a few examples through recipes/bert, its labels as predictions."""
    words = folder / "tokenizer"
    if not words.is_dir():
        tokenizer_training.train_wordpiece(TEXTS, 120).save(words)
    data = folder / name
    write_dev(name, data)
    values: dict[str, Any] = {
        "model": {"arch": "bert", "layers": 1, "hidden": 8, "heads": 1, "positions": 64, "vocab_size": 120},
        "task": {"name": name, "data": str(data)} | ({"tags": ["O", "B-X", "I-X"]} if name == "ner" else {}),
        "data": {"tokenizer": str(words), "seq_len": 64}, "optim": {"lr": 1.0}, "train": {"steps": 1, "global_batch": 1},
    }  # fmt: skip
    values["task"] |= {"question_len": 16} if name.startswith("squad") else {}
    examples = finetune.dataset(finetune.Config.model_validate(finetune.Config.complete(values)), "dev", shuffle=False)
    rows = examples.collate(np.arange(len(examples)))
    labels = rows["labels"].reshape(len(examples), -1).astype(float)
    if TASKS[name].task_type == "question_answering":  # its places, the score of the answer and of none
        none = labels[:, 0] == 0  # [CLS]
        first = rows["start_mask"].argmax(-1)[:, None]
        answers = np.where(none[:, None], first, labels)
        labels = np.column_stack([answers, np.where(none, -9.0, 9.0), np.where(none, 9.0, -9.0)])
    return examples.metrics(labels)


def write_dev(name: str, folder: Path) -> None:
    """Files in the form that the task is read from; every label comes up, and of squad2 a question without an answer."""

    def write(file: str, content: str) -> None:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(content, encoding="utf-8")

    if name in glue.TASKS:
        form = glue.FORMS[name][0]
        known = glue.TASKS[name].labels
        header = list(form.columns) if isinstance(form.columns[0], str) else [""] * (max(form.columns) + 1)
        places = [header.index(c) if isinstance(c, str) else c for c in form.columns]
        for file in form.dev:
            lines = ["\t".join(header)] if isinstance(form.columns[0], str) else []
            for i, label in enumerate(labels_of(name)):
                line = list(header)
                for place, value in zip(places, [*TEXTS[i:], ""], strict=False):
                    line[place] = value
                line[places[-1]] = known[int(label)] if known else str(label)
                lines.append("\t".join(line))
            write(file, "\n".join(lines) + "\n")
    elif name == "classify":
        rows = "\n".join(json.dumps({"text": line, "label": "ab"[i % 2]}) for i, line in enumerate(TEXTS))
        write("train.jsonl", rows)
        write("dev.jsonl", rows)
    elif name == "race":
        for level in ("middle", "high"):
            item = {"article": TEXTS[0], "questions": TEXTS[:2], "options": [TEXTS[:4]] * 2, "answers": ["A", "C"]}
            write(f"dev/{level}/1.txt", json.dumps(item))
    elif name == "ner":
        write("valid.txt", "\n\n".join("the O\nvalue B-X\nof I-X\na O" for _ in range(3)) + "\n")
    else:
        answer = [{"text": "value", "answer_start": TEXTS[0].index("value")}]
        asked = [{"id": "a", "question": TEXTS[1], "answers": answer}]
        asked += [{"id": "b", "question": TEXTS[2], "answers": [], "is_impossible": True}] if name == "squad2" else []
        content = json.dumps({"data": [{"paragraphs": [{"context": TEXTS[0], "qas": asked}]}]})
        for file in squad.FILES[name].values():
            write(file, content)
