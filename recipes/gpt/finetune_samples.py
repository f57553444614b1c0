"""The samples that GPT is finetuned on: texts and conversations are read, tokenized and packed into samples of seq_len.

A text file is one document. A .jsonl file of texts has one document per line, {"text": ...}. A .jsonl file of conversations has
one conversation per line, in one of three forms: {"messages": [{"role": ..., "content": ...}, ...]},
{"prompt": ..., "response": ...} for one question and its answer, or ShareGPT's
{"conversations": [{"from": "human", "value": ...}, {"from": "gpt", "value": ...}, ...]}.
This module does not import torch.
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

Chat = list[dict[str, str]]  # a conversation: messages, each with role and content
ROLES = ("system", "user", "assistant")
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}
VALID_SHARE, VALID_SEED = 0.05, 1234  # share of train that becomes the validation set if there is none, and seed of the draw
OTHER_NAMES = {"valid": ("validation", "dev")}  # names of a split that are also accepted

# For a tokenizer without a chat template. Roles are plain words, since its vocabulary has no special tokens for them.
# eos_token ends an answer.
DEFAULT_TEMPLATE = (
    "{% for message in messages %}{{ '### ' + message['role'] + '\\n' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### assistant\\n' }}{% endif %}"
)


# ---- reading ---------------------------------------------------------------------------------------------------------


class Documents(NamedTuple):
    """documents: texts or conversations. locations: file and line of each document, for messages."""

    documents: list[Any]
    locations: list[str]
    notes: list[str]


def read(kind: str, data: str, folder: Path, train: str, valid: str, for_train: bool) -> Documents:
    """Read the documents to train on, or to validate on. If there are no validation documents, a share of train replaces them.

    kind: 'lm' or 'sft'. data: task.data as written in the config. folder: its path on disk; if that does not exist, data is
    a dataset on the hub, NAME or NAME:CONFIG. train, valid: names of files (with or without their endings) or of splits.
    Raises BadInput for a missing file and for content that is not a text or a conversation.
    """
    available = _files(data, folder, kind) if folder.exists() else _hub_splits(data)
    train_name, valid_name = _find_name(available, train), _find_name(available, valid)
    if train_name is None:
        raise BadInput(
            f"task.data={data}: has no {train!r}; it has {', '.join(available) or 'nothing to read'}; give data.train"
        )
    name = train_name if for_train or valid_name is None else valid_name
    documents, locations = [], []
    for location, content in _contents(data, folder, name):
        documents.append(_conversation(content, location) if kind == "sft" else _text(content, location))
        locations.append(location)
    if not documents:
        raise BadInput(f"{folder / name}: is empty; give a file with a document or conversation")
    if valid_name is not None:
        return Documents(documents, locations, [])
    count = max(1, round(VALID_SHARE * len(documents)))
    if len(documents) <= count:
        raise BadInput(f"task.data={data}: has no {valid!r}, and one document cannot be divided; add {valid}{_ending(kind)}")
    chosen = set(np.random.default_rng(VALID_SEED).permutation(len(documents))[:count].tolist())
    keep = [i for i in range(len(documents)) if (i in chosen) != for_train]
    note = f"task.data has no {valid!r}: {count:,} of {len(documents):,} of train, drawn with seed {VALID_SEED}, take its place"
    return Documents([documents[i] for i in keep], [locations[i] for i in keep], [note])


def _ending(kind: str) -> str:
    return ".jsonl" if kind == "sft" else ".txt or .jsonl"


def _files(data: str, folder: Path, kind: str) -> list[str]:
    if not folder.is_dir():
        raise BadInput(f"task.data={data}: is a file; give its folder, and the file's name as data.train")
    return sorted(p.name for p in folder.iterdir() if p.is_file() and (kind == "lm" or p.suffix == ".jsonl"))


def _find_name(available: Sequence[str], name: str) -> str | None:
    """The available file or split with this name; None if there is none."""
    for accepted in (name, *OTHER_NAMES.get(name, ())):
        for file in (accepted, f"{accepted}.jsonl", f"{accepted}.txt"):
            if file in available:
                return file
    return None


def _hub_splits(data: str) -> list[str]:
    """Names of the splits of a dataset on the hub."""
    name, _, configuration = data.partition(":")
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise Missing(f"task.data={data}: no such folder; give one with train.jsonl, or a dataset on the hub as OWNER/NAME")
    import datasets

    try:
        return list(datasets.get_dataset_split_names(name, configuration or None))
    except Exception as error:  # no network, or no such dataset: the library raises a different class for each
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise Missing(f"task.data={data}: no such folder, and the hub did not provide it: {reason}; give a folder") from None


def _contents(data: str, folder: Path, name: str) -> Iterator[tuple[str, Any]]:
    """Yield (location, content) of each document. The content is a text or a parsed JSON object."""
    if not folder.exists():
        dataset, _, configuration = data.partition(":")
        rows = hub.load_split(f"{data} {name}", dataset, configuration or None, name)
        yield from ((f"{data} {name}, row {number}", dict(row)) for number, row in enumerate(rows))
        return
    path = folder / name
    if path.suffix == ".jsonl":
        yield from json_lines(path)
        return
    text = read_text(path).replace("\r\n", "\n").replace("\r", "\n")
    if text.strip():
        yield str(path), text


def _text(content: Any, location: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, dict) or not isinstance(content.get("text"), str):
        raise BadInput(f'{location}: has no text; a line must be an object {{"text": "..."}}')
    return content["text"]


def _conversation(line: Any, location: str) -> Chat:
    """The messages of a conversation. Raises BadInput for an unknown role, and if there is no assistant message."""
    if isinstance(line, dict) and "messages" in line:
        messages = line["messages"]
    elif isinstance(line, dict) and "conversations" in line:
        messages = _from_sharegpt(line["conversations"])
    elif isinstance(line, dict) and {"prompt", "response"} <= line.keys():
        messages = [{"role": "user", "content": line["prompt"]}, {"role": "assistant", "content": line["response"]}]
    else:
        raise BadInput(
            f"{location}: has neither `messages` nor `prompt` and `response` nor `conversations`; a line must be a conversation"
        )
    if not isinstance(messages, list) or not messages:
        raise BadInput(f"{location}: `messages` must be a list of messages, each with role and content")
    for number, message in enumerate(messages):
        role, content = (message.get(key) for key in ("role", "content")) if isinstance(message, dict) else (None, None)
        if role not in ROLES:
            raise BadInput(f"{location}: message {number} has role {role!r}; a role is one of {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise BadInput(f"{location}: message {number} ({role}) has content {json.dumps(content)[:40]}; it must be a text")
    if all(message["role"] != "assistant" for message in messages):
        raise BadInput(f"{location}: has no assistant message to learn from; add the answer, or remove the line")
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def _from_sharegpt(turns: Any) -> Any:
    """Convert ShareGPT's turns, {"from": "human", "value": ...}, to messages. _conversation refuses other values."""
    if not isinstance(turns, list) or not all(isinstance(turn, dict) and "from" in turn for turn in turns):
        return turns
    return [{"role": SHAREGPT_ROLES.get(str(turn["from"]), turn["from"]), "content": turn.get("value")} for turn in turns]


