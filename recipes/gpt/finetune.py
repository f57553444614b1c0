"""GPT finetuned: on a text (`lm`), or on conversations of which it learns the assistant's part (`sft`).

A family module like task.py, which it imports the rest from. finetune_samples.py reads and packs the data.
Letters in shapes: B samples, T positions, V vocabulary.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Set
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import numpy as np
from pydantic import Field

from common import config
from common.config import Count, FilePath, Positive
from common.data import examples
from common.data.tokenizer import Tokenizer
from common.errors import BadInput
from common.huggingface import export, pretrained
from common.json_files import write_json
from common.launch.processes import Ranks
from common.training import finetuning
from common.training.lora import Adapters, Lora

from . import finetune_samples as samples, task
from .task import (  # what finetuning takes over unchanged
    FAMILY as FAMILY,
    HF_BUFFER_PATTERNS as HF_BUFFER_PATTERNS,
    HF_MODEL_TYPES as HF_MODEL_TYPES,
    IGNORED_HF_HEADS as IGNORED_HF_HEADS,
    IGNORED_HF_KEYS as IGNORED_HF_KEYS,
    counts as counts,
    duplicate_names as duplicate_names,
    export_loss_sums as export_loss_sums,
    forward_backward_flops as forward_backward_flops,
    has_weight_decay as has_weight_decay,
    head_notes as head_notes,
    head_problems as head_problems,
    hf_class_name as hf_class_name,
    hf_config as hf_config,
    hf_config_overrides as hf_config_overrides,
    hf_model as hf_model,
    hf_model_type as hf_model_type,
    initializer as initializer,
    layer_count as layer_count,
    loss_sum as loss_sum,
    make_batch as make_batch,
    model_card as model_card,
    model_from_hf_config as model_from_hf_config,
    model_inputs as model_inputs,
    new_head_prefixes as new_head_prefixes,
    normalized_hf_config as normalized_hf_config,
    optional_prefixes as optional_prefixes,
    parameter_patterns as parameter_patterns,
    parameter_shapes as parameter_shapes,
    reorder_labels as reorder_labels,
    stored_names as stored_names,
)

if TYPE_CHECKING:
    from common.preflight import Run


class Model(task.Model):
    """Its shapes come from init.from where the config gives none."""

    def layout_problems(self, cfg: Any, stack: str) -> Iterator[str]:
        yield from super().layout_problems(cfg, stack)
        if cfg.lora is None:
            return
        if stack == "megatron":
            yield (
                "lora on megatron: Megatron Core fuses query, key and value, and gate and up, into one layer each, and peft "
                "gives each an adapter of its own; use deepspeed or baseline, or leave out the section lora"
            )
        if stack == "deepspeed" and cfg.deepspeed.tp > 1:
            yield f"lora with deepspeed.tp={cfg.deepspeed.tp}: AutoTP splits no adapters; use deepspeed.tp=1"
        known = linear_layers(self)
        for target in cfg.lora.targets or ():
            if target not in known:
                yield f"lora.targets: the model has no linear layer {target!r}; it has {', '.join(known)}"

    def resolve(self, cfg: Any, tokenizer_size: int | None) -> ResolvedModel:
        return ResolvedModel(**self.filled(cfg, tokenizer_size))


class ResolvedModel(task.ResolvedModel, Model):
    """The same with every default filled in, as config.yaml of a run has it."""


class Data(config.Data):
    """train, valid: names of files in task.data (with or without their endings), or splits of a dataset."""

    train: FilePath = Field(
        default="train", description="File of task.data with or without its ending, or a split of its dataset."
    )
    valid: FilePath = Field(
        default="valid",
        description="The same. Where there is none, 5 % of train are drawn.",
    )
    pack: bool = Field(default=True, description="Several documents per sample. false: one document per sample, padded.")
    reset_attention: bool | None = Field(
        default=None, description="Packed: attention and positions restart at each document. Default: sft true, lm false."
    )


class Task(finetuning.Task):
    """What is learned, from which files."""

    name: Literal["lm", "sft"] = Field(description="lm: the next token of texts. sft: the assistant's part of conversations.")
    data: FilePath = Field(
        description="Folder with train.jsonl (lm: or train.txt), or a dataset of the hub: OWNER/NAME or OWNER/NAME:CONFIG."
    )
    answers: Count = Field(default=16, description="sft: conversations of valid that the best checkpoint answers at the end.")
    max_new_tokens: Positive = Field(default=128, description="sft: longest answer, in tokens.")

    renamed: ClassVar[dict[str, str]] = {"answer_tokens": "max_new_tokens"}

    @classmethod
    def resume_keys(cls) -> Set[str]:
        return {"data", "patience", "answers", "max_new_tokens"}


class Config(finetuning.Config):
    model: Model
    data: Data
    task: Task
    lora: Lora | None = None

    @property
    def adapters(self) -> Adapters | None:
        if self.lora is None:
            return None
        targets = self.lora.targets or linear_layers(self.model)
        transposed = self.model.arch == "gpt2"  # transformers' Conv1D: weights (in, out)
        return Adapters(self.lora.rank, self.lora.alpha, self.lora.dropout, list(targets), transposed)

    def dump(self) -> dict[str, Any]:
        """As config.Config's: a section that is not there is not written, since an empty one means its defaults."""
        return {key: value for key, value in super().dump().items() if key != "lora" or value is not None}

    @classmethod
    def complete(cls, values: dict[str, Any]) -> dict[str, Any]:
        return finetuning.with_shapes(values, model_from_hf_config, HF_MODEL_TYPES, {"dropout", "init_std"})


