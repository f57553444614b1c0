"""common/tokenizer.py: the right ids, the same ids in every form, and loud failure instead of others."""

import json
import shutil

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from common import tokenizer as tokenizers
from common.errors import BadInput

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
    return tokenizers.train_bpe([shakespeare[:200_000]], 600)


@pytest.fixture(scope="module")
def code():
    """A tokenizer in which runs of blanks are single tokens, as where it is trained on programs."""
    return tokenizers.train_bpe(["x        y\n\n    z \n \n    's\t\t\u00a0 \u00a0" * 50], 300)


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
    char = tokenizers.train_char("".join(SAMPLES))
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
    for given_, told in (
        (tmp_path, "give a folder with tokenizer.json"),
        (tmp_path / "nothing", "no such folder"),
        ("gpt2", "corpora/tokenizers/gpt2"),
        ("char", "build a corpus with it"),
    ):
        with pytest.raises(BadInput, match=told) as error:
            tokenizers.load(given_)
        assert "\n" not in str(error.value)


def test_a_name_is_looked_up_in_corpora_first(gpt2, tmp_path, monkeypatch):
    gpt2.save(tmp_path / "gpt2")
    monkeypatch.setattr(tokenizers, "TOKENIZERS", tmp_path)
    assert tokenizers.load("gpt2").hash == gpt2.hash


def test_characters(shakespeare):
    char = tokenizers.train_char(shakespeare)
    assert (char.size, char.eod_id, char.kind) == (65, None, "char")
    assert char.encode("\n !$&'") == [0, 1, 2, 3, 4, 5]  # code point order
    assert char.decode(char.encode(shakespeare)) == shakespeare
    slow = char.backend.encode(shakespeare[:5000], add_special_tokens=False).ids  # the library's own way
    assert char.encode(shakespeare[:5000]) == slow
    with pytest.raises(BadInput, match="'é' is not among the 65"):
        char.encode("café")
    with pytest.raises(BadInput, match="no text"):
        tokenizers.train_char("")


def test_trained_bpe(bpe, shakespeare):
    assert (bpe.size, bpe.eod_id, bpe.kind) == (600, 0, "bpe")
    assert [bpe.decode(bpe.encode(text)) for text in SAMPLES] == SAMPLES  # bytes: nothing is unknown
    assert tokenizers.train_bpe([shakespeare[:200_000]], 600).hash == bpe.hash
    with pytest.raises(BadInput, match="at least 257"):
        tokenizers.train_bpe(["x"], 256)


def test_saved_form_is_the_same_tokenizer_to_us_and_to_transformers(gpt2, bpe, shakespeare, tmp_path):
    from transformers import AutoTokenizer

    for name, tokenizer in (("gpt2", gpt2), ("bpe", bpe), ("char", tokenizers.train_char("".join(SAMPLES)))):
        tokenizer.save(tmp_path / name)
        again = tokenizers.load(tmp_path / name)
        assert (again.hash, again.kind, again.eod_id) == (tokenizer.hash, tokenizer.kind, tokenizer.eod_id)
        for config in (None, {"model_type": "gpt2"}):  # beside a model it is loaded through the model's config
            if config:
                (tmp_path / name / "config.json").write_text(json.dumps(config))
            theirs = AutoTokenizer.from_pretrained(tmp_path / name)
            for text in SAMPLES:
                ids = tokenizer.encode(text)
                assert theirs(text)["input_ids"] == ids, (name, config)
                assert theirs.decode(ids) == text
            assert theirs.eos_token_id == tokenizer.eod_id and len(theirs) == tokenizer.size
    assert len({gpt2.hash, bpe.hash}) == 2


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


def test_a_tokenizer_of_unknown_splitting_is_not_cut(source):
    other = tokenizers.load(source / "tokenizers" / "bert")
    assert list(other.pieces("some words " * 100, 10)) == ["some words " * 100]