# ---- conversations as tokens -----------------------------------------------------------------------------------------


class Template:
    """Writes conversations as tokens, with the chat template of a tokenizer or DEFAULT_TEMPLATE, and marks the answers."""

    def __init__(self, tokenizer: Tokenizer, folder: str):
        from tokenizers import Tokenizer as Backend

        chat_template = tokenizer.config.get("chat_template")
        if isinstance(chat_template, list):  # several templates with names
            chat_template = next((entry["template"] for entry in chat_template if entry["name"] == "default"), None)
        self.folder, self.text = folder, chat_template or DEFAULT_TEMPLATE
        tokens = {f"{role}_token": tokenizer.config.get(f"{role}_token") for role in ("bos", "eos", "pad", "unk")}
        if tokenizer.eod_id is not None:
            tokens["eos_token"] = tokens["eos_token"] or tokenizer.backend.id_to_token(tokenizer.eod_id)
        # the template's variables bos_token, eos_token and so on
        self.variables = {name: t["content"] if isinstance(t, dict) else t for name, t in tokens.items() if t}
        if not chat_template and "eos_token" not in self.variables:
            raise BadInput(f"{folder}: its tokenizer has neither a chat template nor a token that ends a text; give another")
        self.backend = Backend.from_str(tokenizer.backend.to_str())
        self.backend.encode_special_tokens = False  # special tokens in the template's text become single ids
        self.backend.post_processor = None  # with it, the offsets of a word would not include the space before it
        added = json.loads(self.backend.to_str())["added_tokens"]
        special = sorted((token["content"] for token in added if token["special"]), key=len, reverse=True)
        self.special_pattern = re.compile("|".join(map(re.escape, special)) or r"(?!)")
        self.special_ids = {i for i in map(self.backend.token_to_id, special) if i is not None}

    def contains_special_token(self, chat: Chat) -> bool:
        """Whether the text of a message contains a special token, which the tokenizer would encode as such."""
        return any(self.special_pattern.search(message["content"]) for message in chat)

    def render(self, chat: Chat, location: str, prompt: bool = False) -> tuple[str, list[tuple[int, int]]]:
        """The text of a conversation, and the bounds of the parts between {% generation %} marks.

        prompt: end with the text that the template writes before an answer.
        """
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            rendered: Any = render_jinja_template(
                [chat], chat_template=self.text, add_generation_prompt=prompt, **self.variables,
                return_assistant_tokens_mask="endgeneration" in self.text,
            )  # fmt: skip
        except Exception as error:  # a template can raise anything: a division by zero, an unknown name, an endless macro
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise BadInput(f"{location}: the chat template of {self.folder} refuses it: {reason}") from None
        texts, bounds = rendered
        return texts[0], bounds[0] if bounds else []

    def _in_child_process(self, function: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
        """[function(item), ...] from a child process with limited time and memory. `function` runs the template."""
        import jinja2  # noqa: F401 (imported here once, so that no child process imports it)
        from transformers.utils import chat_template_utils  # noqa: F401

        try:
            return limited_process.each(function, items)
        except limited_process.Exceeded as error:
            raise BadInput(f"the chat template of {self.folder} {error} for a conversation; give another") from None

    def render_with_answers(self, chat: Chat, location: str) -> tuple[str, list[tuple[int, int]]]:
        """The text of a conversation, and the bounds of its answers in characters.

        An answer includes the token that ends it, but no white space after that. Without {% generation %} marks, an answer is
        the text that it adds to the conversation before it. For this, a template must write the beginning of a conversation
        in the same way whether or not more messages follow; others are refused.
        """
        text, bounds = self.render(chat, location)
        if bounds:
            return text, bounds
        for k, message in enumerate(chat):
            if message["role"] != "assistant":
                continue
            before, _ = self.render(chat[:k], location, prompt=True)
            after, _ = self.render(chat[: k + 1], location)
            if not (text.startswith(after) and after.startswith(before)):
                raise BadInput(
                    f"{location}: the chat template of {self.folder} rewrites earlier messages, so the answers cannot be "
                    "located in its text; give the tokenizer a chat_template with {% generation %} marks"
                )
            answer = after[len(before) :].rstrip()
            ends_with_token = any(match.end() == len(answer) for match in self.special_pattern.finditer(answer))
            bounds.append((len(before), len(before) + len(answer) if ends_with_token else len(after)))
        return text, bounds

    def prompt(self, chat: Chat, location: str) -> str:
        """The text of a conversation up to the point where the next answer begins."""
        [text] = self._in_child_process(lambda messages: self.render(messages, location, prompt=True)[0], [chat])
        return text

    def prompt_ids(self, chat: Chat, location: str) -> list[int]:
        """The token ids of `prompt`."""
        return self.backend.encode(self.prompt(chat, location), add_special_tokens=False).ids

    def end_ids(self, chat: Chat, location: str) -> set[int] | None:
        """Ids of the special tokens that end an answer: eos_token, and the last token of this conversation's answers.

        None if the conversation has no answer.
        """
        [(ids, is_target)] = self.encode([chat], [location])
        if not is_target.any():
            return None
        eos = self.backend.token_to_id(self.variables.get("eos_token", ""))
        return {i for i in (int(ids[is_target][-1]), eos) if i is not None and i in self.special_ids}

    def encode(self, chats: Sequence[Chat], locations: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        """For each conversation, its ids (n,) int32 and a mask (n,) bool of the tokens with a character of an answer."""
        rendered = self._in_child_process(
            lambda item: self.render_with_answers(*item), list(zip(chats, locations, strict=True))
        )
        encodings = encoded(self.backend.encode_batch, [text for text, _ in rendered])
        tokenized = []
        for (_, bounds), encoding in zip(rendered, encodings, strict=True):
            begin, end = np.array(encoding.offsets, np.int64).reshape(-1, 2).T
            is_target = np.zeros(len(begin), bool)
            for first, last in bounds:
                is_target |= (begin < last) & (end > first)
            is_target[:1] = False  # nothing predicts the first token
            tokenized.append((np.array(encoding.ids, np.int32), is_target))
        return tokenized


# ---- samples ---------------------------------------------------------------------------------------------------------


def best_fit(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Group documents into samples of `room` tokens. Returns the indices of the documents of each sample.

    Documents are placed longest first, each where it leaves the least room (best-fit decreasing; Ding et al.,
    arXiv:2404.10830, section 3). Each document is in exactly one sample, and the result depends only on the lengths.
    """
    samples: list[list[int]] = []
    open_: list[tuple[int, int]] = []  # (room left, index of the sample), sorted
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
    """Samples of seq_len tokens that hold concatenated documents, or windows of a text.

    ids, is_target: (N,) the tokens of all documents, and which of them are targets.
    pieces: for each sample, the bounds of its documents in `ids`.
    restart: attention and positions restart at each document.
    pad_to_seq_len: pad every sample to seq_len. Otherwise a batch is padded to its longest sample.
    """

    def __init__(self, source: examples.Source, ids: np.ndarray, is_target: np.ndarray, pieces: list[list[tuple[int, int]]],
                 seq_len: int, pad_id: int, restart: bool, pad_to_seq_len: bool, **order: Any):  # fmt: skip
        lengths = np.array([sum(end - begin for begin, end in piece) for piece in pieces])
        super().__init__(source, lengths, **order)
        self.ids, self.is_target, self.pieces = ids, is_target, pieces
        self.seq_len, self.pad_id, self.restart, self.pad_to_seq_len = seq_len, pad_id, restart, pad_to_seq_len

    def collate(self, numbers: Any) -> batches.MicroBatch:
        """As samples.Samples.collate: tokens (B, T+1), loss_mask (B, T), lengths (B,). With `restart` also segment and position
        (B, T)."""
        samples = [self.pieces[i] for i in self.indices(numbers).tolist()]
        lengths = np.array([sum(end - begin for begin, end in pieces) for pieces in samples])
        width = self.seq_len if self.pad_to_seq_len else min(self.seq_len, self.rounded(int(lengths.max()) - 1))
        shape = (len(samples), width + 1)
        tokens, is_target = np.full(shape, self.pad_id, np.int64), np.zeros(shape, bool)
        segment, position = np.zeros(shape, np.int32), np.zeros(shape, np.int64)
        for row, pieces in enumerate(samples):
            start = 0
            for number, (begin, end) in enumerate(pieces):
                columns = slice(start, start + end - begin)
                tokens[row, columns], is_target[row, columns] = self.ids[begin:end], self.is_target[begin:end]
                segment[row, columns], position[row, columns] = number, np.arange(end - begin)
                start += end - begin
            segment[row, start:], position[row, start:] = len(pieces), np.arange(width + 1 - start)  # padding
        batch = {"tokens": tokens, "loss_mask": is_target[:, 1:], "lengths": np.minimum(lengths, width)}
        return batch | {"segment": segment[:, :-1], "position": position[:, :-1]} if self.restart else batch


def windows(lengths: Sequence[int], seq_len: int, restart: bool) -> list[list[tuple[int, int]]]:
    """The pieces of each sample of concatenated documents with these lengths. Sample j is tokens [j*T, j*T + T].

    With `restart`, a sample is divided into pieces at the bounds of documents. The last sample may be shorter.
    """
    ends = np.cumsum(lengths)
    total = int(ends[-1])
    samples = []
    for begin in range(0, max(1, total - 1), seq_len):
        end = min(begin + seq_len + 1, total)
        first, last = np.searchsorted(ends, [begin, end - 1], side="right")
        cuts = ends[first:last].tolist() if restart else []
        samples.append(list(zip([begin, *cuts], [*cuts, end], strict=True)))
    return samples


def content_hash(*arrays: np.ndarray) -> str:
    """sha256 (hex) of the tokens that a run learns from and of the mask of its targets, independent of the file format."""
    return hashlib.sha256(b"".join(hashlib.sha256(np.ascontiguousarray(a)).digest() for a in arrays)).hexdigest()
