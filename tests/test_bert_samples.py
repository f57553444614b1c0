"""BERT's samples: their content, the statistics of the masking, and that only (seed, number) determines them."""

import functools
import hashlib
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from conftest import ROOT

from common import config, preflight
from common.data import batches, tables, tokenizer
from common.data.indexed_dataset import IndexedDataset, IndexedDatasetWriter, write_manifest
from common.errors import BadInput
from common.layout import Layout
from recipes.bert import samples, task

TOKENS = 1_000_000


def opened(prefix, *overrides, valid=False):
    settings = [f"data.train={prefix}", "data.valid=null", "data.seq_len=128", *overrides]
    cfg = config.load(ROOT / "recipes/bert/configs/tiny.yaml", settings, task.Config)
    return task.dataset(cfg, cfg.data.train, not valid)


@pytest.fixture(scope="module")
def words(sentences):
    return tokenizer.load(sentences / "tokenizer")


def draw_enough(dataset):
    """Rows of samples with TOKENS tokens that may be masked, joined."""
    drawn_batches, tokens, first = [], 0, 0
    while tokens < TOKENS:
        batch = dataset.collate(range(first, first + 512))
        drawn_batches.append(batch)
        special = 2 if dataset.pair == "none" else 3
        tokens += int(batch["lengths"].sum()) - special * 512
        first += 512
    return {name: np.concatenate([batch[name] for batch in drawn_batches]) for name in drawn_batches[0]}, tokens


@pytest.fixture(scope="module", params=["token", "whole_word", "ngram"])
def drawn(request, sentences):
    dataset = opened(sentences / "train", f"objective.masking={request.param}", "objective.pair=sop")
    return request.param, dataset, *draw_enough(dataset)


def three_sigma(share, n):
    return 3 * (share * (1 - share) / n) ** 0.5


def test_masked_share_and_80_10_10(drawn, words):
    """BERT, section 3.1 and appendix A.1, over a million tokens."""
    _, dataset, batch, tokens = drawn
    mask, labels, seen = batch["mlm_mask"], batch["labels"], batch["tokens"]
    masked = int(mask.sum())
    assert abs(masked / tokens - 0.15) <= three_sigma(0.15, tokens)
    hidden = (seen[mask] == words.mask_id).mean()
    ordinary = len(dataset.special.ordinary)
    unchanged = (seen[mask] == labels[mask]).mean()  # a random token is the token itself once in `ordinary`
    other = 1 - hidden - unchanged
    assert abs(hidden - 0.8) <= three_sigma(0.8, masked)
    assert abs(unchanged - (0.1 + 0.1 / ordinary)) <= three_sigma(0.1, masked)
    assert abs(other - 0.1 * (1 - 1 / ordinary)) <= three_sigma(0.1, masked)
    assert (seen[~mask] == labels[~mask]).all()


def test_special_and_padding_tokens_are_never_masked(drawn, words):
    _, dataset, batch, _ = drawn
    mask, labels, seen = batch["mlm_mask"], batch["labels"], batch["tokens"]
    special = [words.cls_id, words.sep_id, words.mask_id, words.pad_id]
    assert not np.isin(labels[mask], special).any()
    beyond = np.arange(labels.shape[1]) >= batch["lengths"][:, None]
    assert not mask[beyond].any() and (labels[beyond] == words.pad_id).all()
    replaced = seen[mask & (seen != words.mask_id)]
    assert not np.isin(replaced, special).any()
    assert (mask.sum(1) >= 1).all()


def test_words_are_masked_whole(drawn, words):
    masking, _, batch, _ = drawn
    continues = words.continues()
    if masking == "token":
        word = continues[batch["labels"]]
        assert (batch["mlm_mask"][:, 1:] != batch["mlm_mask"][:, :-1])[word[:, 1:]].any()  # parts of words, too
        return
    for row in range(500):
        ids, mask = batch["labels"][row, : batch["lengths"][row]], batch["mlm_mask"][row, : batch["lengths"][row]]
        inside = continues[ids[1:]] & (ids[:-1] != words.sep_id) & (ids[:-1] != words.cls_id)
        assert (mask[1:] == mask[:-1])[inside].all(), "a word is masked whole or not at all"


