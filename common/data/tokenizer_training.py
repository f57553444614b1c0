"""Train a tokenizer on texts: byte-level BPE, WordPiece, SentencePiece's unigram model, or one id per character."""

import io
import re
from collections import Counter
from collections.abc import Iterable, Iterator

from common.data.tokenizer import (
    END_OF_TEXT,
    SENTINELS,
    SPECIAL,
    Tokenizer,
    byte_level_backend,
    unigram_backend,
    wordpiece_backend,
)
from common.errors import BadInput

ALPHABET = 1_000  # a WordPiece trained here has so many of the most frequent characters; others become [UNK]


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE of at most `vocab_size` ids: `<|endoftext|>` (id 0), the 256 bytes, then merges."""
    from tokenizers import models, pre_tokenizers, trainers

    if vocab_size < 257:
        raise BadInput(f"vocabulary of {vocab_size}: byte-level BPE needs at least 257 (256 bytes and {END_OF_TEXT})")
    backend = byte_level_backend(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return Tokenizer(backend)


def train_wordpiece(texts: Iterable[str], vocab_size: int, lowercase: bool = True) -> Tokenizer:
    """Train a WordPiece of at most `vocab_size` ids: SPECIAL, the characters, those inside words (##x), then pieces.

    Too little text gives fewer ids. BadInput for a size below what the characters alone need.
    """
    from tokenizers import Tokenizer as Backend, models, pre_tokenizers, trainers

    start = dict(zip(SPECIAL, range(len(SPECIAL)), strict=True))
    normalizer = wordpiece_backend(start, lowercase).normalizer
    normal = [normalizer.normalize_str(text) for text in texts]  # the costliest part, once for both passes
    counts: Counter[str] = Counter()
    for text in normal:
        counts.update(text)
    del counts[" "]
    characters = sorted(sorted(counts), key=lambda c: -counts[c])[:ALPHABET]

    def train(size: int, first: list[str]) -> dict[str, int]:
        backend = Backend(models.WordPiece(start, unk_token="[UNK]"))
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(
            vocab_size=size,
            min_frequency=2,
            special_tokens=first,
            initial_alphabet=characters,
            limit_alphabet=len(characters),
            show_progress=False,
        )
        backend.train_from_iterator(normal, trainer)
        return backend.get_vocab(with_added_tokens=False)

    # The library numbers the ##x in the order of a hash table, which differs per process, and the numbers break ties between
    # pairs of equal frequency. So the first pass only finds them, and the second gets them in a fixed order.
    inside = sorted(token for token in train(0, [*SPECIAL]) if token.startswith("##"))
    first = [*SPECIAL, *sorted(characters), *inside]
    if vocab_size < len(first):
        raise BadInput(
            f"vocabulary of {vocab_size}: WordPiece of this text needs at least {len(first):,} ({len(SPECIAL)} special "
            f"tokens, {len(characters):,} characters, {len(inside):,} of them inside words)"
        )
    return Tokenizer(wordpiece_backend(train(vocab_size, first), lowercase))


def train_sentencepiece(texts: Iterable[str], vocab_size: int, sentinels: int = SENTINELS) -> Tokenizer:
    """Train SentencePiece's unigram model with T5's settings, of at most `vocab_size` ids: <pad>, </s>, <unk> (0 to 2), pieces
    in descending probability, then the sentinels. It learns from lines; lines of over 2^20 bytes are left out.

    Too little text gives fewer ids. BadInput for no text, or a size below what the characters alone need.
    """
    import sentencepiece

    model, pieces = io.BytesIO(), vocab_size - sentinels
    stopped: list[BadInput] = []  # raised by the texts; the trainer turns it into a RuntimeError

    def lines() -> Iterator[str]:
        try:
            for text in texts:
                yield from (line for line in text.splitlines() if line.strip())
        except BadInput as error:
            stopped.append(error)
            raise

    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines(),
            model_writer=model,
            model_type="unigram",
            vocab_size=max(pieces, 4),  # below 4 its error is about something else than the size
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            normalization_rule_name="nmt_nfkc",
            character_coverage=0.9995,
            max_sentence_length=2**20,
            hard_vocab_limit=False,
            num_threads=16,  # fixed, because the order of sums, and so the last digits, depend on it
            minloglevel=2,
        )
    except RuntimeError as error:
        if stopped:
            raise stopped[0] from None
        needed = re.search(r"Vocabulary size is smaller than required_chars\. \d+ vs (\d+)", str(error))
        if needed:
            raise BadInput(
                f"vocabulary of {vocab_size}: SentencePiece of this text needs at least {int(needed[1]) + sentinels + 1:,} "
                f"({sentinels} sentinels, the special pieces and the characters)"
            ) from None
        if "sentences_.empty()" in str(error):
            raise BadInput("no text to train SentencePiece on; give a source with lines that are not blank") from None
        raise BadInput(
            f"SentencePiece cannot be trained on this text ({str(error).strip().splitlines()[-1]}); give more text"
        ) from None
    return Tokenizer(unigram_backend(model.getvalue(), sentinels))


def train_char(text: str) -> Tokenizer:
    """One id per character of `text`, in code point order, without special ids, as in nanoGPT's shakespeare_char (65 ids)."""
    from tokenizers import Tokenizer as Backend, decoders, models

    if not text:
        raise BadInput("no text to take characters from; give a source with text")
    vocab = {char: i for i, char in enumerate(sorted(set(text)))}
    backend = Backend(models.BPE(vocab, []))  # no merges: one id per character
    backend.decoder = decoders.Fuse()
    return Tokenizer(backend)
