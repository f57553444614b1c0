"""T5's samples: span corruption splices back, has the published lengths and densities, and depends on (seed, number) alone."""

import hashlib

import numpy as np
import pytest
from conftest import ROOT

from common import config
from common.data import tokenizer
from common.data.indexed_dataset import IndexedDatasetWriter, write_manifest
from common.errors import BadInput
from recipes.t5 import samples, task


def opened(prefix, *overrides, valid=False):
    settings = [f"data.train={prefix}", "data.valid=null", *overrides]
    cfg = config.load(ROOT / "recipes/t5/configs/tiny.yaml", settings, task.Config)
    return task.dataset(cfg, cfg.data.train, not valid)


@pytest.fixture(scope="module")
def words(spans):
    return tokenizer.load(spans / "tokenizer")


def test_lengths_are_the_papers():
    """568 raw tokens give 512 and 114 (t5/data/preprocessors.py, random_spans_helper, for inputs_length 512)."""
    assert samples.raw_tokens(512, 0.15, 3.0) == 568
    assert samples.lengths_of(568, 0.15, 3.0) == (512, 114)
    assert samples.counts_of(568, 0.15, 3.0) == (85, 28)
    assert samples.lengths_of(1, 0.15, 3.0) == (2, 1) and samples.counts_of(2, 0.15, 3.0) == (1, 1)


def spliced(source, target, sentinels, eos):
    """The raw text of an input and its target."""
    order = {int(s): i for i, s in enumerate(sentinels)}
    assert source[-1] == eos and target[-1] == eos
    spans_by_sentinel, current = {}, None
    for token in target[:-1].tolist():
        if token in order:
            current = spans_by_sentinel.setdefault(token, [])
        else:
            current.append(token)
    assert list(spans_by_sentinel) == sentinels[: len(spans_by_sentinel)].tolist(), "sentinels in their order"
    raw = [part for token in source[:-1].tolist() for part in (spans_by_sentinel[token] if token in order else [token])]
    return np.array(raw), [len(span) for span in spans_by_sentinel.values()]


@pytest.mark.parametrize("pack", ["true", "false"])
def test_ten_thousand_samples_splice_back_exactly(spans, words, pack):
    dataset = opened(spans / "train", f"data.pack={pack}", "data.seq_len=128", "data.target_len=32")
    corpus, sentinels = dataset.corpora[0], words.sentinels()
    noise = raw = 0
    lengths = []
    for first in range(0, 10_000, 500):
        batch = dataset.collate(range(first, first + 500))
        _, index = dataset.indices(range(first, first + 500))
        for row, j in enumerate(index.tolist()):
            n = batch["input_lengths"][row]
            source, target = batch["inputs"][row, :n], batch["targets"][row][batch["loss_mask"][row]]
            expected = corpus.flat[j * dataset.raw : (j + 1) * dataset.raw] if pack == "true" else corpus.get(j, dataset.raw)
            if len(expected) < 2:
                continue
            text, sizes = spliced(source, target, sentinels, words.eod_id)
            assert (text == expected).all()
            assert batch["lengths"][row] == n + len(target)
            noise, raw = noise + sum(sizes), raw + len(text)
            lengths += sizes
    if pack == "true":
        assert abs(noise / raw - 0.15) <= 0.0015, "within 1 %"
        assert abs(np.mean(lengths) - 3.0) <= 0.03


def test_every_division_is_equally_likely():
    rng = np.random.Generator(np.random.Philox(key=1))
    seen = {}
    for division in map(tuple, samples.pieces(5, 3, rng.random((6000, 4))).tolist()):
        assert sum(division) == 5 and min(division) >= 1
        seen[division] = seen.get(division, 0) + 1
    assert len(seen) == 6 and all(abs(count - 1000) < 3 * (6000 * 1 / 6 * 5 / 6) ** 0.5 for count in seen.values())
    uniform = rng.random((1, 3))
    assert samples.pieces(4, 4, uniform).tolist() == [[1, 1, 1, 1]] and samples.pieces(4, 1, uniform).tolist() == [[4]]


