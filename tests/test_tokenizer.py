"""common/data/tokenizer.py: the right ids, the same ids in every form, and an error instead of wrong ids."""

import json
import os
import random
import re
import resource
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import example, given, settings, strategies as st

from common.data import fast_bpe, tokenizer as tokenizers, tokenizer_training
from common.errors import BadInput

ROOT = Path(__file__).resolve().parents[1]
SAMPLES = [
    "First Citizen:\nBefore we proceed any further, hear me speak.",
    "  two  spaces\t\ttabs \n\n\n lines   ",
    "it's they're I'd 12,345.67 naïve Zürich 東京 🙂 \u00a0\u2003x",
    "",
]


@pytest.fixture(scope="module")
def gpt2(source):
    return tokenizers.load(source / "tokenizers" / "gpt2")


@pytest.fixture(scope="module")
def shakespeare(source):
    return (source / "tinyshakespeare" / "input.txt").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def bpe(shakespeare):
    return tokenizer_training.train_bpe([shakespeare[:200_000]], 600)


@pytest.fixture(scope="module")
def code():
    """A tokenizer in which runs of blanks are single tokens, as where it is trained on programs."""
    return tokenizer_training.train_bpe(["x        y\n\n    z \n \n    's\t\t\u00a0 \u00a0" * 50], 300)


@pytest.fixture(scope="module")
def bert(source, tmp_path_factory):
    """bert-base-uncased, read from its tokenizer.json alone and from its vocab.txt alone."""
    loaded = {}
    for name in ("tokenizer.json", "vocab.txt"):
        folder = tmp_path_factory.mktemp("bert")
        shutil.copy(source / "tokenizers" / "bert" / name, folder)
        loaded[name] = tokenizers.load(folder)
    return loaded


@pytest.fixture(scope="module")
def wordpiece(shakespeare):
    return tokenizer_training.train_wordpiece(shakespeare[:200_000].split("\n"), 800)


def test_gpt2(gpt2):
    assert (gpt2.size, gpt2.eod_id, gpt2.pad_id, gpt2.kind) == (50_257, 50_256, None, "bpe")
    assert gpt2.encode("Hello world") == [15496, 995]
    assert [gpt2.decode(gpt2.encode(text)) for text in SAMPLES] == SAMPLES
    assert gpt2.encode_batch(SAMPLES) == [gpt2.encode(text) for text in SAMPLES]


def test_special_tokens_in_a_text_are_text(gpt2):
    text = "ends <|endoftext|> here"
    assert gpt2.eod_id not in gpt2.encode(text)
    assert gpt2.decode(gpt2.encode(text)) == text
    assert gpt2.decode([gpt2.eod_id]) == "<|endoftext|>"


def test_encode_flat_is_encode(gpt2, bpe, shakespeare):
    char = tokenizer_training.train_char("".join(SAMPLES))
    for tokenizer in (gpt2, bpe, char):
        ids, lengths = tokenizer.encode_flat(SAMPLES)
        expected = [tokenizer.encode(text) for text in SAMPLES]
        assert ids.tolist() == sum(expected, []) and lengths.tolist() == [len(e) for e in expected]
        assert ids.dtype == np.uint16
        assert [len(part) for part in tokenizer.encode_flat([])] == [0, 0]


def test_damaged_gpt2_files_are_refused(source, tmp_path):
    shutil.copy(source / "tokenizers" / "gpt2" / "merges.txt", tmp_path)
    vocab = json.loads((source / "tokenizers" / "gpt2" / "vocab.json").read_text(encoding="utf-8"))
    del vocab["<|endoftext|>"], vocab["Ġgazed"]
    (tmp_path / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    with pytest.raises(BadInput):
        tokenizers.load(tmp_path)
    (tmp_path / "vocab.json").write_text("{", encoding="utf-8")
    with pytest.raises(BadInput, match="cannot be read"):
        tokenizers.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}", encoding="utf-8")
    with pytest.raises(BadInput, match="cannot be read"):
        tokenizers.load(tmp_path)


def test_what_is_no_tokenizer(tmp_path, monkeypatch):
    import huggingface_hub

    def offline(*_, **__):
        raise ConnectionError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    monkeypatch.setattr(tokenizers, "TOKENIZERS", tmp_path / "none")
    for given_, message in (
        (tmp_path, "give a folder with tokenizer.json"),
        (tmp_path / "nothing", "no such folder"),
        ("gpt2", "corpora/tokenizers/gpt2"),
        ("char", "build a corpus with it"),
    ):
        with pytest.raises(BadInput, match=message) as error:
            tokenizers.load(given_)
        assert "\n" not in str(error.value)


