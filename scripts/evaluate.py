"""Evaluate a language model by published protocols, with plain transformers, on one task or several.

    python -m scripts.evaluate MODEL TASK... [--data DIR_OR_FILE] [--batch N] [--dtype fp32|bf16] [--limit N] [--out DIR]
    torchrun --nproc-per-node 8 -m scripts.evaluate MODEL TASK...      shared among 8 processes, with the same values

MODEL is a Hugging Face folder, or an OUT folder of pretrain.sh or finetune.sh, of any stack and layout; then OUT/hf is
evaluated. The data come from the Hugging Face hub, or from --data: a folder that holds the files listed below, directly or in
the subfolder listed with them. Results go to OUT/eval.json (--out; default: MODEL), a list of {task, metric, value, n,
protocol}. The answers on LAMBADA go to OUT/predictions/. --limit takes the first N windows, passages or inputs, and the
protocol says so.

Encoder-decoder models generate translations, summaries, and the answers of GLUE and SQuAD as text, by beam search
(multi30k-en-de, cnn_dm, mrpc, squad, ...; common/evaluation/text.py describes their files). The options --split, --prefix,
--beams, --length-penalty and --tokens are for these tasks.

A BERT model with a head is evaluated on the dev set of its task: GLUE's nine, squad, squad2, race, ner, or classify (--data:
the folder of the task). --split test takes the test set. Only GLUE's server has the answers of GLUE's test sets, so
OUT/predictions/test holds the files to submit. The outputs of the head are matched with the task's labels by name (id2label in
config.json). Names that say nothing (LABEL_0, LABEL_1, ...) are taken in the task's order, with a note.
"""

import argparse
import json
import math
import os
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from common import families, screen
from common.command_line import Parser
from common.data.text_files import read_text
from common.errors import BadInput, exit_cleanly
from common.evaluation import hub, language, metrics, text
from common.huggingface import hf_folder
from common.huggingface.pretrained import architecture_of, load, refuse_unknown
from common.json_files import read_object
from common.launch import processes
from common.launch.processes import Ranks
from common.paths import near

Result = dict[str, Any]
# Evaluates models with a head: the evaluate.py of MODEL's family, else of the first family that has one (recipes/bert).
# Without any such file, there are no such tasks.
heads: Any = families.module_of("evaluate") or SimpleNamespace(TASKS=(), PUBLIC_DEV_ALONE=(), tasks_of=lambda architecture: [])


class Task(NamedTuple):
    what: str
    folder: str  # under --data
    file: str
    hub: tuple[str, str | None]  # dataset and config; the test split has a column `text`


TASKS = {
    "wikitext103": Task("word-level perplexity by Megatron-LM's protocol", "wikitext103", "wiki.test.tokens",
                        ("Salesforce/wikitext", "wikitext-103-v1")),
    "wikitext2": Task("the same on WikiText-2", "wikitext2", "wiki.test.tokens", ("Salesforce/wikitext", "wikitext-2-v1")),
    "wikitext2-raw": Task("token perplexity and bits per byte of the raw text (the same as WikiText-103's)", "wikitext2",
                          "wiki.test.raw", ("Salesforce/wikitext", "wikitext-2-raw-v1")),
    "lambada": Task("accuracy of the last word (strict) and of the last token", "lambada", "lambada_test.jsonl",
                    ("EleutherAI/lambada_openai", "default")),
    "text": Task("token perplexity and bits per byte of --data FILE", "", "", ("", None)),
}  # fmt: skip


TOKENIZERS = ("tokenizer.json", "vocab.json", "vocab.txt", "spiece.model", "tokenizer.model")
MAX_TOKENS = 32_768
KNOWN = [*TASKS, *text.PAIRS, *heads.TASKS]


class Model(NamedTuple):
    net: Any
    tokenizer: Any
    length: int  # tokens per window or input
    batch: int  # windows or inputs per batch
    limit: int | None
    ranks: Ranks
    args: argparse.Namespace  # --bos, --data and the options of beam search

    def tokenize(self, text: str) -> np.ndarray:
        ids = np.array(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], np.int64)
        refuse_unknown(int(ids.max(initial=0)), self.net, self.net.config.name_or_path)
        return ids