class ResolvedConfig(Config):
    """The config of a run that was checked."""

    model: ResolvedModel


def linear_layers(model: Model) -> tuple[str, ...]:
    """What adapters may be added to: all that multiplies, but for the embedding and the output."""
    if model.arch == "gpt2":
        return ("c_attn", "c_proj", "c_fc")
    return ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


# ---- samples ---------------------------------------------------------------------------------------------------------


def dataset(cfg: Config, split: str, shuffle: bool, stack: str = "baseline") -> samples.Packed:
    """The documents of train (shuffle) or valid, tokenized and packed. BadInput for a file, a conversation or a tokenizer
    that cannot be used."""
    from common.data import tokenizer as tokenizers
    from common.paths import find

    given = cfg.data.tokenizer or (cfg.init.from_ if cfg.init.from_ != "scratch" else None)
    if given is None:
        raise BadInput("data.tokenizer: is missing, and init.from=scratch has none to take; give data.tokenizer=DIR")
    folder = find(given) if find(given).is_dir() else given
    tokenizer = tokenizers.load(folder)
    d, name = cfg.data, "train" if shuffle else "valid"
    source = samples.read(cfg.task.name, cfg.task.data, find(cfg.task.data), d.train, d.valid, for_train=shuffle)
    tokenize = _conversations if cfg.task.name == "sft" else _texts
    ids, counted, lengths, notes = tokenize(cfg, source, tokenizer, str(folder))

    within = d.pack and (cfg.task.name == "sft" if d.reset_attention is None else d.reset_attention)
    bounds = np.concatenate([[0], np.cumsum(lengths)])
    if d.pack and cfg.task.name == "lm":
        pieces = samples.windows(lengths, d.seq_len, within)
    else:
        alone = [[i] for i, length in enumerate(lengths) if length > 1]  # one token predicts nothing
        groups = samples.best_fit(lengths, d.seq_len + 1) if d.pack else alone
        cut = [int(min(length, d.seq_len + 1)) for length in lengths]
        pieces = [[(int(bounds[i]), int(bounds[i]) + cut[i]) for i in group] for group in groups]
    what = f"conversations, {counted.sum():,} answer tokens," if cfg.task.name == "sft" else f"documents, {len(ids):,} tokens,"
    is_unknown = counted & (ids == tokenizer.unk_id) if tokenizer.unk_id is not None else np.zeros(len(ids), bool)
    unknown = len(np.unique(np.searchsorted(bounds, np.flatnonzero(is_unknown), side="right")))  # documents
    if unknown:
        notes = [*notes, f"{unknown:,} of {len(lengths):,} hold targets that the vocabulary cannot write (<unk>)"]
    notes = [f"{name}: {note}" for note in [*notes, f"{len(lengths):,} {what} in {len(pieces):,} samples of {d.seq_len}"]]
    if cfg.task.name == "sft" and shuffle and not tokenizer.config.get("chat_template"):
        notes.append("the tokenizer has no chat template: the default of recipes/gpt/finetune_samples.py is used")

    content = samples.content_hash(ids, counted, np.array(lengths, np.int64))
    corpus = examples.Source(f"{cfg.task.name} {name}", content, folder, tokenizer, int(ids.max()))
    pad_id = next((i for i in (tokenizer.pad_id, tokenizer.eod_id) if i is not None), 0)
    # pipeline stages expect one length, which sequence parallelism divides by tp
    whole = d.pack or stack == "megatron" and (cfg.megatron.pp > 1 or cfg.megatron.sequence_parallel)
    notes = [*(source.notes if shuffle else []), *notes]
    order = {"seed": cfg.train.seed, "shuffle": shuffle, "notes": notes}
    return samples.Packed(corpus, ids, counted, pieces, d.seq_len, pad_id, within, whole, **order)