def test_a_name_is_looked_up_in_corpora_first(gpt2, tmp_path, monkeypatch):
    gpt2.save(tmp_path / "gpt2")
    monkeypatch.setattr(tokenizers, "TOKENIZERS", tmp_path)
    assert tokenizers.load("gpt2").hash == gpt2.hash


def test_characters(shakespeare):
    char = tokenizer_training.train_char(shakespeare)
    assert (char.size, char.eod_id, char.kind) == (65, None, "char")
    assert char.encode("\n !$&'") == [0, 1, 2, 3, 4, 5]  # code point order
    assert char.decode(char.encode(shakespeare)) == shakespeare
    slow = char.backend.encode(shakespeare[:5000], add_special_tokens=False).ids  # the library's own way
    assert char.encode(shakespeare[:5000]) == slow
    with pytest.raises(BadInput, match="'é' is not among the 65"):
        char.encode("café")
    with pytest.raises(BadInput, match="no text"):
        tokenizer_training.train_char("")


def test_trained_bpe(bpe, shakespeare):
    assert (bpe.size, bpe.eod_id, bpe.kind) == (600, 0, "bpe")
    assert [bpe.decode(bpe.encode(text)) for text in SAMPLES] == SAMPLES  # bytes: nothing is unknown
    assert tokenizer_training.train_bpe([shakespeare[:200_000]], 600).hash == bpe.hash
    with pytest.raises(BadInput, match="at least 257"):
        tokenizer_training.train_bpe(["x"], 256)


def test_saved_form_is_the_same_tokenizer_here_and_in_transformers(gpt2, bpe, shakespeare, tmp_path):
    from transformers import AutoTokenizer

    for name, tokenizer in (("gpt2", gpt2), ("bpe", bpe), ("char", tokenizer_training.train_char("".join(SAMPLES)))):
        tokenizer.save(tmp_path / name)
        again = tokenizers.load(tmp_path / name)
        assert (again.hash, again.kind, again.eod_id) == (tokenizer.hash, tokenizer.kind, tokenizer.eod_id)
        for config in (None, {"model_type": "gpt2"}):  # beside a model it is loaded through the model's config
            if config:
                (tmp_path / name / "config.json").write_text(json.dumps(config))
            hf_tokenizer = AutoTokenizer.from_pretrained(tmp_path / name)
            for text in SAMPLES:
                ids = tokenizer.encode(text)
                assert hf_tokenizer(text)["input_ids"] == ids, (name, config)
                assert hf_tokenizer.decode(ids) == text
            assert hf_tokenizer.eos_token_id == tokenizer.eod_id and len(hf_tokenizer) == tokenizer.size
    assert len({gpt2.hash, bpe.hash}) == 2


# ---- WordPiece ------------------------------------------------------------------------------------------------------


def roles(tokenizer):
    return tokenizer.pad_id, tokenizer.cls_id, tokenizer.sep_id, tokenizer.mask_id


def test_bert(bert, source):
    book = (source / "gutenberg" / "emma_158.txt").read_text(encoding="utf-8")
    for tokenizer in bert.values():
        assert (tokenizer.size, tokenizer.kind, tokenizer.eod_id) == (30_522, "wordpiece", None)
        assert roles(tokenizer) == (0, 101, 102, 103)
        assert tokenizer.encode("Hello Wörld, unaffable!") == [7592, 2088, 1010, 14477, 20961, 3468, 999]
    one, other = bert.values()
    assert one.hash == other.hash
    assert one.encode_batch([book, *SAMPLES]) == other.encode_batch([book, *SAMPLES])


def test_special_tokens_in_a_text_are_text_to_wordpiece(bert, wordpiece):
    for tokenizer in (*bert.values(), wordpiece):
        ids = tokenizer.encode("a [MASK] b [CLS] c [SEP] d [PAD] e")
        assert not set(ids) & set(roles(tokenizer))
        assert len(ids) > 9  # not one unknown word either
        assert tokenizer.decode([tokenizer.mask_id]) == "[MASK]"


def test_pieces_that_continue_a_word(bert, wordpiece, gpt2):
    for tokenizer in (bert["vocab.txt"], wordpiece):
        continuing = tokenizer.continues()
        assert continuing.dtype == bool and continuing.shape == (tokenizer.size,)
        assert continuing.tolist() == [tokenizer.backend.id_to_token(i).startswith("##") for i in range(tokenizer.size)]
        assert 0 < continuing.sum() < tokenizer.size
    assert not gpt2.continues().any() and roles(gpt2) == (None, None, None, None)