def test_lengths_of_pieces(sentences, monkeypatch):
    """ngram: 1, 2 or 3 words with probability 6/11, 3/11, 2/11 (ALBERT, section 4.1, with n up to 3), within 3 sigma.

    Adjacent pieces cannot be distinguished in a sample, so the lengths are observed where they are drawn; the share of masked
    tokens above shows that all that is drawn is laid down.
    """
    dataset = opened(sentences / "train", "objective.masking=ngram")
    seen = Counter()
    search = np.searchsorted

    def watched(sorted_values, values, side="left"):
        positions = search(sorted_values, values, side)
        if len(sorted_values) == 2:
            seen.update((positions + 1).reshape(-1).tolist())
        return positions

    monkeypatch.setattr(samples.np, "searchsorted", watched)
    dataset.collate(range(4000))
    total = sum(seen.values())
    assert total > 20_000
    for length, share in ((1, 6 / 11), (2, 3 / 11), (3, 2 / 11)):
        assert abs(seen[length] / total - share) <= three_sigma(share, total)


@pytest.mark.parametrize("pair", ["nsp", "sop"])
def test_pairs(sentences, words, pair):
    """Segments, labels and types of pairs: half are changed; what is not changed follows in the text."""
    dataset = opened(sentences / "train", f"objective.pair={pair}", "objective.masked_lm_prob=0.000001")
    batch = dataset.collate(range(2000))
    text = dataset.corpora[0].flat.tobytes()
    in_order = strange = 0
    for row in range(2000):
        ids, types = batch["labels"][row, : batch["lengths"][row]], batch["token_types"][row]
        ends = np.flatnonzero(ids == words.sep_id)
        assert ids[0] == words.cls_id and len(ends) == 2 and ends[1] == len(ids) - 1
        assert (types[: ends[0] + 1] == 0).all() and (types[ends[0] + 1 : len(ids)] == 1).all()
        assert (types[len(ids) :] == 0).all()
        a, b = ids[1 : ends[0]], ids[ends[0] + 1 : -1]
        assert len(a) and len(b)
        if batch["lengths"][row] == 128:
            continue  # may be shortened, so it is not one stretch of text
        first, second = (b, a) if pair == "sop" and batch["pair_label"][row] else (a, b)
        adjacent = np.concatenate([first, second]).astype(np.uint16).tobytes() in text
        in_order += adjacent
        strange += not adjacent
        assert adjacent or (pair == "nsp" and batch["pair_label"][row] == 1)
    assert in_order > 50 and (strange > 50) == (pair == "nsp")
    share = batch["pair_label"].mean()
    assert abs(share - 0.5) <= three_sigma(0.5, 2000)


def test_the_length_of_a_sample_does_not_tell_its_label(words, tmp_path):
    """With a threshold on any of the lengths one must not be able to guess whether the second segment is a stranger."""
    rng = np.random.default_rng(0)
    documents = [[rng.integers(100, 200, n) for n in rng.integers(5, 60, count)] for count in rng.integers(2, 80, 300)]
    write(tmp_path / "drawn", documents)
    for seq_len in (64, 128, 512):
        batch = bert(tmp_path / "drawn", words, "nsp", seq_len).collate(range(6000))
        label = batch["pair_label"].astype(bool)
        second = batch["token_types"].sum(1)
        for length in (batch["lengths"], second, batch["lengths"] - second):
            bounds = np.arange(seq_len + 2)[:, None]
            guessed = ((length >= bounds) == label).mean(1)  # for each threshold
            assert max(guessed.max(), 1 - guessed.min()) < 0.56, (seq_len, guessed.max(), guessed.min())


