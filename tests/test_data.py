"""data/: the same text gives the same bytes, however it came and however often the work was interrupted."""

import __future__

import contextlib
import gzip
import importlib
import io
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings, strategies as st

from common.data import indexed_dataset, tokenizer as tokenizers, tokenizer_training
from common.data.indexed_dataset import IndexedDataset
from common.errors import BadInput
from data import build, sentences, sources, verify, wiki_books
from data.sources import Errors

ROOT = Path(__file__).resolve().parents[1]
FILES = (*(f"{split}{suffix}" for split in ("train", "valid") for suffix in indexed_dataset.FILES), "manifest.json")


def run(module, *args, **kwargs):
    """The real command line, in its own process."""
    command = [sys.executable, "-m", f"data.{module}", *map(str, args)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, **kwargs)


def make(module, monkeypatch, *args):
    """The same in this process, which spares the start."""
    monkeypatch.setattr(sys, "argv", [f"{module}.py", *map(str, args)])
    importlib.import_module(f"data.{module}").main()


def complaint(result):
    assert result.returncode == 2, result.stdout + result.stderr
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
    return result.stderr


@pytest.fixture(scope="module")
def play(source):
    return (source / "tinyshakespeare" / "input.txt").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def speeches(play):
    return play.split("\n\n")


