"""Finetuning of GPT: on texts (`lm`), or on conversations, where it learns the assistant's part (`sft`).

This is a family module like task.py, from which it imports what does not change. finetune_samples.py reads and packs the data.
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

from common.checkpoints import integrity
from common.config import Count, FilePath, Positive
from common.data import examples
from common.data.tokenizer import Tokenizer
from common.errors import BadInput
from common.huggingface import pretrained
from common.json_files import write_json
from common.launch.processes import Ranks
from common.training import finetuning
from common.training.lora import Adapters, Lora

from . import finetune_samples as samples, task
from .task import (  # the same in pretraining and finetuning
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
    """The architecture. Shapes that the config does not give come from init.from."""

    def layout_problems(self, cfg: Any, stack: str) -> Iterator[str]:
        yield from super().layout_problems(cfg, stack)
        if cfg.lora is None:
            return
        if stack == "megatron":
            yield (
                "lora on megatron: Megatron Core fuses query, key and value, and gate and up, into one layer each, but peft "
                "gives each an adapter of its own; use deepspeed or baseline, or leave out the section lora"
            )
        if stack == "deepspeed" and cfg.deepspeed.tp > 1:
            yield f"lora with deepspeed.tp={cfg.deepspeed.tp}: AutoTP does not split adapters; use deepspeed.tp=1"
        if stack == "deepspeed" and cfg.deepspeed.pp > 1:
            yield f"lora with deepspeed.pp={cfg.deepspeed.pp}: is not tested together; use deepspeed.pp=1"
        layers = linear_layers(self)
        for target in cfg.lora.targets or ():
            if target not in layers:
                yield f"lora.targets: the model has no linear layer {target!r}; it has {', '.join(layers)}"

    def has_mask(self, cfg: Any) -> bool:
        return restarts(cfg)

    def resolve(self, cfg: Any, tokenizer_size: int | None) -> ResolvedModel:
        return ResolvedModel(**self.filled(cfg, tokenizer_size))


class ResolvedModel(task.ResolvedModel, Model):
    """A model with all defaults filled in, as in the config.yaml of a run."""


class Data(finetuning.Data):
    """train and valid name files in task.data (with or without their endings), or splits of a dataset."""

    train: FilePath = Field(
        default="train", description="File of task.data with or without its ending, or a split of its dataset."
    )
    valid: FilePath = Field(
        default="valid",
        description="The same, for validation. If there is none, 5 % of train are drawn.",
    )
    pack: bool = Field(default=True, description="Several documents per sample. false: one document per sample, padded.")
    reset_attention: bool | None = Field(
        default=None, description="With pack: attention and positions restart at each document. Default: sft true, lm false."
    )


class Task(finetuning.Task):
    """What the model learns, and from which files."""

    name: Literal["lm", "sft"] = Field(description="lm: the next token of texts. sft: the assistant's part of conversations.")
    data: FilePath = Field(
        description="Folder with train.jsonl (lm: or train.txt), or a dataset on the hub: OWNER/NAME or OWNER/NAME:CONFIG."
    )
    answers: Count = Field(
        default=16, description="sft: number of conversations in valid that the best checkpoint answers at the end."
    )
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
        """As config.Config.dump, without the lora section if there is none: an empty section would mean its defaults."""
        return {key: value for key, value in super().dump().items() if key != "lora" or value is not None}

    @classmethod
    def complete(cls, values: dict[str, Any]) -> dict[str, Any]:
        return finetuning.with_shapes(values, model_from_hf_config, HF_MODEL_TYPES, {"dropout", "init_std"})


class ResolvedConfig(Config):
    """A config that has been checked, with its model resolved."""

    model: ResolvedModel


def linear_layers(model: Model) -> tuple[str, ...]:
    """The layers that adapters can be added to: all linear layers except the embedding and the output."""
    if model.arch == "gpt2":
        return ("c_attn", "c_proj", "c_fc")
    return ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


# ---- samples ---------------------------------------------------------------------------------------------------------


def restarts(cfg: Config) -> bool:
    """Do attention and positions restart at each document of a sample?"""
    d = cfg.data
    return d.pack and (cfg.task.name == "sft" if d.reset_attention is None else d.reset_attention)


def dataset(cfg: Config, split: str, shuffle: bool, stack: str = "baseline") -> samples.Packed:
    """The documents of train (shuffle=True) or valid, tokenized and packed.

    Raises BadInput for a file, a conversation or a tokenizer that cannot be used.
    """
    from common.data import tokenizer as tokenizers
    from common.paths import find

    name_or_dir = cfg.data.tokenizer or (cfg.init.from_ if cfg.init.from_ != "scratch" else None)
    if name_or_dir is None:
        raise BadInput("data.tokenizer: is missing, and init.from=scratch does not provide one; give data.tokenizer=DIR")
    folder = find(name_or_dir) if find(name_or_dir).is_dir() else name_or_dir
    tokenizer = tokenizers.load(folder)
    d, split_name = cfg.data, "train" if shuffle else "valid"
    source = samples.read(cfg.task.name, cfg.task.data, find(cfg.task.data), d.train, d.valid, for_train=shuffle)
    tokenize = _conversations if cfg.task.name == "sft" else _texts
    ids, is_target, lengths, notes = tokenize(cfg, source, tokenizer, str(folder))

    restart = restarts(cfg)
    bounds = np.concatenate([[0], np.cumsum(lengths)])
    if d.pack and cfg.task.name == "lm":
        pieces = samples.windows(lengths, d.seq_len, restart)
    else:
        alone = [[i] for i, length in enumerate(lengths) if length > 1]  # one token predicts nothing
        groups = samples.best_fit(lengths, d.seq_len + 1) if d.pack else alone
        truncated = [int(min(length, d.seq_len + 1)) for length in lengths]
        pieces = [[(int(bounds[i]), int(bounds[i]) + truncated[i]) for i in group] for group in groups]
    content = (
        f"conversations, {is_target.sum():,} answer tokens," if cfg.task.name == "sft" else f"documents, {len(ids):,} tokens,"
    )
    is_unknown = is_target & (ids == tokenizer.unk_id) if tokenizer.unk_id is not None else np.zeros(len(ids), bool)
    unknown = len(np.unique(np.searchsorted(bounds, np.flatnonzero(is_unknown), side="right")))  # documents
    if unknown:
        notes = [*notes, f"{unknown:,} of {len(lengths):,} have targets that the vocabulary lacks (<unk>)"]
    notes.append(f"{len(lengths):,} {content} in {len(pieces):,} samples of {d.seq_len}")
    notes = [f"{split_name}: {note}" for note in notes]
    if cfg.task.name == "sft" and shuffle and not tokenizer.config.get("chat_template"):
        notes.append(f"the tokenizer has no chat template: the default of recipes/{FAMILY}/finetune_samples.py is used")

    content_hash = samples.content_hash(ids, is_target, np.array(lengths, np.int64))
    corpus = examples.Source(f"{cfg.task.name} {split_name}", content_hash, folder, tokenizer, int(ids.max()))
    pad_id = next((i for i in (tokenizer.pad_id, tokenizer.eod_id) if i is not None), 0)
    # pipeline stages expect samples of one length; Megatron's sequence parallelism divides that length by tp, Ulysses by sp
    is_pipeline = stack != "baseline" and getattr(cfg, stack).pp > 1
    is_divided = stack == "megatron" and cfg.megatron.sequence_parallel or stack == "deepspeed" and cfg.deepspeed.sp > 1
    pad_to_seq_len = d.pack or is_pipeline or is_divided
    notes = [*(source.notes if shuffle else []), *notes]
    order = {
        "seed": cfg.train.seed, "shuffle": shuffle, "notes": notes, "pad_multiple": finetuning.pad_multiple(cfg, stack),
        "length_window": 0 if d.pack else d.length_window, "global_batch": cfg.train.global_batch,  # packed samples are full
    }  # fmt: skip
    return samples.Packed(corpus, ids, is_target, pieces, d.seq_len, pad_id, restart, pad_to_seq_len, **order)


Tokenized = tuple[np.ndarray, np.ndarray, list[int], list[str]]  # ids (N,), mask of targets (N,), document lengths, notes


def _texts(cfg: Config, source: samples.Documents, tokenizer: Tokenizer, folder: str) -> Tokenized:
    """Tokenize texts. Every token is a target, and end-of-document tokens separate the documents."""
    if len(source.documents) > 1 and tokenizer.eod_id is None:
        raise BadInput(f"{folder}: its tokenizer has no end-of-document token to separate documents; give a single text")
    texts = [_encode(tokenizer, text) for text in source.documents]
    ends = [[tokenizer.eod_id]] * (len(texts) - 1) + [[]]
    documents = [np.array([*ids, *end], np.int32) for ids, end in zip(texts, ends, strict=True)]
    ids = np.concatenate(documents)
    if len(ids) < 2:
        raise BadInput(f"{source.locations[0]}: {len(ids)} token, but predicting one needs two; give more text")
    return ids, np.ones(len(ids), bool), [len(d) for d in documents if len(d)], []


def _encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """The token ids of one text. Pieces of the text are tokenized in parallel on the processor's cores."""
    return [i for ids in tokenizer.encode_batch(list(tokenizer.pieces(text, 2**16))) for i in ids]