def main() -> None:
    files = {name: f"; {task.folder}/{task.file}" if task.file else "" for name, task in TASKS.items()}
    listing = "\n".join(f"  {name:<14} {task.what}{files[name]}" for name, task in TASKS.items())
    p = Parser(
        prog="python -m scripts.evaluate", description=__doc__, epilog=f"tasks, and their files:\n{listing}",
    )  # fmt: skip
    p.add_argument("model", metavar="MODEL")
    p.add_argument("tasks", nargs="+", metavar="TASK", help=", ".join(KNOWN))
    p.add_argument("--data", metavar="DIR_OR_FILE", type=Path, help="local copies, for a machine without network")
    p.add_argument("--batch", metavar="N", type=int, default=8, help="windows or inputs per batch (default: %(default)s)")
    p.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="dtype of the weights (default: %(default)s)")
    p.add_argument("--seq-len", metavar="N", type=int, help="tokens per window (default: the model's positions, at most 1024)")
    p.add_argument("--limit", metavar="N", type=int, help="evaluate only the first N windows, passages or inputs")
    p.add_argument("--bos", action="store_true", help="for perplexities: begin every window with the beginning-of-text token")
    help_text = "split of the task (default: dev for GLUE, SQuAD, RACE, ner and classify, else test)"
    p.add_argument("--split", choices=("dev", "test"), help=help_text)
    p.add_argument("--prefix", metavar="TEXT", help="text before every input (default: T5's prefix of the task)")
    p.add_argument("--beams", metavar="N", type=int, default=4, help="beams of beam search (default: %(default)s)")
    help_text = "log probabilities are divided by length ^ A (default: %(default)s)"
    p.add_argument("--length-penalty", metavar="A", type=float, default=0.6, help=help_text)
    p.add_argument("--tokens", metavar="N", type=int, default=128, help="most tokens to generate (default: %(default)s)")
    p.add_argument("--out", metavar="DIR", type=Path, help="folder of eval.json (default: MODEL)")
    p.add_argument("--json", action="store_true", help="print the results as JSON in place of lines")
    args = p.parse_args()
    folder = export_of(Path(args.model))
    family = (read_object(folder / "twinstack.json") or {}).get("family")
    global heads
    heads = families.module_of("evaluate", family) or heads
    texts = check_arguments(args, folder)
    out = args.out or Path(args.model)
    recorded = read_results(out / "eval.json")

    processes.quiet()
    ranks = processes.start()
    model = load_model(folder, args, ranks)
    step = (read_object(folder / "twinstack.json") or {}).get("step")  # None if the folder is not an export of a run
    results = []
    for name in args.tasks:
        begin = time.perf_counter()
        score = partial(score_generated, name) if isinstance(texts[name], text.Examples) else EVALUATE[name]
        scores = score(model, texts[name], out if ranks.rank == 0 else None)
        if step is not None:
            scores = [row | {"protocol": f"{row['protocol']}, step {step}"} for row in scores]
        if args.dtype != "fp32":
            scores = [row | {"protocol": f"{row['protocol']}, {args.dtype}"} for row in scores]
        results += [metrics.row(name, **row) for row in scores]
        if ranks.rank == 0:
            if not args.json:
                print("\n".join([*lines_of(name, scores), f"{'':<14} {time.perf_counter() - begin:.0f} s"]), flush=True)
    if ranks.rank == 0:
        write(out / "eval.json", recorded, results)
        if args.json:
            print(json.dumps(results, indent=1))
        print(f"results   {out / 'eval.json'}", file=sys.stderr if args.json else sys.stdout)


def lines_of(task: str, scores: list[Result]) -> list[str]:
    """A line for each score, with its protocol behind it, or below it where the screen is narrow."""
    lines = []
    for row in scores:
        first = f"{task:<14} {row['metric']:<22} {row['value']:>12.4f}  n {row['n']:<9,} "
        is_wide = len(first) + len(row["protocol"]) <= screen.width()
        below = textwrap.wrap(row["protocol"], max(20, screen.width() - 15), break_long_words=False, break_on_hyphens=False)
        lines += [first + row["protocol"]] if is_wide else [first.rstrip(), *(f"{'':<14} {line}" for line in below)]
    return lines


