"""Language modelling by the published protocols: which tokens are scored in which window, and what the sum is divided by.

Perplexities of one model under two protocols differ more than two models do. Each protocol has a name, which a result states:

megatron-wikitext    Megatron-LM's (arXiv:1909.08053, section 5.3 and appendix E; tasks/zeroshot_gpt, deleted since): the
                     word-level file, detokenized, in overlapping windows that move by 32 tokens, the sum divided by the
                     number of words and not of tokens: exp(loss x (T - 1) / (T_o - 1)). T_o = 245,566 in the test file.
token-perplexity     the mean over the tokens of windows that do not overlap; the first token of a window is not predicted, as
                     in transformers' own loss. It depends on the tokenizer.
bits-per-byte        every token but the first, each predicted once in windows end to end, in bits, over the bytes of the text:
                     comparable between tokenizers. A window's last token predicts the first of the next, which token-perplexity
                     leaves out.
--bos                every window starts with a beginning-of-text token, as in the training of models that have one: every token
                     is predicted, the first of a window from this token alone. A result says so; its sums are over all tokens.
lambada-strict       the last word, all of its tokens, predicted greedily from the text before it (arXiv:1606.06031; Megatron's
                     --strict-lambada).
lambada-last-token   only the last token of the text: easier, and not comparable with lambada-strict.
"""

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from common.data.text_files import json_lines
from common.errors import BadInput
from common.launch.processes import Ranks

WIKITEXT_WORDS = 245_566  # T_o: pieces between single spaces in the test file of WikiText-103, which is WikiText-2's too
OVERLAP = 32  # tokens that Megatron's window moves by


class Window(NamedTuple):
    """inputs = tokens[start : start + length]. The targets are the tokens one position later, scored from `first` on."""

    start: int
    length: int
    first: int


def overlapping(tokens: int, length: int, step: int) -> list[Window]:
    """Megatron's windows over `tokens` tokens: the first scores all its targets, each later one its last `step`. Every token
    but the very first is scored once."""
    windows = [Window(0, min(length, tokens - 1), 0)]
    scored = windows[0].length
    while scored < tokens - 1:
        start = windows[-1].start + step
        size = min(length, tokens - 1 - start)
        windows.append(Window(start, size, scored - start))
        scored = start + size
    return windows


# ---- WikiText ---------------------------------------------------------------------------------------------------------

# What Megatron's wikitext_detokenizer undoes, in its order, which matters (two marks share the space between them). The result
# is plain text, as in the training data of models.
_UNDO: list[tuple[str, str]] = [
    (r"s '", "s'"),
    (r" @-@ ", "-"), (r" @,@ ", ","), (r" @\.@ ", "."),
    *((f" {re.escape(mark)} ", f"{mark} ") for mark in ":;.!?,"),
    (r"\(\s*([^\)]*?)\s*\)", r"(\1)"), (r"\[\s*([^\]]*?)\s*\]", r"[\1]"), (r"{\s*([^}]*?)\s*}", r"{\1}"),
    (r"\"\s*([^\"]*?)\s*\"", r'"\1"'), (r"'\s*([^']*?)\s*'", r"'\1'"),
    (r"= = = =", "===="), (r"= = =", "==="), (r"= =", "=="),
    (r" ° ", "°"),
    (r" \n", "\n"), (r"\n ", "\n"),
    (r" N ", " 1 "), (r" 's", "'s"),
]  # fmt: skip


def of_hub(rows: Sequence[str]) -> str:
    """The text of the file, from the rows of the hub's `Salesforce/wikitext`, where a blank line (one space) is an empty
    row."""
    return "".join(row or " \n" for row in rows)


def detokenized(text: str) -> str:
    """WikiText as plain text, by Megatron's rules."""
    for pattern, new in _UNDO:
        text = re.sub(pattern, new, text)
    return text


def words_of(text: str) -> int:
    """T_o: pieces between single spaces, before the text is detokenized."""
    return len(text.strip().split(" "))


# ---- LAMBADA ----------------------------------------------------------------------------------------------------------


