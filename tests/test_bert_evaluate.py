"""BERT's heads on their tasks: tiny random models whose own answers, asked of plain transformers, are the gold ones."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import case
from test_metrics import official

from common.errors import BadInput
from common.evaluation import glue, labelled, squad
from recipes.bert import finetune
from recipes.bert.tasks.base import TaskDataset
from recipes.bert.tasks.registry import TASKS
from tests import warm

pytestmark = pytest.mark.timeout(600)
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,?'-"
SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 128}
PAIRS = [
    (f"The {a} is {b} the {c}.", f"A {c} {d} the {a}.")
    for a in ("cup", "dog", "lamp", "boat", "key") for b in ("on", "near") for c in ("hut", "door") for d in ("under", "behind")
]  # fmt: skip


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vocabulary")
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *(f"##{c}" for c in LETTERS), "the", "is", "##oor"]
    (folder / "vocab.txt").write_text("\n".join(pieces) + "\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer", "do_lower_case": True}))
    return folder


class Models:
    """Makes folders of models, and asks them."""

    def __init__(self, root: Path, vocabulary: Path):
        self.root, self.vocabulary = root, vocabulary
        self.nets: dict[Path, Any] = {}
        self.words = transformers.BertTokenizerFast(vocab=str(vocabulary / "vocab.txt"))

    def make(self, name: str, kind: str, seed: int, names: Sequence[str] = (), asked: Sequence[Any] = (), **more: Any) -> Path:
        """names: of the labels; none: the default ones. asked: texts that it answers with each label. more: of config.json."""
        torch.manual_seed(seed)
        labels = {"id2label": dict(enumerate(names)), "label2id": {n: i for i, n in enumerate(names)}} if names else {}
        cfg = transformers.BertConfig(**SHAPE | labels | more)
        net = getattr(transformers, f"Bert{kind}")(cfg)
        for parameter in net.parameters():
            torch.nn.init.normal_(parameter, 0, 0.3) if parameter.dim() > 1 else parameter.data.add_(0.1)
        folder = self.root / "models" / name
        self.nets[folder] = net.eval()
        if asked:
            net.classifier.bias.data -= torch.stack(self.logits(folder, asked)).mean(0)
            assert len({int(row.argmax()) for row in self.logits(folder, asked)}) == len(names)
        net.save_pretrained(folder)
        for file in self.vocabulary.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        return folder

    def logits(self, folder: Path, texts: Sequence[Any], **how: Any) -> list[torch.Tensor]:
        net, texts = self.nets[folder], [text if isinstance(text, tuple) else (text,) for text in texts]
        with torch.no_grad():
            return [net(**self.words(*text, return_tensors="pt", **how)).logits[0] for text in texts]

    def answers(self, folder: Path, texts: Sequence[Any]) -> list[str]:
        names = json.loads((folder / "config.json").read_text())["id2label"]
        return [names[str(int(row.argmax()))] for row in self.logits(folder, texts)]


@pytest.fixture(scope="module")
def models(vocabulary: Path, tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("heads"), vocabulary)


def evaluated(out: Path, commands: Sequence[Sequence[object]]) -> list[list[dict[str, Any]] | str]:
    """Each a command line of scripts.evaluate but for --out, all in one process: rows of eval.json, or what it refuses."""
    script = out / "commands.py"
    script.write_text(f"""
import json, pathlib, sys
from common.launch import processes
processes.quiet()
from common.errors import BadInput
from scripts import evaluate
results = []
for number, words in enumerate({[[*map(str, words)] for words in commands]!r}):
    folder = pathlib.Path({str(out)!r}) / str(number)
    sys.argv = ["evaluate", *words, "--out", str(folder)]
    try:
        evaluate.main()
        results.append(json.loads((folder / "eval.json").read_text()))
    except BadInput as error:
        results.append(str(error))