def test_damaged_vocab_txt_is_refused(source, tmp_path, monkeypatch):
    lines = (source / "tokenizers" / "bert" / "vocab.txt").read_text(encoding="utf-8").split("\n")[:-1]
    assert len(lines) == 30_522

    def load(lines, name=tmp_path):
        (tmp_path / "vocab.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        return tokenizers.load(name)

    for bad, message in (
        ([*lines, "the"], "30,523 lines, 1 of them repeated"),
        ([*lines[:9000], "", *lines[9000:]], "1 empty"),
        ([line for line in lines if line != "[MASK]"], r"without \[MASK\] of"),
        ([], "without"),
    ):
        with pytest.raises(BadInput, match=message) as error:
            load(bad)
        assert "\n" not in str(error.value)
    assert load([line + "\r" for line in lines]).size == 30_522
    (tmp_path / "bert-base-uncased").symlink_to(tmp_path)
    monkeypatch.setattr(tokenizers, "TOKENIZERS", tmp_path)
    assert load(lines, "bert-base-uncased").size == 30_522
    with pytest.raises(BadInput, match="wordpiece of 30,521 ids; bert-base-uncased is"):
        load(lines[:-1], "bert-base-uncased")
    (tmp_path / "vocab.txt").write_bytes(b"\xff\n")
    with pytest.raises(BadInput, match="not UTF-8"):
        tokenizers.load(tmp_path)


@pytest.mark.parametrize("config", [None, {"do_lower_case": True}, {"do_lower_case": False}])
@pytest.mark.parametrize("pieces", [["ab", "##c", "c"], ["ab", "##c", "c", "A", "##B"]])
def test_the_case_of_a_vocab_txt(tmp_path, config, pieces):
    (tmp_path / "vocab.txt").write_text("\n".join([*tokenizers.SPECIAL, "[UNUSED]", *pieces]), encoding="utf-8")
    if config:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    lowercase = config["do_lower_case"] if config else "A" not in pieces
    tokenizer = tokenizers.load(tmp_path)
    assert tokenizer.size == 6 + len(pieces)
    upper = ["[UNK]"] if "A" not in pieces else ["A", "##B"]
    assert [tokenizer.backend.id_to_token(i) for i in tokenizer.encode("AB")] == (["ab"] if lowercase else upper)


def test_trained_wordpiece(wordpiece, shakespeare):
    assert (wordpiece.size, wordpiece.eod_id, wordpiece.kind) == (800, None, "wordpiece")
    assert [wordpiece.backend.id_to_token(i) for i in range(5)] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert roles(wordpiece) == (0, 2, 3, 4)
    assert wordpiece.decode(wordpiece.encode("First Citizen: hear me speak")) == "first citizen : hear me speak"
    assert wordpiece.encode("東") == [1]
    cased = tokenizer_training.train_wordpiece([shakespeare[:100_000]], 500, lowercase=False)
    assert cased.decode(cased.encode("First Citizen")) == "First Citizen"
    few = tokenizer_training.train_wordpiece(["a b ab abc"], 500)
    assert few.size < 500 and few.encode("ab")  # what there is
    with pytest.raises(BadInput, match=r"vocabulary of 30: .* needs at least \d\d") as error:
        tokenizer_training.train_wordpiece([shakespeare[:100_000]], 30)
    assert "\n" not in str(error.value)


def test_training_wordpiece_is_the_same_in_every_process():
    code = (
        "from common.data import tokenizer_training\n"
        "lines = open('common/data/tokenizer.py', encoding='utf-8').read().split('\\n')\n"
        "t = tokenizer_training.train_wordpiece(lines, 700); print(t.size, t.hash)"
    )
    command, seeds = [sys.executable, "-c", code], ("0", "1", "2")
    outputs = [subprocess.check_output(command, cwd=ROOT, text=True, env=os.environ | {"PYTHONHASHSEED": s}) for s in seeds]
    assert outputs[0].startswith("700 ") and len(set(outputs)) == 1


def test_rare_characters_are_left_out(monkeypatch):
    monkeypatch.setattr(tokenizer_training, "ALPHABET", 4)
    trained = tokenizer_training.train_wordpiece(["aab cde 東" * 3, "aabb cc z"], 40)
    characters = {token for token in trained.backend.get_vocab() if len(token) == 1}
    assert characters == {"a", "b", "c", "d"}  # d, e and 東 are as frequent: the first in order


def test_saved_wordpiece_is_the_same_here_and_in_transformers(bert, wordpiece, tmp_path):
    from transformers import AutoTokenizer

    for name, tokenizer in ({"trained": wordpiece} | bert).items():
        tokenizer.save(tmp_path / name)
        again = tokenizers.load(tmp_path / name)
        assert (again.hash, again.kind, roles(again)) == (tokenizer.hash, tokenizer.kind, roles(tokenizer))
        for config in (None, {"model_type": "bert"}):  # beside a model it is loaded through the model's config
            if config:
                (tmp_path / name / "config.json").write_text(json.dumps(config))
            hf_tokenizer = AutoTokenizer.from_pretrained(tmp_path / name)
            assert len(hf_tokenizer) == tokenizer.size
            named = hf_tokenizer.pad_token_id, hf_tokenizer.cls_token_id, hf_tokenizer.sep_token_id, hf_tokenizer.mask_token_id
            assert named == roles(tokenizer) and hf_tokenizer.unk_token == "[UNK]"
            for text in SAMPLES:
                ids = tokenizer.encode(text)
                assert hf_tokenizer(text, add_special_tokens=False)["input_ids"] == ids, (name, config)
                assert hf_tokenizer(text)["input_ids"] == [tokenizer.cls_id, *ids, tokenizer.sep_id]
            pair = hf_tokenizer("to be", "not")
            assert pair["input_ids"].count(tokenizer.sep_id) == 2 and set(pair["token_type_ids"]) == {0, 1}


# ---- SentencePiece --------------------------------------------------------------------------------------------------

SPELLED = "a </s> b <extra_id_0> c <pad><unk>d<extra_id_99>"


@pytest.fixture(scope="module")
def t5(source, tmp_path_factory):
    """T5's, read from its tokenizer.json alone and from its spiece.model alone."""
    loaded = {}
    for name in ("tokenizer.json", "spiece.model"):
        folder = tmp_path_factory.mktemp("t5")
        shutil.copy(source / "tokenizers" / "t5" / name, folder)
        loaded[name] = tokenizers.load(folder)
    return loaded


@pytest.fixture(scope="module")
def sentencepiece(shakespeare):
    return tokenizer_training.train_sentencepiece([shakespeare[:200_000]], 1000, sentinels=20)


def test_t5(t5, source, shakespeare):
    from sentencepiece import SentencePieceProcessor

    reference = SentencePieceProcessor(model_file=str(source / "tokenizers" / "t5" / "spiece.model"))
    # By lines: over a whole book the float32 sums of sentencepiece lose the difference between two segmentations of a word.
    texts = [*shakespeare.split("\n")[:5000], *SAMPLES, SPELLED, "  \u200b\u2581x\x00 e\u0301\u3000か\u3099 ﬁ ① \u00ad"]
    for name in ("multi30k/val.de", "multi30k/val.en", "gutenberg/emma_158.txt"):
        texts += (source / name).read_text(encoding="utf-8").split("\n")[:2000]
    expected = reference.encode(texts)
    for tokenizer in t5.values():
        assert (tokenizer.size, tokenizer.kind, tokenizer.eod_id) == (32_100, "unigram", 1)
        assert roles(tokenizer) == (0, None, None, None)
        assert tokenizer.sentinels().tolist() == list(range(32_099, 31_999, -1))
        assert tokenizer.encode_batch(texts) == expected
        assert tokenizer.decode([32_099, 1, *tokenizer.encode("Thank you.")]) == "<extra_id_0></s> Thank you."
    one, other = t5.values()
    assert one.hash == other.hash


def test_special_tokens_in_a_text_are_text_to_sentencepiece(t5, sentencepiece):
    for tokenizer in (*t5.values(), sentencepiece):
        ids = tokenizer.encode(SPELLED)
        special = {tokenizer.eod_id, tokenizer.pad_id, *tokenizer.sentinels().tolist()}
        assert len(special) > 20 and not set(ids) & special and len(ids) > 20
        assert tokenizer.encode_flat([SPELLED])[0].tolist() == ids
        last = tokenizer.sentinels()[0]
        assert tokenizer.decode([last]) == "<extra_id_0>" and last == tokenizer.size - 1


def test_others_have_no_sentinels(gpt2, wordpiece):
    for tokenizer in (gpt2, wordpiece, tokenizer_training.train_char("ab")):
        assert tokenizer.sentinels().tolist() == []


def test_trained_sentencepiece(sentencepiece, shakespeare):
    assert (sentencepiece.size, sentencepiece.eod_id, sentencepiece.kind) == (1000, 1, "unigram")
    assert [sentencepiece.backend.id_to_token(i) for i in range(3)] == ["<pad>", "</s>", "<unk>"]
    assert sentencepiece.sentinels().tolist() == list(range(999, 979, -1))
    text = "First Citizen: hear me speak."
    assert sentencepiece.decode(sentencepiece.encode(text)) == text
    assert sentencepiece.encode("東")[-1] == 2 and sentencepiece.encode(" \n ") == []
    few = tokenizer_training.train_sentencepiece(["a b ab abc abcabc\n"] * 9, 500)
    assert few.size < 500 and few.encode("ab")  # what there is
    assert len(few.sentinels()) == 100
    for texts, size, message in (
        ([shakespeare[:9000]], 120, r"vocabulary of 120: .* needs at least \d\d\d \(100 sentinels"),
        ([shakespeare[:9000]], 0, "vocabulary of 0: .* needs at least"),
        (["", " \n"], 500, "no text"),
    ):
        with pytest.raises(BadInput, match=message) as error:
            tokenizer_training.train_sentencepiece(texts, size)
        assert "\n" not in str(error.value)
    with pytest.raises(BadInput) as error:
        tokenizer_training.train_sentencepiece([shakespeare[:9000]], 120)
    needed = int(str(error.value).split("at least ")[1].split()[0])
    assert tokenizer_training.train_sentencepiece([shakespeare[:9000]], needed).size == needed


def test_training_sentencepiece_is_the_same_in_every_process():
    code = (
        "from common.data import tokenizer_training\n"
        "lines = open('common/data/tokenizer.py', encoding='utf-8').read().split('\\n')\n"
        "t = tokenizer_training.train_sentencepiece(lines, 700); print(t.size, t.hash)"
    )
    command, seeds = [sys.executable, "-c", code], ("0", "1")
    outputs = [subprocess.check_output(command, cwd=ROOT, text=True, env=os.environ | {"PYTHONHASHSEED": s}) for s in seeds]
    assert outputs[0].startswith("700 ") and len(set(outputs)) == 1


def test_damaged_spiece_model_is_refused(source, tmp_path, monkeypatch):
    import sentencepiece

    whole = (source / "tokenizers" / "t5" / "spiece.model").read_bytes()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a b ab abc"] * 9), model_prefix=tmp_path / "bpe", model_type="bpe", vocab_size=9,
        pad_id=3, minloglevel=2,
    )  # fmt: skip
    for bad, message in (
        (b"", "cannot be read as a SentencePiece unigram model"),
        (whole[:5000], "cannot be read"),
        (b"{}\n", "cannot be read"),
        ((tmp_path / "bpe.model").read_bytes(), "of type 2, unigram is 1"),
    ):
        (tmp_path / "spiece.model").write_bytes(bad)
        with pytest.raises(BadInput, match=message) as error:
            tokenizers.load(tmp_path)
        assert "\n" not in str(error.value)
    monkeypatch.setattr(tokenizers, "TOKENIZERS", tmp_path)
    (tmp_path / "t5").symlink_to(tmp_path)
    (tmp_path / "spiece.model").write_bytes(whole)
    assert tokenizers.load("t5").size == 32_100
    (tmp_path / "tokenizer_config.json").write_text('{"extra_ids": 10}')
    with pytest.raises(BadInput, match="unigram of 32,010 ids .*; t5 is unigram of 32,100"):
        tokenizers.load("t5")
    assert tokenizers.load(tmp_path).sentinels()[0] == 32_009


