"""What GPT is finetuned on: texts and conversations, read, tokenized, and packed into samples of seq_len.

A text file is one document; a .jsonl file has one per line, {"text": ...}. A conversation is a line of a .jsonl file:
{"messages": [{"role": ..., "content": ...}, ...]}, {"prompt": ..., "response": ...} for one question and its answer, or
ShareGPT's {"conversations": [{"from": "human", "value": ...}, {"from": "gpt", "value": ...}, ...]}.
Torch-free.
"""

import hashlib
import json
import re
from bisect import bisect_left, insort
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from common.data import batches, examples, limited_process
from common.data.text_files import json_lines, read_text
from common.data.tokenizer import Tokenizer, encoded
from common.errors import BadInput, Missing
from common.evaluation import hub

Chat = list[dict[str, str]]  # messages, each with role and content
ROLES = ("system", "user", "assistant")
SHAREGPT = {"human": "user", "gpt": "assistant"}  # its names of roles
VALID_SHARE, VALID_SEED = 0.05, 1234  # of train's documents, where there is nothing to validate on
ALSO = {"valid": ("validation", "dev")}  # what others call it
ROUND = 8  # unpacked, a micro batch is padded to its longest sample, rounded up to a multiple of this

# For a tokenizer that brings none. Plain words, since its vocabulary has no marks of turns; eos_token ends an answer.
DEFAULT_TEMPLATE = (
    "{% for message in messages %}{{ '### ' + message['role'] + '\\n' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### assistant\\n' }}{% endif %}"
)


# ---- reading ---------------------------------------------------------------------------------------------------------


class Documents(NamedTuple):
    """documents: texts, or conversations. where: file and line of each, for messages."""

    documents: list[Any]
    where: list[str]
    notes: list[str]


def read(kind: str, data: str, place: Path, train: str, valid: str, for_train: bool) -> Documents:
    """The documents to train on, or to validate on: where there are none of these, a share of train's.

    kind: 'lm' or 'sft'. data: as the config gives it; place: where that would be on disk, else it is a dataset of the hub,
    NAME or NAME:CONFIG. train, valid: names of files (with or without their endings) or splits. BadInput for what is not
    there, or is no text or conversation.
    """
    there = _files(data, place, kind) if place.exists() else _of_hub(data)
    train_name, valid_name = _named(there, train), _named(there, valid)
    if train_name is None:
        raise BadInput(f"task.data={data}: has no {train!r}; it has {', '.join(there) or 'nothing to read'}; give data.train")
    name = train_name if for_train or valid_name is None else valid_name
    documents, where = [], []
    for at, row in _rows(data, place, name):
        documents.append(_conversation(row, at) if kind == "sft" else _text(row, at))
        where.append(at)
    if not documents:
        raise BadInput(f"{place / name}: is empty; give a file with a document or conversation")
    if valid_name is not None:
        return Documents(documents, where, [])
    count = max(1, round(VALID_SHARE * len(documents)))
    if len(documents) <= count:
        raise BadInput(f"task.data={data}: has no {valid!r}, and one document cannot be divided; add {valid}{_ending(kind)}")
    chosen = set(np.random.default_rng(VALID_SEED).permutation(len(documents))[:count].tolist())
    keep = [i for i in range(len(documents)) if (i in chosen) != for_train]
    note = f"task.data has no {valid!r}: {count:,} of {len(documents):,} of train, drawn by seed {VALID_SEED}, are it"
    return Documents([documents[i] for i in keep], [where[i] for i in keep], [note])


def _ending(kind: str) -> str:
    return ".jsonl" if kind == "sft" else ".txt or .jsonl"


def _files(data: str, place: Path, kind: str) -> list[str]:
    if not place.is_dir():
        raise BadInput(f"task.data={data}: is a file; give its folder, and the file's name as data.train")
    return sorted(p.name for p in place.iterdir() if p.is_file() and (kind == "lm" or p.suffix == ".jsonl"))


def _named(there: Sequence[str], name: str) -> str | None:
    """The file or split of this name."""
    for wanted in (name, *ALSO.get(name, ())):
        for file in (wanted, f"{wanted}.jsonl", f"{wanted}.txt"):
            if file in there:
                return file
    return None