@pytest.fixture(scope="module")
def words(play, tmp_path_factory):
    """A small tokenizer in a folder."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer_training.train_bpe([play[:100_000]], 400).save(folder)
    return folder


@pytest.fixture(scope="module")
def jsonl(speeches, tmp_path_factory):
    path = tmp_path_factory.mktemp("jsonl") / "speeches.jsonl"
    path.write_text("".join(json.dumps({"text": s, "n": n}) + "\n" for n, s in enumerate(speeches)), encoding="utf-8")
    return path


def texts(prefix, tokenizer):
    """The documents of a corpus as text, without their end."""
    corpus = IndexedDataset(prefix)
    documents = [corpus.get(k).tolist() for k in range(corpus.documents)]
    if corpus.eod_id is not None:
        assert all(ids[-1] == corpus.eod_id and corpus.eod_id not in ids[:-1] for ids in documents)
        documents = [ids[:-1] for ids in documents]
    return [tokenizer.decode(ids) for ids in documents]


def sentence_texts(prefix, tokenizer):
    """The documents of a corpus, each as the texts of its sentences."""
    corpus = IndexedDataset(prefix)
    pairs = zip(corpus.starts[:-1], corpus.starts[1:], strict=True)
    sentence_list = [tokenizer.decode(corpus.flat[start:end]) for start, end in pairs]
    return [sentence_list[a:b] for a, b in zip(corpus.bounds[:-1], corpus.bounds[1:], strict=True)]


def contents(out):
    return {name: (out / name).read_bytes() for name in FILES}


# ---- what comes out -------------------------------------------------------------------------------------------------


def test_tinyshakespeare_is_nanogpts(source, play, tmp_path, monkeypatch):
    make("tinyshakespeare", monkeypatch, tmp_path / "c", "--source", source / "tinyshakespeare")
    train, valid = IndexedDataset(tmp_path / "c" / "train"), IndexedDataset(tmp_path / "c" / "valid")
    assert (train.tokens, valid.tokens, train.documents, train.eod_id) == (1_003_854, 111_540, 1, None)
    known = {character: i for i, character in enumerate(sorted(set(play)))}  # nanoGPT's prepare.py
    assert np.array_equal(train.flat, [known[c] for c in play[: int(len(play) * 0.9)]])
    assert np.array_equal(valid.flat, [known[c] for c in play[int(len(play) * 0.9) :]])
    gpt2 = source / "tokenizers" / "gpt2"
    make("tinyshakespeare", monkeypatch, tmp_path / "w", "--source", source / "tinyshakespeare", "--tokenizer", gpt2)
    assert [IndexedDataset(tmp_path / "w" / s).tokens for s in ("train", "valid")] == [301_966, 36_059]  # its readme.md


def test_documents_come_back_and_shares_hold(speeches, jsonl, words, tmp_path, monkeypatch):
    out, shares = tmp_path / "out", ("--valid-share", 0.1, "--test-share", 0.05)
    make("text", monkeypatch, out, "--source", jsonl, "--tokenizer", words, *shares)
    tokenizer = tokenizers.load(words)
    splits = {split: texts(out / split, tokenizer) for split in ("train", "valid", "test")}
    assert sorted(sum(splits.values(), [])) == sorted(speeches)
    assert [s for s in speeches if s in set(splits["train"])] == splits["train"]  # in the order of the source
    assert 0.08 < len(splits["valid"]) / len(speeches) < 0.12 and 0.035 < len(splits["test"]) / len(speeches) < 0.065
    train, manifest = IndexedDataset(out / "train"), json.loads((out / "manifest.json").read_text())
    assert train.tokenizer_hash == tokenizer.hash == tokenizers.load(train.tokenizer_dir).hash
    assert (train.manifest["tokenizer_size"], train.manifest["eod_id"]) == (tokenizer.size, tokenizer.eod_id)
    assert manifest["splits"].keys() == splits.keys() and manifest["documents"] == len(speeches)
    for split in splits:
        IndexedDataset(out / split).verify(tokenizer.size)


def test_a_document_stays_in_its_split(speeches, tmp_path):
    split = build.by_hash({"valid": 0.2, "test": 0.2}, seed=1)
    first = [split(text, text.encode()) for text in speeches]
    assert [split(text, text.encode()) for text in reversed(speeches)] == first[::-1]
    wider = build.by_hash({"valid": 0.3, "test": 0.2}, seed=1)
    moved = [wider(text, text.encode())[0][0] for ((name, text),) in first if name == "valid"]
    assert set(moved) == {"valid"}  # a larger share keeps what was there
    other = build.by_hash({"valid": 0.2, "test": 0.2}, seed=2)
    assert [other(text, text.encode()) for text in speeches] != first


def test_few_large_files_are_cut_at_ends_of_lines(source, words, tmp_path, monkeypatch):
    books = sorted((source / "gutenberg").glob("*_1[36]*.txt"))
    out, shares = tmp_path / "books", ("--valid-share", 0.02, "--test-share", 0.01)
    make("text", monkeypatch, out, "--source", *books, "--tokenizer", words, *shares)
    tokenizer = tokenizers.load(words)
    parts = zip(*(texts(out / split, tokenizer) for split in ("train", "valid", "test")), strict=True)
    for book, (train, valid, test) in zip(books, parts, strict=True):
        text = book.read_bytes().decode("utf-8-sig")
        assert train + valid + test == text
        assert train.endswith("\n") and valid.endswith("\n")
        assert abs(len(valid) / len(text) - 0.02) < 0.002 and abs(len(test) / len(text) - 0.01) < 0.002


@pytest.mark.parametrize("how", ["none", "line", "blank-line"])
def test_bounds_of_documents(speeches, words, tmp_path, monkeypatch, how):
    text = "\n\n".join(speeches[:40]) + "\n"
    (tmp_path / "in.txt").write_text(text, encoding="utf-8")
    args = ("--tokenizer", words, "--valid-share", 0, "--split-documents", how)
    make("text", monkeypatch, tmp_path / "out", "--source", tmp_path / "in.txt", *args)
    documents = texts(tmp_path / "out" / "train", tokenizers.load(words))
    lines = [line + "\n" for line in text.splitlines() if line]
    assert documents == {"none": [text], "line": lines, "blank-line": [s + "\n" for s in speeches[:40]]}[how]
    assert not (tmp_path / "out" / "valid.bin").exists()


def test_packed_files_and_folders_give_the_same_ids(speeches, jsonl, words, tmp_path, monkeypatch):
    import zstandard

    folder = tmp_path / "in" / "deep"
    folder.mkdir(parents=True)
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(jsonl.read_bytes()))
    half = len(jsonl.read_bytes()) // 2  # two frames, as parallel packers write them
    frames = [zstandard.compress(part) for part in (jsonl.read_bytes()[:half], jsonl.read_bytes()[half:])]
    (tmp_path / "b.jsonl.zst").write_bytes(b"".join(frames))
    (folder / "picture.png").write_bytes(b"\x89PNG")
    flats = []
    for name in (jsonl, tmp_path / "in", tmp_path / "b.jsonl.zst"):
        out = tmp_path / f"out{len(flats)}"
        make("text", monkeypatch, out, "--source", name, "--tokenizer", words)
        flats.append(IndexedDataset(out / "train").flat.tolist())
    assert flats[0] == flats[1] == flats[2]
    for packed, whole in ((".zst", b"".join(frames)), (".gz", gzip.compress(jsonl.read_bytes()))):
        damaged = tmp_path / f"damaged.jsonl{packed}"
        for damage in (whole[:3000], whole[:200_000], whole[:-1], whole[:3000] + b"\0" * 3000, b"not packed at all"):
            damaged.write_bytes(damage)
            with pytest.raises(BadInput, match=rf"damaged\.jsonl\{packed}: cannot be decompressed"):
                for _ in sources.Files([damaged]).documents(0, [], sources.Errors("skip")):
                    pass


def test_python_docs_needs_no_network(tmp_path, monkeypatch):
    make("python_docs", monkeypatch, tmp_path / "out", "--max-mb", 1, "--vocab-size", 512)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert 0.9e6 < manifest["bytes_of_text"] <= 1e6 and manifest["tokenizer_size"] == 512
    assert 0.04 < manifest["splits"]["valid"]["documents"] / manifest["documents"] < 0.2
    names = manifest["source_names"]
    assert "argparse.py" in names and not {"test", "tests", "site-packages"} & {p for n in names for p in n.split("/")}
    documents = texts(tmp_path / "out" / "train", tokenizers.load(tmp_path / "out" / "tokenizer"))
    documents += texts(tmp_path / "out" / "valid", tokenizers.load(tmp_path / "out" / "tokenizer"))
    assert Path(__future__.__file__).read_text(encoding="utf-8") in documents


def test_a_sentencepiece_of_the_text(speeches, jsonl, tmp_path, monkeypatch):
    out = tmp_path / "out"
    args = ("--source", jsonl, "--valid-share", 0.1, "--tokenizer-type", "sentencepiece")
    make("text", monkeypatch, out, *args, "--vocab-size", 1000)
    tokenizer = tokenizers.load(out / "tokenizer")
    assert (tokenizer.kind, tokenizer.size, len(tokenizer.sentinels())) == ("unigram", 1000, 100)
    assert IndexedDataset(out / "train").eod_id == tokenizer.eod_id == 1
    documents = sum((texts(out / split, tokenizer) for split in ("train", "valid")), [])
    assert sorted(documents) == sorted(tokenizer.decode(tokenizer.encode(s)) for s in speeches)
    plain = {" ".join(s.split()) for s in speeches}  # an end of line is a blank to it
    assert sum(text in plain for text in documents) > 0.95 * len(documents)  # but for the rarest characters
    for split in ("train", "valid"):
        IndexedDataset(out / split).verify(tokenizer.size)
        assert np.asarray(IndexedDataset(out / split).flat).max() < tokenizer.sentinels().min()
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["request"]["tokenizer"] == "SentencePiece of 1000"
    with pytest.raises(BadInput, match="SentencePiece of 1000, is BPE of 1000"):
        make("text", monkeypatch, out, *args[:-2], "--vocab-size", 1000)


@pytest.fixture
def translations(tmp_path):
    """200 pairs as JSON lines: words, and the same words backwards."""
    words = "red blue green house tree walks runs sees the big small dog cat".split()
    rng = np.random.default_rng(0)
    lines = []
    for _ in range(200):
        given = [words[i] for i in rng.integers(0, len(words), 6)]
        lines.append(json.dumps({"there": " ".join(given), "back": " ".join(given[::-1])}))
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_pairs_are_two_sequences_each(translations, tmp_path, monkeypatch):
    keys = ["--source", translations, "--input-key", "there", "--target-key", "back", "--valid-share", "0.1"]
    make("pairs", monkeypatch, tmp_path / "out", *keys, "--prefix", "reverse: ", "--vocab-size", 160)
    tokenizer, back = tokenizers.load(tmp_path / "out/tokenizer"), []
    for split in ("train", "valid"):
        corpus = IndexedDataset(tmp_path / "out" / split)
        assert (np.diff(corpus.bounds) == 2).all() and corpus.documents > 5
        back += [tokenizer.decode(corpus.flat[a:b].tolist()) for a, b in zip(corpus.starts, corpus.starts[1:], strict=False)]
    expected = [json.loads(line) for line in translations.read_text().splitlines()]
    written = set(zip(back[::2], back[1::2], strict=True))
    assert written == {(f"reverse: {pair['there']}", pair["back"]) for pair in expected}


PAIRS_REFUSED = {
    "no such key": ({}, ["--target-key", "no"], ":1: no such text field (--target-key no: no string under this key)"),
    "an empty target": ({"there": "a", "back": " "}, [], ":201: empty text (back is blank)"),
    "a number": ({"there": 3, "back": "b"}, [], ":201: no such text field"),
    "the separator": ({"there": "a\x1eb", "back": "b"}, [], ":201: U+001E in a text (there contains U+001E"),
    "a text file": (None, [], "not JSON lines (.jsonl, .ndjson), which pairs are read from"),
    "a prefix with the separator": ({}, ["--prefix", "a\x1e"], "--prefix: contains U+001E"),
    "a prefix that is no text": ({}, ["--prefix", "a\udcff"], "--prefix 'a\\udcff': not UTF-8"),
    "a seed beyond 64 bits": ({}, ["--seed", str(2**63)], f"--seed {2**63}: must fit 64 bits"),
    "tails": ({}, ["--split-by", "tail"], "--split-by tail: a pair cannot be cut"),
}


@pytest.mark.parametrize("case", PAIRS_REFUSED)
def test_pairs_refuse_in_one_line(case, translations, tmp_path, monkeypatch):
    record, more, message = PAIRS_REFUSED[case]
    if record is None:
        translations = translations.rename(tmp_path / "pairs.txt")
    elif record:
        translations.write_text(translations.read_text() + json.dumps(record) + "\n")
    keys = ["--source", translations, "--input-key", "there", "--target-key", "back", "--vocab-size", 160, *more]
    with pytest.raises(BadInput) as error:
        make("pairs", monkeypatch, tmp_path / "out", *keys)
    assert message in str(error.value) and not (tmp_path / "out/manifest.json").exists()


def test_c4_by_t5(source, speeches, tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(tokenizers, "TOKENIZERS", source / "tokenizers")
    splits = {"train": speeches[:40], "validation": speeches[40:50]}
    for name, some in splits.items():
        (tmp_path / "c4").mkdir(exist_ok=True)
        datasets.Dataset.from_dict({"text": some}).to_parquet(tmp_path / "c4" / f"{name}-0.parquet")
    make("c4", monkeypatch, tmp_path / "out", "--source", tmp_path / "c4", "--tokenizer", "t5")
    t5 = tokenizers.load("t5")
    for split, some in (("train", speeches[:40]), ("valid", speeches[40:50])):
        assert texts(tmp_path / "out" / split, t5) == [t5.decode(t5.encode(s)) for s in some]


# ---- sentences ------------------------------------------------------------------------------------------------------


def test_split():
    text = "Mr. J.\u00a0K. Smith came.  He saw (at 3 p.m.) it!\n\nA new one. \u2003 \n"
    assert [s.strip() for s in sentences.split(text)] == [
        "Mr. J. K. Smith came.", "He saw (at 3 p.m.) it!", "A new one.",
    ]  # fmt: skip
    table = "".join(f"row {n} | value\n" for n in range(100))
    assert sentences.split(table) == table.splitlines(keepends=True)
    assert sentences.split(table[:900]) == [table[:900]]
    assert sentences.split("") == sentences.split(" \n\u00a0\t\n") == []


LETTERS = st.sampled_from(" \n\t\r.!?“”\"'()aMJ1é東\u00a0\u2003\x1c\x85\u2028🙂。…")


@settings(max_examples=500, deadline=None)
@example("\u2003M\xa0.")  # which the library does not survive
@example("\xa0 M\x85.é")
@given(st.text(alphabet=LETTERS | st.characters(exclude_categories=["Cs"]), max_size=60))
def test_only_blanks_are_lost_by_splitting(text):
    parts = sentences.split(text)
    assert "".join("".join(parts).split()) == "".join(text.split())
    assert all(part.strip() for part in parts)


def test_splitting_real_texts_loses_nothing(source):
    for path in [*sorted((source / "gutenberg").glob("*_1*.txt")), *sorted((ROOT / "common").glob("*.py"))]:
        text = path.read_text(encoding="utf-8")
        parts = sentences.split(text)
        assert "".join("".join(parts).split()) == "".join(text.split())
        assert max(map(len, parts)) <= sentences.LONG


def test_sentences_of_documents(speeches, jsonl, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    args = ("--source", jsonl, "--valid-share", 0.1, "--sentences")
    monkeypatch.setattr(build, "BATCH_CHARS", 20_000)  # bounds of batches inside documents
    make("text", monkeypatch, out, *args, "--tokenizer-type", "wordpiece", "--vocab-size", 600)
    tokenizer = tokenizers.load(out / "tokenizer")
    assert (tokenizer.kind, tokenizer.size) == ("wordpiece", 600)
    expected = [[tokenizer.decode(tokenizer.encode(s)) for s in sentences.split(speech)] for speech in speeches]
    splits = {split: sentence_texts(out / split, tokenizer) for split in ("train", "valid")}
    assert sorted(splits["train"] + splits["valid"]) == sorted(expected)
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["sentences"] == sum(map(len, expected)) > manifest["documents"] == len(speeches)
    for split, documents in splits.items():
        corpus = IndexedDataset(out / split)
        assert corpus.eod_id is None and corpus.has_sentence_bounds
        counts = len(documents), sum(map(len, documents))
        assert (corpus.manifest["documents"], corpus.manifest["sentences"]) == counts
        assert manifest["splits"][split]["sentences"] == counts[1]
        corpus.verify(tokenizer.size)
    assert f"{manifest['splits']['train']['sentences']:,} sentences" in capsys.readouterr().out
    with pytest.raises(BadInput, match="sentences was True, is None"):
        make("text", monkeypatch, out, *args[:-1], "--tokenizer-type", "wordpiece", "--vocab-size", 600)
    with pytest.raises(BadInput, match="WordPiece of 600, is BPE of 600"):
        make("text", monkeypatch, out, *args, "--vocab-size", 600)


def test_a_corpus_without_sentences_asks_for_what_it_always_did(jsonl, words, tmp_path, monkeypatch):
    make("text", monkeypatch, tmp_path / "out", "--source", jsonl, "--tokenizer", words)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["request"].keys() == {
        "corpus", "source", "tokenizer", "shares", "split_by", "seed", "append_eod", "max_mb",
    }  # fmt: skip
    assert "sentences" not in manifest | manifest["splits"]["train"] | IndexedDataset(tmp_path / "out" / "train").manifest


def test_python_docs_in_sentences(tmp_path, monkeypatch):
    args = ("--max-mb", 1, "--vocab-size", 1024, "--sentences", "--tokenizer-type", "wordpiece")
    make("python_docs", monkeypatch, tmp_path / "out", *args)
    corpus = IndexedDataset(tmp_path / "out" / "train")
    assert corpus.manifest["tokenizer_size"] == 1024 and corpus.sentences > 20 * corpus.documents
    assert (np.asarray(corpus.flat) == 1).mean() < 0.001  # [UNK]


def test_a_document_of_wide_blanks_alone_has_no_sentence(jsonl, words, tmp_path, monkeypatch):
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in ("\u00a0", "One. Two.", "\u2003\u00a0")))
    args = ("--source", path, "--tokenizer", words, "--valid-share", 0, "--sentences")
    make("text", monkeypatch, tmp_path / "out", *args)
    assert sentence_texts(tmp_path / "out" / "train", tokenizers.load(words)) == [["One. ", "Two."]]


# ---- Wikipedia and books --------------------------------------------------------------------------------------------

ARTICLE = "Cheese\n\nCheese is made of milk. It is old.\n\n" + "More of it.\n" * 9
HEAD = "The Project Gutenberg eBook of Emma\n\n*** START OF THE PROJECT GUTENBERG EBOOK EMMA ***\n\n"
FOOT = "\n\n*** END OF THE PROJECT GUTENBERG EBOOK EMMA ***\n\nLicence.\n"


def test_cleaning():
    clean = wiki_books.clean
    assert clean(ARTICLE) == ARTICLE.strip()
    assert clean(HEAD + ARTICLE + FOOT) == ARTICLE.strip()
    assert clean(HEAD.replace("*** START OF THE", "***START OF THIS") + ARTICLE) == ARTICLE.strip()
    for heading in ("References", "See also", "External links", "Further reading", "Notes", "Bibliography", "Sources"):
        assert clean(f"{ARTICLE}\n{heading} \n\nA list.\nReferences\n") == ARTICLE.strip()
    text = f"See also the\nNotes\n{ARTICLE}"  # far from the end, or a line that is more than the heading
    assert clean(text) == text.strip()
    text = f"{ARTICLE}Notes\n{'x ' * wiki_books.CLOSING_CHARS}"
    assert clean(text) == text.strip()


@pytest.fixture
def wiki_like(speeches, tmp_path):
    """Local folders of both data sets: saved Wikipedia (text), books as parquet files (TEXT), with repeated documents."""
    import datasets

    long = [s for s in speeches if len(s.split()) >= 8]
    wiki = [*long[:60], "Too short.", long[3].upper().replace(" ", "  "), *long[60:90]]
    datasets.Dataset.from_dict({"text": wiki, "title": wiki}).save_to_disk(tmp_path / "wiki")
    (tmp_path / "books").mkdir()
    books = [HEAD + "\n".join(long[90:120]) + FOOT, "\n".join(long[90:120]), HEAD + "\n".join(long[120:150]) + FOOT]
    datasets.Dataset.from_dict({"TEXT": books}).to_parquet(tmp_path / "books" / "train-0.parquet")
    expected = [*long[:90], "\n".join(long[90:120]), "\n".join(long[120:150])]
    return [tmp_path / "wiki", tmp_path / "books"], expected


def test_wiki_books(wiki_like, source, tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folders, expected = wiki_like
    bert = tokenizers.load(source / "tokenizers" / "bert")
    (tmp_path / "tokenizers").mkdir()
    bert.save(tmp_path / "tokenizers" / "bert-base-uncased")
    monkeypatch.setattr(tokenizers, "TOKENIZERS", tmp_path / "tokenizers")
    args = ("--source", *folders, "--min-words", 8, "--valid-share", 0.1)
    make("wiki_books", monkeypatch, tmp_path / "out", *args)
    written = [doc for split in ("train", "valid") for doc in sentence_texts(tmp_path / "out" / split, bert)]
    assert sorted(written) == sorted([bert.decode(bert.encode(s)) for s in sentences.split(text)] for text in expected)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["skipped"] == {"came before": 2, "shorter than 8 words": 1}
    assert manifest["tokenizer_hash"] == bert.hash and manifest["eod_id"] is None
    make("wiki_books", monkeypatch, tmp_path / "out", *args)  # already there
    with pytest.raises(BadInput, match="--min-words 0: must be at least 1"):
        make("wiki_books", monkeypatch, tmp_path / "x", *args[:-3], 0)
    with pytest.raises(BadInput, match="bert-base-uncased is not trained; give --vocab-size"):
        words_ = ("--tokenizer", "bert-base-uncased", "--tokenizer-type", "wordpiece")
        make("wiki_books", monkeypatch, tmp_path / "x", "--source", *folders, *words_)
    datasets.Dataset.from_dict({"body": ["x"]}).save_to_disk(tmp_path / "other")
    with pytest.raises(BadInput, match="has no column text or TEXT; it has body"):
        make("wiki_books", monkeypatch, tmp_path / "x", "--source", tmp_path / "other")


def test_few_books_are_cut_at_their_tails(source, tmp_path, monkeypatch):
    books = sorted((source / "gutenberg").glob("*_1[36][46]*.txt"))
    args = ("--source", *books, "--vocab-size", 1000, "--valid-share", 0.02)
    make("wiki_books", monkeypatch, tmp_path / "books", *args)
    manifest = json.loads((tmp_path / "books" / "manifest.json").read_text())
    splits = manifest["splits"]
    assert splits["train"]["documents"] == splits["valid"]["documents"] == len(books)
    assert 0.01 < splits["valid"]["tokens"] / manifest["tokens"] < 0.03
    assert tokenizers.load(tmp_path / "books" / "tokenizer").kind == "wordpiece"


def test_a_source_that_goes_on_knows_what_came_before(tmp_path):
    lines = [f"document {n % 7} of the seven that are here" for n in range(20)] + ["short"] + ["another one that is long"]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    source = wiki_books.WikiBooks([sources.Files([tmp_path / "in.jsonl"])], 3)
    errors = sources.Errors()
    whole = list(source.documents(0, [], errors))
    assert [d.text for d in whole] == [*lines[:7], lines[-1]]
    assert errors.counts == {"came before": 13, "shorter than 3 words": 1}
    for number, document in enumerate(whole):
        assert list(source.documents(0, document.cursor, sources.Errors())) == whole[number + 1 :]


# ---- datasets -------------------------------------------------------------------------------------------------------


def test_datasets(speeches, words, tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    parts = {"train": speeches[:300], "validation": speeches[300:360]}
    saved = datasets.DatasetDict({k: datasets.Dataset.from_dict({"text": v, "url": v}) for k, v in parts.items()})
    saved.save_to_disk(tmp_path / "saved")
    files = tmp_path / "files"
    files.mkdir()
    for name in parts:
        saved[name].to_parquet(files / f"{name}-00000.parquet")
    tokenizer = tokenizers.load(words)
    for source in (tmp_path / "saved", files):  # both forms of a local dataset
        out = tmp_path / f"c4_{source.name}"
        make("c4", monkeypatch, out, "--source", source, "--tokenizer", words)
        assert texts(out / "train", tokenizer) == parts["train"]
        assert texts(out / "valid", tokenizer) == parts["validation"]
    make("c4", monkeypatch, out, "--source", source, "--tokenizer", words)  # already there
    args = ("--tokenizer", words, "--valid-share", 0.1)
    make("hub", monkeypatch, tmp_path / "hub", "--name", files, "--text-key", "url", *args)
    documents = [texts(tmp_path / "hub" / split, tokenizer) for split in ("train", "valid")]
    assert sorted(documents[0] + documents[1]) == sorted(parts["train"])
    make("openwebtext", monkeypatch, tmp_path / "owt", "--source", files, *args)
    assert texts(tmp_path / "owt" / "valid", tokenizer) == documents[1]
    with pytest.raises(BadInput, match="has no column 'body'; --text-key may be text or url"):
        make("hub", monkeypatch, tmp_path / "x", "--name", files, "--text-key", "body", "--tokenizer", words)
    with pytest.raises(BadInput, match="has no split 'dev'; it has train, validation"):
        make("hub", monkeypatch, tmp_path / "y", "--name", tmp_path / "saved", "--split", "dev", "--tokenizer", words)
    # A source goes on where a cursor says.
    hub = sources.Hub(str(files), None, [(None, "train")])
    assert [d.text for d in hub.documents(0, [123], sources.Errors())] == parts["train"][123:]


# ---- interruption ---------------------------------------------------------------------------------------------------

KILLED = """
import os, sys
from data import build, {module} as module
build.PART_BYTES, build.BATCH_CHARS = 100_000, 30_000
{kill}
sys.argv = ["{module}.py", *sys.argv[1:]]
module.main()
"""
AT_SAVE = """
count, write = [0], build.write_json
def dying(path, values):
    count[0] += 1
    if count[0] == {at}:
        os._exit(9)
    write(path, values)