def test_saved_sentencepiece_is_the_same_here_and_in_transformers(t5, sentencepiece, tmp_path):
    from transformers import AutoTokenizer

    for name, tokenizer in ({"trained": sentencepiece} | t5).items():
        tokenizer.save(tmp_path / name)
        again = tokenizers.load(tmp_path / name)
        assert (again.hash, again.kind, roles(again)) == (tokenizer.hash, tokenizer.kind, roles(tokenizer))
        assert (again.eod_id, again.sentinels().tolist()) == (1, tokenizer.sentinels().tolist())
        for config in (None, {"model_type": "t5"}):  # beside a model it is loaded through the model's config
            if config:
                (tmp_path / name / "config.json").write_text(json.dumps(config))
            hf_tokenizer = AutoTokenizer.from_pretrained(tmp_path / name)
            assert len(hf_tokenizer) == tokenizer.size
            assert (hf_tokenizer.pad_token_id, hf_tokenizer.eos_token_id, hf_tokenizer.unk_token_id) == (0, 1, 2)
            assert hf_tokenizer.bos_token is None and len(hf_tokenizer.all_special_tokens) == 3 + len(tokenizer.sentinels())
            assert hf_tokenizer.convert_tokens_to_ids("<extra_id_0>") == tokenizer.size - 1
            assert hf_tokenizer("<extra_id_1>")["input_ids"] == [tokenizer.size - 2, 1]
            for text in SAMPLES:
                ids = tokenizer.encode(text)
                assert hf_tokenizer(text, add_special_tokens=False)["input_ids"] == ids, (name, config)
                assert hf_tokenizer(text)["input_ids"] == [*ids, 1]
                assert hf_tokenizer.decode(ids) == tokenizer.decode(ids)