def test_full_sentences_fill_a_sample_across_documents(sentences, words):
    dataset = opened(sentences / "train", "objective.pair=none", "objective.short_seq_prob=0", valid=True)
    batch = dataset.collate(range(len(dataset)))
    ids = [row[1:n] for row, n in zip(batch["labels"], batch["lengths"], strict=True)]
    flat = dataset.corpora[0].flat
    joined = np.concatenate([row[:-1] for row in ids])
    texts = joined[joined != words.sep_id]
    lost = np.maximum(dataset.corpora[0].lengths - 126, 0).sum()  # of sentences longer than a sample
    assert len(texts) == len(flat) - lost
    assert any((row[:-1] == words.sep_id).any() for row in ids), "documents meet in a sample"
    assert "pair_label" not in batch


def test_short_samples(sentences):
    n = 3000
    for pair, least in (("none", 0.05), ("sop", 0.01)):  # some are short anyway; two sentences are never made shorter
        dataset = opened(sentences / "train", f"objective.pair={pair}", "objective.short_seq_prob=0.1")
        usual = opened(sentences / "train", f"objective.pair={pair}", "objective.short_seq_prob=0")
        shorter = (dataset.collate(range(n))["lengths"] < usual.collate(range(n))["lengths"]).mean()
        assert least < shorter < 0.1 + three_sigma(0.1, n)
    with_one = opened(sentences / "train", "objective.pair=none", "objective.short_seq_prob=0.999").collate(range(500))
    assert (with_one["mlm_mask"].sum(1) >= 1).all() and with_one["lengths"].min() >= 4


def test_chunks_hold_every_sentence_once(sentences):
    corpus = IndexedDataset(sentences / "train")
    for chunks, least in ((samples.pairs_of_sentences(corpus, 61), 2), (samples.whole_sentences(corpus, 62), 1)):
        first, end = np.concatenate(list(chunks)).T
        assert (end - first >= least).all() and (first[1:] == end[:-1]).all()
        assert first[0] == 0 and end[-1] == corpus.sentences
        before_last = np.where(least == 2, corpus.starts[end - 2], corpus.starts[end]) - corpus.starts[first]
        assert (before_last[end - first > 3] <= 62).all()  # pairs: the sentence that reaches the room, a document's last one
    bounds = np.asarray(corpus.bounds)
    first, end = np.concatenate(list(samples.pairs_of_sentences(corpus, 61))).T
    assert (np.searchsorted(bounds, first, "right") == np.searchsorted(bounds, end - 1, "right")).all(), "one document each"


def test_chunks_are_computed_once_and_kept(words, tmp_path, monkeypatch):
    """Beside the corpus, by one of several processes; again if the file is damaged; in the cache if the folder is read-only."""
    documents = [[np.arange(3 + (d * s) % 17) + 4 for s in range(d % 9)] for d in range(90)]
    write(tmp_path / "data/kept", documents)
    prefix = tmp_path / "data/kept"
    plain = {pair: bert(prefix, words, pair).collate(range(50)) for pair in ("sop", "none")}
    assert not list(tmp_path.rglob("*.table")), "a small corpus needs no file"
    monkeypatch.setattr(tables, "LEAST_SEQUENCES", 0)
    monkeypatch.setattr(samples, "PART_SENTENCES", 7)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    computed = []
    for name in ("pairs_of_sentences", "whole_sentences"):
        divide = getattr(samples, name)
        counted = functools.wraps(divide)(lambda *of, divide=divide: (computed.append(divide.__name__), divide(*of))[1])
        monkeypatch.setattr(samples, name, counted)

    def same(pair):
        batch = bert(prefix, words, pair).collate(range(50))
        return all((batch[name] == values).all() for name, values in plain[pair].items())

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(same, ["sop", "none"] * 4))
    assert sorted(computed) == ["pairs_of_sentences", "whole_sentences"]
    kept = sorted((tmp_path / "data").glob("*.table"))
    assert len(kept) == 2 and not list((tmp_path / "data").glob("*.lock"))
    content = kept[0].read_bytes()
    for damaged in (content[:-16], content[:20] + b"?" + content[21:], b""):
        kept[0].write_bytes(damaged)
        assert same("sop") and kept[0].read_bytes() == content
    bert(prefix, words, "sop", seq_len=40)
    write(prefix, documents[:50])
    bert(prefix, words, "sop")
    assert len(list((tmp_path / "data").glob("*.table"))) == 4, "another length, another corpus"
    monkeypatch.setattr(tables.tempfile, "TemporaryFile", refuse_writing_to(tmp_path / "data"))
    bert(prefix, words, "sop", seq_len=41)
    assert len(list((tmp_path / "cache/twinstack").glob("kept.pairs_of_sentences_*.table"))) == 1