build.write_json = dying
"""
AT_BATCH = """
count, append = [0], build.IndexedDatasetWriter.append
def dying(self, *args):
    count[0] += 1
    if count[0] == {at}:
        os._exit(9)
    append(self, *args)
build.IndexedDatasetWriter.append = dying
"""
AT_RENAME = """
count, replace = [0], os.replace
def dying(a, b):
    if not str(b).endswith("progress.json"):
        count[0] += 1
        if count[0] == {at}:
            os._exit(9)
    replace(a, b)
os.replace = dying
"""


@pytest.mark.parametrize("module", ["text", "wiki_books"])
def test_killed_anywhere_and_continued_gives_the_same_bytes(module, jsonl, tmp_path):
    """The same command, killed while encoding, saving, finishing and publishing, then let run. With wiki_books documents
    of sentences, some of which came before."""
    if module == "wiki_books":
        lines = jsonl.read_text(encoding="utf-8").splitlines(keepends=True)
        jsonl = tmp_path / "repeated.jsonl"
        jsonl.write_text("".join([*lines, *lines[::3]]), encoding="utf-8")
    plan = (AT_BATCH, 9), (AT_SAVE, 4), (AT_RENAME, 1), (AT_RENAME, 2), (AT_RENAME, 4), (AT_RENAME, 6), (AT_RENAME, 7)

    def attempt(folder, kill):
        folder.mkdir(exist_ok=True)
        args = ["out", "--source", str(jsonl), "--vocab-size", "300", "--valid-share", "0.1"]
        return subprocess.run(
            [sys.executable, "-c", KILLED.format(kill=kill, module=module), *args],
            cwd=folder, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)},
        )  # fmt: skip

    assert attempt(tmp_path / "straight", "").returncode == 0
    resumed = 0
    for kill, at in plan:
        result = attempt(tmp_path / "killed", kill.format(at=at))
        assert result.returncode == 9, result.stderr
        resumed += "continues at" in result.stdout
        assert not (tmp_path / "killed" / "out" / "manifest.json").exists()
    assert resumed == len(plan) - 1
    result = attempt(tmp_path / "killed", "")
    assert result.returncode == 0, result.stderr
    assert contents(tmp_path / "killed" / "out") == contents(tmp_path / "straight" / "out")
    assert IndexedDataset(tmp_path / "killed" / "out" / "train").has_sentence_bounds == (module == "wiki_books")
    assert not (tmp_path / "killed" / "out" / ".partial").exists()
    assert "already there" in attempt(tmp_path / "killed", "").stdout


def test_what_is_there_is_not_overwritten(jsonl, words, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    make("text", monkeypatch, out, "--source", jsonl, "--tokenizer", words)
    before, stamp = contents(out), (out / "train.bin").stat().st_mtime_ns
    capsys.readouterr()
    make("text", monkeypatch, out, "--source", jsonl, "--tokenizer", words)
    assert "already there" in capsys.readouterr().out and (out / "train.bin").stat().st_mtime_ns == stamp
    with pytest.raises(BadInput, match="contains another corpus .*shares was"):
        make("text", monkeypatch, out, "--source", jsonl, "--tokenizer", words, "--valid-share", 0.3)
    assert contents(out) == before
    shares = ("--valid-share", 0, "--test-share", 0.3)
    make("text", monkeypatch, out, "--source", jsonl, "--tokenizer", words, *shares, "--force")
    assert IndexedDataset(out / "test").documents and not (out / "valid.bin").exists()  # nothing is left of the old one
    (out / "train.bin").write_bytes(bytes(len((out / "train.bin").read_bytes())))
    with pytest.raises(BadInput, match=r"train\.bin is not the file .*--force"):
        make("text", monkeypatch, out, "--source", jsonl, "--tokenizer", words, *shares)
    other = tmp_path / "mine"
    other.mkdir()
    (other / "thesis.doc").touch()
    with pytest.raises(BadInput, match="not empty and contains no corpus"):
        make("text", monkeypatch, other, "--source", jsonl, "--tokenizer", words)


def test_a_small_valid_says_how_it_becomes_larger(play, words, tmp_path, monkeypatch, capsys):
    (tmp_path / "one.txt").write_text(play[:120_000])

    def lines(*args):
        make("text", monkeypatch, tmp_path / "out", "--source", tmp_path / "one.txt", "--tokenizer", words, *args)
        return capsys.readouterr().out.splitlines()

    notes = [line for line in lines() if line.startswith("note: ")]
    tokens = IndexedDataset(tmp_path / "out" / "valid").tokens
    assert notes == [f"note: valid has {tokens:,} tokens; --valid-share 0.1 --force gives more"] and tokens < 4096
    larger = lines("--valid-share", 0.1, "--force")  # as the note says
    assert not any(line.startswith("note: ") for line in larger) and larger[0].endswith(" 1 document")
    assert IndexedDataset(tmp_path / "out" / "valid").tokens > 4096
    (tmp_path / "one.txt").write_text(play[:10_000])
    assert any(line.endswith(" tokens; more text gives more") for line in lines("--valid-share", 0.1, "--force"))


# ---- bad input ------------------------------------------------------------------------------------------------------


def test_bad_lines_stop_or_are_counted(speeches, words, tmp_path, monkeypatch):
    good = [json.dumps({"text": s}).encode() for s in speeches[:50]]
    bad = {
        b'{"text": "cut off': "not JSON",
        b'{"text": "\xff"}': "not UTF-8",
        b'{"words": "x"}': "no such text field",
        b'{"text": 5}': "no such text field",
        b'["x"]': "no such text field",
        b'{"text": "  "}': "empty text",
        b'{"text": "\\ud800"}': "half of a surrogate pair",
    }
    path = tmp_path / "in.jsonl"
    for line, message in bad.items():
        path.write_bytes(b"\n".join([*good[:9], line, *good[9:]]))
        with pytest.raises(BadInput, match=rf"in\.jsonl:10: {message}.*--on-error skip"):
            make("text", monkeypatch, tmp_path / "out", "--source", path, "--tokenizer", words, "--valid-share", 0)
    (tmp_path / "empty.jsonl").touch()
    path.write_bytes(b"\n".join([*good[:9], *bad, *good[9:]]))
    args = ("--source", path, tmp_path / "empty.jsonl", "--tokenizer", words, "--valid-share", 0, "--on-error", "skip")
    make("text", monkeypatch, tmp_path / "out", *args)
    assert texts(tmp_path / "out" / "train", tokenizers.load(words)) == speeches[:50]
    skipped = json.loads((tmp_path / "out" / "train.json").read_text())["skipped"]
    assert skipped == {
        "empty file": 1, "empty text": 1, "half of a surrogate pair": 1,
        "no such text field": 3, "not JSON": 1, "not UTF-8": 1,
    }  # fmt: skip


def packed(path, unit, times):
    """A file that holds `unit` many times, packed as its suffix says."""
    import zstandard

    if path.suffix == ".gz":
        with gzip.open(path, "wb", compresslevel=1) as file:
            for _ in range(times):
                file.write(unit)
    elif path.suffix == ".zst":
        with zstandard.open(path, "wb") as file:
            for _ in range(times):
                file.write(unit)
    else:
        path.write_bytes(unit * times)
    return path


def test_what_a_packed_file_expands_to_is_bounded(tmp_path):
    """1 GB of one line in 31 KB; a process of its own, whose memory is measured."""
    bomb = packed(tmp_path / "a.jsonl.zst", b"a" * 10**6, 1000)
    (tmp_path / "b.txt.zst").symlink_to(bomb)
    code = """