# ---- long texts -----------------------------------------------------------------------------------------------------


def test_pieces_of_whole_books_give_the_ids_of_the_whole(gpt2, source):
    for book in sorted((source / "gutenberg").glob("*.txt")):
        text = book.read_text(encoding="utf-8")
        pieces = list(gpt2.pieces(text, 4000))
        assert "".join(pieces) == text and len(pieces) > len(text) / 8000
        whole, _ = gpt2.encode_flat([text])
        cut, _ = gpt2.encode_flat(pieces)
        assert np.array_equal(whole, cut), book.name


@settings(max_examples=300, deadline=None)
@example("x" + " " * 8 + "y", 3)
@example("x  \n\n\n    y", 2)
@given(st.text(alphabet=" \n\t\r'svl9,é東\u00a0\u180e\u200b\u2003\ufeff\x1c\x85a🙂", max_size=60), st.integers(1, 8))
def test_pieces_of_any_text_give_the_ids_of_the_whole(gpt2, code, text, size):
    for tokenizer in (gpt2, code):
        pieces = list(tokenizer.pieces(text, size))
        assert "".join(pieces) == text
        assert sum(tokenizer.encode_batch(pieces), []) == tokenizer.encode(text)


def test_pieces_of_a_book_give_the_ids_of_the_whole_to_sentencepiece(t5, source):
    text = (source / "gutenberg" / "emma_158.txt").read_text(encoding="utf-8")[:200_000]
    for tokenizer in t5.values():
        pieces = list(tokenizer.pieces(text, 4000))
        assert "".join(pieces) == text and len(pieces) > len(text) / 8000
        assert tokenizer.encode_flat(pieces)[0].tolist() == tokenizer.encode(text)