def export_of(model: Path) -> Path:
    """The Hugging Face folder of a MODEL."""
    if (model / "config.json").is_file():
        return model
    if (model / "run.json").is_file():
        if (model / "hf/config.json").is_file():
            return model / "hf"
        family = (read_object(model / "run.json") or {}).get("family", "FAMILY")
        raise BadInput(
            f"{model}: the run has no export yet; finish it by its own command, or make one of its last checkpoint: "
            f"python -m recipes.{family}.convert to-hf {model} HF_DIR"
        )
    if not model.exists():
        raise BadInput(f"{model}: no such folder;{near(model, '')} give a Hugging Face folder, or OUT of a run")
    raise BadInput(f"{model}: no config.json and no run.json there; give a Hugging Face folder, or OUT of a run")


def check_arguments(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Check the command line, and return {task: its data}. BadInput reports all problems at once, before a model is loaded."""
    problems = [f"{name}: no such task; there is {', '.join(KNOWN)}" for name in args.tasks if name not in KNOWN]
    numbers = (("batch", args.batch, 1), ("seq-len", args.seq_len, 2), ("limit", args.limit, 1), ("beams", args.beams, 1),
               ("length-penalty", args.length_penalty, 0), ("tokens", args.tokens, 1))  # fmt: skip
    problems += [f"--{name} {v}: must be {least} or more" for name, v, least in numbers if v is not None and not v >= least]
    if args.length_penalty == math.inf or args.tokens > MAX_TOKENS:
        problems.append(f"--length-penalty must be finite, --tokens {MAX_TOKENS:,} or less")
    architecture, config = architecture_of(folder), read_object(folder / "config.json")
    classes = ((TASKS, ("ForCausalLM", "LMHeadModel"), "causal language models"),
               (text.PAIRS, "ForConditionalGeneration", "encoder-decoder models"))  # fmt: skip
    what = f"{folder}: is {architecture or 'of no class'}"
    for tasks, ends, models in classes:
        if any(name in tasks for name in args.tasks) and not architecture.endswith(ends):
            problems.append(f"{what}, and these tasks are for {models}")
    able = text.NAMES if architecture.endswith("ForConditionalGeneration") else heads.tasks_of(architecture)
    wrong = [name for name in args.tasks if name in heads.TASKS and name not in able]
    suited = "for BERT with the head of such a task, or (GLUE but for WNLI, squad) for an encoder-decoder"
    problems += [f"{what}, and {name} is {suited}" for name in wrong]
    perplexities = (score_words, score_tokens)
    without = [name for name in args.tasks if args.bos and name in KNOWN and EVALUATE.get(name) not in perplexities]
    problems += [f"--bos: is for perplexities, and {name} has none; leave it out" for name in without]
    positions = positions_of(config)
    if heads.tasks_of(architecture) and args.seq_len and args.seq_len < heads.MIN_SEQ_LEN:
        problems.append(f"--seq-len {args.seq_len}: must be {heads.MIN_SEQ_LEN} or more")
    if args.seq_len and positions and args.seq_len > positions:
        problems.append(f"--seq-len {args.seq_len}: the model has {positions} positions; give at most {positions}")
    if not any((folder / name).is_file() for name in TOKENIZERS):
        problems.append(f"{folder}: holds no tokenizer; copy tokenizer.json and tokenizer_config.json there")
    hf_folder.tensors(folder, str(folder), problems)
    if args.data and Path(f"{args.data}.idx").is_file():
        problems.append(
            f"--data {args.data}: is a tokenized corpus, and {' '.join(args.tasks)} takes text; give a text file, or score the "
            "run on its own data.valid: python -m scripts.heldout OUT"
        )
    elif args.data and not args.data.exists():
        problems.append(f"--data {args.data}: no such file or folder;{near(args.data, '')} give one that exists")
    if problems:
        raise BadInput(problems)
    return {name: read_data(name, args, folder, able) for name in dict.fromkeys(args.tasks)}


def positions_of(config: dict[str, Any]) -> int | None:
    positions = config.get("max_position_embeddings") or config.get("n_positions")
    return positions if isinstance(positions, int) else None


def read_data(name: str, args: argparse.Namespace, folder: Path, able: Sequence[str]) -> Any:
    """The data of a task: a text, LAMBADA's passages, the inputs and references of a generation task, or the config and
    examples of a task for a head. able: the tasks that this kind of model can answer, for tasks that exist for both kinds."""
    data = args.data
    if name in heads.TASKS and able != text.NAMES:
        if name in heads.PUBLIC_DEV_ALONE and args.split == "test":
            raise BadInput(f"{name}: its test set is not public; leave out --split test")
        return heads.read(Path(args.model), folder, name, data, args.seq_len, args.split or "dev")
    if name in text.NAMES:
        inside = data / name.partition("-")[0] if data else None
        return text.read(name, inside if inside and inside.is_dir() else data, split_of(name, args), args.prefix)
    task = TASKS[name]
    if name == "text":
        if data is None or not data.is_file():
            raise BadInput(f"text: give the file to evaluate on: --data FILE{f' ({data} is a folder)' if data else ''}")
        return read_nonblank(data)
    if data is None:
        return from_hub(name, task)
    path = next((p for p in (data / task.folder / task.file, data / task.file) if p.is_file()), None)
    if path is None:
        raise BadInput(f"--data {data}: holds no {task.folder}/{task.file} and no {task.file}, which {name} reads")
    return language.lambada(path) if name == "lambada" else read_nonblank(path)


def split_of(name: str, args: argparse.Namespace) -> str:
    return args.split or ("test" if name in text.PAIRS else "dev")


def read_nonblank(path: Path) -> str:
    text = read_text(path)
    if not text.strip():
        raise BadInput(f"{path}: is empty")
    return text


def from_hub(name: str, task: Task) -> str | list[str]:
    texts = hub.load_split(name, *task.hub, "test")["text"]
    return list(texts) if name == "lambada" else language.of_hub(texts)


def load_model(folder: Path, args: argparse.Namespace, ranks: Ranks) -> Model:
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[args.dtype]
    processes.check_dtype(args.dtype, ranks.device)
    architecture = architecture_of(folder)
    model_class = AutoModelForSeq2SeqLM if architecture.endswith("ForConditionalGeneration") else AutoModelForCausalLM
    if args.tasks[0] in heads.TASKS and model_class is AutoModelForCausalLM:
        model_class = getattr(transformers, architecture.replace("ForMultipleChoice", "ForSequenceClassification"))
    more = {"num_labels": 1} if args.tasks[0] == "race" else {}  # one output per answer; each answer is a sequence of the batch
    net, tokenizer = load(model_class, folder, dtype=dtype, **more)
    positions = positions_of(net.config.to_dict()) or 1024
    length = args.seq_len or min(1024, positions)
    if args.bos and bos_id(net, tokenizer) is None:
        raise BadInput(f"--bos: {folder} names no beginning-of-text token; leave it out")
    return Model(net.to(ranks.device), tokenizer, length, args.batch, args.limit, ranks, args)


def bos_id(net: Any, tokenizer: Any) -> int | None:
    """The id of the token that begins a text: the tokenizer's, else the model's. Models trained here begin a text with the
    token that ends one."""
    return net.config.bos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id


# ---- the tasks -------------------------------------------------------------------------------------------------------


def summed_losses(model: Model, tokens: np.ndarray, windows: list[language.Window], bound: int | None = None) -> np.ndarray:
    """Summed losses, in nats, of the first `limit` windows: one per window, or two with `bound` (language.window_losses)."""
    if len(tokens) < 2:
        raise BadInput(f"the text has {len(tokens)} token: nothing to predict")
    windows = windows[: model.limit]
    batches = [windows[i : i + model.batch] for i in range(0, len(windows), model.batch)]
    bos = bos_id(model.net, model.tokenizer) if model.args.bos else None
    with progress("windows", len(windows), model) as report:
        return language.shared_out(
            batches, lambda batch: language.window_losses(model.net, tokens, batch, model.ranks.device, bound, bos),
            model.ranks, report, each=2 if bound else 1,
        )  # fmt: skip


def text_tokens(model: Model, text: str) -> np.ndarray:
    """The tokens of a text whose perplexity is computed. With --bos, the beginning-of-text token comes first."""
    tokens = model.tokenize(text)
    return np.concatenate([[bos_id(model.net, model.tokenizer)], tokens]) if model.args.bos else tokens


def bos_note(model: Model) -> str:
    """What the protocol says about --bos."""
    return f", {model.tokenizer.decode([bos_id(model.net, model.tokenizer)])} first in every window" if model.args.bos else ""


def score_words(model: Model, text: str, out: Path | None) -> list[Result]:
    """Word perplexity by Megatron's protocol, with n = T_o - 1, and token perplexity. With --limit only the token perplexity,
    because the number of words in the first windows is unknown."""
    tokens, words = text_tokens(model, language.detokenized(text)), language.words_of(text)
    step = min(language.OVERLAP, model.length)
    windows = language.overlapping(len(tokens), model.length, step)
    losses = summed_losses(model, tokens, windows)
    total, done = math.fsum(losses), len(losses)
    targets = sum(w.length - w.first for w in windows[:done])
    part, length = limit_note(done, len(windows), "windows"), len(tokens) - model.args.bos
    how = f"windows of {model.length}, step {step}, T_o {words:,}, T {length:,}{part}{bos_note(model)}"
    if words != language.WIKITEXT_WORDS:
        how += f"; not the published test file, whose T_o is {language.WIKITEXT_WORDS:,}"
    rows = [{"metric": "token_perplexity", "value": language.perplexity(total, targets), "n": targets,
             "protocol": f"overlapping windows, detokenized, {how}"}]  # fmt: skip
    if done == len(windows):
        scored = words - (not model.args.bos)  # the first word is predicted only if a token stands before it
        value = language.perplexity(total, scored)
        rows.insert(0, {"metric": "word_perplexity", "value": value, "n": scored, "protocol": f"megatron-wikitext, {how}"})
    return rows


def score_tokens(model: Model, text: str, out: Path | None) -> list[Result]:
    """Token perplexity and bits per byte, from one pass over adjacent windows. The perplexity leaves out each target that is
    the first token of the next window."""
    tokens = text_tokens(model, text)
    every = language.overlapping(len(tokens), model.length, model.length)
    bound = model.length if model.args.bos else model.length - 1
    losses = summed_losses(model, tokens, every, bound=bound).reshape(-1, 2)  # (windows, within it and in the next)
    windows = every[: len(losses)]
    targets = sum(min(w.length, bound) for w in windows)
    file = f"{model.args.data.name}, " if model.args.data and model.args.data.is_file() else ""
    how = f"{file}windows of {model.length}, apart{limit_note(len(windows), len(every), 'windows')}{bos_note(model)}"
    rows = [{"metric": "token_perplexity", "value": language.perplexity(math.fsum(losses[:, 0]), targets), "n": targets,
             "protocol": f"token-perplexity, {how}"}]  # fmt: skip
    if len(windows) == len(every):  # with --limit the number of bytes that were scored is unknown
        size, how = len(text.encode()), f"{file}windows of {model.length}, every token{bos_note(model) or ' but the first'}"
        bits = math.fsum(losses.flat) / math.log(2) / size
        rows.append({"metric": "bits_per_byte", "value": bits, "n": size, "protocol": f"bits-per-byte, {how}"})
    return rows


def score_last_words(model: Model, texts: list[str], out: Path | None) -> list[Result]:
    """LAMBADA by both protocols. The answers of the strict one go to predictions/lambada.jsonl."""
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
        with progress(f"passages, {name}", len(passages), model) as report:
            right = language.shared_out(batches, score, model.ranks, report)
        rows.append({"metric": "accuracy" if name == "lambada-strict" else "last_token_accuracy", "value": right.mean().item(),
                     "n": len(right), "protocol": name + limit_note(len(texts), whole, "passages")})  # fmt: skip
        if out and name == "lambada-strict":
            words = [language.last_word(text)[1].strip() for text in texts]
            lines = [json.dumps({"word": word, "right": bool(r)}) for word, r in zip(words, right, strict=True)]
            (out / "predictions").mkdir(parents=True, exist_ok=True)
            (out / "predictions/lambada.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return rows


def passage(model: Model, text: str, strict: bool) -> tuple[np.ndarray, np.ndarray]:
    """(context, label), both as token ids."""
    if not strict:
        tokens = model.tokenize(text)
        return tokens[:-1], tokens[-1:]
    context, word = language.last_word(text)
    return model.tokenize(context), model.tokenize(word)


def score_generated(name: str, model: Model, examples: text.Examples, out: Path | None) -> list[Result]:
    """The scores of the texts that beam search generates. Writes predictions/TASK.txt, one line per input, and for GLUE and
    SQuAD without --limit the benchmark's own files in predictions/TASK."""
    whole, how = len(examples.inputs), model.args
    inputs, references = examples.inputs[: model.limit], examples.references[: model.limit]
    labels = None if examples.labels is None else examples.labels[: model.limit]
    search = text.Search(how.beams, how.length_penalty, how.tokens, model.batch)
    with progress("inputs", len(inputs), model) as report:
        written = text.write(model.net, model.tokenizer, inputs, model.length, search, model.ranks, report)
    if out:
        (out / "predictions").mkdir(parents=True, exist_ok=True)
        (out / f"predictions/{name}.txt").write_text("\n".join(written) + "\n", encoding="utf-8")
        for file, content in text.files(name, written, examples).items() if len(inputs) == whole else ():
            (out / "predictions" / name).mkdir(exist_ok=True)
            (out / "predictions" / name / file).write_text(content, encoding="utf-8")
    unknown = text.unknown(model.tokenizer, examples.targets[: model.limit], split_of(name, how))
    notes = "".join(f"; {note}" for note in (*examples.notes, *unknown))
    options = f", prefix {how.prefix!r}" if how.prefix is not None else ""
    options += f", inputs of {how.seq_len} tokens" if how.seq_len else ""
    protocol = f"{split_of(name, how)}, {search}{options}{limit_note(len(inputs), whole, 'inputs')}{notes}"
    scores = text.scores(name, written, examples._replace(references=references, labels=labels), model.tokenizer)
    n, counts = len(inputs), text.counts(name, len(inputs), examples)
    return [
        {"metric": metric, "value": value, "n": counts.get(metric, n), "protocol": f"{protocol}; {method}"}
        for metric, value, method in scores
    ]


def score_head(model: Model, task: Any, out: Path | None) -> list[Result]:
    size = len(task.examples)
    with progress("examples", min(model.limit or size, size), model) as report:
        predictions = heads.predict(model.net, task, model.batch, model.limit, model.ranks, report)
    files = heads.write_predictions(task, predictions, out) if out else []
    if heads.is_unanswered(task):
        print(*(f"written   {file}" for file in files), sep="\n", file=sys.stderr if model.args.json else sys.stdout)
        return []
    return heads.scores(task, predictions)


def limit_note(done: int, whole: int, what: str) -> str:
    return f", the first {done:,} of {whole:,} {what}" if done < whole else ""


EVALUATE: dict[str, Callable[[Model, Any, Path | None], list[Result]]] = {
    "wikitext103": score_words, "wikitext2": score_words, "wikitext2-raw": score_tokens, "text": score_tokens,
    "lambada": score_last_words, **dict.fromkeys(heads.TASKS, score_head),
}  # fmt: skip


@contextmanager
def progress(what: str, number: int, model: Model) -> Iterator[Callable[[int], None]]:
    """A function to call with the number of each batch; rank 0 shows the progress."""
    shown = model.ranks.rank == 0 and not model.args.json
    with screen.progress("evaluate", number, what, shown) as report:
        yield lambda batch: report(min(batch * model.batch, number))


def read_results(path: Path) -> list[Result]:
    """The results that eval.json holds already. BadInput if results could not be added to it."""
    existing = next(folder for folder in path.parents if folder.exists())
    predictions = path.parent / "predictions"
    for place, what in ((existing, "is not a folder that can be written to"), (predictions, "is in the way, not a folder")):
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
    """Add results to those in eval.json. A result replaces one with the same task, metric and protocol."""
    new = {(r["task"], r["metric"], r["protocol"]) for r in results}
    recorded = [r for r in recorded if (r["task"], r["metric"], r["protocol"]) not in new]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".tmp").write_text(json.dumps(recorded + results, indent=1) + "\n", encoding="utf-8")
    os.replace(path.with_suffix(".tmp"), path)


if __name__ == "__main__":
    exit_cleanly(main)