import resource, sys
from data.sources import Errors, Files
from common.errors import BadInput
for path in sys.argv[1:]:
    try:
        list(Files([path]).documents(0, [], Errors()))
    except BadInput as error:
        print(error)
used = resource.getrusage(resource.RUSAGE_SELF)
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))  # ru_maxrss counts the parent's
print(int(peak.split()[1]) // 1024, round(used.ru_utime + used.ru_stime))
"""
    command = [sys.executable, "-c", code, str(bomb), str(tmp_path / "b.txt.zst")]
    lines = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    megabytes, seconds = map(int, lines[2].split())
    assert bomb.stat().st_size < 50_000 and megabytes < 1000 and seconds < 10
    assert "a.jsonl.zst:1: a document of over 32 MB (--max-document-mb N raises the limit" in lines[0]
    assert "b.txt.zst: a document of over 256 MB" in lines[1]


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_documents_up_to_the_bound_are_taken(tmp_path, suffix):
    """max_document_mb counts the bytes of a document: 100 of them here."""

    def read(name, unit, **how):
        errors = Errors("skip")
        files = sources.Files([packed(tmp_path / f"{name}{suffix}", unit, 1)], max_document_mb=1e-4, **how)
        return [document.text for document in files.documents(0, [], errors)], dict(errors.counts)

    def line(length):
        return "x" * (length - 1) + "\n"

    texts = [line(100), line(101), line(30), line(300), line(99), "x" * 101]
    expected = [line(100), line(30), line(99)]
    assert read("a.txt", "".join(texts).encode(), split_documents="line") == (expected, {"a document of over 0.0001 MB": 3})
    blank = "".join(text + "\n" for text in [line(50) * 2, line(50) * 3, line(300), line(20)]).encode()
    expected = [line(50) * 2, line(20)]
    assert read("b.txt", blank, split_documents="blank-line") == (expected, {"a document of over 0.0001 MB": 2})
    assert read("c.txt", b"x" * 100) == (["x" * 100], {}) and read("c.txt", b"x" * 101)[0] == []
    texts = ["y" * 80, "y" * 300, "z"]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    assert read("d.jsonl", lines) == ([texts[0], texts[2]], {"a document of over 0.0001 MB": 1})
    with pytest.raises(BadInput, match=r"d\.jsonl.*:2: a document of over 0.0001 MB .*--on-error skip"):
        list(sources.Files([tmp_path / f"d.jsonl{suffix}"], max_document_mb=1e-4).documents(0, [], Errors()))


def test_json_that_is_deeply_nested_or_many_objects_is_one_line(tmp_path):
    for unit, message in ((b"[", "not JSON"), (b'{"text":', "not JSON"), (b"9", "not JSON"), (b" ", "empty")):
        path = packed(tmp_path / "a.jsonl", unit, 10**6)
        if message == "empty":
            assert list(sources.Files([path]).documents(0, [], Errors())) == []
            continue
        with pytest.raises(BadInput, match=f"a.jsonl:1: {message}") as error:
            list(sources.Files([path]).documents(0, [], Errors()))
        assert "\n" not in str(error.value) and len(str(error.value)) < 500


def test_damaged_records_of_the_builder_are_one_line(jsonl, words, tmp_path, monkeypatch):
    out, args = tmp_path / "out", ("--source", jsonl, "--tokenizer", words)
    make("text", monkeypatch, out, *args)
    path = out / "manifest.json"
    good = path.read_text()
    values = json.loads(good)
    keys = ("splits", "skipped", "bytes_of_text", "request")
    nested = [values | {key: value} for key in keys for value in (None, 7.5, "x", [1])]
    broken = [good[: len(good) // 2], "", "[]", "[" * 10**5, good.replace("1234", "Infinity"), "\0", *map(json.dumps, nested)]
    for text in broken:
        path.write_text(text)
        with pytest.raises(BadInput, match=r"manifest\.json: not a manifest|contains another corpus") as error:
            make("text", monkeypatch, out, *args)
        assert "\n" not in str(error.value)
    path.unlink()
    (out / ".partial").mkdir()
    for text in ("", "{}", '{"request": {}}', good):
        (out / ".partial" / "progress.json").write_text(text)
        with pytest.raises(BadInput, match=r"progress\.json: not the state of an interrupted build"):
            make("text", monkeypatch, out, *args)
    make("text", monkeypatch, out, *args, "--force")
    IndexedDataset(out / "train").verify()


def test_verify_reads_everything(jsonl, words, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    make("text", monkeypatch, out, "--source", jsonl, "--tokenizer", words)
    capsys.readouterr()
    verify.main([str(out), str(out / "valid")])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines] == [str(out / name) for name in ("train", "valid", "valid")]
    assert all("intact: sha256, checksums of blocks" in line for line in lines)
    good, rng = {name: (out / name).read_bytes() for name in FILES[:8]}, np.random.default_rng(0)
    for number in range(24):
        path = out / FILES[number % 8]
        raw = bytearray(good[path.name])
        raw[rng.integers(len(raw))] ^= 1 << int(rng.integers(8))
        path.write_bytes(raw)
        with pytest.raises(BadInput) as error:
            verify.main([str(out)])
        assert len(error.value.problems) == 1 and path.stem in str(error.value)
        path.write_bytes(good[path.name])
    path = out / "train.bin"
    path.write_bytes(bytes(len(good["train.bin"])))
    with pytest.raises(BadInput, match="blocks are damaged") as error:
        verify.main([str(out)])
    assert len(error.value.problems) == verify.SHOWN + 1
    path.write_bytes(good["train.bin"])
    tokenizer_training.train_bpe(["a b c"], 300).save(out / "tokenizer")
    with pytest.raises(BadInput, match="was made with tokenizer"):
        verify.main([str(out / "train")])
    for suffix in (".json", ".crc32"):
        (out / f"train{suffix}").unlink()
    capsys.readouterr()
    verify.main([str(out / "train")])
    assert "no manifest" in capsys.readouterr().out
    result = run("verify", out / "valid", tmp_path / "no")
    assert result.returncode == 2 and result.stderr.count("\n") == 2 and "no corpus at" in result.stderr


def test_every_module_takes_sources_alike(words, tmp_path, monkeypatch):
    modules = [path.stem for path in (ROOT / "data").glob("*.py") if "def main" in path.read_text()]
    corpus_modules = sorted(set(modules) - {"__main__", "verify"})
    assert len(corpus_modules) == 9
    for name in corpus_modules:
        monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
        monkeypatch.setenv("COLUMNS", "80")
        with pytest.raises(SystemExit) as end, contextlib.redirect_stdout(io.StringIO()) as output:
            importlib.import_module(f"data.{name}").main()
        assert end.value.code == 0 and "--source PATH [PATH ...]" in output.getvalue(), name
        assert max(map(len, output.getvalue().splitlines())) <= 80, name
    result = subprocess.run([sys.executable, "-m", "data"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0 and all(f"  {name} " in result.stdout for name in [*corpus_modules, "verify"])
    assert max(map(len, result.stdout.splitlines())) <= 80


def test_several_sources_are_read_one_after_the_other(speeches, words, tmp_path, monkeypatch):
    import datasets

    for k in range(2):
        (tmp_path / f"t{k}.txt").write_text(speeches[k])
        parts = {"train": speeches[10 * k : 10 * k + 9], "validation": speeches[10 * k + 9 : 10 * k + 10]}
        splits = {split: datasets.Dataset.from_dict({"text": texts_}) for split, texts_ in parts.items()}
        datasets.DatasetDict(splits).save_to_disk(tmp_path / f"d{k}")
    make("tinyshakespeare", monkeypatch, tmp_path / "s", "--source", tmp_path / "t0.txt", tmp_path / "t1.txt")
    assert IndexedDataset(tmp_path / "s" / "train").documents == 2
    make("c4", monkeypatch, tmp_path / "c", "--source", tmp_path / "d0", tmp_path / "d1", "--tokenizer", words)
    tokenizer = tokenizers.load(words)
    assert texts(tmp_path / "c" / "train", tokenizer) == [*speeches[:9], *speeches[10:19]]
    assert texts(tmp_path / "c" / "valid", tokenizer) == [speeches[9], speeches[19]]
    (tmp_path / "m.py").write_text('def f():\n    """Returns what it is given, unchanged."""\n')
    make("python_chat", monkeypatch, tmp_path / "q", "--source", tmp_path / "m.py")
    assert "m.f" in "".join((tmp_path / "q" / name).read_text() for name in ("train.jsonl", "valid.jsonl"))
    for name in ("c4", "openwebtext", "hub"):
        with pytest.raises(BadInput, match="nowhere: no such folder"):
            more = ("--vocab-size", 300) if name != "openwebtext" else ()
            make(name, monkeypatch, tmp_path / "n", "--source", tmp_path / "d0", tmp_path / "nowhere", *more)


def test_numbers_out_of_range_are_refused(jsonl, words, tmp_path, monkeypatch):
    for message, args in (
        ("--vocab-size 1000000000: must be from 1 to 2,000,000", ("--vocab-size", 10**9)),
        ("--vocab-size 99999999999999999999: must be from 1 to", ("--vocab-size", 10**20 - 1)),
        ("--workers 1000000: must be from 1 to 1,024", ("--tokenizer", words, "--workers", 10**6)),
        ("--valid-share nan", ("--tokenizer", words, "--valid-share", "nan")),
        ("--max-mb nan: must be above 0", ("--tokenizer", words, "--max-mb", "nan")),
        ("--max-document-mb inf: must be above 0", ("--tokenizer", words, "--max-document-mb", "inf")),
        ("--max-document-mb -1.0: must be above 0", ("--tokenizer", words, "--max-document-mb", -1)),
    ):
        with pytest.raises(BadInput, match=message):
            make("text", monkeypatch, tmp_path / "out", "--source", jsonl, *args)
    assert not (tmp_path / "out").exists()


def test_names_that_are_too_long_are_one_line(jsonl, words, tmp_path):
    long = tmp_path / ("n" * 300)
    for args in (
        (tmp_path / "out", "--source", long, "--tokenizer", words),
        (tmp_path / "out", "--source", jsonl, "--tokenizer", long),
        (long, "--source", jsonl, "--tokenizer", words),
    ):
        assert "nnn" in complaint(run("text", *args))


@pytest.mark.parametrize("how", ["none", "line"])
def test_text_that_is_not_utf8_is_placed(words, tmp_path, monkeypatch, how):
    (tmp_path / "in.txt").write_bytes("Erste Zeile\nzweite\nJürgen\n".encode("latin-1"))
    with pytest.raises(BadInput, match=r"in\.txt:3: not UTF-8"):
        args = ("--tokenizer", words, "--split-documents", how)
        make("text", monkeypatch, tmp_path / "out", "--source", tmp_path / "in.txt", *args)


def test_the_command_line_refuses_in_one_line(jsonl, words, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "empty.txt").touch()
    (tmp_path / "folder").mkdir()
    out, by = tmp_path / "out", ("--tokenizer", words)
    for message, args in (
        ("nowhere: no such file", (out, "--source", tmp_path / "nowhere", *by)),
        ("no file with a known suffix", (out, "--source", tmp_path / "folder", *by)),
        ("empty.txt: empty file", (out, "--source", tmp_path / "empty.txt", *by)),
        ("--valid-share 1.5", (out, "--source", jsonl, *by, "--valid-share", 1.5)),
        ("no document fell into valid", (out, "--source", jsonl, *by, "--valid-share", 1e-9)),
        ("at least 257", (out, "--source", jsonl, "--vocab-size", 100)),
        ("Not a directory", (tmp_path / "file" / "out", "--source", jsonl, *by)),
        ("is a file", (tmp_path / "file", "--source", jsonl, *by)),
        ("folder: no tokenizer there", (out, "--source", jsonl, "--tokenizer", tmp_path / "folder")),
    ):
        assert message in complaint(run("text", *args))
    assert run("text", out, "--source", jsonl).returncode == 2  # neither --tokenizer nor --vocab-size
    assert not (out / "manifest.json").exists()


def test_a_full_disk_is_one_line_and_the_work_goes_on_later(jsonl, words, tmp_path):
    args = (tmp_path / "out", "--source", jsonl, "--tokenizer", words)
    limit = 100_000  # bytes that a file may have, as a stand-in for a full disk

    def small():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    assert "the same command continues" in complaint(run("text", *args, preexec_fn=small))
    assert run("text", *args).returncode == 0
    IndexedDataset(tmp_path / "out" / "train").verify()


def test_help_and_lean_start():
    for module in ("text", "hub", "c4", "openwebtext", "python_docs", "tinyshakespeare", "wiki_books"):
        code = f"import sys; from data import {module}; print([m for m in {SLOW} if m in sys.modules])"
        result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
        assert result.stdout.strip() == "[]", (module, result)
    result = run("c4", "--help")
    assert result.returncode == 0 and "python -m data.c4" in result.stdout


SLOW = ("torch", "transformers", "datasets", "tokenizers", "rich", "sentencex")