@settings(max_examples=300, deadline=None)
@example("x  y   z ", 1)
@example("a \u0301b c", 1)
@example("a b</s> c", 1)
@given(
    st.text(alphabet=" \n\t\r'svl9<>/,é東\u0301\u2581\u00a0\u200b\u2003\ufeff\x1c\x85a🙂\U000111c2", max_size=60),
    st.integers(1, 8),
)
def test_pieces_of_any_text_give_the_ids_of_the_whole_to_sentencepiece(t5, sentencepiece, text, size):
    for tokenizer in (t5["spiece.model"], sentencepiece):
        pieces = list(tokenizer.pieces(text, size))
        assert "".join(pieces) == text
        assert sum(tokenizer.encode_batch(pieces), []) == tokenizer.encode(text)


def test_a_tokenizer_of_unknown_splitting_is_not_cut(source):
    other = tokenizers.load(source / "tokenizers" / "bert")
    assert list(other.pieces("some words " * 100, 10)) == ["some words " * 100]


# ---- damaged files ---------------------------------------------------------------------------------------------------

VALUES = [None, True, -1, 0, 1.5, 2**31, 2**40, 10**30, "", "x", "\0", "\ud800", [], {}, [1], {"a": 1}]


def paths_in(values: object, path: tuple = ()) -> list[tuple]:
    """Where something stands in JSON; of long lists and tables the first forty."""
    items = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    return [path, *(inner for key, value in list(items)[:40] for inner in paths_in(value, (*path, key)))]


def damage(draw: random.Random, path: Path) -> None:
    """Cut it, flip bits in it, or put another value into its JSON."""
    data, kind = bytearray(path.read_bytes()), draw.random()
    if kind < 0.2:
        del data[draw.randrange(len(data)) :]
    elif kind < 0.4:
        for _ in range(draw.choice([1, 3, 20])):
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    else:
        values = json.loads(data)
        where = draw.choice(paths_in(values))
        node = values
        for key in where[:-1]:
            node = node[key]
        if where and draw.random() < 0.3:
            del node[where[-1]]
        elif where:
            node[where[-1]] = draw.choice(VALUES)
        data = json.dumps(values if where else draw.choice(VALUES)).encode()
    path.write_bytes(data)