def _conversations(cfg: Config, source: samples.Documents, tokenizer: Tokenizer, folder: str) -> Tokenized:
    """Tokenize conversations. The tokens of answers are targets. The notes say what is truncated and what is left out."""
    template = samples.Template(tokenizer, folder)
    usable = [i for i, chat in enumerate(source.documents) if not template.contains_special_token(chat)]
    encoded = template.encode([source.documents[i] for i in usable], [source.locations[i] for i in usable])
    limit = cfg.data.seq_len + 1
    chats = [(ids[:limit], is_target[:limit]) for ids, is_target in encoded if is_target[:limit].any()]
    truncated = sum(len(ids) > limit and bool(is_target[:limit].any()) for ids, is_target in encoded)
    endless = sum(int(ids[is_target][-1]) not in template.special_ids for ids, is_target in encoded if is_target.any())
    reasons = {
        f"conversations are longer than data.seq_len={cfg.data.seq_len} and are truncated": truncated,
        f"conversations are left out: no answer begins within data.seq_len={cfg.data.seq_len}": len(encoded) - len(chats),
        "conversations are left out: a message contains a special token of the tokenizer": len(source.documents) - len(usable),
        "conversations end without a special token, since the chat template has none there: a model finetuned on them does not "
        "stop by itself": endless,
    }
    notes = [f"{count:,} of {len(source.documents):,} {reason}" for reason, count in reasons.items() if count]
    if not chats:
        raise BadInput([f"task.data={cfg.task.data}: no conversation is left to learn from", *notes])
    lengths = [len(ids) for ids, _ in chats]
    return np.concatenate([ids for ids, _ in chats]), np.concatenate([is_target for _, is_target in chats]), lengths, notes


