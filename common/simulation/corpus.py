"""A synthetic corpus, with a tokenizer that has BERT's special tokens and T5's."""

from pathlib import Path

import numpy as np

from common.data import tokenizer as tokenizers
from common.data.indexed_dataset import IndexedDatasetWriter, write_manifest

SPECIAL = ("<pad>", "</s>", "<unk>", "[CLS]", "[SEP]", "[MASK]")
SENTENCES = 40  # of a document
SMALLEST = 512  # ids; used where the config leaves the size to the tokenizer


def write(folder: Path, vocabulary: int, sample_tokens: int, sentences: bool) -> Path:
    """Write corpus and tokenizer of `vocabulary` ids; returns the prefix for data.train. A few samples are enough: a dataset
    goes through them again and again.

    sentences: with their bounds, which BERT needs and T5 refuses.
    """
    prefix = folder / "train"
    hash_of_tokenizer, words = _write_tokenizer(folder / "tokenizer", vocabulary)
    rng = np.random.default_rng(0)
    writer = IndexedDatasetWriter(prefix, tokenizers.token_dtype(vocabulary))
    while writer.tokens < max(50_000, 20 * sample_tokens):
        lengths = rng.integers(8, 40, SENTENCES)
        document = [len(SPECIAL) + rng.integers(0, words, n) for n in lengths]
        if sentences:
            writer.add_sentences(document)
        else:
            writer.add(np.concatenate(document))
    writer.finish()
    write_manifest(prefix, {"tokenizer": "tokenizer", "tokenizer_hash": hash_of_tokenizer, "tokenizer_size": vocabulary})
    return prefix


def _write_tokenizer(folder: Path, vocabulary: int) -> tuple[str, int]:
    """Returns its hash, and how many of its ids are words."""
    from tokenizers import Tokenizer, models

    sentinels = [f"<extra_id_{i}>" for i in reversed(range(tokenizers.SENTINELS))]
    words = vocabulary - len(SPECIAL) - len(sentinels)
    pieces = [*SPECIAL, *(f"\u2581w{i}" for i in range(words)), *sentinels]
    backend = Tokenizer(models.Unigram([(piece, 0.0) for piece in pieces], unk_id=2))
    backend.add_special_tokens([*SPECIAL, *sentinels])
    tokenizers.Tokenizer(backend).save(folder)
    return tokenizers.load(folder).hash, words
