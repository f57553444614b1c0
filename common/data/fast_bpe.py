"""Byte-level BPE by gigatoken, where it is installed (pip install gigatoken): tens of times as fast as tokenizers.

Its ids must be those of tokenizers, so they are compared: on texts that are hard to split and on a part of the first batch
before anything is written, and then on one text of each batch. Texts with characters from U+30000 on are left to tokenizers,
because gigatoken 0.10 takes unassigned ones for letters. tests/test_tokenizer.py compares the characters below.
"""

import importlib
import importlib.util
import json
import re
import threading
from typing import Any

import numpy as np

from common.data.tokenizer import Tokenizer, token_dtype
from common.errors import BadInput

FIRST_CHARS = 100_000  # of the first batch, compared before anything is written
RENEWED_AFTER = 2**29  # characters: the library keeps every word that it has seen
UNPROVEN = re.compile("[\U00030000-\U0010ffff]")
HARD = [
    "", " ", "\n", "  a", " \n\n x", "a \n b", "\t\tx\r\ny  ", " " * 300, "x" * 300, "..." * 50, "<|endoftext|>",
    "a<|endoftext|>b", "don't WE'LL I'm 's 'T 'VE'll'LL o''clock", "1234567 ١٢٣ ½ Ⅷ ²³ 𝟘१", "_a_b__c @#$%^&*() a-b",
    "\x00\x01\x7f \x85\x1c\x1f x", "\ufeffabc \u00a0x\u2028y\u3000z\u200b\u200d\u00ad", "é́ a\u0301 ñ ß İı ﬁ ſ ᾷ ʰˢ ªº",
    "日本語 中文 한글", "Привет, мир! שלום ไทย", "\U0001f642\U0001f468\u200d\U0001f469 \U0001f1e9\U0001f1ea 𝔘𝔫𝔦",
    "price: $3.50, 10% (approx.) e.g. https://a.b/c?d=e&f", "\ufffd\uffff\U0001ffff",
]  # fmt: skip


def is_installed() -> bool:
    return importlib.util.find_spec("gigatoken") is not None


class Encoder:
    """`Tokenizer.encode_flat`, by gigatoken if it is installed and the tokenizer is a byte-level BPE as GPT-2's.

    name: the library that encodes. If gigatoken's ids differ before the first batch is returned, tokenizers takes its place
    after a line on the screen; if they differ later, BadInput, because earlier batches may be wrong too.
    """

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self._library: Any = None
        self._chars = 0  # since the library was loaded
        self._first = threading.Lock()
        self._is_first = True
        if is_installed() and tokenizer.is_gpt2_like:
            self._library = self._load()
            self._fall_back_unless_equal(HARD)

    @property
    def name(self) -> str:
        return "tokenizers" if self._library is None else "gigatoken"

    def encode_flat(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """As `Tokenizer.encode_flat`. Safe to call from several threads."""
        with self._first:
            if self._is_first and self._library is not None:
                most = next((n for n in range(1, len(texts)) if sum(map(len, texts[:n])) >= FIRST_CHARS), len(texts))
                self._fall_back_unless_equal(texts[:most])
            self._is_first = False
        if self._library is None or any(not text.isascii() and UNPROVEN.search(text) for text in texts):
            return self.tokenizer.encode_flat(texts)
        if texts and not self._equal([texts[len(texts) // 2]]):
            raise BadInput(
                "gigatoken gives other ids than tokenizers for a text of this corpus; uninstall it (pip uninstall gigatoken), "
                "and repeat the command with --force"
            )
        return self._encode(texts)

    def _load(self) -> Any:
        """gigatoken's tokenizer; None if it does not take this one. Without special tokens: spelled out, they are text."""
        spec = json.loads(self.tokenizer.backend.to_str()) | {"added_tokens": [], "post_processor": None}
        try:
            importlib.import_module("awkward")
            return importlib.import_module("gigatoken").Tokenizer.from_json(json.dumps(spec))
        except Exception as error:  # another interface, a model that it does not know: each raises another class
            print(f"gigatoken is not used: {(str(error).strip().splitlines() or [type(error).__name__])[0][:200]}", flush=True)
            return None

    def _encode(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        self._chars += sum(map(len, texts))
        if self._chars > RENEWED_AFTER:
            self._library, self._chars = self._load() or self._library, 0
        rows = self._library.encode_batch(texts)
        awkward = importlib.import_module("awkward")
        ids, lengths = awkward.flatten(rows).to_numpy(), awkward.num(rows).to_numpy()
        return ids.astype(token_dtype(self.tokenizer.size)), lengths.astype(np.int64)

    def _equal(self, texts: list[str]) -> bool:
        pairs = zip(self._encode(texts), self.tokenizer.encode_flat(texts), strict=True)
        return all(np.array_equal(ids, expected) for ids, expected in pairs)

    def _fall_back_unless_equal(self, texts: list[str]) -> None:
        proven = [text for text in texts if not UNPROVEN.search(text)]
        if self._library is not None and not self._equal(proven):
            print("gigatoken is not used: its ids differ from those of tokenizers", flush=True)
            self._library = None