Tokenized = tuple[np.ndarray, np.ndarray, list[int], list[str]]  # ids, counted (N,); length of each document; notes


def _texts(cfg: Config, source: samples.Documents, tokenizer: Tokenizer, folder: str) -> Tokenized:
    """Every token is a target; an end of document stands between two documents."""
    if len(source.documents) > 1 and tokenizer.eod_id is None:
        raise BadInput(f"{folder}: its tokenizer has no token that ends a text, to stand between documents; give one text")
    texts = [_encode(tokenizer, text) for text in source.documents]
    ends = [[tokenizer.eod_id]] * (len(texts) - 1) + [[]]
    documents = [np.array([*ids, *end], np.int32) for ids, end in zip(texts, ends, strict=True)]
    ids = np.concatenate(documents)
    if len(ids) < 2:
        raise BadInput(f"{source.where[0]}: {len(ids)} token, and two are needed to predict one; give more text")
    return ids, np.ones(len(ids), bool), [len(d) for d in documents if len(d)], []


def _encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of one text, whose pieces are shared among the processor's cores."""
    return [i for ids in tokenizer.encode_batch(list(tokenizer.pieces(text, 2**16))) for i in ids]


def _conversations(cfg: Config, source: samples.Documents, tokenizer: Tokenizer, folder: str) -> Tokenized:
    """The tokens of answers are targets. The notes say what is cut to seq_len, and what is left out."""
    template = samples.Template(tokenizer, folder)
    usable = [i for i, chat in enumerate(source.documents) if not template.spells_a_mark(chat)]
    encoded = template.encode([source.documents[i] for i in usable], [source.where[i] for i in usable])
    room = cfg.data.seq_len + 1
    chats = [(ids[:room], counted[:room]) for ids, counted in encoded if counted[:room].any()]
    cut = sum(len(ids) > room and bool(counted[:room].any()) for ids, counted in encoded)
    endless = sum(int(ids[counted][-1]) not in template.special_ids for ids, counted in encoded if counted.any())
    reasons = {
        f"conversations are longer than data.seq_len={cfg.data.seq_len} and are cut there": cut,
        f"conversations are left out: no answer begins within data.seq_len={cfg.data.seq_len}": len(encoded) - len(chats),
        "conversations are left out: a message spells a special token of the tokenizer": len(source.documents) - len(usable),
        "conversations end without a special token (the chat template writes none): a model finetuned on them does not stop by "
        "itself": endless,
    }
    notes = [f"{count:,} of {len(source.documents):,} {reason}" for reason, count in reasons.items() if count]
    if not chats:
        raise BadInput([f"task.data={cfg.task.data}: no conversation is left to learn from", *notes])
    lengths = [len(ids) for ids, _ in chats]
    return np.concatenate([ids for ids, _ in chats]), np.concatenate([counted for _, counted in chats]), lengths, notes


# ---- evaluation and export -------------------------------------------------------------------------------------------


def selection_metric(cfg: Config) -> str:
    """The metric that decides which checkpoint is the best."""
    return "loss"


def validation_metrics(run: Run, predictions: None) -> dict[str, float]:
    """No metric besides the loss."""
    return {}


def best_results(run: Run, loss: float, n: int, predictions: None) -> finetuning.Results:
    """The mean loss over n targets, and the perplexity."""
    return finetuning.Results({"loss": loss, "perplexity": math.exp(min(loss, 50.0))}, n)