pathlib.Path({str(out / "made.json")!r}).write_text(json.dumps(results))
""")
    done = warm.run([script])
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((out / "made.json").read_text())


def values(rows: list[dict[str, Any]]) -> dict[str, tuple[float, int]]:
    assert isinstance(rows, list), rows
    return {row["metric"]: (row["value"], row["n"]) for row in rows}


# ---- by name ---------------------------------------------------------------------------------------------------------

# the task's labels in another order, as files or as other models name them
ORDERS = {
    "mnli": ("contradiction", "entailment", "neutral"), "rte": ("not_entailment", "entailment"),
    "qnli": ("NOT_ENTAILMENT", "ENTAILMENT"), "cola": ("1", "0"), "sst2": ("POSITIVE", "NEGATIVE"),
    "mrpc": ("equivalent", "not_equivalent"), "qqp": ("duplicate", "not_duplicate"), "wnli": ("entailment", "not_entailment"),
}  # fmt: skip


def glue_files(folder: Path, name: str, labels: Sequence[Any]) -> None:
    """PAIRS, or their first texts, with these labels as the task's train and dev sets."""
    folder.mkdir(parents=True)
    form = glue.FORMS[name][-1 if name == "cola" else 0]
    rows = list(zip(PAIRS, labels, strict=True))
    for split, files in (("train", form.train), ("dev", form.dev)):
        parts = [rows[:25], rows[25:]] if len(files) == 2 and split == "dev" else [rows]
        for file, part in zip(files, parts, strict=True):
            lines = ["\t".join(map(str, form.columns))] if isinstance(form.columns[0], str) else []
            for texts, label in part:
                fields = [*texts[: len(form.columns) - 1], str(label)]
                if not lines or isinstance(form.columns[0], int):
                    wide = [""] * (max(form.columns) + 1)
                    for place, field in zip(form.columns, fields, strict=True):
                        wide[place] = field
                    fields = wide
                lines.append("\t".join(fields))
            (folder / file).write_text("\n".join(lines) + "\n")


def of_file(name: str, label: str) -> str:
    """A label of a model -> as the files of the task spell it."""
    known, words = glue.TASKS[name].labels, glue.WORDS.get(name, ())
    return label if label in known else known[words.index(label.lower())] if words else label.lower()


@pytest.fixture(scope="module")
def named(models: Models) -> dict[str, Path]:
    """Of each of GLUE's tasks a model whose labels stand in another order, and files that hold its answers."""
    folders = {}
    for number, (name, order) in enumerate(ORDERS.items()):
        asked = PAIRS if len(glue.TASKS[name].hub_columns) == 2 else [a for a, _ in PAIRS]
        folders[name] = models.make(name, "ForSequenceClassification", number, order, asked)
        answers = [of_file(name, label) for label in models.answers(folders[name], asked)]
        glue_files(models.root / "data" / name, name, answers)
    return folders


@pytest.fixture(scope="module")
def scored(models: Models, named: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """{name: rows of eval.json, or the refusal} of every command of this file, in one process."""
    data, commands = models.root / "data", {}
    for name, folder in named.items():
        commands[name] = [folder, name, "--data", data / name]
    default = models.make("default", "ForSequenceClassification", 1, num_labels=3)
    commands["default"] = [default, "mnli", "--data", data / "mnli"]
    for name, (names, edit) in REFUSED_HEADS.items():
        folder = models.make(name, "ForSequenceClassification", 1, names, **({} if names else {"num_labels": 3}))
        stored = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(stored | edit))
        commands[name] = [folder, "mnli", "--data", data / "mnli"]
    commands |= {**of_scores(models), **of_tags(models), **of_choices(models), **of_spans(models), **of_own_labels(models)}
    out = tmp_path_factory.mktemp("scored")
    results = evaluated(out, list(commands.values()))
    return {name: (rows, out / str(number)) for number, (name, rows) in enumerate(zip(commands, results, strict=True))}


REFUSED_HEADS = {
    "others": (("yes", "no", "maybe"), {}),
    "fewer": (("entailment", "neutral"), {}),
    "holes": ((), {"id2label": {"0": "entailment", "2": "neutral", "5": "contradiction"}, "label2id": None}),
    "twice": ((), {"id2label": {"0": "neutral", "1": "neutral", "2": "contradiction"}, "label2id": None}),
    "contradict": (ORDERS["mnli"], {"label2id": {"entailment": 0, "neutral": 1, "contradiction": 2}}),
    "many": (ORDERS["mnli"], {"problem_type": "multi_label_classification"}),
}
REFUSALS = {
    "others": "the labels of its head are yes, no, maybe, those of mnli are entailment, neutral, contradiction; "
    "correct id2label",
    "fewer": "its head has 2 outputs, mnli wants 3; finetune it on mnli first",
    "holes": "its id2label (config.json) must give each output, from 0 on, a different name",
    "twice": "its id2label (config.json) must give each output, from 0 on, a different name",
    "contradict": "its id2label and label2id (config.json) contradict each other; correct one",
    "many": "its problem_type (config.json) is multi_label_classification, mnli is single_label_classification",
}


