"""Finetuning T5: every stack and layout follows transformers' own class and tokenizer; the best checkpoint,
what it writes and its scores are what the export gives; resume; the tasks' files; what is refused."""

import json
import math
import os
import re
import subprocess
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, assert_same_state, case, losses
from test_parity import LOSS, NORM, farthest

from common import config, paths, preflight
from common.data import tokenizer
from common.errors import BadInput
from common.evaluation import glue, hub, text
from common.training import init
from recipes.t5 import finetune, task
from tests import plain_t5_finetune, warm
from tests.plain_t5 import clear_of_kinks

TEXT = """\
init: {from: FOLDER}
task: {name: NAME, data: DATA, split: SPLIT, beams: 3, generation_batch_size: 8}
model: {dropout: 0.0}
data: {seq_len: 40, target_len: 24, length_window: 0}
optim: {lr: 2.0e-3, warmup_steps: 2, schedule: linear, weight_decay: 0.01, betas: [0.9, 0.999], eps: 1.0e-5}
train: {steps: 20, global_batch: 8, eval_every: 5, save_every: 10}
baseline: {micro_batch: 2}
deepspeed: {micro_batch: 2, zero_stage: 1}
megatron: {micro_batch: 2}
"""
LAYOUTS = {
    "baseline": ("baseline", []),
    "fsdp2": ("baseline", ["baseline.shard=full"]),
    "zero0": ("deepspeed", ["deepspeed.zero_stage=0"]),
    "zero1": ("deepspeed", ["deepspeed.micro_batch=1"]),
    "zero3": ("deepspeed", ["deepspeed.zero_stage=3", "deepspeed.micro_batch=4"]),
    "dp2": ("megatron", ["megatron.distributed_optimizer=true"]),
    "tp2_sp": ("megatron", ["megatron.tp=2", "megatron.sequence_parallel=true", "megatron.micro_batch=4"]),
    # the last two: their groups stay
    "autotp2": ("deepspeed", ["deepspeed.tp=2", "deepspeed.micro_batch=4"]),
    "zero3_autotp2": ("deepspeed", ["deepspeed.zero_stage=3", "deepspeed.tp=2", "deepspeed.micro_batch=4"]),
}
RUNS = [("multi30k-en-de", name) for name in LAYOUTS] + [("mrpc", name) for name in ("baseline", "tp2_sp")]
SPLITS = {"multi30k-en-de": "test", "mrpc": "dev"}
pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def folders(spans: Path, tmp_path_factory) -> dict[str, Path]:
    """Hugging Face folders of untrained models, with the tokenizer of the test corpus."""
    folders = {}
    for name, arch in (("multi30k-en-de", "tiny_v1_1"), ("mrpc", "tiny")):
        cfg = config.load(ROOT / f"recipes/t5/configs/{arch}.yaml", ["model.vocab_size=768"], task.Config)
        model = cfg.model.resolve(cfg, None)
        net, draw = task.hf_model(model), init.scratch(3, lambda name, model=model: task.initializer(model, name))
        with torch.no_grad():
            for parameter, values in net.named_parameters():
                values.copy_(draw(parameter, values.shape))
        folders[name] = tmp_path_factory.mktemp("hf") / arch
        net.save_pretrained(folders[name])
        tokenizer.load(spans / "tokenizer").save(folders[name])
    return folders


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Multi30k's and MRPC's files: of unequal lengths, some longer than the model takes; a target is its input's even words."""
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(5)
    words = "the value of a list is returned if it was given as an argument and raises an error".split()
    (folder / "multi30k-en-de").mkdir()
    (folder / "mrpc").mkdir()
    for split, mrpc, count in (("train", "train", 60), ("val", "dev", 21), ("test_2016_flickr", None, 19)):
        texts = [rng.choice(words, rng.integers(1, 30)).tolist() for _ in range(count)]
        for language, lines in (("en", texts), ("de", [t[::2] for t in texts])):
            path = folder / f"multi30k-en-de/{split}.{language}"
            path.write_text("".join(" ".join(line) + "\n" for line in lines), encoding="utf-8")
        if mrpc:
            rows = [f"{int('error' in t)}\t1\t2\t{' '.join(t[:12])}\t{' '.join(t[1:9])} x" for t in texts]
            lines = ["Quality\t#1 ID\t#2 ID\t#1 String\t#2 String", *rows]
            (folder / f"mrpc/{mrpc}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def configs(folders, data, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("configs")
    for name, split in SPLITS.items():
        config_text = TEXT.replace("FOLDER", str(folders[name])).replace("NAME", name).replace("DATA", str(data / name))
        (folder / f"{name}.yaml").write_text(config_text.replace("SPLIT", split), encoding="utf-8")
    return {name: folder / f"{name}.yaml" for name in SPLITS}


def one(stack: str, path: Path, out: Path, overrides: list[str]) -> dict:
    one_case = case(stack, "tiny", out, overrides, family="t5")
    return one_case | {"module": f"recipes.t5.{stack}.finetune", "config": str(path)}


@pytest.fixture(scope="module")
def texts(data) -> dict[str, list[tuple[str, str]]]:
    """(input, target) of each sample of train, read and put together here."""
    folder = data / "multi30k-en-de"
    sides = [(folder / f"train.{language}").read_text().splitlines() for language in ("en", "de")]
    pairs = [(f"translate English to German: {a}", b) for a, b in zip(*sides, strict=True)]
    rows = [line.split("\t") for line in (data / "mrpc/train.tsv").read_text().splitlines()[1:]]
    examples = [(f"mrpc sentence1: {r[3]} sentence2: {r[4]}", ("not_equivalent", "equivalent")[int(r[0])]) for r in rows]
    return {"multi30k-en-de": pairs, "mrpc": examples}


@pytest.fixture(scope="module")
def seeded(configs, texts) -> dict[str, tuple[list[str], list[tuple[float, float]]]]:
    """{task: (overrides with a seed that keeps clear of T5 1.0's ReLUs (plain_t5.py), the reference loop's curve)}"""
    steps = {name: partial(plain_t5_finetune.steps, configs[name], pairs=texts[name]) for name in SPLITS}
    return {name: clear_of_kinks(steps[name], []) for name in SPLITS}


@pytest.fixture(scope="module")
def runs(drive, configs, seeded, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("finetuned")
    translation = configs["multi30k-en-de"]
    cases = []
    for layout in ("baseline", "zero1", "tp2_sp"):
        stack, more = LAYOUTS[layout]
        shared = [*more, "model.dropout=0.1", "optim.decay_steps=8", "train.eval_every=4", "task.split=dev"]
        cases.append(one(stack, translation, out / "whole" / layout, [*shared, "train.steps=8"]))
        cases += [one(stack, translation, out / "halves" / layout, [*shared, f"train.steps={n}"]) for n in (4, 8)]
    patient = ["task.patience=1", "optim.lr=1e-12", "train.steps=40"]
    cases += [one("baseline", translation, out / "patient", [*patient, *more]) for more in ([], [], ["task.beams=1"])]
    cases += [one("baseline", translation, out / "moved", ["train.steps=10", "optim.decay_steps=20"]),
              one("megatron", translation, out / "moved", ["train.steps=20", "megatron.tp=2"])]  # fmt: skip
    by_layout = sorted(RUNS, key=lambda run: [*LAYOUTS].index(run[1]))
    cases += [one(LAYOUTS[n][0], configs[name], out / name / n, seeded[name][0] + LAYOUTS[n][1]) for name, n in by_layout]
    drive(cases, 2)
    return out


@pytest.fixture(scope="module")
def reference(seeded) -> dict[str, list[tuple[float, float]]]:
    """{task: [(loss, norm) of each step]} of the reference loop."""
    return {name: curve for name, (_, curve) in seeded.items()}


@pytest.mark.parametrize(("name", "layout"), RUNS)
def test_follows_the_reference_loop(runs, reference, name, layout):
    expected = reference[name]
    assert expected[-1][0] < expected[0][0] - 0.5
    loss, norm = farthest(runs / name / layout, expected)
    assert loss <= LOSS and norm <= NORM


def valids(out: Path) -> dict[int, float]:
    lines = map(json.loads, (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return {line["step"]: line["valid_loss"] for line in lines if "valid_loss" in line}


def test_the_dev_loss_is_the_same_on_every_layout(runs):
    for name in SPLITS:
        curves = [valids(runs / name / layout) for run, layout in RUNS if run == name]
        assert all(sorted(values) == [5, 10, 15, 20] for values in curves)
        assert all(np.ptp([values[step] for values in curves]) <= LOSS for step in curves[0])


def test_the_dev_loss_is_the_exports(runs, data):
    """transformers' own loss of the last checkpoint, which the best is here, over all of dev at once."""
    out = runs / "multi30k-en-de/zero1"
    assert json.loads((out / "hf/twinstack.json").read_text())["step"] == 20
    net, words = plain_t5_finetune.loaded(str(out / "hf"))
    sides = [(data / f"multi30k-en-de/val.{language}").read_text().splitlines() for language in ("en", "de")]
    sources = [f"translate English to German: {line}" for line in sides[0]]
    given = words(sources, truncation=True, max_length=40, padding=True, return_tensors="pt")
    wanted = words(sides[1], truncation=True, max_length=24, padding=True, return_tensors="pt")
    with torch.no_grad():
        loss = net.eval()(**given, labels=wanted["input_ids"].masked_fill(wanted["attention_mask"] == 0, -100)).loss
    assert abs(loss.item() - valids(out)[20]) <= LOSS


def rows_of(out: Path) -> dict[str, dict]:
    return {row["metric"]: row for row in json.loads((out / "eval.json").read_text())}


@pytest.mark.parametrize(("name", "layout"), RUNS)
def test_the_export_is_the_best_and_writes_its_predictions(runs, data, name, layout):
    out = runs / name / layout
    values = valids(out)
    best = min(values, key=lambda step: (values[step], step))
    assert json.loads((out / "hf/twinstack.json").read_text())["step"] == best
    split = SPLITS[name]
    examples = text.read(name, data / name, split)
    lines = (out / f"predictions/{split}.txt").read_text(encoding="utf-8").removesuffix("\n").split("\n")
    assert lines == plain_t5_finetune.written(out / "hf", examples.inputs, 40, 24, 3, 0.6)
    assert name == "mrpc" or len(set(lines)) > 1
    rows = rows_of(out)
    assert {(m, row["value"]) for m, row in rows.items()} == {(m, v) for m, v, _ in text.scores(name, lines, examples)}
    for row in rows.values():
        assert row["n"] == len(lines) and f"{name} {split}, step {best}, the best by dev loss, beam 3" in row["protocol"]
    assert set(rows) == ({"bleu", "bleu_intl", "chrf"} if name != "mrpc" else {"f1", "accuracy"})
    if name == "mrpc":
        known = {"equivalent": "1", "not_equivalent": "0"}
        labels = [known.get(line, str(1 - y)) for line, y in zip(lines, examples.labels.tolist(), strict=True)]
        table = (out / "predictions/MRPC.tsv").read_text().splitlines()
        assert table == ["index\tprediction", *(f"{i}\t{label}" for i, label in enumerate(labels))]


@pytest.mark.parametrize("layout", ["baseline", "zero1", "tp2_sp"])
def test_two_halves_are_one_run_bit_for_bit(runs, layout):
    whole, halves = runs / "whole" / layout, runs / "halves" / layout
    first, second = losses(whole), losses(halves)
    assert len(first) == 8 and all(first[s][key] == second[s][key] for s in first for key in ("loss", "grad_norm", "lr"))
    assert valids(whole) == valids(halves)
    assert_same_state(whole, halves, 8)
    assert (whole / "predictions/dev.txt").read_bytes() == (halves / "predictions/dev.txt").read_bytes()
    assert (whole / "eval.json").read_bytes() == (halves / "eval.json").read_bytes()


def test_a_run_without_progress_ends_early_and_stays_ended(runs):
    out = runs / "patient"
    assert max(losses(out)) == 10 and sorted(valids(out)) == [5, 10]
    assert json.loads((out / "hf/twinstack.json").read_text())["step"] == 5
    # and is scored again where it is asked for another search
    assert all("step 5, the best by dev loss, beam 1" in row["protocol"] for row in rows_of(out).values())


STOPPED = """\
import os, signal
from common.launch import processes
from common.training import finetuning

def main(argv):
    ranks = processes.start()
    with finetuning.progress(100, 10, ranks) as tell:
        assert not tell(0)
        if ranks.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        assert tell(1) == (ranks.rank == 1)
    try:
        finetuning.exit_if_signaled(ranks, 7)
    except processes.Stopped as stopped:
        print(f"{ranks.rank}: {stopped.code}: {stopped}", file=open(f"{argv[0]}/{ranks.rank}", "w"))

if __name__ == "__main__":
    processes.run(main)
"""


def test_a_signal_to_one_rank_ends_the_writing_of_all(tmp_path):
    (tmp_path / "stopped.py").write_text(STOPPED)
    done = warm.run([tmp_path / "stopped.py", tmp_path], nproc=2)
    assert done.returncode == 0, done.stderr[-3000:]
    message = "143: stopped after step 7, state saved; the same command continues\n"
    assert [(tmp_path / str(rank)).read_text() for rank in (0, 1)] == [f"0: {message}", f"1: {message}"]


def test_a_run_moves_from_stack_to_stack(runs, reference):
    loss, norm = farthest(runs / "moved", reference["multi30k-en-de"])
    assert loss <= LOSS and norm <= NORM


def test_evaluate_gives_what_the_run_gave(runs, data, tmp_path):
    """One process against the run's two; and in two again, bit for bit."""
    out = runs / "multi30k-en-de/tp2_sp"
    words = [str(out), "multi30k-en-de", "--data", str(data / "multi30k-en-de"), "--beams", "3", "--length-penalty", "0.6",
             "--tokens", "24", "--seq-len", "40"]  # fmt: skip
    scores = []
    for name, ranks in (("one", 0), ("two", 2)):
        done = warm.run(["-m", "scripts.evaluate", *words, "--out", tmp_path / name], nproc=ranks)
        assert done.returncode == 0, done.stderr[-3000:]
        scores.append({m: row["value"] for m, row in rows_of(tmp_path / name).items()})
        written = (tmp_path / name / "predictions/multi30k-en-de.txt").read_bytes()
        assert written == (out / "predictions/test.txt").read_bytes()
    assert scores[0] == scores[1] == {metric: row["value"] for metric, row in rows_of(out).items()}


def test_evaluate_scores_glue_in_words(runs, data, tmp_path):
    out = runs / "mrpc/baseline"
    words = [str(out), "mrpc", "--data", str(data / "mrpc"), "--beams", "3", "--tokens", "24", "--seq-len", "40"]
    done = warm.run(["-m", "scripts.evaluate", *words, "--out", tmp_path])
    assert done.returncode == 0, done.stderr[-3000:]
    assert {m: row["value"] for m, row in rows_of(tmp_path).items()} == {m: row["value"] for m, row in rows_of(out).items()}
    assert (tmp_path / "predictions/mrpc/MRPC.tsv").read_bytes() == (out / "predictions/MRPC.tsv").read_bytes()
    words[1] = "wnli"
    done = warm.run(["-m", "scripts.evaluate", *words])
    assert done.returncode == 2 and "wnli is for BERT with the head of such a task" in done.stderr


# ---- samples ---------------------------------------------------------------------------------------------------------


def test_batches_are_sorted_and_padded_but_hold_the_same_samples(configs):
    cfg = config.load(configs["multi30k-en-de"], [], finetune.Config)
    stream = finetune.dataset(cfg, "train", shuffle=True)
    for step in range(20):
        numbers = stream.batch_order(range(8 * step, 8 * step + 8))
        assert sorted(numbers) == list(range(8 * step, 8 * step + 8))
        assert (np.diff(stream.lengths[stream.indices(numbers)]) >= 0).all()
        rows = stream.collate(numbers[2:5])
        for key, lengths in (("inputs", rows["input_lengths"]), ("targets", rows["loss_mask"].sum(1))):
            size = rows[key].shape[1]
            assert size == min({"inputs": 40, "targets": 24}[key], math.ceil(max(lengths) / 8) * 8)
            assert all((row[n:] == 0).all() and row[n - 1] == 1 for row, n in zip(rows[key], lengths, strict=True))
    dev = finetune.dataset(cfg, "dev", shuffle=False)
    assert sorted(dev.indices(dev.batch_order(range(21)))) == list(range(21))


def test_what_is_cut_is_told(configs):
    cfg = config.load(configs["multi30k-en-de"], ["data.target_len=8"], finetune.Config)
    notes = finetune.dataset(cfg, "train", shuffle=True).notes
    assert any(re.fullmatch(r"\d+ targets of train are truncated to data.target_len=8", note) for note in notes)


# ---- tasks -----------------------------------------------------------------------------------------------------------


def test_inputs_and_targets_are_t5s(tmp_path):
    """Raffel et al. (arXiv:1910.10683), appendix D."""
    tables = {
        "mrpc": ("train.tsv", "Quality\t#1 String\t#2 String\n1\ta b\tc\n0\td\te\n"),
        "stsb": ("sts-train.csv", "g\tf\t2012\t0\t3.25\ta\tb\ng\tf\t2012\t0\t5.0\tc\td\n"),
        "mnli": ("train.tsv", "sentence1\tsentence2\tgold_label\na\tb\tneutral\n"),
        "sst2": ("train.tsv", "sentence\tlabel\nfine\t1\n"),
    }
    expected = {
        "mrpc": [("mrpc sentence1: a b sentence2: c", "equivalent"), ("mrpc sentence1: d sentence2: e", "not_equivalent")],
        "stsb": [("stsb sentence1: a sentence2: b", "3.2"), ("stsb sentence1: c sentence2: d", "5.0")],
        "mnli": [("mnli hypothesis: b premise: a", "neutral")],
        "sst2": [("sst2 sentence: fine", "positive")],
    }
    for name, (file, content) in tables.items():
        folder = tmp_path / name
        folder.mkdir()
        for path in {file, *(dev for form in glue.FORMS[name] for dev in form.dev)}:
            (folder / path).write_text(content)
        examples = text.read(name, folder, "train")
        assert list(zip(examples.inputs, examples.targets, strict=True)) == expected[name]
    known = [{"text": "c", "answer_start": 0}, {"text": "c c", "answer_start": 0}]
    paragraph = {"context": "c c", "qas": [{"id": "1", "question": "q?", "answers": known}]}
    for split in ("train", "dev"):
        (tmp_path / f"{split}-v1.1.json").write_text(json.dumps({"data": [{"paragraphs": [paragraph]}]}))
    examples = text.read("squad", tmp_path, "dev")
    assert (
        examples.inputs == ["question: q? context: c c"] and examples.targets == ["c"] and examples.references == [["c", "c c"]]
    )
    assert [score[:2] for score in text.scores("squad", ["the c c"], examples)] == [("f1", 100.0), ("exact_match", 100.0)]


def test_pairs_and_summaries_come_from_json_lines_and_csv(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"input": "a", "target": "b"}\n\n{"input": "c\\nd", "target": "e"}\n')
    (tmp_path / "dev.csv").write_text('id,document,summary\n1,"a, ""b""\nc",d\n')
    assert text.read("pairs", tmp_path, "train").inputs == ["a", "c\nd"]
    assert text.read("pairs", tmp_path, "train", prefix="x: ").inputs == ["x: a", "x: c\nd"]
    examples = text.read("cnn_dm", tmp_path, "dev", source="document", target="summary")
    assert (examples.inputs, examples.targets) == (['summarize: a, "b"\nc'], ["d"])
    assert text.read("xsum", tmp_path, "dev").inputs == examples.inputs
    (tmp_path / "dev.csv").write_text("document,summary\na\u2028b,c\x85d\n", encoding="utf-8")  # no ends of lines in CSV
    assert text.read("xsum", tmp_path, "dev").targets == ["c\x85d"]


def test_the_hubs_columns_are_read(monkeypatch):
    import datasets

    pairs = datasets.Dataset.from_list([{"translation": {"de": a, "en": b}} for a, b in (("eins", "one"), ("zwei", "two"))])
    answers = {"text": ["a", "b"], "answer_start": [0, 1]}
    asked = datasets.Dataset.from_list([{"id": "1", "question": "q?", "context": "ab", "answers": answers}])
    calls = []

    def load(*where: str, split: str) -> datasets.Dataset:
        calls.append((*where, split))
        return asked if "squad" in where[0] else pairs

    monkeypatch.setattr(datasets, "load_dataset", load)
    examples = text.read("wmt14-de-en", None, "dev")
    assert examples.inputs == ["translate German to English: eins", "translate German to English: zwei"]
    assert examples.targets == ["one", "two"]
    assert text.read("squad", None, "train").references == [["a", "b"]]
    assert calls == [("wmt/wmt14", "de-en", "validation"), ("rajpurkar/squad", None, "train")]


def test_multi30k_is_as_large_as_published(source: Path):
    """Elliott et al. (arXiv:1605.00459): 29,000, 1,014 and 1,000."""
    sizes = {split: len(text.read("multi30k-en-de", source / "multi30k", split).inputs) for split in hub.SPLITS}
    assert sizes == {"train": 29_000, "dev": 1_014, "test": 1_000}
    examples = text.read("multi30k-de-en", source / "multi30k", "test")
    assert examples.inputs[0].startswith("translate German to English: Ein Mann") and examples.targets[0].startswith("A man")


def test_a_list_of_targets_is_one_example_to_score_and_several_to_learn(tmp_path):
    rows = [{"input": "a", "target": ["b", "c"]}, {"input": "a", "target": "d"}, {"input": "e", "target": ["f"]}]
    for split in ("train", "dev"):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    examples = text.read("pairs", tmp_path, "dev")
    assert (examples.inputs, examples.targets) == (["a", "a", "e"], ["b", "d", "f"])
    assert examples.references == [["b", "c"], ["d"], ["f"]]  # equal inputs stay examples of their own
    learnt = text.each_reference(examples)
    assert list(zip(learnt.inputs, learnt.targets, strict=True)) == [("a", "b"), ("a", "c"), ("a", "d"), ("e", "f")]
    assert learnt.notes == ("1 of 3 inputs have several targets: 4 examples",)
    for bad, message in (
        ([], "or a list of strings, is"),
        (["b", 5], "or a list of strings, is"),
        (["b", " "], "target is blank"),
    ):
        (tmp_path / "dev.jsonl").write_text(json.dumps({"input": "a", "target": bad}))
        with pytest.raises(BadInput, match=message):
            text.read("pairs", tmp_path, "dev")


# ---- scores ----------------------------------------------------------------------------------------------------------


class Writes:
    """In place of a model: writes the ids it was given."""

    def __init__(self, ids: list[list[int]]):
        self.rows = iter(ids)

    def generate(self, input_ids: torch.Tensor, **_) -> torch.Tensor:
        rows = [next(self.rows) for _ in input_ids]
        return torch.tensor([[0, *row, *[0] * (max(map(len, rows)) - len(row))] for row in rows])


def test_who_writes_the_targets_ids_has_an_exact_match(source: Path, configs, tmp_path: Path):
    """Two blanks become one, and T5 cannot write `<`: both in the targets, the latter counted."""
    from transformers import AutoTokenizer

    from common.launch.processes import Ranks

    rows = [{"input": f"list col{i}", "target": f"SELECT  col{i} FROM table WHERE col{i} {'<' if i % 4 else 'is'} {i}"}
            for i in range(40)]  # fmt: skip
    for split in ("train", "dev"):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8-sig")
    words, examples = AutoTokenizer.from_pretrained(source / "tokenizers/t5"), text.read("pairs", tmp_path, "dev")
    order = sorted(range(40), key=lambda i: len(words(examples.inputs[i])["input_ids"]))
    net = Writes([words(examples.targets[i])["input_ids"] for i in order])
    search, ranks = text.Search(1, 0.6, 64, 8), Ranks(0, 1, torch.device("cpu"))
    written = text.write(net, words, examples.inputs, None, search, ranks, lambda number: None)
    scores = {name: value for name, value, _ in text.scores("pairs", written, examples, words)}
    assert scores["exact_match"] == 100.0 and scores["bleu"] < 100
    wrong = ["SELECT col0", *written[1:]]
    assert dict((name, value) for name, value, _ in text.scores("pairs", wrong, examples, words))["exact_match"] == 97.5
    note = "30 of 40 targets of dev hold what the vocabulary cannot write (<unk>)"
    assert text.unknown(words, examples.targets, "dev") == (note,)
    more = ["task.name=pairs", f"task.data={tmp_path}", f"data.tokenizer={source}/tokenizers/t5", "task.split=dev"]
    cfg = config.load(configs["multi30k-en-de"], more, finetune.Config)
    notes = finetune.dataset(cfg, "dev", shuffle=False).notes
    assert note in notes and not any("inputs of dev hold" in note for note in notes)


def test_several_references():
    """BLEU as Papineni et al. have it: counts clipped by the largest of any reference, the length of the nearest; of ROUGE the
    best reference; a prediction that is one of them has all points by every score."""
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    predictions, first = some_pairs(60)
    _, second = some_pairs(120)
    known = [[a, b] if i % 3 else [a] for i, (a, b) in enumerate(zip(first, second[60:], strict=True))]
    cut, hits, totals, length, reference_length = Tokenizer13a(), [0] * 4, [0] * 4, 0, 0
    for prediction, texts in zip(predictions, known, strict=True):
        p, many = cut(prediction).split(), [cut(t).split() for t in texts]
        for n in range(1, 5):
            most = Counter()
            for r in many:
                most |= grams(r, n)
            hits[n - 1] += (grams(p, n) & most).total()
            totals[n - 1] += grams(p, n).total()
        length, reference_length = (
            length + len(p),
            reference_length + min(map(len, many), key=lambda size, p=p: (abs(size - len(p)), size)),
        )
    expected = 100 * min(1, math.exp(1 - reference_length / length)) * math.exp(np.mean(np.log(np.divide(hits, totals))))
    (_, value, protocol), _ = text.bleu(predictions, known)
    assert abs(value - expected) < 1e-9 and "nrefs:var" in protocol
    assert abs(value - text.bleu(predictions, [[t] for t in first])[0][1]) > 1e-3

    best = [max(text.rouge([p], [[t]])[2][1] for t in texts) for p, texts in zip(predictions, known, strict=True)]
    assert abs(text.rouge(predictions, known)[2][1] - np.mean(best)) < 1e-9
    either = [[b, a] for a, b in zip(second[::-1], second, strict=True)]
    for score in (text.bleu, text.chrf, text.exact_match):
        assert all(value == pytest.approx(100) for _, value, _ in score(second, either))


def some_pairs(number: int) -> tuple[list[str], list[str]]:
    """References, and predictions that share some of their words."""
    rng = np.random.default_rng(0)
    words = "the man is running and jumping over two old houses , dogs . a small-scale 3.5 test ( here ) !".split()
    references = [" ".join(rng.choice(words, rng.integers(4, 25))) for _ in range(number)]
    predictions = [" ".join(w for w in r.split() if rng.random() < 0.8) or "none" for r in references]
    return predictions, references


def grams(words: list[str], n: int) -> Counter:
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def test_bleu_is_the_papers():
    """Papineni et al. (2002), over sacrebleu's tokens: precisions of 1 to 4 words, clipped, and the brevity penalty."""
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a
    from sacrebleu.tokenizers.tokenizer_intl import TokenizerV14International

    predictions, references = some_pairs(200)
    values = {name: value for name, value, _ in text.bleu(predictions, [[r] for r in references])}
    for name, cut in (("bleu", Tokenizer13a()), ("bleu_intl", TokenizerV14International())):
        pairs = [(cut(p).split(), cut(r).split()) for p, r in zip(predictions, references, strict=True)]
        precisions = []
        for n in range(1, 5):
            hits = sum((grams(p, n) & grams(r, n)).total() for p, r in pairs)
            precisions.append(hits / sum(grams(p, n).total() for p, _ in pairs))
        length, reference_length = (sum(len(pair[side]) for pair in pairs) for side in (0, 1))
        expected = 100 * min(1, math.exp(1 - reference_length / length)) * math.exp(np.mean(np.log(precisions)))
        assert abs(values[name] - expected) < 1e-9 and 20 < expected < 90


def test_chrf_is_the_papers():
    """Popović (2015): F2 of the mean precision and recall over n-grams of 1 to 6 characters, without blanks."""
    predictions, references = some_pairs(200)
    [(_, value, _)] = text.chrf(predictions, [[r] for r in references])
    precisions, recalls = [], []
    for n in range(1, 7):
        hits = length = reference_length = 0
        for pair in zip(predictions, references, strict=True):
            p, r = (Counter(s[i : i + n] for i in range(len(s) - n + 1)) for s in (t.replace(" ", "") for t in pair))
            hits, length, reference_length = hits + (p & r).total(), length + p.total(), reference_length + r.total()
        precisions.append(hits / length)
        recalls.append(hits / reference_length)
    p, r = np.mean(precisions), np.mean(recalls)
    assert abs(value - 100 * 5 * p * r / (4 * p + r)) < 1e-9


def test_rouge_is_the_papers():
    """Lin (2004): F1 of n-grams and of the longest common subsequence, over stems; rougeLsum: of the union over sentences."""
    from nltk.stem.porter import PorterStemmer

    predictions, references = some_pairs(200)
    values = {name: value for name, value, _ in text.rouge(predictions, [[r] for r in references])}
    stem = PorterStemmer().stem

    def stems(line: str) -> list[str]:
        return [stem(w) if len(w) > 3 else w for w in re.sub(r"[^a-z0-9]+", " ", line.lower()).split()]

    def f1(hits: int, length: int, reference_length: int) -> float:
        return 2 * hits / (length + reference_length) if hits else 0.0

    def common(a: list[str], b: list[str]) -> int:
        rows = [0] * (len(b) + 1)
        for x in a:
            before, rows = rows, [0]
            for j, y in enumerate(b):
                rows.append(before[j] + 1 if x == y else max(before[j + 1], rows[j]))
        return rows[-1]

    both = [(stems(p), stems(r)) for p, r in zip(predictions, references, strict=True)]
    for n in (1, 2):
        expected = [f1((grams(p, n) & grams(r, n)).total(), grams(p, n).total(), grams(r, n).total()) for p, r in both]
        assert abs(values[f"rouge{n}"] - 100 * np.mean(expected)) < 1e-9
    assert abs(values["rougeL"] - 100 * np.mean([f1(common(p, r), len(p), len(r)) for p, r in both])) < 1e-9
    assert values["rougeLsum"] >= values["rougeL"]
    # by hand: of 3 words in 2 sentences 3 are found in the other order of sentences, where rougeL finds 2
    summed = {name: value for name, value, _ in text.rouge(["red . big dog"], [["big dog . red"]])}
    assert summed["rougeLsum"] == 100.0 and abs(summed["rougeL"] - 200 / 3) < 1e-9


def test_texts_that_are_no_label_are_wrong():
    labels = np.array([0, 1, 1, 0])
    assert text.classes("mrpc", ["not_equivalent", " equivalent", "maybe", ""], labels).tolist() == [0, 1, 0, 1]
    assert text.classes("stsb", ["3.2", "high", "nan", "-2"], labels).tolist() == [3.2, -1.0, -1.0, -2.0]
    three = np.array([0, 1, 2])
    assert text.classes("mnli", ["neutral", "neutral", "?"], three).tolist() == [1, 1, 0]


# ---- what is refused -------------------------------------------------------------------------------------------------

DAMAGE = [
    ("count", "train.de", lambda t: t + "more\n", "train.en has 60 lines and"),
    ("blank", "val.en", lambda t: "\n" + t[t.index("\n") + 1 :], "val.en:1: the line is blank; each must have a text"),
    ("missing", "test_2016_flickr.de", None, "has no test examples of multi30k-en-de: test_2016_flickr.en and test_2016_fl"),
    ("latin", "train.en", lambda t: t.replace("the", "th\u00e9").encode("latin-1"), "train.en: not UTF-8 (byte"),
]


@pytest.mark.parametrize(("file", "damage", "message"), [row[1:] for row in DAMAGE], ids=[row[0] for row in DAMAGE])
def test_files_that_do_not_fit(file, damage, message, data: Path, configs, tmp_path: Path):
    for path in (data / "multi30k-en-de").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    if damage is None:
        (tmp_path / file).unlink()
    else:
        damaged = damage((tmp_path / file).read_text())
        (tmp_path / file).write_bytes(damaged if isinstance(damaged, bytes) else damaged.encode())
    refused(configs["multi30k-en-de"], tmp_path / "out", [f"task.data={tmp_path}"], [message])


JSON_LINES = [
    ("not_json", '{"input": "a", "target": "b"}\n{"input"\n', "train.jsonl:2: is not JSON"),
    ("no_key", '{"input": "a", "answer": "b"}\n', "no text under 'target'; it has input, answer: give task.target=KEY"),
    ("a_list", "[1]\n", "train.jsonl:1: must be an object, is list"),
    ("blank", '{"input": " ", "target": "b"}\n', "train.jsonl:1: input is blank"),
    ("empty", "\n", "train.jsonl: has no examples"),
    ("a_number", '{"input": 5, "target": "b"}\n', "'input' must be a string, is 5"),
]


@pytest.mark.parametrize(("content", "message"), [row[1:] for row in JSON_LINES], ids=[row[0] for row in JSON_LINES])
def test_lines_that_are_no_pairs(content, message, tmp_path: Path):
    (tmp_path / "train.jsonl").write_text(content)
    with pytest.raises(BadInput, match=re.escape(message)):
        text.read("pairs", tmp_path, "train")


def test_a_folder_with_the_name_of_a_split_is_not_the_split(configs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Corpora are looked for in the repository's root too; the splits `train` and `dev` are names, not paths."""
    for split in ("train", "dev"):
        (tmp_path / split).mkdir()
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    run = preflight.prepare(str(configs["multi30k-en-de"]), str(tmp_path / "out"), [], "baseline", finetune, 1)
    assert len(run.train) == 60 and len(run.valid) > 0


REFUSED = [
    ("task.name=mutli30k", "task.name=\"mutli30k\": should be 'multi30k-en-de', 'multi30k-de-en', 'wmt14-en-de'"),
    ("task.data=nowhere", "nowhere: no such folder; give one with the files of multi30k-en-de, or leave it out for the hub"),
    ("task.source=fr", "has no train examples of multi30k-en-de: train.fr and train.de"),
    ("task.beams=0", "task.beams=0: should be greater than 0"),
    ("data.valid=test", "data.valid=\"test\": should be 'dev'"),
    ("task.train_examples=1000", "task.train_examples=1000: train has only 60; give at most that"),
    ("model.layers=4", "has num_layers=3, the model gives 4"),
    ("init.from=scratch", "data.tokenizer: is missing, and init.from=scratch does not provide one"),
    ("init.from=nowhere", "init.from=nowhere: no config.json there"),
    ("megatron.pp=2", "megatron.pp=2: megatron-core no longer splits an encoder and a decoder over pipeline stages"),
]
SHAPES = ["model.layers=3", "model.hidden=64", "model.heads=4"]


def refused(path: Path, out: Path, words: list[str], messages: list[str], stack: str = "megatron") -> None:
    command = ["bash", str(ROOT / f"recipes/t5/{stack}/finetune.sh"), str(path), str(out), *words]
    env = os.environ | {"NPROC": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 2 and not out.exists(), done.stderr
    assert all(line.startswith("error: ") for line in done.stderr.splitlines())
    assert all(words in done.stderr for words in messages), done.stderr


@pytest.mark.parametrize(("word", "message"), REFUSED, ids=[row[0] for row in REFUSED])
def test_what_is_refused(word: str, message: str, configs, tmp_path: Path):
    shapes = SHAPES if "init.from" in word else []
    refused(configs["multi30k-en-de"], tmp_path / "out", [*shapes, word], [message])


def test_a_label_outside_the_set_is_refused(data: Path, configs, tmp_path: Path):
    for file in ("train.tsv", "dev.tsv"):
        (tmp_path / file).write_text((data / "mrpc" / file).read_text())
    (tmp_path / "dev.tsv").write_text((data / "mrpc/dev.tsv").read_text().replace("\n1\t", "\nyes\t", 1))
    message = ["label 'yes' is outside the set of mrpc: 0, 1"]
    refused(configs["mrpc"], tmp_path / "out", [f"task.data={tmp_path}"], message, "baseline")
    message = ["mrpc: the answers of its test set are not public; give task.split=dev"]
    refused(configs["mrpc"], tmp_path / "out", ["task.split=test"], message, "baseline")
    refused(configs["mrpc"], tmp_path / "out", ["task.prefix=x"], ["mrpc: T5 defines its inputs; leave out"], "baseline")


def test_a_folder_without_a_tokenizer_is_refused(folders, configs, tmp_path: Path):
    folder = tmp_path / "hf"
    folder.mkdir()
    for file in ("config.json", "model.safetensors"):
        (folder / file).write_bytes((folders["multi30k-en-de"] / file).read_bytes())
    message = [f"{folder}: no tokenizer there; give a folder with tokenizer.json"]
    refused(configs["multi30k-en-de"], tmp_path / "out", [f"init.from={folder}"], message, "deepspeed")
