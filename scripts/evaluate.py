"""Evaluate a language model by the published protocols, with plain transformers: a Hugging Face folder or a run, on one
task or several.

    python -m scripts.evaluate MODEL TASK... [--data DIR_OR_FILE] [--batch N] [--dtype fp32|bf16] [--limit N] [--out DIR]
    torchrun --nproc-per-node 8 -m scripts.evaluate MODEL TASK...      shared among 8 processes: the same values

MODEL is an OUT folder of pretrain.sh or finetune.sh, of any stack and layout (OUT/hf is evaluated), or a Hugging Face folder.
Data come from the Hugging Face hub, or from --data: a folder that holds the files named below, at its top or under the folder
named. Results go to OUT/eval.json (--out; default: MODEL), a list of {task, metric, value, n, protocol}; LAMBADA's answers to
OUT/predictions/. --limit takes the first N windows, passages or inputs, and the protocol says so.

An encoder-decoder model writes translations, summaries, and GLUE's and SQuAD's answers in words by beam search (multi30k-en-de,
cnn_dm, mrpc, squad, ...; their files: common/evaluation/text.py): --split, --prefix, --beams, --length-penalty and --tokens are
for these.

A BERT with a head answers the dev set of its task: GLUE's nine, squad, squad2, race, ner, classify (--data: the folder of the
task), or with --split test its test set; of GLUE's, whose answers only its server has, OUT/predictions/test holds what is sent
in. The outputs of the head are matched with the labels of the task by name (id2label of config.json); LABEL_0 and so on, which
say nothing, are taken in the task's order, with a note.
"""

import argparse
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from common import families
from common.data.text_files import read_text
from common.errors import BadInput, exit_cleanly
from common.evaluation import hub, language, metrics, text
from common.huggingface import hf_folder
from common.huggingface.pretrained import architecture_of, load, refuse_unknown
from common.json_files import read_object
from common.launch import processes
from common.launch.processes import Ranks

Result = dict[str, Any]
# recipes/bert/evaluate.py, or that of the family of MODEL: what evaluates a head. None where no recipe has such a file.
heads: Any = families.module_of("evaluate") or SimpleNamespace(TASKS=(), PUBLIC_DEV_ALONE=(), tasks_of=lambda architecture: [])


class Task(NamedTuple):
    what: str
    folder: str  # under --data
    file: str
    hub: tuple[str, str | None]  # dataset, config; its test split has a column `text`


TASKS = {
    "wikitext103": Task("word-level perplexity by Megatron-LM's protocol", "wikitext103", "wiki.test.tokens",
                        ("Salesforce/wikitext", "wikitext-103-v1")),
    "wikitext2": Task("the same on WikiText-2", "wikitext2", "wiki.test.tokens", ("Salesforce/wikitext", "wikitext-2-v1")),
    "wikitext2-raw": Task("token perplexity and bits per byte of the raw text (which is WikiText-103's too)", "wikitext2",
                          "wiki.test.raw", ("Salesforce/wikitext", "wikitext-2-raw-v1")),
    "lambada": Task("accuracy of the last word (strict) and of the last token", "lambada", "lambada_test.jsonl",
                    ("EleutherAI/lambada_openai", "default")),
    "text": Task("token perplexity and bits per byte of --data FILE", "", "", ("", None)),
}  # fmt: skip


TOKENIZERS = ("tokenizer.json", "vocab.json", "vocab.txt", "spiece.model", "tokenizer.model")
MOST_TOKENS = 32_768
KNOWN = [*TASKS, *text.PAIRS, *heads.TASKS]


class Model(NamedTuple):
    net: Any
    tokenizer: Any
    length: int  # tokens of a window, of an input
    batch: int
    limit: int | None
    ranks: Ranks
    how: argparse.Namespace  # of beam search

    def tokenize(self, text: str) -> np.ndarray:
        ids = np.array(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], np.int64)
        refuse_unknown(int(ids.max(initial=0)), self.net, self.net.config.name_or_path)
        return ids