def _of_hub(data: str) -> list[str]:
    """Splits of a dataset of the hub."""
    name, _, part = data.partition(":")
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise Missing(f"task.data={data}: no such folder; give one with train.jsonl, or a dataset of the hub as OWNER/NAME")
    import datasets

    try:
        return list(datasets.get_dataset_split_names(name, part or None))
    except Exception as error:  # no network, no such name: each has a class of its own there
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise Missing(f"task.data={data}: no such folder, and not to be had from the hub: {reason}; give a folder") from None


def _rows(data: str, place: Path, name: str) -> Iterator[tuple[str, Any]]:
    """(where, content) of each document: a text, or an object."""
    if not place.exists():
        source, _, part = data.partition(":")
        rows = hub.rows(f"{data} {name}", source, part or None, name)
        yield from ((f"{data} {name}, row {number}", dict(row)) for number, row in enumerate(rows))
        return
    path = place / name
    if path.suffix == ".jsonl":
        yield from json_lines(path)
        return
    text = read_text(path).replace("\r\n", "\n").replace("\r", "\n")
    if text.strip():
        yield str(path), text


def _text(row: Any, at: str) -> str:
    if isinstance(row, str):
        return row
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        raise BadInput(f'{at}: has no text; a line must be an object {{"text": "..."}}')
    return row["text"]


