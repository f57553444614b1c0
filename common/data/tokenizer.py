"""One class, `Tokenizer`, for byte-level BPE, WordPiece (BERT), SentencePiece's unigram model (T5) and characters; `load` reads
one from a folder or by name.

Text is data here: a special token spelled out in a text (`<|endoftext|>` in a web page) is encoded as the ordinary characters
that it consists of, never as the special id. A caller that needs an end of document appends `eod_id`.
"""

import contextlib
import hashlib
import importlib
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from common.data.text_files import read_text
from common.errors import BadInput
from common.launch import heartbeat

if TYPE_CHECKING:  # functions import the library when they need it, so that checking a config does not wait for it
    import tokenizers

END_OF_TEXT = "<|endoftext|>"
GPT2_SIZE = 50_257
GPT2_EOD = 50_256
TOKENIZERS = Path(__file__).resolve().parents[2] / "corpora" / "tokenizers"  # searched first for a name
HUB_NAMES = {
    "gpt2": "openai-community/gpt2",
    "bert-base-uncased": "google-bert/bert-base-uncased",
    "t5": "google-t5/t5-base",
}
BERT_SIZE = 30_522
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")  # of WordPiece; ids 0 to 4 if it is trained here
T5_SIZE = 32_100
SENTINELS = 100  # T5's <extra_id_0> ..., which stand for masked spans; <extra_id_0> has the highest id
_SENTINEL = re.compile(r"<extra_id_(\d+)>")

# A cut point inside no pre-token: GPT-2's regex `'s|...| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+` has no
# alternative in which whitespace follows something else, and none that looks behind. On these character classes Python's and
# the tokenizer's Unicode tables cannot disagree.
_CUT = re.compile(r"[\w!-~](?=[ \n])")