def main() -> None:
    files = {name: f"; {task.folder}/{task.file}" if task.file else "" for name, task in TASKS.items()}
    listing = "\n".join(f"  {name:<14} {task.what}{files[name]}" for name, task in TASKS.items())
    p = argparse.ArgumentParser(
        prog="python -m scripts.evaluate", description=__doc__, epilog=f"tasks, and their files:\n{listing}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    p.add_argument("model", metavar="MODEL")
    p.add_argument("tasks", nargs="+", metavar="TASK", help=", ".join(KNOWN))
    p.add_argument("--data", metavar="DIR_OR_FILE", type=Path, help="local copies, for a machine without network")
    p.add_argument("--batch", metavar="N", type=int, default=8, help="windows at once (default: %(default)s)")
    p.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="of the weights (default: %(default)s)")
    p.add_argument("--seq-len", metavar="N", type=int, help="of a window (default: 1024, or the model's positions if fewer)")
    p.add_argument("--limit", metavar="N", type=int, help="the first N windows or passages alone")
    p.add_argument("--bos", action="store_true", help="of perplexities: the beginning-of-text token first in every window")
    p.add_argument("--split", choices=("dev", "test"), help="of the task (default: test; of GLUE, SQuAD, RACE and tags dev)")
    p.add_argument("--prefix", metavar="TEXT", help="goes before every input (default: T5's for the task)")
    p.add_argument("--beams", metavar="N", type=int, default=4, help="default: %(default)s")
    help_text = "log probabilities are divided by length ^ A (default: %(default)s)"
    p.add_argument("--length-penalty", metavar="A", type=float, default=0.6, help=help_text)
    p.add_argument("--tokens", metavar="N", type=int, default=128, help="written at most (default: %(default)s)")
    p.add_argument("--out", metavar="DIR", type=Path, help="where eval.json goes (default: MODEL)")
    args = p.parse_args()
    folder = export_of(Path(args.model))
    family = (read_object(folder / "twinstack.json") or {}).get("family")
    global heads
    heads = families.module_of("evaluate", family) or heads
    texts = checked(args, folder)
    out = args.out or Path(args.model)
    recorded = read_results(out / "eval.json")

    processes.quiet()
    ranks = processes.start()
    model = loaded(folder, args, ranks)
    step = (read_object(folder / "twinstack.json") or {}).get("step")  # of an export
    results = []
    for name in args.tasks:
        begin = time.perf_counter()
        score = partial(of_inputs, name) if isinstance(texts[name], text.Examples) else EVALUATE[name]
        rows = score(model, texts[name], out if ranks.rank == 0 else None)
        if step is not None:
            rows = [row | {"protocol": f"{row['protocol']}, step {step}"} for row in rows]
        if args.dtype != "fp32":
            rows = [row | {"protocol": f"{row['protocol']}, {args.dtype}"} for row in rows]
        results += [metrics.row(name, **row) for row in rows]
        if ranks.rank == 0:
            for row in rows:
                print(f"{name:<14} {row['metric']:<22} {row['value']:>12.4f}  n {row['n']:<9,} {row['protocol']}", flush=True)
            print(f"{'':<14} {time.perf_counter() - begin:.0f} s", flush=True)
    if ranks.rank == 0:
        write(out / "eval.json", recorded, results)
        print(f"results   {out / 'eval.json'}")


def export_of(given: Path) -> Path:
    """The Hugging Face folder of a MODEL."""
    if (given / "config.json").is_file():
        return given
    if (given / "run.json").is_file():
        if (given / "hf/config.json").is_file():
            return given / "hf"
        family = (read_object(given / "run.json") or {}).get("family", "FAMILY")
        raise BadInput(
            f"{given}: the run has no export yet; finish it by its own command, or make one of its last checkpoint: "
            f"python -m recipes.{family}.convert to-hf {given} HF_DIR"
        )
    raise BadInput(f"{given}: no config.json and no run.json there; give a Hugging Face folder, or OUT of a run")