@pytest.mark.parametrize("name", ORDERS)
def test_labels_are_matched_by_name(scored, name: str):
    scores = values(scored[name][0])
    assert {metric: value for metric, (value, _) in scores.items()} == pytest.approx(
        dict.fromkeys(glue.TASKS[name].metrics, 1.0)
    )
    counts = [n for _, n in scores.values()]
    assert counts == ([25, 15] if name == "mnli" else [40] * len(counts))


def test_default_names_are_taken_in_the_tasks_order(scored, models: Models):
    rows, _ = scored["default"]
    lines = (models.root / "data/mnli/dev_matched.tsv").read_text().splitlines()[1:]
    answers = [glue.NLI[int(row.argmax())] for row in models.logits(models.root / "models/default", PAIRS[:25])]
    right = sum(line.endswith(f"\t{answer}") for line, answer in zip(lines, answers, strict=True)) / 25
    assert values(rows)["accuracy"] == (pytest.approx(right), 25)
    assert rows[0]["protocol"].endswith(
        "have no names (id2label): assumed to be entailment, neutral, contradiction, in this order"
    )


@pytest.mark.parametrize("name", REFUSALS)
def test_heads_with_other_labels_are_refused(scored, name: str):
    assert REFUSALS[name] in scored[name][0] and len(scored[name][0].splitlines()) == 1


# ---- scores, choices -------------------------------------------------------------------------------------------------


def of_scores(models: Models) -> dict[str, list[object]]:
    folder = models.make("stsb", "ForSequenceClassification", 7, num_labels=1, problem_type="regression")
    scores = torch.cat(models.logits(folder, PAIRS))
    scores = (5 * (scores - scores.min()) / (scores.max() - scores.min())).tolist()
    glue_files(models.root / "data/stsb", "stsb", scores)
    other = models.make("toxic", "ForSequenceClassification", 7, ["toxic"])
    return {name: [path, "stsb", "--data", models.root / "data/stsb"] for name, path in (("stsb", folder), ("toxic", other))}


def test_a_score_needs_no_name(scored):
    assert values(scored["stsb"][0]) == {"pearson": (pytest.approx(1), 40), "spearman": (pytest.approx(1), 40)}
    assert "the labels of its head are toxic, those of stsb are score" in scored["toxic"][0]


def of_choices(models: Models) -> dict[str, list[object]]:
    """RACE: the options of questions, three of middle schools and two of high schools; windows that cut their answers."""
    folder = models.make("race", "ForMultipleChoice", 9, num_labels=1)
    net = models.nets[folder]
    for level, count in (("middle", 3), ("high", 2)):
        (models.root / f"data/race/dev/{level}").mkdir(parents=True)
        for i in range(count):
            article, question = " ".join(PAIRS[i]), f"Where is the {level} {i}?"
            options = [a.split()[1] + f" {i}" for a, _ in PAIRS[i::9][:4]]
            texts = [f"{question} {option}" for option in options]
            given = models.words([article] * 4, texts, padding=True, return_tensors="pt")
            with torch.no_grad():
                best = net(**{key: value[None] for key, value in given.items()}).logits[0].argmax()
            item = {"article": article, "questions": [question], "options": [options], "answers": ["ABCD"[int(best)]]}
            (models.root / f"data/race/dev/{level}/{i}.txt").write_text(json.dumps(item))
    whole = [folder, "race", "--data", models.root / "data/race"]
    return {"race": whole, "race cut": [*whole, "--seq-len", 24]}


def test_the_levels_of_race_are_counted(scored):
    assert values(scored["race"][0]) == {"accuracy": (1, 5), "accuracy_middle": (1, 3), "accuracy_high": (1, 2)}
    assert (
        "dev: 5 of 5 questions lose the end of an answer: they are cut to data.seq_len=24"
        in scored["race cut"][0][0]["protocol"]
    )


# ---- tags ------------------------------------------------------------------------------------------------------------

