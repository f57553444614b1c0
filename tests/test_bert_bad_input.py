"""What BERT refuses besides GPT's list (test_bad_input.py): corpora, tokenizers, folders to begin from; and what must work."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import case, losses
from test_bad_input import Try, attempt, place, refused  # noqa: F401 (fixtures)

from common.data import tokenizer
from common.data.indexed_dataset import IndexedDataset, IndexedDatasetWriter, write_manifest
from common.data.manifest import checksum

TEXT = """\
model: {arch: bert, layers: 2, hidden: 32, heads: 2}
data: {train: words/train, valid: words/valid, seq_len: 32}
objective: {pair: nsp}
optim: {lr: 1.0e-3, warmup_steps: 2}
train: {steps: 4, global_batch: 8}
baseline: {micro_batch: 2}
deepspeed: {micro_batch: 2, zero_stage: 1}
megatron: {micro_batch: 2, tp: 1, pp: 1}
"""


@pytest.fixture
def home(place: Path, sentences: Path) -> Path:  # noqa: F811
    """The folder one stands in: bert.yaml and its corpus, `words`."""
    (place / "bert.yaml").write_text(TEXT)
    shutil.copytree(sentences, place / "words")
    return place


def documents(prefix: Path, lengths: list[int], tokens: int = 12) -> None:
    """A corpus of the same tokenizer, with documents of so many sentences."""
    manifest = json.loads((prefix.parent / "train.json").read_text())
    writer = IndexedDatasetWriter(prefix, np.uint16)
    for count in lengths:
        writer.add_sentences([np.arange(100, 100 + tokens)] * count)
    writer.finish()
    keep = ("eod_id", "tokenizer", "tokenizer_hash", "tokenizer_size")
    write_manifest(prefix, {key: manifest[key] for key in keep} | {"sentences": sum(lengths)})


def without_mask(home: Path) -> None:
    """The corpus's tokenizer without [MASK], as of a model that is not BERT; the manifests know it."""
    path = home / "words/tokenizer/tokenizer.json"
    path.write_text(path.read_text().replace("[MASK]", "[NOTHING]"))
    config = home / "words/tokenizer/tokenizer_config.json"
    config.write_text("{}")
    vocabulary = tokenizer.load(home / "words/tokenizer")
    for name in ("train", "valid"):
        manifest = json.loads((home / f"words/{name}.json").read_text())
        manifest["tokenizer_hash"] = vocabulary.hash
        (home / f"words/{name}.json").write_text(json.dumps(manifest | {"checksum": checksum(manifest)}))


CORPORA = [  # name, what is done, overrides, messages: one entry per line
    ("no bounds of sentences", None, "data.train=corpus/train data.valid=null data.tokenizer=words/tokenizer",
     ["corpus/train: has no sentence boundaries (one sequence per document); build it again with --sentences"]),
    ("one sentence a document", lambda h: documents(h / "words/single", [1, 1, 1]), "data.train=words/single",
     ["words/single: each document has one sentence; a pair needs two sentences of one document"]),
    ("one document", lambda h: documents(h / "words/alone", [9]), "data.train=words/alone",
     ["words/alone: one document; objective.pair=nsp takes every other second segment from another document"]),
    ("no [MASK]", without_mask, "", ["words/train: its tokenizer has no [MASK]; build", "words/valid: its tokenizer has no"]),
    ("no tokenizer", lambda h: [(h / f"words/{n}.json").unlink() for n in ("train", "valid")], "",
     ["words/train: its tokenizer is not known, so [MASK] and [SEP] are not either; give data.tokenizer=DIR", "words/valid:"]),
    ("too short", None, "data.seq_len=4", ["data.seq_len=4: leaves 1 tokens besides [CLS] and [SEP]; give more"]),
    ("longer than positions", None, "model.positions=16", ["bert.yaml: model.positions=16 is below data.seq_len=32"]),
    ("no pair head", None, "model.pair_head=false", ["model.pair_head=false with objective.pair=nsp"]),
    ("pair head and none", None, "model.pair_head=true objective.pair=none", ["model.pair_head=true with objective.pair=none"]),
    ("pairs that end", None, "phases=[{'train.steps':8,'objective.pair':none}]", ["phases[0]: model.pair_head=true with obj"]),
    ("unknown pair", None, "objective.pair=sopp", ["objective.pair=\"sopp\": should be 'nsp', 'sop' or 'none'"]),
    ("unknown masking", None, "objective.masking=span", ["objective.masking=\"span\": should be 'token', 'whole_word'"]),
    ("nothing masked", None, "objective.masked_lm_prob=0", ["objective.masked_lm_prob=0: should be greater than 0"]),
    ("unknown key", None, "objective.mask_prob=0.15", ["objective.mask_prob: unknown key; did you mean 'masked_lm_prob'?"]),
    ("key of GPT", None, "data.pack=true", ["data.pack: unknown key; data has: train, valid, seq_len, tokenizer"]),
]  # fmt: skip