def checked(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """What each task reads. All problems at once, before anything is loaded."""
    problems = [f"{name}: no such task; there is {', '.join(KNOWN)}" for name in args.tasks if name not in KNOWN]
    numbers = (("batch", args.batch, 1), ("seq-len", args.seq_len, 2), ("limit", args.limit, 1), ("beams", args.beams, 1),
               ("length-penalty", args.length_penalty, 0), ("tokens", args.tokens, 1))  # fmt: skip
    problems += [f"--{name} {v}: must be {least} or more" for name, v, least in numbers if v is not None and not v >= least]
    if args.length_penalty == math.inf or args.tokens > MOST_TOKENS:
        problems.append(f"--length-penalty must be finite, --tokens {MOST_TOKENS:,} or less")
    architecture, config = architecture_of(folder), read_object(folder / "config.json")
    classes = ((TASKS, ("ForCausalLM", "LMHeadModel"), "causal language models"),
               (text.PAIRS, "ForConditionalGeneration", "encoder-decoder models"))  # fmt: skip
    what = f"{folder}: is {architecture or 'of no class'}"
    for tasks, ends, of in classes:
        if any(name in tasks for name in args.tasks) and not architecture.endswith(ends):
            problems.append(f"{what}, and these tasks are for {of}")
    able = text.NAMES if architecture.endswith("ForConditionalGeneration") else heads.tasks_of(architecture)
    wrong = [name for name in args.tasks if name in heads.TASKS and name not in able]
    suited = "for BERT with the head of such a task, or (GLUE but for WNLI, squad) for an encoder-decoder"
    problems += [f"{what}, and {name} is {suited}" for name in wrong]
    no_bos = [name for name in args.tasks if args.bos and name in KNOWN and EVALUATE.get(name) not in (of_words, of_tokens)]
    problems += [f"--bos: is for perplexities, and {name} has none; leave it out" for name in no_bos]
    positions = positions_of(config)
    if heads.tasks_of(architecture) and args.seq_len and args.seq_len < heads.MIN_SEQ_LEN:
        problems.append(f"--seq-len {args.seq_len}: must be {heads.MIN_SEQ_LEN} or more")
    if args.seq_len and positions and args.seq_len > positions:
        problems.append(f"--seq-len {args.seq_len}: the model has {positions} positions; give at most {positions}")
    if not any((folder / name).is_file() for name in TOKENIZERS):
        problems.append(f"{folder}: holds no tokenizer; copy tokenizer.json and tokenizer_config.json there")
    hf_folder.tensors(folder, str(folder), problems)
    if args.data and not args.data.exists():
        problems.append(f"--data {args.data}: no such file or folder")
    if problems:
        raise BadInput(problems)
    return {name: data_of(name, args, folder, able) for name in dict.fromkeys(args.tasks)}


def positions_of(config: dict[str, Any]) -> int | None:
    positions = config.get("max_position_embeddings") or config.get("n_positions")
    return positions if isinstance(positions, int) else None


def data_of(name: str, args: argparse.Namespace, folder: Path, able: Sequence[str]) -> Any:
    """The text of a task; of LAMBADA the passages; of what is written the inputs and references; of a head the config and the
    examples. able: of the tasks that have several ways those of this model."""
    given = args.data
    if name in heads.TASKS and able != text.NAMES:
        if name in heads.PUBLIC_DEV_ALONE and args.split == "test":
            raise BadInput(f"{name}: its test set is not public; leave out --split test")
        return heads.read(Path(args.model), folder, name, given, args.seq_len, args.split or "dev")
    if name in text.NAMES:
        inside = given / name.partition("-")[0] if given else None
        return text.read(name, inside if inside and inside.is_dir() else given, split_of(name, args), args.prefix)
    task = TASKS[name]
    if name == "text":
        if given is None or not given.is_file():
            raise BadInput(f"text: give the file to evaluate on: --data FILE{f' ({given} is a folder)' if given else ''}")
        return text_of(given)
    if given is None:
        return from_hub(name, task)
    path = next((p for p in (given / task.folder / task.file, given / task.file) if p.is_file()), None)
    if path is None:
        raise BadInput(f"--data {given}: holds no {task.folder}/{task.file} and no {task.file}, which {name} reads")
    return language.lambada(path) if name == "lambada" else text_of(path)


def split_of(name: str, args: argparse.Namespace) -> str:
    return args.split or ("test" if name in text.PAIRS else "dev")


def text_of(path: Path) -> str:
    text = read_text(path)
    if not text.strip():
        raise BadInput(f"{path}: is empty")
    return text


def from_hub(name: str, task: Task) -> str | list[str]:
    texts = hub.rows(name, *task.hub, "test")["text"]
    return list(texts) if name == "lambada" else language.of_hub(texts)


def loaded(folder: Path, args: argparse.Namespace, ranks: Ranks) -> Model:
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[args.dtype]
    processes.check_dtype(args.dtype, ranks.device)
    architecture = architecture_of(folder)
    of = AutoModelForSeq2SeqLM if architecture.endswith("ForConditionalGeneration") else AutoModelForCausalLM
    if args.tasks[0] in heads.TASKS and of is AutoModelForCausalLM:
        of = getattr(transformers, architecture.replace("ForMultipleChoice", "ForSequenceClassification"))
    more = {"num_labels": 1} if args.tasks[0] == "race" else {}  # one output an answer, whose texts are sequences of a batch
    net, tokenizer = load(of, folder, dtype=dtype, **more)
    positions = positions_of(net.config.to_dict()) or 1024
    length = args.seq_len or min(1024, positions)
    if args.bos and bos_of(net, tokenizer) is None:
        raise BadInput(f"--bos: {folder} names no beginning-of-text token; leave it out")
    return Model(net.to(ranks.device), tokenizer, length, args.batch, args.limit, ranks, args)


def bos_of(net: Any, tokenizer: Any) -> int | None:
    """The id of the token that begins a text: the tokenizer's, else the model's; those trained here begin where one ended."""
    return net.config.bos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id


# ---- the tasks -------------------------------------------------------------------------------------------------------


def losses_of(model: Model, tokens: np.ndarray, windows: list[language.Window], bound: int | None = None) -> np.ndarray:
    """Of the first `limit` windows the summed losses in nats, one or (bound) two each, as window_losses has them."""
    if len(tokens) < 2:
        raise BadInput(f"the text has {len(tokens)} token: nothing to predict")
    windows = windows[: model.limit]
    batches = [windows[i : i + model.batch] for i in range(0, len(windows), model.batch)]
    bos = bos_of(model.net, model.tokenizer) if model.how.bos else None
    return language.shared_out(
        batches, lambda batch: language.window_losses(model.net, tokens, batch, model.ranks.device, bound, bos), model.ranks,
        progress("windows", len(windows), model), each=2 if bound else 1,
    )  # fmt: skip


def text_tokens(model: Model, text: str) -> np.ndarray:
    """Of a text whose perplexity is asked for, with --bos behind its token."""
    tokens = model.tokenize(text)
    return np.concatenate([[bos_of(model.net, model.tokenizer)], tokens]) if model.how.bos else tokens


def first(model: Model) -> str:
    """What the protocol says of --bos."""
    return f", {model.tokenizer.decode([bos_of(model.net, model.tokenizer)])} first in every window" if model.how.bos else ""


def of_words(model: Model, text: str, out: Path | None) -> list[Result]:
    """Megatron's protocol. n: T_o - 1. Of a part (--limit) by tokens alone: how many words they are is not known."""
    tokens, words = text_tokens(model, language.detokenized(text)), language.words_of(text)
    step = min(language.OVERLAP, model.length)
    windows = language.overlapping(len(tokens), model.length, step)
    losses = losses_of(model, tokens, windows)
    total, done = math.fsum(losses), len(losses)
    targets = sum(w.length - w.first for w in windows[:done])
    part, length = limited(done, len(windows), "windows"), len(tokens) - model.how.bos
    how = f"windows of {model.length}, step {step}, T_o {words:,}, T {length:,}{part}{first(model)}"
    if words != language.WIKITEXT_WORDS:
        how += f"; not the published test file, whose T_o is {language.WIKITEXT_WORDS:,}"
    rows = [{"metric": "token_perplexity", "value": language.perplexity(total, targets), "n": targets,
             "protocol": f"overlapping windows, detokenized, {how}"}]  # fmt: skip
    if done == len(windows):
        scored = words - (not model.how.bos)  # without a token before it the first word is not predicted
        value = language.perplexity(total, scored)
        rows.insert(0, {"metric": "word_perplexity", "value": value, "n": scored, "protocol": f"megatron-wikitext, {how}"})
    return rows


def of_tokens(model: Model, text: str, out: Path | None) -> list[Result]:
    """Both from one pass over windows end to end: the perplexity leaves out the target that stands in the next window."""
    tokens = text_tokens(model, text)
    every = language.overlapping(len(tokens), model.length, model.length)
    bound = model.length if model.how.bos else model.length - 1
    losses = losses_of(model, tokens, every, bound=bound).reshape(-1, 2)  # (windows, within it and in the next)
    windows = every[: len(losses)]
    targets = sum(min(w.length, bound) for w in windows)
    file = f"{model.how.data.name}, " if model.how.data and model.how.data.is_file() else ""
    how = f"{file}windows of {model.length}, apart{limited(len(windows), len(every), 'windows')}{first(model)}"
    rows = [{"metric": "token_perplexity", "value": language.perplexity(math.fsum(losses[:, 0]), targets), "n": targets,
             "protocol": f"token-perplexity, {how}"}]  # fmt: skip
    if len(windows) == len(every):  # else the bytes of what was scored are not known
        size, how = len(text.encode()), f"{file}windows of {model.length}, every token{first(model) or ' but the first'}"
        bits = math.fsum(losses.flat) / math.log(2) / size
        rows.append({"metric": "bits_per_byte", "value": bits, "n": size, "protocol": f"bits-per-byte, {how}"})
    return rows


def of_last_words(model: Model, texts: list[str], out: Path | None) -> list[Result]:
    """LAMBADA, both ways; the answers of the strict one go to predictions/lambada.jsonl."""
    whole, texts = len(texts), texts[: model.limit]
    rows = []

    def score(batch: list[tuple[np.ndarray, np.ndarray]]) -> list[float]:
        answers = language.answers(model.net, batch, model.ranks.device)
        return [float(answer == label.tolist()) for answer, (_, label) in zip(answers, batch, strict=True)]

    for name in ("lambada-strict", "lambada-last-token"):
        passages = [passage(model, text, strict=name == "lambada-strict") for text in texts]
        long = next((n for n, (c, w) in enumerate(passages, 1) if len(c) + len(w) > model.length), None)
        if long:
            room = positions_of(model.net.config.to_dict())
            remedy = "give --seq-len" if not room or model.length < room else f"the model has {room} positions, --limit is left"
            raise BadInput(f"lambada: passage {long} is longer than the window of {model.length} tokens; {remedy}")
        batches = [passages[i : i + model.batch] for i in range(0, len(passages), model.batch)]
        right = language.shared_out(batches, score, model.ranks, progress(name, len(passages), model))
        rows.append({"metric": "accuracy" if name == "lambada-strict" else "last_token_accuracy", "value": right.mean().item(),
                     "n": len(right), "protocol": name + limited(len(texts), whole, "passages")})  # fmt: skip
        if out and name == "lambada-strict":
            words = [language.last_word(text)[1].strip() for text in texts]
            lines = [json.dumps({"word": word, "right": bool(r)}) for word, r in zip(words, right, strict=True)]
            (out / "predictions").mkdir(parents=True, exist_ok=True)
            (out / "predictions/lambada.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return rows


def passage(model: Model, text: str, strict: bool) -> tuple[np.ndarray, np.ndarray]:
    """(context, label) in tokens."""
    if not strict:
        tokens = model.tokenize(text)
        return tokens[:-1], tokens[-1:]
    context, word = language.last_word(text)
    return model.tokenize(context), model.tokenize(word)


def of_inputs(name: str, model: Model, examples: text.Examples, out: Path | None) -> list[Result]:
    """What beam search writes to each input: predictions/TASK.txt, a line each, all of GLUE's and SQuAD's in predictions/TASK
    as the benchmark has them; and its scores."""
    whole, how = len(examples.inputs), model.how
    inputs, references = examples.inputs[: model.limit], examples.references[: model.limit]
    labels = None if examples.labels is None else examples.labels[: model.limit]
    search = text.Search(how.beams, how.length_penalty, how.tokens, model.batch)
    tell = progress("inputs", len(inputs), model)
    written = text.write(model.net, model.tokenizer, inputs, model.length, search, model.ranks, tell)
    if out:
        (out / "predictions").mkdir(parents=True, exist_ok=True)
        (out / f"predictions/{name}.txt").write_text("\n".join(written) + "\n", encoding="utf-8")
        for file, content in text.files(name, written, examples).items() if len(inputs) == whole else ():
            (out / "predictions" / name).mkdir(exist_ok=True)
            (out / "predictions" / name / file).write_text(content, encoding="utf-8")
    unknown = text.unknown(model.tokenizer, examples.targets[: model.limit], split_of(name, how))
    notes = "".join(f"; {note}" for note in (*examples.notes, *unknown))
    given = f", prefix {how.prefix!r}" if how.prefix is not None else ""
    given += f", inputs of {how.seq_len} tokens" if how.seq_len else ""
    protocol = f"{split_of(name, how)}, {search}{given}{limited(len(inputs), whole, 'inputs')}{notes}"
    scores = text.scores(name, written, examples._replace(references=references, labels=labels), model.tokenizer)
    n, counts = len(inputs), text.counts(name, len(inputs), examples)
    return [
        {"metric": metric, "value": value, "n": counts.get(metric, n), "protocol": f"{protocol}; {worked_out}"}
        for metric, value, worked_out in scores
    ]


def of_head(model: Model, task: Any, out: Path | None) -> list[Result]:
    size = len(task.examples)
    tell = progress("examples", min(model.limit or size, size), model)
    said = heads.predict(model.net, task, model.batch, model.limit, model.ranks, tell)
    files = heads.write_predictions(task, said, out) if out else []
    if heads.is_unanswered(task):
        print(*(f"written   {file}" for file in files), sep="\n")
        return []
    return heads.scores(task, said)


def limited(done: int, whole: int, what: str) -> str:
    return f", the first {done:,} of {whole:,} {what}" if done < whole else ""


EVALUATE: dict[str, Callable[[Model, Any, Path | None], list[Result]]] = {
    "wikitext103": of_words, "wikitext2": of_words, "wikitext2-raw": of_tokens, "lambada": of_last_words, "text": of_tokens,
    **dict.fromkeys(heads.TASKS, of_head),
}  # fmt: skip


def progress(what: str, number: int, model: Model) -> Callable[[int], None]:
    """Called with each batch's number; rank 0 says every 10 s how far it is."""
    begin = shown = time.monotonic()

    def tell(batch: int) -> None:
        nonlocal shown
        now = time.monotonic()
        if model.ranks.rank == 0 and batch and now - shown >= 10:
            done, shown = batch * model.batch, now
            print(f"  {done:>8,} of {number:,} {what}  eta {(now - begin) / done * (number - done):.0f} s", flush=True)

    return tell


def read_results(path: Path) -> list[Result]:
    """What eval.json holds already; BadInput where results could not be added to it."""
    there = next(folder for folder in path.parents if folder.exists())
    predictions = path.parent / "predictions"
    for place, what in ((there, "is no folder that can be written to"), (predictions, "is in the way, not a folder")):
        if place.exists() and not (place.is_dir() and os.access(place, os.W_OK)):
            raise BadInput(f"{place}: {what}; give --out DIR")
    try:
        recorded = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror or error}; give --out DIR") from None
    except (ValueError, RecursionError):
        recorded = None
    if not isinstance(recorded, list) or not all(isinstance(row, dict) and row.keys() >= KEYS for row in recorded):
        raise BadInput(f"{path}: is not a list of results; move it away, or give --out DIR")
    return recorded


KEYS = {"task", "metric", "protocol"}


def write(path: Path, recorded: list[Result], results: list[Result]) -> None:
    """Add to what eval.json holds; a result of the same task, metric and protocol is replaced."""
    new = {(r["task"], r["metric"], r["protocol"]) for r in results}
    recorded = [r for r in recorded if (r["task"], r["metric"], r["protocol"]) not in new]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".tmp").write_text(json.dumps(recorded + results, indent=1) + "\n", encoding="utf-8")
    os.replace(path.with_suffix(".tmp"), path)


if __name__ == "__main__":
    exit_cleanly(main)