# The same for SentencePiece, where a space begins a word and no piece spans two words. Its normalizer rewrites clusters of
# characters; none crosses the bounds of these three characters, which it leaves unchanged.
_CUT_UNIGRAM = re.compile(r"[!-~](?= [!-~])")
# As transformers converts T5's model: trailing blanks are stripped, runs of blanks become one, each blank begins a word.
_UNIGRAM_STEPS = [
    {"type": "Strip", "strip_left": False, "strip_right": True},
    {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": "\u2581"},
]
_METASPACE = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": True}


def token_dtype(size: int) -> type[np.uint16] | type[np.int32]:
    """The type in which ids are stored, by Megatron's rule: 2 bytes if `size` (number of ids) < 65,500, else 4."""
    return np.uint16 if size < 65_500 else np.int32


def encoded(encode_batch: Callable[..., list[Any]], texts: list[str]) -> list[Any]:
    """The Rust library's encodings of texts, without special tokens. BadInput for a text with half of a surrogate pair, which
    JSON can spell (\\ud83d alone) and UTF-8 cannot."""
    encodings: list[Any] = []
    try:
        for first in range(0, len(texts), 4096):  # a corpus of long texts takes minutes
            heartbeat.beat("tokenization")
            encodings += encode_batch(texts[first : first + 4096], add_special_tokens=False)
        return encodings
    except TypeError:
        half = next((text for text in texts if any("\ud800" <= c <= "\udfff" for c in text)), None)
        if half is None:
            raise
        raise BadInput(f"{ascii(half[:60])}: contains half of a surrogate pair; correct the text") from None
    except Exception as error:  # a bare Exception from Rust: a vocabulary without its own unknown token
        raise BadInput(f"the tokenizer cannot encode a text: {_reason(error)}; get its files again") from None


def _reason(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


@contextlib.contextmanager
def refusing(what: str) -> Iterator[None]:
    """BadInput, with `what`, for whatever the Rust library raises for damaged files: bare Exceptions, and panics, which are not
    subclasses of Exception and which it also writes to stderr."""
    sys.stderr.flush()
    stderr, devnull = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 2)
    try:
        yield
    except BadInput:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise BadInput(f"{what}: {_reason(error)}; get it again") from None
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(devnull)


class Tokenizer:
    """One tokenizer, from `load` or a function of common/data/tokenizer_training.py.

    size: number of ids. eod_id: ends a document (None for WordPiece; </s> for T5). pad_id: padding. cls_id, sep_id: the begin
    and the end of a sentence. mask_id: a masked token. Each is None if the tokenizer has no such token.
    kind: 'bpe', 'wordpiece', 'unigram' (T5's SentencePiece), 'char', or the model's name in lower case.
    """

    def __init__(self, backend: "tokenizers.Tokenizer", config: dict[str, Any] | None = None):
        """config: content of tokenizer_config.json, if there is one."""
        self.backend = backend
        self.config = dict(config or {})
        backend.encode_special_tokens = True  # special tokens spelled out in a text are text
        backend.no_truncation()
        backend.no_padding()
        self.size: int = 1 + max(backend.get_vocab().values(), default=-1)  # ids may have gaps
        self.kind: str = type(backend.model).__name__.lower()
        eod = {"wordpiece": None, "unigram": "</s>"}.get(self.kind, END_OF_TEXT)
        pad = {"wordpiece": "[PAD]", "unigram": "<pad>"}.get(self.kind)
        self.eod_id = None if self.kind == "wordpiece" else self._id_of("eos_token", eod)
        self.pad_id = self._id_of("pad_token", pad)
        self.cls_id = self._id_of("cls_token", "[CLS]")
        self.sep_id = self._id_of("sep_token", "[SEP]")
        self.mask_id = self._id_of("mask_token", "[MASK]")
        if self.kind == "bpe" and backend.pre_tokenizer is None and not self._spec["model"]["merges"]:
            self.kind = "char"

    def _id_of(self, role: str, default: str | None) -> int | None:
        token = self.config.get(role) or default
        token = token["content"] if isinstance(token, dict) else token
        return None if token is None else self.backend.token_to_id(token)

    @cached_property
    def unk_id(self) -> int | None:
        """The id for what the vocabulary cannot encode; None if it can encode everything."""
        model = self._spec["model"]
        if self.kind == "unigram":
            return model["unk_id"]
        unk_id = self.backend.token_to_id(model.get("unk_token") or "")
        return None if unk_id == self.eod_id else unk_id  # copies of GPT-2 name one, though its bytes encode everything

    def continues(self) -> np.ndarray:
        """Which ids continue a word (WordPiece's ##ing): (size,) bool."""
        out = np.zeros(self.size, dtype=bool)
        prefix = self._spec["model"].get("continuing_subword_prefix")
        if prefix:
            out[[i for token, i in self.backend.get_vocab().items() if token.startswith(prefix)]] = True
        return out

    def sentinels(self) -> np.ndarray:
        """Ids that stand for masked spans, in the order of use (T5's <extra_id_0> first): int32, empty if there are none."""
        numbered = [(int(match[1]), i) for token, i in self._added.items() if (match := _SENTINEL.fullmatch(token))]
        return np.array([i for _, i in sorted(numbered)], dtype=np.int32)

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without special tokens. BadInput for a character that a character tokenizer does not know."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text, without special tokens; the texts are distributed over the processor's cores."""
        if self.kind == "char":
            return [self._encode_chars(text).tolist() for text in texts]
        return [encoding.ids for encoding in encoded(self._encoder.encode_batch_fast, texts)]

    def encode_with_offsets(self, texts: list[str]) -> list[tuple[list[int], list[tuple[int, int]]]]:
        """Per text its ids, without special tokens, and the bounds of each id in the text, in characters."""
        return [(encoding.ids, encoding.offsets) for encoding in encoded(self._encoder.encode_batch, texts)]

    def encode_flat(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids of all texts end to end, in the type in which they are stored, and the number of ids per text (int64)."""
        dtype = token_dtype(self.size)
        if self.kind == "char":
            arrays = [self._encode_chars(text) for text in texts]
            lengths = np.array([len(array) for array in arrays], dtype=np.int64)
            return np.concatenate([*arrays, np.empty(0, np.int32)]).astype(dtype), lengths
        encodings = encoded(self._encoder.encode_batch_fast, texts)
        lengths = np.fromiter((len(encoding) for encoding in encodings), np.int64, len(encodings))
        ids = chain.from_iterable(encoding.ids for encoding in encodings)
        return np.fromiter(ids, dtype, int(lengths.sum())), lengths

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, with special tokens spelled out."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=False)

    def pieces(self, text: str, size: int) -> Iterator[str]:
        """The text cut into pieces of about `size` characters whose ids, end to end, are the ids of the whole text.

        One long text occupies one core; its pieces occupy all. The text stays whole if no safe cut is known for the tokenizer.
        """
        start = 0
        cut = _CUT_UNIGRAM if self.kind == "unigram" else _CUT
        while self._can_cut and len(text) - start > 1.5 * size:
            match = cut.search(text, start + size)
            if match is None:
                break
            yield text[start : match.end()]
            start = match.end()
        yield text[start:]

    @cached_property
    def _spec(self) -> dict[str, Any]:
        return json.loads(self.backend.to_str())

    @cached_property
    def _added(self) -> dict[str, int]:
        """The added tokens, which are not pieces of text, and their ids."""
        return {token["content"]: token["id"] for token in self._spec["added_tokens"]}

    @cached_property
    def _encoder(self) -> "tokenizers.Tokenizer":
        """The backend, or for a unigram model a copy that cannot find the special tokens in a text.

        In a unigram model special tokens are pieces with the best score. A space before a piece hides it, because the model
        never sees a space: its words have \u2581 instead. Ids are positions in the list, so they stay the same.
        """
        if self.kind != "unigram":
            return self.backend
        from tokenizers import Tokenizer as Backend, models

        model = self._spec["model"]
        vocab = [(" " + piece if piece in self._added else piece, score) for piece, score in _scores(model)]
        encoder = Backend(models.Unigram(vocab, unk_id=model["unk_id"], byte_fallback=model["byte_fallback"]))
        encoder.normalizer, encoder.pre_tokenizer = self.backend.normalizer, self.backend.pre_tokenizer
        return encoder

    @cached_property
    def _can_cut(self) -> bool:
        if self.kind == "char":
            return True
        if self.kind == "unigram":
            steps = (self._spec["normalizer"] or {}).get("normalizers", [])
            is_unigram = steps[-2:] == _UNIGRAM_STEPS and [step["type"] for step in steps[:-2]] in ([], ["Precompiled"])
            return is_unigram and self._spec["pre_tokenizer"] == _METASPACE
        return self.is_gpt2_like

    @cached_property
    def is_gpt2_like(self) -> bool:
        """Is it a byte-level BPE that splits texts by GPT-2's regex, without a normalizer?"""
        before = self._spec["pre_tokenizer"] or {}
        after = self._spec["post_processor"] or {"type": "ByteLevel"}
        return (
            self.kind == "bpe"
            and self._spec["normalizer"] is None
            and before.get("type") == "ByteLevel"
            and before.get("use_regex", True)
            and after.get("type") == "ByteLevel"
        )

    @cached_property
    def _id_of_character(self) -> np.ndarray:
        """Code point -> id, or -1 if unknown; the last entry stands for every code point beyond the table."""
        vocab = {ord(char): i for char, i in self.backend.get_vocab().items() if len(char) == 1}
        table = np.full(max(vocab) + 2, -1, dtype=np.int32)
        table[list(vocab)] = list(vocab.values())
        return table

    def _encode_chars(self, text: str) -> np.ndarray:
        points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
        table = self._id_of_character
        ids = table[np.minimum(points, len(table) - 1)]
        if len(ids) and ids.min() < 0:
            unknown = text[int(ids.argmin())]
            raise BadInput(
                f"character {unknown!r} is not among the {self.size} of the tokenizer; "
                "remove it from the text, or build the corpus, and with it the tokenizer, from text that has it"
            )
        return ids

    @cached_property
    def hash(self) -> str:
        """sha256 (hex) of what determines the ids: equal for copies of one tokenizer, whatever files they come from."""
        spec = {key: self._spec[key] for key in ("model", "normalizer", "pre_tokenizer", "post_processor")}
        if (spec["post_processor"] or {}).get("type") == "ByteLevel" or self.kind in ("wordpiece", "unigram"):
            spec["post_processor"] = None  # moves offsets, or adds [CLS], [SEP] or </s>, which is never requested here
        spec["pre_tokenizer"] = {k: v for k, v in (spec["pre_tokenizer"] or {}).items() if k != "trim_offsets"}
        spec["model"] = {key: value or None for key, value in spec["model"].items()}  # "" and null are the same affix
        if self.kind == "unigram":
            spec["model"]["vocab"] = _scores(spec["model"])
        spec["added"] = [(token["id"], token["content"]) for token in self._spec["added_tokens"]]
        spec["eod"] = self.eod_id
        canonical = json.dumps(spec, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        return hashlib.sha256(canonical.encode()).hexdigest()

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json and tokenizer_config.json, which `transformers.AutoTokenizer` loads."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False} | self.config
        roles = {"eos_token": self.eod_id}
        if self.kind == "wordpiece":
            roles = {"pad_token": self.pad_id, "cls_token": self.cls_id, "sep_token": self.sep_id, "mask_token": self.mask_id}
            config.setdefault("unk_token", self._spec["model"]["unk_token"])
            config.setdefault("model_input_names", ["input_ids", "token_type_ids", "attention_mask"])
            config.setdefault("do_lower_case", (self._spec["normalizer"] or {}).get("lowercase", False))
        if self.kind == "unigram":
            roles["pad_token"] = self.pad_id
            sentinels = [self.backend.id_to_token(i) for i in self.sentinels().tolist()]
            if sentinels:  # transformers' T5 tokenizer adds the sentinels that are not listed
                config.setdefault("extra_ids", len(sentinels))
                config.setdefault("additional_special_tokens", sentinels)
            if self._spec["model"]["unk_id"] is not None:
                config.setdefault("unk_token", self.backend.id_to_token(self._spec["model"]["unk_id"]))
        for role, i in roles.items():
            if i is not None:
                config.setdefault(role, self.backend.id_to_token(i))
        (folder / "tokenizer.json").write_text(self.backend.to_str(), encoding="utf-8")
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _scores(model: dict[str, Any]) -> list[tuple[str, float]]:
    """Pieces of a unigram model and their scores, in float32 as in SentencePiece. The last digits in a tokenizer.json depend on
    how often it was read and written, and they would decide between segmentations of equal score."""
    return [(piece, float(np.float32(score))) for piece, score in model["vocab"]]


FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json", "added_tokens.json",
         "vocab.json", "merges.txt", "vocab.txt", "spiece.model", "generation_config.json")  # fmt: skip


def copy_files(folder: Path, to: Path) -> None:
    """Copy the tokenizer's files of a folder unchanged, those that exist."""
    for name in FILES:
        if (folder / name).is_file():
            to.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / name, to / name)


def load(name_or_dir: str | Path) -> Tokenizer:
    """The tokenizer in a folder (tokenizer.json, GPT-2's vocab.json + merges.txt, BERT's vocab.txt or T5's spiece.model), or
    the one with a name (`gpt2`, `bert-base-uncased`, `t5`).

    A name is looked up in corpora/tokenizers/NAME, then on the Hugging Face hub. BadInput if there is no such tokenizer.
    """
    folder = Path(name_or_dir)
    if not folder.is_dir():
        folder = _find_by_name(str(name_or_dir))
    with refusing(f"{folder}: its tokenizer cannot be read"):
        tokenizer = _read(folder)
        if tokenizer.kind != "char":
            tokenizer.encode("a b\n")
        assert tokenizer.hash and tokenizer.size  # a fault shows here, not in the middle of a text
    if str(name_or_dir) == "gpt2":
        _check_gpt2(tokenizer, folder)
    if str(name_or_dir) == "bert-base-uncased":
        _check_bert(tokenizer, folder)
    if str(name_or_dir) == "t5":
        _check_t5(tokenizer, folder)
    return tokenizer


def _read(folder: Path) -> Tokenizer:
    if (folder / "tokenizer.json").is_file():
        tokenizer = _from_json(folder)
    elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        tokenizer = _from_gpt2_files(folder)
    elif (folder / "vocab.txt").is_file():
        tokenizer = _from_vocab_txt(folder)
    elif (folder / "spiece.model").is_file():
        tokenizer = _from_spiece(folder)
    else:
        raise BadInput(
            f"{folder}: no tokenizer there; give a folder with tokenizer.json, "
            "with GPT-2's vocab.json and merges.txt, with BERT's vocab.txt, or with T5's spiece.model"
        )
    return tokenizer


def _find_by_name(name: str) -> Path:
    local = TOKENIZERS / name
    if local.is_dir():
        return local
    if name == "char":
        raise BadInput(
            "tokenizer char: its characters are those of one text, so it does not exist by itself; "
            "build a corpus with it (python -m data.tinyshakespeare OUT) and give OUT/tokenizer"
        )
    if name.count("/") > 1 or name.startswith((".", "/", "~")):
        raise BadInput(f"tokenizer {name}: no such folder; give a folder with tokenizer.json, or a name such as gpt2")
    import huggingface_hub

    try:
        wanted = ["tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "vocab.txt", "spiece.model"]
        return Path(huggingface_hub.snapshot_download(HUB_NAMES.get(name, name), allow_patterns=wanted))
    except Exception as error:  # no network, no such name, no access: each raises another class
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise BadInput(
            f"tokenizer {name}: no such folder, and not found in corpora/tokenizers or on the hub ({reason}); put its "
            "tokenizer.json (or vocab.json and merges.txt, or vocab.txt, or spiece.model) "
            f"into corpora/tokenizers/{name} or give their folder"
        ) from None


def _config(folder: Path) -> dict[str, Any]:
    """Content of tokenizer_config.json ({} if there is none), and the chat template, which transformers 5 keeps in a file."""
    path, template = folder / "tokenizer_config.json", folder / "chat_template.jinja"
    config = _object(path) if path.is_file() else {}
    if template.is_file():
        config["chat_template"] = read_text(template)
    for key, value in config.items():
        text = value.get("content") if isinstance(value, dict) else value
        if key in ROLES and value is not None and not (isinstance(text, str) and text.isascii() | text.isprintable()):
            raise BadInput(f"{path}: {key} is {json.dumps(value)[:60]}; it must be a token; get the file again")
    stored = config.get("chat_template")
    named = stored if isinstance(stored, list) else [{"name": "default", "template": stored or ""}]
    if not all(isinstance(one, dict) and isinstance(one.get("template"), str) and "name" in one for one in named):
        raise BadInput(f"{path}: its chat_template must be a string or a list of names and templates; get the file again")
    return config


ROLES = ("bos_token", "eos_token", "unk_token", "pad_token", "cls_token", "sep_token", "mask_token")


def _object(path: Path) -> dict[str, Any]:
    """The object in a JSON file. BadInput if it holds something else."""
    try:
        values = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path}: cannot be read: {_reason(error)}; get it again") from None
    if not isinstance(values, dict):
        raise BadInput(f"{path}: cannot be read: it holds {type(values).__name__}, not an object; get it again")
    return values


def check_ids(folder: Path) -> None:
    """BadInput for invalid ids in a tokenizer.json, and for ids so far apart that the library would take hours from one to the
    next."""
    values = _object(folder / "tokenizer.json")
    vocab, added = (values.get("model") or {}).get("vocab") or {}, values.get("added_tokens") or []
    ids = [*(vocab.values() if isinstance(vocab, dict) else range(len(vocab))), *(token["id"] for token in added)]
    bad = next((i for i in ids if not isinstance(i, int) or not 0 <= i < 4 * len(ids) + 65_536), None)
    if bad is not None:
        raise BadInput(f"{folder}: tokenizer.json cannot be read: it has an id {bad!r} among {len(ids):,} tokens; get it again")


def _from_json(folder: Path) -> Tokenizer:
    from tokenizers import Tokenizer as Backend

    check_ids(folder)
    return Tokenizer(Backend.from_file(str(folder / "tokenizer.json")), _config(folder))


def _from_vocab_txt(folder: Path) -> Tokenizer:
    """BERT's vocab.txt: one piece per line; its id is the line's number."""
    lines, config = read_text(folder / "vocab.txt").removesuffix("\n").split("\n"), _config(folder)
    tokens = [line.removesuffix("\r") for line in lines]
    vocab = {token: i for i, token in enumerate(tokens)}
    missing = [token for token in SPECIAL if token not in vocab]
    if missing or "" in vocab or len(vocab) < len(tokens):
        raise BadInput(
            f"{folder / 'vocab.txt'}: {len(tokens):,} lines, {len(tokens) - len(vocab):,} of them repeated, "
            f"{tokens.count('')} empty, without {', '.join(missing) or 'none'} of {' '.join(SPECIAL)}; "
            "each line must be a different piece: get the file again, or give the tokenizer.json"
        )
    cased = any(token != token.lower() for token in tokens if not re.fullmatch(r"\[.*\]", token))
    return Tokenizer(wordpiece_backend(vocab, bool(config.get("do_lower_case", not cased))), config)


def _from_gpt2_files(folder: Path) -> Tokenizer:
    from tokenizers.models import BPE

    try:
        model = BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    except Exception as error:
        raise BadInput(f"{folder}: vocab.json and merges.txt cannot be read: {_reason(error)}; get them again") from None
    backend = byte_level_backend(model)
    backend.add_special_tokens([END_OF_TEXT])
    tokenizer = Tokenizer(backend)
    _check_gpt2(tokenizer, folder)
    return tokenizer


def _check_gpt2(tokenizer: Tokenizer, folder: Path) -> None:
    if (tokenizer.size, tokenizer.eod_id) != (GPT2_SIZE, GPT2_EOD):
        raise BadInput(
            f"{folder}: {tokenizer.size:,} ids with {END_OF_TEXT} = {tokenizer.eod_id}; GPT-2 has {GPT2_SIZE:,} with "
            f"{GPT2_EOD}; the files are damaged or of another tokenizer (then give its tokenizer.json)"
        )


def _check_bert(tokenizer: Tokenizer, folder: Path) -> None:
    if (tokenizer.size, tokenizer.kind) != (BERT_SIZE, "wordpiece"):
        raise BadInput(
            f"{folder}: {tokenizer.kind} of {tokenizer.size:,} ids; bert-base-uncased is wordpiece of {BERT_SIZE:,}; "
            "the files are damaged or of another tokenizer (then give their folder)"
        )


def _check_t5(tokenizer: Tokenizer, folder: Path) -> None:
    if (tokenizer.size, tokenizer.kind, tokenizer.eod_id) != (T5_SIZE, "unigram", 1):
        raise BadInput(
            f"{folder}: {tokenizer.kind} of {tokenizer.size:,} ids with </s> = {tokenizer.eod_id}; t5 is unigram of "
            f"{T5_SIZE:,} with 1; the files are damaged or of another tokenizer (then give their folder)"
        )


def _from_spiece(folder: Path) -> Tokenizer:
    path = folder / "spiece.model"
    try:
        model, config = path.read_bytes(), _config(folder)
        sentinels = config.get("extra_ids", SENTINELS)
        if not isinstance(sentinels, int) or not 0 <= sentinels <= 10_000:
            raise ValueError(f"extra_ids is {sentinels!r}")
        return Tokenizer(unigram_backend(model, sentinels), config)
    except BadInput:
        raise
    except Exception as error:  # protobuf and tokenizers raise classes without a common base
        raise BadInput(
            f"{path}: cannot be read as a SentencePiece unigram model with T5's special pieces ({_reason(error)}); "
            "get the file again, or give the tokenizer.json"
        ) from None


def unigram_backend(model: bytes, sentinels: int) -> "tokenizers.Tokenizer":
    """T5's tokenizer from the file of a SentencePiece unigram model, as transformers' T5Converter builds it.

    The sentinels follow the model's pieces, the first of them last. ValueError if the model is of another type.
    """
    from tokenizers import AddedToken, Regex, Tokenizer as Backend, decoders, models, normalizers, pre_tokenizers, processors

    # generated at import, so type checkers do not see its classes; needs protobuf, which tensorboard brings
    messages = importlib.import_module("sentencepiece.sentencepiece_model_pb2")
    proto = messages.ModelProto.FromString(model)
    names = [piece.piece for piece in proto.pieces]
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    missing = [token for token in ("<pad>", "</s>", "<unk>") if token not in names]
    if missing or trainer.model_type != trainer.UNIGRAM:
        fault = f"without {', '.join(missing)}"
        if not missing:
            fault = f"of type {trainer.model_type}, unigram is {trainer.UNIGRAM}"
        raise ValueError(f"{len(names):,} pieces, {fault}")
    extra = [f"<extra_id_{i}>" for i in reversed(range(sentinels))]
    vocab = [(piece.piece, piece.score) for piece in proto.pieces] + [(token, 0.0) for token in extra]
    backend = Backend(models.Unigram(vocab, unk_id=trainer.unk_id, byte_fallback=trainer.byte_fallback))
    steps: list[normalizers.Normalizer] = [
        normalizers.Strip(left=False, right=True),
        normalizers.Replace(Regex(" {2,}"), "\u2581"),
    ]
    if normalizer.precompiled_charsmap:
        steps.insert(0, normalizers.Precompiled(normalizer.precompiled_charsmap))
    backend.normalizer = normalizers.Sequence(steps)
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="\u2581", prepend_scheme="always")
    backend.decoder = decoders.Metaspace(replacement="\u2581", prepend_scheme="always")
    if trainer.byte_fallback:
        backend.decoder = decoders.Sequence([decoders.ByteFallback(), backend.decoder])
    end = ("</s>", names.index("</s>"))
    backend.post_processor = processors.TemplateProcessing(
        single=["$A", "</s>"], pair=["$A", "</s>", "$B", "</s>"], special_tokens=[end]
    )
    control = [piece.piece for piece in proto.pieces if piece.type in (piece.CONTROL, piece.UNKNOWN)]
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in [*control, *extra]])
    return backend


def byte_level_backend(model: Any) -> "tokenizers.Tokenizer":
    """GPT-2's tokenizer around a BPE model: its splitting regex, bytes as letters, no space added before a text."""
    from tokenizers import Tokenizer as Backend, decoders, pre_tokenizers, processors

    backend = Backend(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def wordpiece_backend(vocab: dict[str, int], lowercase: bool) -> "tokenizers.Tokenizer":
    """BERT's tokenizer around a WordPiece vocabulary that contains SPECIAL."""
    from tokenizers import Tokenizer as Backend, decoders, models, normalizers, pre_tokenizers, processors

    backend = Backend(models.WordPiece(vocab, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    backend.post_processor = processors.BertProcessing(("[SEP]", vocab["[SEP]"]), ("[CLS]", vocab["[CLS]"]))
    backend.add_special_tokens(sorted(SPECIAL, key=vocab.__getitem__))
    return backend