@pytest.mark.parametrize(("damage", "overrides", "messages"), [row[1:] for row in CORPORA], ids=[row[0] for row in CORPORA])
def test_corpora_and_keys(damage, overrides: str, messages: list[str], home: Path, attempt: Try) -> None:  # noqa: F811
    if damage:
        damage(home)
    refused(home, lambda: attempt(*overrides.split(), config="bert.yaml", family="bert"), *messages)


LAYOUTS = [
    ("deepspeed", 2, "deepspeed.sp=2", "deepspeed.sp=2: BERT's heads read the first token and the masked ones"),
    ("megatron", 3, "megatron.tp=3 train.global_batch=6 model.ffn=96", "megatron.tp=3 does not divide model.heads=2"),
    (
        "deepspeed",
        3,
        "deepspeed.pp=3 train.global_batch=6",
        "deepspeed.pp=3 is above model.layers=2: a stage would have no layer",
    ),
    ("megatron", 3, "megatron.pp=3 train.global_batch=6", "megatron.pp=3 does not divide model.layers=2"),
    ("megatron", 2, "megatron.cp=2 data.seq_len=30", "megatron.cp=2 needs a multiple of 4 and data.seq_len=30; give 28 or 32"),
    ("megatron", 1, "optim.optimizer=lamb", "optim.optimizer=lamb on megatron: it scales each parameter's update by the norms"),
]


@pytest.mark.parametrize(("stack", "nproc", "overrides", "message"), LAYOUTS, ids=[f"{r[0]} {r[2]}" for r in LAYOUTS])
def test_layouts(stack, nproc, overrides, message, home: Path, attempt: Try) -> None:  # noqa: F811
    refused(home, lambda: attempt(*overrides.split(), config="bert.yaml", family="bert", stack=stack, nproc=nproc), message)


def test_documents_of_one_sentence_are_left_out_and_told(home: Path, attempt: Try) -> None:  # noqa: F811
    documents(home / "words/mixed", [1, 1, 5, 5])
    attempted = attempt("data.train=words/mixed", config="bert.yaml", family="bert")
    assert (attempted.code, attempted.started) == (0, True)
    assert "note: words/mixed: 2 documents of one sentence are left out; a pair needs two sentences" in attempted.lines[0]


def test_another_objective_is_another_run(home: Path, attempt: Try, drive) -> None:  # noqa: F811
    (home / "out").mkdir()
    out = home / "run"
    one = case("baseline", "tiny", out, []) | {"config": str(home / "bert.yaml"), "module": "recipes.bert.baseline.pretrain"}
    shared = [f"data.train={home}/words/train", f"data.valid={home}/words/valid", "train.eval_samples=8"]
    # a pad id other than 0: the same text with a vocabulary in another order
    moved = home / "moved"
    old = tokenizer.load(home / "words/tokenizer")
    words = [old.backend.id_to_token(i) for i in range(old.size)]
    order = [*range(1, old.size), 0]
    (moved / "tokenizer").mkdir(parents=True)
    (moved / "tokenizer/vocab.txt").write_text("\n".join(words[i] for i in order) + "\n", encoding="utf-8")
    vocabulary = tokenizer.load(moved / "tokenizer")
    assert vocabulary.pad_id == vocabulary.size - 1
    new_id = np.argsort(np.array(order))
    for name in ("train", "valid"):
        corpus = IndexedDataset(home / f"words/{name}")
        writer = IndexedDatasetWriter(moved / name, np.uint16)
        for first, end in zip(corpus.bounds[:-1], corpus.bounds[1:], strict=True):
            writer.add_sentences([new_id[corpus.flat[corpus.starts[s] : corpus.starts[s + 1]]] for s in range(first, end)])
        writer.finish()
        ids = {"eod_id": None, "tokenizer_hash": vocabulary.hash, "tokenizer_size": vocabulary.size}
        write_manifest(moved / name, ids | {"tokenizer": "tokenizer"})
    padded = [f"data.train={moved}/train", f"data.valid={moved}/valid", "train.eval_samples=8"]
    again = {"config": str(home / "bert.yaml")}
    cases = [
        one | {"overrides": shared},
        case("baseline", "tiny", home / "pad_baseline", padded, family="bert") | again,
        case("deepspeed", "tiny", home / "pad_zero3", [*padded, "deepspeed.zero_stage=3"], family="bert") | again,
        case("megatron", "tiny", home / "pad_tp2", [*padded, "megatron.tp=2"], family="bert") | again,
    ]
    drive(cases, 2)
    refused(
        home, lambda: attempt(*shared, "objective.masking=ngram", config="bert.yaml", out=out, family="bert"),
        f'{out} has another run: objective.masking was "token", is "ngram"; choose another OUT',
    )  # fmt: skip
    expected = losses(home / "pad_baseline")
    for name in ("pad_zero3", "pad_tp2"):
        lines = losses(home / name)
        assert max(abs(lines[s]["loss"] - expected[s]["loss"]) for s in expected) <= 1e-5
    exported = json.loads((home / "pad_tp2/hf/config.json").read_text())
    assert exported["pad_token_id"] == vocabulary.pad_id