TAGS = "O B-PER I-PER B-ORG I-ORG B-LOC I-LOC B-MISC I-MISC".split()
SENTENCES = [
    ["Reed", "\u200b", "met", "the", "board", "of", "Mills", "."], ["\ufeff\ufeff", "\u00ad"], ["Ada", "\u200d"],
    ["Ada", "Moss", "went", "to", "\ufeff", "Lisbon", "on", "Monday", "with", "June", "Park"],
]  # fmt: skip


def of_tags(models: Models) -> dict[str, list[object]]:
    """Sentences with words of which no WordPiece is left; the gold tags are the model's, O where it sees nothing."""
    commands = {}
    for name, names in (("ner", TAGS[::-1]), ("ner default", ())):
        for seed in range(40):
            folder = models.make(name, "ForTokenClassification", seed, names, **({} if names else {"num_labels": 9}))
            if len({tag for tags in gold_tags(models) for tag in tags}) > 4:
                break
        commands[name] = [folder, "ner", "--data", models.root / "data/ner"]
    sentences = [zip(words, gold, strict=True) for words, gold in zip(SENTENCES, gold_tags(models), strict=True)]
    text = "\n".join("".join(f"{word} {tag}\n" for word, tag in sentence) for sentence in sentences)
    (models.root / "data/ner").mkdir()
    for file in ("train", "valid", "test"):
        (models.root / f"data/ner/{file}.txt").write_text(text, encoding="utf-8")
    commands["ner test"] = [*commands["ner"], "--split", "test"]
    commands["ner cut"] = [*commands["ner"], "--seq-len", 12]
    return commands


def gold_tags(models: Models, seq_len: int = 512) -> list[list[str]]:
    folder, tags = models.root / "models/ner", []
    how = {"is_split_into_words": True, "truncation": True, "max_length": seq_len}
    for words, logits in zip(SENTENCES, models.logits(folder, [(words,) for words in SENTENCES], **how), strict=True):
        tags.append(["O"] * len(words))
        places = models.words(words, **how).word_ids()
        for place, word in reversed(list(enumerate(places))):  # the first piece of a word speaks for it
            if word is not None:
                tags[-1][word] = TAGS[::-1][int(logits[place].argmax())]
    return tags


@pytest.mark.parametrize("name", ["ner", "ner test"])
def test_tags_stay_beside_their_words(scored, models: Models, name: str):
    rows, out = scored[name]
    assert len({tag for tags in gold_tags(models) for tag in tags}) > 4
    assert {metric: value for metric, (value, _) in values(rows).items()} == {"f1": 1, "precision": 1, "recall": 1}
    file = out / "predictions" / ("test" if name == "ner test" else "") / "ner.txt"
    lines = [line.split(" ") for line in file.read_text(encoding="utf-8").split("\n") if line]
    assert [word for word, _, _ in lines] == [word for words in SENTENCES for word in words]
    assert all(gold == prediction for _, gold, prediction in lines)
    assert "5 words lie beyond data.seq_len or have no piece: not trained on, predicted as O" in rows[0]["protocol"]


def test_words_beyond_the_window_are_outside(scored, models: Models):
    lines = (scored["ner cut"][1] / "predictions/ner.txt").read_text(encoding="utf-8").split("\n")
    assert [line.split(" ")[2] for line in lines if line] == [tag for tags in gold_tags(models, 12) for tag in tags]
    assert gold_tags(models, 12) != gold_tags(models)


def test_tags_without_names_are_refused(scored):
    assert (
        "its config.json does not name the labels of its head, which ner needs; give them as id2label"
        in scored["ner default"][0]
    )


def test_training_labels_stay_beside_their_words(scored, models: Models):
    """As transformers' tokenizer aligns them: the first piece of each word that has one."""
    examples = opened(models.root / "models/ner", "ner", models.root / "data/ner", tags=TAGS)
    rows = examples.collate(range(len(SENTENCES)))
    for row, (words, gold) in enumerate(zip(SENTENCES, gold_tags(models), strict=True)):
        places = models.words(words, is_split_into_words=True).word_ids()
        firsts = [place for place, word in enumerate(places) if word is not None and word not in places[:place]]
        assert rows["loss_mask"][row].nonzero()[0].tolist() == firsts
        assert rows["labels"][row][firsts].tolist() == [TAGS.index(gold[places[place]]) for place in firsts]