def lambada(path: Path) -> list[str]:
    """The passages of a .jsonl file whose rows have a `text`."""
    try:
        texts = [row["text"] for _, row in json_lines(path)]
        if not texts or not all(len(text.split()) > 1 for text in texts):  # something to read, and a word to predict
            raise ValueError
        "".join(texts).encode()  # UnicodeEncodeError, a ValueError, for half of a surrogate pair
    except (BadInput, ValueError, KeyError, TypeError, AttributeError):
        problem = "not JSON lines with a `text` of two words or more each"
        raise BadInput(f"{path}: {problem}; give OpenAI's lambada_test.jsonl") from None
    return texts


def last_word(text: str) -> tuple[str, str]:
    """(context, ' ' + last word). The word is what follows the last white space; the context is stripped."""
    word = text.split()[-1]
    return text[: text.rfind(word)].strip(), " " + word


# ---- sums -------------------------------------------------------------------------------------------------------------


def perplexity(total: float, count: float) -> float:
    """exp of the mean, at most exp(20) as in Megatron, so that an untrained model's is finite."""
    return math.exp(min(20.0, total / count))


def padded(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """Arrays of different lengths -> (B, T) int64, padded with 0 on the right, where a causal model does not see it."""
    out = np.zeros((len(arrays), max(map(len, arrays))), np.int64)
    for row, ids in zip(out, arrays, strict=True):
        row[: len(ids)] = ids
    return out


def shared_out(
    batches: Sequence[Any], score: Callable[[Any], list[float]], ranks: Ranks, report: Callable[[int], None], each: int = 1
) -> np.ndarray:
    """The values of all batches, in order, on every rank; `each` is the number of values per item. The batches do not depend
    on the number of ranks, and one rank scores each, so 2 ranks give the same bits as 1.

    report: called with the number of each batch.
    """
    import torch
    import torch.distributed as dist

    ends = np.cumsum([len(batch) * each for batch in batches])
    values = torch.zeros(int(ends[-1]), dtype=torch.float64, device=ranks.device)
    for number in range(ranks.rank, len(batches), ranks.world):
        report(number)
        part = score(batches[number])
        values[ends[number] - len(part) : ends[number]] = torch.tensor(part, dtype=torch.float64)
    if ranks.world > 1:
        dist.all_reduce(values)  # each value plus zeros: exact
    return values.cpu().numpy()


def window_losses(
    net: Any, tokens: np.ndarray, windows: Sequence[Window], device: Any, bound: int | None = None, bos: int | None = None
) -> list[float]:
    """Summed cross entropy, in nats, of the scored targets of each window of a batch, from fp32 logits.

    bound: if given, there are two sums per window: of the targets before this position, and of the others. bos: replaces the
    first input of each window.
    """
    import torch

    from common.training.loss import cross_entropy

    ids = padded([tokens[w.start : w.start + w.length] for w in windows])
    if bos is not None:
        ids[:, 0] = bos
    inputs = torch.from_numpy(ids).to(device)  # (B, T)
    targets = torch.from_numpy(padded([tokens[w.start + 1 : w.start + w.length + 1] for w in windows])).to(device)
    first = min(w.first for w in windows)
    with torch.no_grad():
        logits = net(input_ids=inputs).logits[:, first:]  # (B, T - first, V)
    losses = cross_entropy(logits.flatten(0, 1), targets[:, first:].flatten()).view(len(windows), -1)
    scored = [row[w.first - first : w.length - first].double() for row, w in zip(losses, windows, strict=True)]
    if bound is None:
        return [row.sum().item() for row in scored]
    return [part.sum().item() for row in scored for part in (row[:bound], row[bound:])]


def answers(net: Any, passages: Sequence[tuple[np.ndarray, np.ndarray]], device: Any) -> list[list[int]]:
    """The most likely token at each position of the label, under teacher forcing, for each (context, label) of a batch."""
    import torch

    ids = padded([np.concatenate([context, label]) for context, label in passages])
    with torch.no_grad():
        predicted = net(input_ids=torch.from_numpy(ids).to(device)).logits.argmax(-1).tolist()  # (B, T)
    return [row[len(c) - 1 : len(c) + len(w) - 1] for row, (c, w) in zip(predicted, passages, strict=True)]