def refuse_writing_to(folder):
    """TemporaryFile as in a folder that is read-only, also for root."""
    writable = tempfile.TemporaryFile

    def temporary_file(dir):
        if dir == folder:
            raise PermissionError(13, "read-only")
        return writable(dir=dir)

    return temporary_file


def test_shorten_keeps_a_stretch_of_each():
    rng = np.random.default_rng(0)
    for a, b, room in ((10, 50, 40), (50, 10, 40), (50, 50, 41), (3, 90, 20), (1, 1, 5)):
        kept_a, kept_b = samples.shorten(np.arange(a), np.arange(b), room, rng)
        assert len(kept_a) + len(kept_b) == min(a + b, room)
        assert (np.diff(kept_a) == 1).all() and (np.diff(kept_b) == 1).all()
        if min(a, b) <= room // 2:
            assert min(len(kept_a), len(kept_b)) == min(a, b)


CODE = """
import sys, hashlib
from common import config
from recipes.bert import task
cfg = config.load("recipes/bert/configs/tiny.yaml", [f"data.train={sys.argv[1]}", "data.valid=null"], task.Config)
rows = task.dataset(cfg, cfg.data.train, True).collate(range(64))
print(hashlib.sha256(b"".join(rows[name].tobytes() for name in sorted(rows))).hexdigest())
"""


def test_a_sample_is_a_function_of_seed_and_number(sentences):
    """Alone, in any company, in any order, by any thread or process, the same sample has the same mask and pair."""
    dataset = opened(sentences / "train", "objective.masking=ngram")
    together = dataset.collate(range(40))
    again = opened(sentences / "train", "objective.masking=ngram")
    with ThreadPoolExecutor(4) as pool:
        apart = list(pool.map(lambda i: again.collate([i]), reversed(range(40))))[::-1]
    for name, values in together.items():
        assert (values == np.concatenate([batch[name] for batch in apart])).all(), name
    other = opened(sentences / "train", "objective.masking=ngram", "train.seed=1").collate(range(40))
    assert (other["labels"] != together["labels"]).any()
    later = dataset.collate(range(len(dataset), len(dataset) + 40))  # the next pass: other masks
    assert (later["mlm_mask"] != together["mlm_mask"]).any()
    prints = [
        subprocess.run([sys.executable, "-c", CODE, str(sentences / "train")], cwd=ROOT, capture_output=True, text=True).stdout
        for _ in range(2)
    ]
    assert len(prints[0]) == 65 and prints[0] == prints[1]


def digest(batch):
    return hashlib.sha256(b"".join(batch[name].tobytes() for name in sorted(batch))).hexdigest()[:16]


# digests of samples 0 to 299, drawn one by one with a generator for each
GOLDEN = {
    ("nsp", "token", 64): "6c687c61d8024e58",
    ("nsp", "whole_word", 9): "fe2c545d54d4f3c7",
    ("sop", "ngram", 64): "d47eecbfc6dbece0",
    ("sop", "whole_word", 200): "9bdd32f04556d91b",
    ("none", "ngram", 64): "94758d6addb798fa",
    ("none", "token", 9): "f77c640228bde9de",
}


@pytest.mark.parametrize("pair, masking, seq_len", GOLDEN)
def test_samples_are_those_of_earlier_versions(pair, masking, seq_len, tmp_path):
    write(tmp_path / "fixed", [[(np.arange(3 + (d * s) % 17) * 7 + d + s) % 96 + 4 for s in range(d % 9)] for d in range(90)])
    special = samples.Special(cls=0, sep=1, mask=2, pad=3, continues=np.arange(100) % 3 == 0, ordinary=np.arange(4, 100))
    shares = {"masked_lm_prob": 0.15, "short_seq_prob": 0.1}
    data = str(tmp_path / "fixed")
    dataset = samples.Samples(data, seq_len, special, pair=pair, masking=masking, seed=1, shuffle=True, **shares)
    assert digest(dataset.collate(range(300))) == GOLDEN[pair, masking, seq_len]