def before_start(run: Run) -> None:
    """Rank 0: what OUT/tokenizer, and so the export, has besides the tokenizer. The chat template that the run learns, and in
    generation_config.json the ids that end a text: those of the folder that it starts from, and those that end answers."""
    from common.data import tokenizer as tokenizers
    from common.paths import find

    cfg, folder = finetuning.settings(run, Config), run.out / "tokenizer"
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return
    if cfg.task.name == "sft":
        values = json.loads(path.read_text(encoding="utf-8"))
        values.setdefault("chat_template", samples.DEFAULT_TEMPLATE)
        path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    tokenizer, start = tokenizers.load(folder), find(cfg.init.from_)
    # ids of a folder with another tokenizer mean other tokens
    same_tokenizer = run.tokenizer is not None and start == Path(run.tokenizer)
    generation = pretrained.generation_config(start) if same_tokenizer else {}
    ends = set(generation.get("eos_token_id", [])) | ({tokenizer.eod_id} if tokenizer.eod_id is not None else set())
    if isinstance(run.train, samples.Packed) and cfg.task.name == "sft":
        last = run.train.counted & ~np.append(run.train.counted[1:], False)  # of each answer
        ends |= set(run.train.ids[last].tolist()) & samples.Template(tokenizer, str(folder)).special_ids
    if ends:
        write_json(folder / "generation_config.json", generation | {"eos_token_id": sorted(ends)})


# ---- answers of the best checkpoint ----------------------------------------------------------------------------------


class Question(NamedTuple):
    messages: samples.Chat  # before the answer
    reference: str
    ids: list[int]  # of the messages, and of what the template writes before an answer
    ends: set[int]  # ids that end it


def questions(cfg: ResolvedConfig, template: samples.Template) -> list[Question]:
    """The first task.answers conversations of valid, each up to its last answer, without those that training leaves out, that
    leave the model no room for an answer, or whose first part the template does not write alone."""
    from common.paths import find

    d, asked = cfg.data, list[Question]()
    source = samples.read("sft", cfg.task.data, find(cfg.task.data), d.train, d.valid, for_train=False)
    for chat, at in zip(source.documents, source.where, strict=True):
        if len(asked) == cfg.task.answers:
            break
        last = max(i for i, message in enumerate(chat) if message["role"] == "assistant")
        if not last or template.spells_a_mark(chat):
            continue
        try:
            ids, ends = template.ask(chat[:last], at), template.ends(chat[: last + 1], at)
        except BadInput:  # no reason for a trained run to fail
            continue
        if ends is not None and len(ids) < cfg.model.positions:
            asked.append(Question(chat[:last], chat[last]["content"], ids, ends))
    return asked


def after_export(run: Run, ranks: Ranks) -> None:
    """Answer `questions` with the export in plain transformers, greedily: OUT/predictions/valid.jsonl, one line each. Each
    question is answered alone, by one rank: 2 ranks write what 1 writes. Does nothing where the answers of this export are
    there already."""
    import torch
    import torch.distributed as dist
    import transformers

    from common.data import tokenizer as tokenizers

    cfg = finetuning.settings(run, ResolvedConfig)
    t, folder, path = cfg.task, run.out / "hf", run.out / "predictions/valid.jsonl"
    if t.name != "sft" or not t.answers or not run.is_last_phase:
        return
    step = export.exported_step(folder)
    template = samples.Template(tokenizers.load(folder), str(folder))
    asked = questions(cfg, template)
    if step is None or not asked or _is_answered(path, step, len(asked)):
        return
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()  # a folder may name sampling that is not used here
    net: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    net = net.to(ranks.device).eval()
    stops = pretrained.write_plainly(net)
    written = torch.zeros(len(asked), t.max_new_tokens, dtype=torch.int64, device=ranks.device)  # ids + 1; 0: none
    report = finetuning.progress(len(asked), 1, ranks)
    for number in range(ranks.rank, len(asked), ranks.world):
        if report(number):
            break
        question = asked[number]
        ids = torch.tensor([question.ids], device=ranks.device)  # (1, T)
        output = net.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0,
            eos_token_id=sorted(question.ends | stops) or None,
            max_new_tokens=min(t.max_new_tokens, cfg.model.positions - len(question.ids)),
        )[0, ids.shape[1] :]  # fmt: skip
        written[number, : len(output)] = output + 1
    dist.all_reduce(written)  # each row plus zeros: exact
    finetuning.end_if_asked(ranks, step)
    if ranks.rank == 0:
        answers = [template.backend.decode([i - 1 for i in row if i]) for row in written.tolist()]
        lines = [
            {"step": step, "messages": [*q.messages, {"role": "assistant", "content": text}], "reference": q.reference}
            for q, text in zip(asked, answers, strict=True)
        ]
        path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
        print(f"answers   {path}", flush=True)


def _is_answered(path: Path, step: int, count: int) -> bool:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")[:-1]
        return len(lines) == count and json.loads(lines[0])["step"] == step
    except (OSError, ValueError, TypeError, KeyError, RecursionError):  # not there, or damaged: they are written again
        return False