# ---- evaluation and export -------------------------------------------------------------------------------------------


def selection_metric(cfg: Config) -> str:
    """The metric that selects the best checkpoint."""
    return "loss"


def validation_metrics(run: Run, predictions: None) -> dict[str, float]:
    """None: the loss is the only metric."""
    return {}


def best_results(run: Run, loss: float, n: int, predictions: None) -> finetuning.Results:
    """The mean loss over n targets, and the perplexity."""
    return finetuning.Results({"loss": loss, "perplexity": math.exp(min(loss, 50.0))}, n)


def before_start(run: Run) -> None:
    """On rank 0: add to OUT/tokenizer, and thereby to the export, what generation needs besides the tokenizer.

    This is the chat template that the run uses and, in generation_config.json, the ids that end a text: those of the folder
    that the run starts from, and those that end answers.
    """
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
    # in a folder with another tokenizer, the same ids stand for other tokens
    same_tokenizer = run.tokenizer is not None and start == Path(run.tokenizer)
    generation = pretrained.generation_config(start) if same_tokenizer else {}
    ends = set(generation.get("eos_token_id", [])) | ({tokenizer.eod_id} if tokenizer.eod_id is not None else set())
    if isinstance(run.train, samples.Packed) and cfg.task.name == "sft":
        last = run.train.is_target & ~np.append(run.train.is_target[1:], False)  # the last token of each answer
        ends |= set(run.train.ids[last].tolist()) & samples.Template(tokenizer, str(folder)).special_ids
    if ends:
        write_json(folder / "generation_config.json", generation | {"eos_token_id": sorted(ends)})