def survive(folder: Path, given: list[Path], numbers: range) -> Counter:
    """Read damaged copies with `load` and with the readers of exports: a refusal is one line, the rest works."""
    from common.huggingface.pretrained import load_tokenizer

    outcomes: Counter[str] = Counter()
    for number in numbers:
        draw, copy = random.Random(number), folder / str(number)
        shutil.copytree(draw.choice(given), copy)
        damage(draw, draw.choice(sorted(copy.iterdir())))
        begin = time.process_time()
        try:
            loaded = tokenizers.load(copy)
            loaded.save(copy / "again")
            assert tokenizers.load(copy / "again").decode([0]) == loaded.decode([0])
            outcomes["read"] += 1
        except BadInput as error:
            assert len(error.problems) == 1 and "\n" not in str(error) and len(str(error)) < 500, number
            outcomes["refused"] += 1
        try:
            load_tokenizer(copy)("a b")
        except BadInput as error:
            assert len(error.problems) == 1 and "\n" not in str(error), number
        except Exception as error:  # from encoding: transformers reads more lazily; no module here calls it unguarded
            assert type(error).__module__ in ("builtins", "tokenizers"), number
        assert time.process_time() - begin < 10, number
        shutil.rmtree(copy)
    return outcomes


@pytest.fixture(scope="module")
def saved(bpe, wordpiece, sentencepiece, tmp_path_factory) -> list[Path]:
    folders = [tmp_path_factory.mktemp("saved") / name for name in ("bpe", "wordpiece", "sentencepiece", "char")]
    for tokenizer, folder in zip((bpe, wordpiece, sentencepiece, tokenizer_training.train_char("a b\n")), folders, strict=True):
        tokenizer.config["chat_template"] = "{{ messages }}"
        tokenizer.save(folder)
        del tokenizer.config["chat_template"]
    return folders


def test_damaged_files_are_one_line(saved, tmp_path):
    outcomes = survive(tmp_path, saved, range(60))
    assert outcomes["refused"] > 20 and outcomes["read"] > 5


@pytest.mark.slow
def test_a_thousand_damaged_files_are_one_line(saved, tmp_path):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    survive(tmp_path, saved, range(1_000))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # KiB


@pytest.mark.parametrize(
    ("file", "values", "message"),
    [
        ("tokenizer_config.json", [1], "it holds list, not an object"),
        ("tokenizer_config.json", {"eos_token": 5}, "eos_token is 5; it must be a token"),
        ("tokenizer_config.json", {"chat_template": 5}, "its chat_template must be a string"),
        ("tokenizer_config.json", {"chat_template": [{"name": "default"}]}, "its chat_template must be a string"),
        ("tokenizer.json", {"model": {"vocab": {"a": 2**40}}}, "it has an id 1099511627776 among 1 tokens"),
        ("tokenizer.json", {"model": {"vocab": {"a": "b"}}}, "it has an id 'b' among 1 tokens"),
    ],
)
def test_wrong_types_are_named(file, values, message, saved, tmp_path):
    shutil.copytree(saved[0], tmp_path / "t")
    (tmp_path / "t" / file).write_text(json.dumps(values))
    with pytest.raises(BadInput, match=re.escape(message)):
        tokenizers.load(tmp_path / "t")


def test_a_byte_order_mark_is_no_part_of_a_tokenizer(wordpiece, saved, tmp_path):
    for name in ("tokenizer_config.json", "chat_template.jinja", "vocab.txt"):
        folder = tmp_path / name
        folder.mkdir()
        vocab = sorted(wordpiece.backend.get_vocab().items(), key=lambda item: item[1])
        content = {"chat_template.jinja": "{{ messages }}", "vocab.txt": "\n".join(token for token, _ in vocab)}
        for mark, to in (("", folder / "plain"), ("\ufeff", folder / "marked")):
            shutil.copytree(saved[1], to)
            if name == "vocab.txt":
                (to / "tokenizer.json").unlink()
            text = content.get(name) or (to / name).read_text(encoding="utf-8")
            (to / name).write_text(mark + text, encoding="utf-8")
        plain, marked = tokenizers.load(folder / "plain"), tokenizers.load(folder / "marked")
        assert (plain.hash, plain.config) == (marked.hash, marked.config)


# ---- gigatoken -------------------------------------------------------------------------------------------------------