def test_prefix_cuts_the_text_in_two(spans, words):
    dataset = opened(spans / "train", "objective.kind=prefix", "data.seq_len=40", "data.target_len=24")
    batch = dataset.collate(range(300))
    _, index = dataset.indices(range(300))
    cuts = set()
    for row, j in enumerate(index.tolist()):
        source = batch["inputs"][row, : batch["input_lengths"][row]]
        target = batch["targets"][row][batch["loss_mask"][row]]
        assert source[-1] == target[-1] == words.eod_id
        both = np.concatenate([source[:-1], target[:-1]])
        assert (both == dataset.corpora[0].flat[j * dataset.raw : (j + 1) * dataset.raw]).all()
        cuts.add(len(source))
    assert len(cuts) > 15


def pairs(prefix, words, documents):
    writer = IndexedDatasetWriter(prefix, np.uint16)
    for document in documents:
        writer.add_sentences([np.asarray(part) for part in document])
    writer.finish()
    metadata = {"tokenizer": "tokenizer", "tokenizer_hash": words.hash, "tokenizer_size": words.size, "eod_id": None}
    write_manifest(prefix, metadata)


def test_a_mixture_of_running_text_and_tasks(spans, words, tmp_path):
    (tmp_path / "pairs").mkdir()
    words.save(tmp_path / "pairs/tokenizer")
    pairs(tmp_path / "pairs/train", words, [(range(10, 20), range(30, 34)), (range(11, 90), range(40, 80))] * 4)
    blend = f"[[3, {spans}/train], [1, {tmp_path}/pairs/train]]"
    dataset = opened(blend)
    batch = dataset.collate(range(40))
    corpus, _ = dataset.indices(range(40))
    assert corpus.sum() == 10
    for row in np.flatnonzero(corpus):
        source = batch["inputs"][row, : batch["input_lengths"][row]]
        target = batch["targets"][row][batch["loss_mask"][row]]
        assert source[-1] == target[-1] == words.eod_id and source[0] in (10, 11)
        assert len(source) <= 64 and len(target) <= 16  # cut to the lengths of the config


def test_a_sample_is_a_function_of_seed_and_number(spans):
    dataset, again = opened(spans / "train"), opened(spans / "train")
    together = dataset.collate(range(40))
    apart = [again.collate([i]) for i in reversed(range(40))][::-1]
    for name, values in together.items():
        assert (values == np.concatenate([batch[name] for batch in apart])).all(), name
    other = opened(spans / "train", "train.seed=1").collate(range(40))
    assert (other["inputs"] != together["inputs"]).any()


# digests of samples 0 to 299, drawn one by one with a generator for each
GOLDEN = {
    ("span", True): "a0d2a4c143be53d9",
    ("span", False): "fde1321f2deb2d46",
    ("prefix", True): "8c6160f379211ad2",
    ("prefix", False): "e43f8691f946623a",
}


@pytest.mark.parametrize("kind, pack", GOLDEN)
def test_samples_are_those_of_earlier_versions(kind, pack, tmp_path):
    writer = IndexedDatasetWriter(tmp_path / "fixed", np.uint16)
    for d in range(90):
        writer.add((np.arange(1 + d * d % 71) * 7 + d) % 80 + 20)
    writer.finish()
    ids = {"sentinels": np.arange(19, 1, -1), "eos": 1, "pad": 0}
    settings = {"noise_density": 0.15, "mean_noise_span_length": 3.0, "pack": pack, "seed": 1, "shuffle": True}
    batch = samples.Samples(str(tmp_path / "fixed"), 50, 20, kind=kind, **ids, **settings).collate(range(300))
    digest = hashlib.sha256(b"".join(batch[name].tobytes() for name in sorted(batch))).hexdigest()[:16]
    assert digest == GOLDEN[kind, pack]


def test_corpora_and_tokenizers_that_give_no_samples(spans, sentences, words, tmp_path):
    with pytest.raises(BadInput, match="its tokenizer has no </s> or no sentinels; T5 takes a SentencePiece"):
        opened(sentences / "train")
    with pytest.raises(BadInput, match="less than one sample"):
        opened(spans / "valid", "data.seq_len=20000", "data.target_len=5000", "objective.mean_noise_span_length=100.0")
    with pytest.raises(BadInput, match="sentinels; give a smaller data.seq_len"):
        opened(spans / "train", "data.seq_len=4096", "data.target_len=1000")
    (tmp_path / "t").mkdir()
    words.save(tmp_path / "t/tokenizer")
    pairs(tmp_path / "t/train", words, [(range(10, 20), range(30, 34), range(9, 12))])
    with pytest.raises(BadInput, match="documents of several sequences, but not of two"):
        opened(tmp_path / "t/train")