def test_layouts_share_out_the_same_samples(sentences):
    """What 1, 2 and 4 replicas read in a step, at any micro batch, and after any number of steps, is one global batch."""
    dataset = opened(sentences / "train")
    cfg = config.load(ROOT / "recipes/bert/configs/tiny.yaml", ["train.steps=3"], task.Config)
    for dp, micro in ((1, 8), (1, 1), (2, 2), (4, 1)):
        layout = Layout(world=dp, dp=dp, tp=1, pp=1, micro_batch=micro, accumulate=8 // dp // micro)
        run = preflight.Run(cfg, cfg, "baseline", None, layout, dataset, None, None, {}, None, [])
        steps = {n: [next(batches.prefetch(run, n, rank)) for rank in range(dp)] for n in (0, 2)}
        for done, ranks in steps.items():
            numbers = sorted(tuple(row) for rank in ranks for batch in rank for row in batch["tokens"].tolist())
            assert numbers == sorted(map(tuple, dataset.collate(range(done * 8, done * 8 + 8))["tokens"].tolist()))


def test_counts_leave_padding_and_repeats_out(sentences):
    dataset = opened(sentences / "valid", valid=True)
    layout = Layout(world=2, dp=2, tp=1, pp=1, micro_batch=7, accumulate=1)
    micro_batches = [r for rank in range(2) for r in batches.for_validation(dataset, 23, layout, rank)]
    once = dataset.collate(range(23))
    assert task.counts(micro_batches)[:-1] == [int(once["mlm_mask"].sum()), 23]
    assert batches.tokens([once]) == int((once["labels"] != dataset.special.pad).sum())


def write(prefix, documents, **metadata):
    writer = IndexedDatasetWriter(prefix, np.uint16)
    for document in documents:
        writer.add_sentences([np.asarray(s) for s in document])
    writer.finish()
    write_manifest(prefix, {"tokenizer_size": 600} | metadata)


def bert(prefix, words, pair="nsp", seq_len=32):
    special = samples.special_ids(words, "here")
    shares = {"masked_lm_prob": 0.15, "short_seq_prob": 0.1}
    return samples.Samples(str(prefix), seq_len, special, pair=pair, masking="token", seed=1, shuffle=True, **shares)


def test_corpora_that_give_no_samples(tmp_path, words, sentences):
    sentence = list(range(10, 20))
    write(tmp_path / "single", [[sentence]] * 4 + [[sentence, sentence]] * 0)
    write(tmp_path / "mixed", [[sentence]] * 3 + [[sentence, sentence]] * 3)
    write(tmp_path / "one", [[sentence] * 9])
    with pytest.raises(BadInput, match="has no sentence boundaries"):
        bert(tmp_path / "single", words)
    with pytest.raises(BadInput, match="one document; objective.pair=nsp takes every other second segment from another"):
        bert(tmp_path / "one", words)
    assert len(bert(tmp_path / "one", words, "sop")) > 0 and len(bert(tmp_path / "one", words, "none")) > 0
    mixed = bert(tmp_path / "mixed", words)
    assert len(mixed) == 3 and "3 documents of one sentence are left out" in mixed.notes[0]
    with pytest.raises(BadInput, match="data.seq_len=4: leaves 1 tokens"):
        bert(tmp_path / "mixed", words, seq_len=4)
    batch = mixed.collate(range(64))  # a document of one sentence can still be the stranger
    assert batch["lengths"].min() >= 5


def test_a_tokenizer_without_mask_is_refused(corpus):
    with pytest.raises(BadInput, match=r"its tokenizer has no \[CLS\] \[SEP\] \[MASK\] \[PAD\]; build the corpus with a WordP"):
        samples.special_ids(tokenizer.load(corpus / "tokenizer"), "here")