class Library:
    """Stands in for gigatoken and awkward, with the ids of tokenizers but for a text with `wrong` in it."""

    def __init__(self, words, wrong=None):
        self.Tokenizer, self.words, self.wrong, self.calls = self, words, wrong, 0

    def from_json(self, text):
        assert json.loads(text)["added_tokens"] == []
        return self

    def encode_batch(self, texts):
        self.calls += 1
        rows = self.words.encode_batch(texts)
        return [[*ids[:-1], 0] if self.wrong and self.wrong in text else ids for text, ids in zip(texts, rows, strict=True)]

    def flatten(self, rows):
        return SimpleNamespace(to_numpy=lambda: np.array([i for row in rows for i in row], np.uint32))

    def num(self, rows):
        return SimpleNamespace(to_numpy=lambda: np.array([len(row) for row in rows]))


@pytest.fixture
def library(monkeypatch):
    """Pretends that gigatoken is installed: library(wrong) -> (encoder, the library)."""
    words = tokenizer_training.train_bpe(iter(TEXTS), 400)

    def install(wrong=None):
        stand_in = Library(words, wrong)
        monkeypatch.setattr(fast_bpe, "is_installed", lambda: True)
        monkeypatch.setitem(sys.modules, "gigatoken", stand_in)
        monkeypatch.setitem(sys.modules, "awkward", stand_in)
        return fast_bpe.Encoder(words), stand_in

    return install


TEXTS = ["the cat sat on the mat, and didn't the dog see it?\n" * 9, "a wrong word, at last", "emoji \U0001f642 and café"]


def test_gigatoken_encodes_where_its_ids_are_equal(library):
    encoder, stand_in = library()
    before = stand_in.calls
    ids, lengths = encoder.encode_flat(TEXTS)
    expected, expected_lengths = encoder.tokenizer.encode_flat(TEXTS)
    assert encoder.name == "gigatoken" and stand_in.calls > before
    assert ids.tolist() == expected.tolist() and lengths.tolist() == expected_lengths.tolist()
    assert (ids.dtype, lengths.dtype) == (expected.dtype, expected_lengths.dtype)
    before = stand_in.calls
    assert encoder.encode_flat(["\U00030001"])[0].tolist() == encoder.tokenizer.encode("\U00030001")
    assert stand_in.calls == before, "characters whose class is not certain are left to tokenizers"


@pytest.mark.parametrize("wrong", ["endoftext", "wrong"])
def test_gigatoken_is_left_out_if_its_ids_differ(library, capsys, wrong):
    """For a text that is hard, and for one of the first batch."""
    encoder, _ = library(wrong)
    assert encoder.encode_flat(TEXTS)[0].tolist() == encoder.tokenizer.encode_flat(TEXTS)[0].tolist()
    assert encoder.name == "tokenizers"
    assert capsys.readouterr().out == "gigatoken is not used: its ids differ from those of tokenizers\n"


def test_ids_that_differ_in_a_later_batch_end_the_build(library):
    encoder, _ = library("wrong")
    encoder.encode_flat(TEXTS[:1])
    with pytest.raises(BadInput, match="gigatoken gives other ids than tokenizers.*pip uninstall gigatoken"):
        encoder.encode_flat(TEXTS[1:2])


def test_gigatoken_is_for_gpt2s_kind_of_bpe(library, tmp_path):
    encoder, stand_in = library()
    wordpiece = fast_bpe.Encoder(tokenizer_training.train_wordpiece(iter(TEXTS), 200))
    assert wordpiece.name == "tokenizers" and wordpiece.encode_flat(["the cat"])[0].tolist()
    assert encoder.name == "gigatoken"


def test_the_real_gigatoken_agrees_on_every_character():
    """Between letters, digits, signs and spaces; of the large blocks of letters every 101st."""
    pytest.importorskip("gigatoken", reason="not installed: pip install -c constraints.txt gigatoken")
    encoder = fast_bpe.Encoder(tokenizer_training.train_bpe(iter(TEXTS), 400))
    assert encoder.name == "gigatoken"
    codes = [c for c in range(0x80, 0x30000) if not 0xD800 <= c < 0xE000]
    letters = [
        range(0x3400, 0xA000),
        range(0xAC00, 0xD7A0),
        range(0xE000, 0xF900),
        range(0x17000, 0x18D00),
        range(0x20000, 0x30000),
    ]
    codes = [c for c in codes if c % 101 == 0 or not any(c in block for block in letters)]
    texts = [f"a{chr(c)}1{chr(c)}!{chr(c)} {chr(c)}" for c in codes]
    ids, lengths = encoder._encode(texts)
    expected, expected_lengths = encoder.tokenizer.encode_flat(texts)
    assert np.array_equal(ids, expected) and np.array_equal(lengths, expected_lengths)