def _conversation(row: Any, at: str) -> Chat:
    """Messages whose roles are known, with an answer among them."""
    if isinstance(row, dict) and "messages" in row:
        messages = row["messages"]
    elif isinstance(row, dict) and "conversations" in row:
        messages = _of_sharegpt(row["conversations"])
    elif isinstance(row, dict) and {"prompt", "response"} <= row.keys():
        messages = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["response"]}]
    else:
        raise BadInput(
            f"{at}: has neither `messages` nor `prompt` and `response` nor `conversations`; a line must be a conversation"
        )
    if not isinstance(messages, list) or not messages:
        raise BadInput(f"{at}: `messages` must be a list of messages, each with role and content")
    for number, message in enumerate(messages):
        role, content = (message.get(key) for key in ("role", "content")) if isinstance(message, dict) else (None, None)
        if role not in ROLES:
            raise BadInput(f"{at}: message {number} has role {role!r}; a role is one of {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise BadInput(f"{at}: message {number} ({role}) has content {json.dumps(content)[:40]}; it must be a text")
    if all(message["role"] != "assistant" for message in messages):
        raise BadInput(f"{at}: has no assistant message, so nothing to learn; add the answer, or remove the line")
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def _of_sharegpt(turns: Any) -> Any:
    """ShareGPT's {"from": "human", "value": ...} as messages; what is none stays for _conversation to refuse."""
    if not isinstance(turns, list) or not all(isinstance(turn, dict) and "from" in turn for turn in turns):
        return turns
    return [{"role": SHAREGPT.get(str(turn["from"]), turn["from"]), "content": turn.get("value")} for turn in turns]


# ---- conversations as tokens -----------------------------------------------------------------------------------------


class Template:
    """How a tokenizer writes conversations, by its own chat template or DEFAULT_TEMPLATE, and which tokens are answers."""

    def __init__(self, tokenizer: Tokenizer, folder: str):
        from tokenizers import Tokenizer as Backend

        given = tokenizer.config.get("chat_template")
        if isinstance(given, list):  # several, by name
            given = next((one["template"] for one in given if one["name"] == "default"), None)
        self.folder, self.text = folder, given or DEFAULT_TEMPLATE
        roles = {f"{role}_token": tokenizer.config.get(f"{role}_token") for role in ("bos", "eos", "pad", "unk")}
        if tokenizer.eod_id is not None:
            roles["eos_token"] = roles["eos_token"] or tokenizer.backend.id_to_token(tokenizer.eod_id)
        self.marks = {role: mark["content"] if isinstance(mark, dict) else mark for role, mark in roles.items() if mark}
        if not given and "eos_token" not in self.marks:
            raise BadInput(f"{folder}: its tokenizer has neither a chat template nor a token that ends a text; give another")
        self.backend = Backend.from_str(tokenizer.backend.to_str())
        self.backend.encode_special_tokens = False  # the template's marks are tokens, not text
        self.backend.post_processor = None  # else spaces before words are left out of their bounds
        added = json.loads(self.backend.to_str())["added_tokens"]
        special = sorted((token["content"] for token in added if token["special"]), key=len, reverse=True)
        self.special = re.compile("|".join(map(re.escape, special)) or r"(?!)")
        self.special_ids = {i for i in map(self.backend.token_to_id, special) if i is not None}

    def spells_a_mark(self, chat: Chat) -> bool:
        """Would a text of the conversation be read as one of the template's marks?"""
        return any(self.special.search(message["content"]) for message in chat)

    def render(self, chat: Chat, at: str, ask: bool = False) -> tuple[str, list[tuple[int, int]]]:
        """The text, and bounds of what stands between {% generation %} marks. ask: end as an answer begins."""
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            rendered: Any = render_jinja_template(
                [chat], chat_template=self.text, add_generation_prompt=ask, **self.marks,
                return_assistant_tokens_mask="endgeneration" in self.text,
            )  # fmt: skip
        except Exception as error:  # whatever its author makes of it: 1/0, a name that is not there, an endless macro
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise BadInput(f"{at}: the chat template of {self.folder} refuses it: {reason}") from None
        texts, bounds = rendered
        return texts[0], bounds[0] if bounds else []

    def _bounded(self, work: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
        """work(item) of each, which runs the template."""
        import jinja2  # noqa: F401 (before the child, which would import it each time)
        from transformers.utils import chat_template_utils  # noqa: F401

        try:
            return limited_process.each(work, items)
        except limited_process.Exceeded as error:
            raise BadInput(f"the chat template of {self.folder} {error} for a conversation; give another") from None

    def answers(self, chat: Chat, at: str) -> tuple[str, list[tuple[int, int]]]:
        """The text, and bounds of the assistant's part in characters: each answer and what ends it, no white space behind.

        Without {% generation %} marks an answer is what it adds to the conversation before it; a template that writes a
        conversation's beginning otherwise than the beginning of a longer one is refused.
        """
        text, bounds = self.render(chat, at)
        if bounds:
            return text, bounds
        for k, message in enumerate(chat):
            if message["role"] != "assistant":
                continue
            asked, _ = self.render(chat[:k], at, ask=True)
            answered, _ = self.render(chat[: k + 1], at)
            if not (text.startswith(answered) and answered.startswith(asked)):
                raise BadInput(
                    f"{at}: the chat template of {self.folder} rewrites what it wrote of earlier messages, so its answers "
                    "cannot be told from the rest; give the tokenizer a chat_template with {% generation %} marks"
                )
            answer = answered[len(asked) :].rstrip()
            marked = any(match.end() == len(answer) for match in self.special.finditer(answer))
            bounds.append((len(asked), len(asked) + len(answer) if marked else len(answered)))
        return text, bounds

    def asks(self, chat: Chat, at: str) -> str:
        """A conversation up to where an answer begins."""
        [text] = self._bounded(lambda given: self.render(given, at, ask=True)[0], [chat])
        return text

    def ask(self, chat: Chat, at: str) -> list[int]:
        """The ids of `asks`."""
        return self.backend.encode(self.asks(chat, at), add_special_tokens=False).ids

    def ends(self, chat: Chat, at: str) -> set[int] | None:
        """Ids that end an answer: the end of text, and the mark with which the template ends those of this conversation. None
        where it has no answer."""
        [(ids, counted)] = self.encode([chat], [at])
        if not counted.any():
            return None
        end = self.backend.token_to_id(self.marks.get("eos_token", ""))
        return {i for i in (int(ids[counted][-1]), end) if i is not None and i in self.special_ids}

    def encode(self, chats: Sequence[Chat], where: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Of each conversation its ids (n,) int32, and which are the assistant's (n,) bool: those with a character of it."""
        rendered = self._bounded(lambda item: self.answers(*item), list(zip(chats, where, strict=True)))
        encodings = encoded(self.backend.encode_batch, [text for text, _ in rendered])
        tokenized = []
        for (_, bounds), encoding in zip(rendered, encodings, strict=True):
            begin, end = np.array(encoding.offsets, np.int64).reshape(-1, 2).T
            counted = np.zeros(len(begin), bool)
            for first, last in bounds:
                counted |= (begin < last) & (end > first)
            counted[:1] = False  # nothing predicts the first
            tokenized.append((np.array(encoding.ids, np.int32), counted))
        return tokenized


# ---- samples ---------------------------------------------------------------------------------------------------------


def best_fit(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Which documents share a sample of `room` tokens: the longest first, each where it leaves the least room (best-fit
    decreasing; Ding et al., arXiv:2404.10830, section 3). The same for the same lengths; every document in one sample."""
    samples: list[list[int]] = []
    open_: list[tuple[int, int]] = []  # (room left, sample), sorted
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        at = bisect_left(open_, (lengths[i], -1))
        if at == len(open_):
            left, sample = room, len(samples)
            samples.append([])
        else:
            left, sample = open_.pop(at)
        samples[sample].append(i)
        if left > lengths[i]:
            insort(open_, (left - lengths[i], sample))
    return samples


class Packed(examples.Examples):
    """Documents, or windows of a text, laid end to end in samples of seq_len.

    ids, counted: of all documents, (N,): tokens, and which of them are targets. pieces: of each sample the bounds in there
    of its documents. within: attention and positions restart at each document. whole: pad every sample to seq_len, else a batch
    to its longest.
    """

    def __init__(self, source: examples.Source, ids: np.ndarray, counted: np.ndarray, pieces: list[list[tuple[int, int]]],
                 seq_len: int, pad_id: int, within: bool, whole: bool, **order: Any):  # fmt: skip
        lengths = np.array([sum(end - begin for begin, end in piece) for piece in pieces])
        super().__init__(source, lengths, **order)
        self.ids, self.counted, self.pieces = ids, counted, pieces
        self.seq_len, self.pad_id, self.within, self.whole = seq_len, pad_id, within, whole

    def collate(self, numbers: Any) -> batches.MicroBatch:
        """tokens (B, T+1) int64: input is [:, :-1], target [:, 1:]; loss_mask (B, T) bool: target t counts; lengths (B,)
        int64: inputs that are no padding; where `within`, segment (B, T) int32: number in the row of the document that input
        t is of, and position (B, T) int64: its place in that document."""
        rows = [self.pieces[i] for i in self.indices(numbers).tolist()]
        lengths = np.array([sum(end - begin for begin, end in row) for row in rows])
        longest = -(-(int(lengths.max()) - 1) // ROUND) * ROUND
        width = self.seq_len if self.whole else min(self.seq_len, longest)
        tokens = np.full((len(rows), width + 1), self.pad_id, np.int64)
        counted = np.zeros((len(rows), width + 1), bool)
        segment, position = np.zeros((len(rows), width + 1), np.int32), np.zeros((len(rows), width + 1), np.int64)
        for row, bounds in enumerate(rows):
            at = 0
            for number, (begin, end) in enumerate(bounds):
                here = slice(at, at + end - begin)
                tokens[row, here], counted[row, here] = self.ids[begin:end], self.counted[begin:end]
                segment[row, here], position[row, here] = number, np.arange(end - begin)
                at += end - begin
            segment[row, at:], position[row, at:] = len(bounds), np.arange(width + 1 - at)  # padding
        batch = {"tokens": tokens, "loss_mask": counted[:, 1:], "lengths": np.minimum(lengths, width)}
        return batch | {"segment": segment[:, :-1], "position": position[:, :-1]} if self.within else batch


def windows(lengths: Sequence[int], seq_len: int, within: bool) -> list[list[tuple[int, int]]]:
    """Samples of documents laid end to end: sample j is tokens [j T, j T + T], cut at the documents' bounds where `within`.
    The last one may be short."""
    ends = np.cumsum(lengths)
    total = int(ends[-1])
    samples = []
    for begin in range(0, max(1, total - 1), seq_len):
        end = min(begin + seq_len + 1, total)
        first, last = np.searchsorted(ends, [begin, end - 1], side="right")
        cuts = ends[first:last].tolist() if within else []
        samples.append(list(zip([begin, *cuts], [*cuts, end], strict=True)))
    return samples


def content_hash(*arrays: np.ndarray) -> str:
    """sha256 (hex) of what a run learns from: tokens and which count, however they were written."""
    return hashlib.sha256(b"".join(hashlib.sha256(np.ascontiguousarray(a)).digest() for a in arrays)).hexdigest()