def opened(folder: Path, name: str, data: Path, split: str = "train", seq_len: int = 64, **task: Any) -> TaskDataset:
    return finetune.dataset(settings(folder, name, data, seq_len, **task), split, shuffle=False)


def settings(folder: Path, name: str, data: Path, seq_len: int = 64, **task: Any) -> finetune.Config:
    given = {"name": name, "data": str(data), **task}
    values = {
        "init": {"from": str(folder)}, "task": given, "model": {}, "data": {"seq_len": seq_len}, "optim": {"lr": 1e-5},
        "train": {"steps": 1, "global_batch": 1},
    }  # fmt: skip
    cfg = finetune.Config.model_validate(finetune.Config.complete(values))
    return cfg.model_copy(update={"model": cfg.model.resolve(cfg, None)})


# ---- spans -----------------------------------------------------------------------------------------------------------


def of_spans(models: Models) -> dict[str, list[object]]:
    folder = models.make("qa", "ForQuestionAnswering", 5)
    short = models.make("qa short", "ForQuestionAnswering", 5, max_position_embeddings=48)
    paragraphs = []
    for i, (one, two) in enumerate(PAIRS[:16]):
        context = f"{one} {two} " * 4
        texts = [one.split()[1], one, "The"][: 1 + i % 3] if i % 4 else []
        answers = [{"text": text, "answer_start": context.index(text)} for text in texts]
        asked = {
            "id": f"q{i}",
            "question": "who? " * (30 if i == 5 else 1 + i % 2),
            "answers": answers,
            "is_impossible": not answers,
        }
        paragraphs.append({"context": context, "qas": [asked]})
    (models.root / "data/squad2").mkdir()
    for split in ("train", "dev"):
        text = json.dumps({"version": "v2.0", "data": [{"title": "t", "paragraphs": paragraphs}]})
        (models.root / f"data/squad2/{split}-v2.0.json").write_text(text)
    data = ["squad2", "--data", models.root / "data/squad2"]
    return {
        "squad2": [folder, *data, "--seq-len", 128], "squad2 66": [folder, *data, "--seq-len", 66],
        "squad2 71": [folder, *data, "--seq-len", 71], "squad2 72": [folder, *data, "--seq-len", 72],
        "squad2 48": [short, *data],
    }  # fmt: skip


def test_a_window_without_room_is_refused(scored):
    """As finetuning does; it was searched for without end."""
    for length in (66, 71):
        assert scored[f"squad2 {length}"][0] == (
            f"--seq-len {length}: leaves no room for a context beside a question of 64 tokens (task.question_len); "
            "give --seq-len 72 or more"
        )
    assert scored["squad2 48"][0].endswith("72 or more; the model has 48 positions: finetune it with shorter questions")
    rows = scored["squad2 72"][0]
    assert values(rows)["f1"][1] == 16 and "dev: 1 of 16 questions are cut to task.question_len=64" in rows[0]["protocol"]


def test_scores_can_be_computed_from_the_files(scored, models: Models):
    """By the rules of evaluate-v2.0.py: f1 and exact match of predictions.json, the best of the other two files."""
    rows, out = scored["squad2"]
    scores = {metric: value for metric, (value, _) in values(rows).items()}
    predictions, best, odds = (
        json.loads((out / f"predictions/{file}.json").read_text()) for file in ("predictions", "best_answers", "null_odds")
    )
    questions = squad.read("squad2", models.root / "data/squad2", "dev").questions
    expected = official("squad2", questions, predictions) | {
        metric: value for metric, value in official("squad2", questions, best, odds).items() if metric.startswith("best")
    }
    assert {metric: scores[metric] for metric in expected} == pytest.approx(expected)
    assert all(best.values()) and predictions == {key: "" if odds[key] > 0 else best[key] for key in best}
    for metric, other in (("best_f1", "f1"), ("best_exact", "exact_match")):
        threshold = scores[f"{metric}_threshold"]
        at = official("squad2", questions, {key: "" if odds[key] > threshold else best[key] for key in best})
        assert at[other] == pytest.approx(scores[metric]) and scores[metric] >= scores[other]
    assert {metric: n for metric, (_, n) in values(rows).items()} == dict.fromkeys(scores, 16) | {
        "has_answer_f1": 12, "has_answer_exact": 12, "no_answer_f1": 4, "no_answer_exact": 4,
    }  # fmt: skip