# ---- answers of the best checkpoint ----------------------------------------------------------------------------------


class Question(NamedTuple):
    messages: samples.Chat  # those before the answer
    reference: str
    ids: list[int]  # tokens of the messages and of the text that the template writes before an answer
    end_ids: set[int]  # tokens that end the answer


def questions(cfg: ResolvedConfig, template: samples.Template) -> list[Question]:
    """The first task.answers conversations of valid, each up to its last answer.

    Skipped are conversations that training leaves out, that leave no room for an answer in the model's positions, or whose
    beginning the template refuses to write alone.
    """
    from common.paths import find

    d, selected = cfg.data, list[Question]()
    source = samples.read("sft", cfg.task.data, find(cfg.task.data), d.train, d.valid, for_train=False)
    for chat, location in zip(source.documents, source.locations, strict=True):
        if len(selected) == cfg.task.answers:
            break
        last = max(i for i, message in enumerate(chat) if message["role"] == "assistant")
        if not last or template.contains_special_token(chat):
            continue
        try:
            ids, end_ids = template.prompt_ids(chat[:last], location), template.end_ids(chat[: last + 1], location)
        except BadInput:  # must not fail a run whose training is done
            continue
        if end_ids is not None and len(ids) < cfg.model.positions:
            selected.append(Question(chat[:last], chat[last]["content"], ids, end_ids))
    return selected


def after_export(run: Run, ranks: Ranks) -> None:
    """Answer `questions` with the export in plain transformers and write the answers to OUT/predictions/valid.jsonl.

    Decoding is greedy. Each question is answered alone, by one rank, so the answers do not depend on the number of ranks. If
    the file already has the answers of this export, nothing happens.
    """
    import torch
    import torch.distributed as dist
    import transformers

    from common.data import tokenizer as tokenizers

    cfg = finetuning.settings(run, ResolvedConfig)
    t, folder, path = cfg.task, run.out / "hf", run.out / "predictions/valid.jsonl"
    if t.name != "sft" or not t.answers or not run.is_last_phase:
        return
    step = integrity.exported_step(folder)
    template = samples.Template(tokenizers.load(folder), str(folder))
    selected = questions(cfg, template)
    if step is None or not selected or _is_answered(path, step, len(selected)):
        return
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()  # else it warns about sampling settings, which are not used here
    net: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    net = net.to(ranks.device).eval()
    stop_ids = pretrained.reset_generation_config(net)
    written = torch.zeros(len(selected), t.max_new_tokens, dtype=torch.int64, device=ranks.device)  # ids + 1; 0: no token
    with finetuning.progress(len(selected), 1, ranks) as report:
        for number in range(ranks.rank, len(selected), ranks.world):
            if report(number):
                break
            question = selected[number]
            ids = torch.tensor([question.ids], device=ranks.device)  # (1, T)
            output = net.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0,
                eos_token_id=sorted(question.end_ids | stop_ids) or None,
                max_new_tokens=min(t.max_new_tokens, cfg.model.positions - len(question.ids)),
            )[0, ids.shape[1] :]  # fmt: skip
            written[number, : len(output)] = output + 1
    dist.all_reduce(written)  # exact: the other ranks add zeros to a row
    finetuning.exit_if_signaled(ranks, step)
    if ranks.rank == 0:
        answers = [template.backend.decode([i - 1 for i in row if i]) for row in written.tolist()]
        lines = [
            {"step": step, "messages": [*q.messages, {"role": "assistant", "content": text}], "reference": q.reference}
            for q, text in zip(selected, answers, strict=True)
        ]
        path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
        print(f"answers   {path}", flush=True)


def _is_answered(path: Path, step: int, count: int) -> bool:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")[:-1]
        return len(lines) == count and json.loads(lines[0])["step"] == step
    except (OSError, ValueError, TypeError, KeyError, RecursionError):  # missing or damaged: the answers are written again
        return False