def test_training_answers_that_no_window_holds_are_counted(models: Models, tmp_path: Path):
    context = "a b c d e f g h i j k l m n o p q r s t u v w x y z"
    asked = [
        {"id": str(i), "question": "?", "answers": [{"text": text, "answer_start": 0}]}
        for i, text in enumerate(("a b", context))
    ]
    for split in ("train", "dev"):
        (tmp_path / f"{split}-v1.1.json").write_text(
            json.dumps({"data": [{"paragraphs": [{"context": context, "qas": asked}]}]})
        )
    examples = opened(models.make("qa two", "ForQuestionAnswering", 5), "squad", tmp_path, seq_len=16, question_len=8)
    assert "train: the answers of 1 questions do not fit into one window: trained on as unanswerable" in examples.notes


# ---- labels of one's own ---------------------------------------------------------------------------------------------

MOODS = ["calm", "angry", "sad"]


def of_own_labels(models: Models) -> dict[str, list[object]]:
    """Pairs in JSON lines and single texts in tab-separated files, labelled by the model."""
    commands: dict[str, list[object]] = {}
    for name, asked in (("pairs", PAIRS), ("texts", [a for a, _ in PAIRS])):
        folder = models.make(name, "ForSequenceClassification", 3, MOODS, asked)
        answers = models.answers(folder, asked)
        data = models.root / "data" / name
        data.mkdir()
        rows = [{"text": a, "text_pair": b, "label": y} for (a, b), y in zip(PAIRS, answers, strict=True)]
        splits = {"train": rows, "valid": rows[:30], "test": rows[30:]}
        for split, part in splits.items():
            if name == "pairs":
                (data / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8-sig")
            else:
                keys = [key for key in ("label", "text") if split != "test" or key != "label"]
                lines = ["\t".join(keys), *("\t".join(row[key] for key in keys) for row in part)]
                (data / f"{split}.tsv").write_text("\r\n".join(lines) + "\r\n")
        commands |= {
            name: [folder, "classify", "--data", data],
            f"{name} test": [folder, "classify", "--data", data, "--split", "test"],
        }
    commands["unnamed"] = [models.root / "models/default", *commands["pairs"][1:]]
    return commands


def test_texts_and_pairs_with_labels_of_ones_own(scored, models: Models):
    assert values(scored["pairs"][0]) == values(scored["texts"][0]) == {"accuracy": (1, 30), "macro_f1": (1, 30)}
    assert values(scored["pairs test"][0]) == {"accuracy": (1, 10), "macro_f1": (1, 10)}
    assert scored["texts test"][0] == []  # its test file has no labels
    lines = (scored["texts test"][1] / "predictions/test/classify.tsv").read_text().splitlines()
    assert lines == [
        "index\tprediction",
        *(f"{i}\t{a}" for i, a in enumerate(models.answers(models.root / "models/texts", [a for a, _ in PAIRS[30:]]))),
    ]
    assert "does not name the labels of its head, which classify needs" in scored["unnamed"][0]


BAD: list[tuple[str, Callable[[Path], Any], str]] = [
    ("none", lambda d: labelled.read(None, "dev", MOODS), "is read from your own files; give task.data=DIR"),
    ("file", lambda d: labelled.read(d, "dev", MOODS), "does not hold valid.jsonl or valid.tsv or dev.jsonl or dev.tsv"),
    ("both", lambda d: labelled.read(d / "both", "train", MOODS), "has train.jsonl and train.tsv; leave one of them"),
    ("json", lambda d: labelled.read(d / "a", "train", MOODS), "train.jsonl:2: is not JSON"),
    ("text", lambda d: labelled.read(d / "b", "train", MOODS), "train.jsonl:1: must be an object with a `text`"),
    ("kind", lambda d: labelled.read(d / "c", "train", MOODS), "its text_pair must be a string, its label a string"),
    ("mixed", lambda d: labelled.read(d / "d", "train", MOODS), "train.jsonl:2: has a text_pair, unlike"),
    ("label", lambda d: labelled.read(d / "e", "train", MOODS), "train.jsonl:2: label 'glad' is not one of calm, angry, sad"),
    ("without", lambda d: labelled.read(d / "f", "train", MOODS), "train.jsonl:2: has no label; give each row one"),
    ("one", lambda d: labelled.label_set(d / "g"), "train.jsonl: has the label 'calm' alone; give each row one of two"),
    ("column", lambda d: labelled.read(d / "h", "train", MOODS), "train.tsv: has no column 'text'; it has sentence, label"),
]  # fmt: skip
ROWS = {
    "a": '{"text": "x", "label": "calm"}\n{', "b": '{"sentence": "x"}', "c": '{"text": "x", "label": 1.5}',
    "d": '{"text": "x", "label": "calm"}\n{"text": "x", "text_pair": "y", "label": "sad"}',
    "e": '{"text": "x", "label": "calm"}\n{"text": "x", "label": "glad"}',
    "f": '{"text": "x", "label": "calm"}\n{"text": "x", "label": null}', "g": '{"text": "x", "label": "calm"}\n' * 2,
}  # fmt: skip


@pytest.mark.parametrize(("read", "message"), [row[1:] for row in BAD], ids=[row[0] for row in BAD])
def test_files_that_are_not_labelled_texts(read, message: str, tmp_path: Path):
    for name, text in ROWS.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.jsonl").write_text(text)
    (tmp_path / "both").mkdir()
    (tmp_path / "h").mkdir()
    for file in ("both/train.jsonl", "both/train.tsv"):
        (tmp_path / file).write_text("text\tlabel\nx\tcalm\n")
    (tmp_path / "h/train.tsv").write_text("sentence\tlabel\nx\tcalm\n")
    with pytest.raises(BadInput) as caught:
        read(tmp_path)
    assert message in str(caught.value)


def test_labels_are_those_of_train(tmp_path: Path):
    for values_of, expected in (([10, 9, 9], ["9", "10"]), (["b", "a", "B"], ["B", "a", "b"])):
        (tmp_path / "train.jsonl").write_text("".join(json.dumps({"text": "x", "label": y}) + "\n" for y in values_of))
        assert labelled.label_set(tmp_path) == expected
    examples = labelled.read(tmp_path, "train", ["a", "b", "B", "c"])
    assert examples.labels.tolist() == [1, 0, 2] and examples.note == "train: no example of c"


# ---- finetuning from such heads --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tuned(drive, scored, models: Models, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs that go on from a finetuned head, at a rate that changes nothing: its answers on dev are those of the folder."""
    out, cases = tmp_path_factory.mktemp("tuned"), []
    for name, tags, labels, stacks in (
        ("mnli", [], [], ("baseline", "deepspeed", "megatron")), ("ner", TAGS, [], ("megatron",)),
        ("pairs", [], [], ("baseline",)), ("texts", [], ["sad", "calm", "angry"], ("megatron",)),
    ):  # fmt: skip
        task = {"name": name if name in TASKS else "classify", "data": str(models.root / "data" / name)}
        task |= {"tags": tags, "labels": labels}
        values = {
            "init": {"from": str(models.root / "models" / name)}, "task": task, "model": {"dropout": 0.0},
            "data": {"seq_len": 64}, "optim": {"lr": 1e-12}, "train": {"steps": 1, "global_batch": 4},
        }  # fmt: skip
        (out / f"{name}.yaml").write_text(json.dumps(values))
        for stack in stacks:
            one_case = case(stack, "tiny", out / name / stack, [], family="bert")
            cases.append(one_case | {"module": f"recipes.bert.{stack}.finetune", "config": str(out / f"{name}.yaml")})
    drive(cases, 1)
    return out


@pytest.mark.parametrize(
    "run", ["mnli/baseline", "mnli/deepspeed", "mnli/megatron", "ner/megatron", "pairs/baseline", "texts/megatron"]
)
def test_finetuning_goes_on_from_a_head_by_name(tuned: Path, run: str):
    scores = values(json.loads((tuned / run / "eval.json").read_text()))
    assert {value for value, _ in scores.values()} == {1.0}
    stored = json.loads((tuned / run / "hf/config.json").read_text())
    wanted = {"mnli": [*glue.NLI], "ner": TAGS, "pairs": sorted(MOODS), "texts": ["sad", "calm", "angry"]}[run.split("/")[0]]
    assert [stored["id2label"][str(i)] for i in range(len(wanted))] == wanted
    if run.startswith("mnli"):
        assert scores == {"accuracy": (1, 25), "accuracy_mismatched": (1, 15)}
