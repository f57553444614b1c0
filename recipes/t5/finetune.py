"""Finetuning of T5 on text-to-text tasks: translation, summaries, GLUE and SQuAD as text, or your own pairs.

A family module like task.py, from which it imports what does not change. The tasks are those of common/evaluation/text.py.
"""

from __future__ import annotations

import json
from collections.abc import Set
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from common.checkpoints import integrity
from common.config import FilePath, Positive, Share
from common.data import examples
from common.errors import BadInput
from common.evaluation import metrics, text
from common.huggingface import pretrained
from common.json_files import write_json
from common.launch.processes import Ranks
from common.preflight import Run, data_notes
from common.training import finetuning

from . import finetune_samples, task
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
    Name = str
else:  # a type checker cannot read computed names
    Name = Literal[*text.NAMES]


class Model(task.Model):
    """The architecture. Shapes that the config does not give come from init.from."""

    dropout: Share = Field(default=0.1, description="Dropout of embedding, attention, MLP, residual and last norm.")

    def resolve(self, cfg: Any, tokenizer_size: int | None) -> ResolvedModel:
        return ResolvedModel(**self.filled(cfg, tokenizer_size))


class ResolvedModel(task.ResolvedModel, Model):
    """A model with all defaults filled in, as in the config.yaml of a run."""


class Data(finetuning.Data):
    """Splits of the task's dataset, and maximum lengths."""

    train: Literal["train"] = Field(default="train", description="Split that is trained on.")
    valid: Literal["dev"] = Field(default="dev", description="Split on which the best checkpoint is chosen.")
    seq_len: Positive = Field(default=512, description="Tokens of the input; longer inputs are truncated.")
    target_len: Positive = Field(
        default=128, description="Tokens of the target; longer targets are truncated. Also the limit of generated texts."
    )

    @classmethod
    def phase_keys(cls) -> Set[str]:
        return {"seq_len", "target_len"}

    @property
    def sample_tokens(self) -> int:
        return self.seq_len + self.target_len


class Task(finetuning.Task):
    """The task, its files, and how texts are generated for its scores."""

    name: Name = Field(description="Translation, summaries, GLUE and SQuAD as text, or your own pairs.")
    data: FilePath | None = Field(default=None, description="Folder of the task's files. Default: the dataset on the hub.")
    prefix: str | None = Field(
        default=None, description="Text before every input. Default: T5's for the task (arXiv:1910.10683, appendix D)."
    )
    source: FilePath | None = Field(
        default=None, description="Column of the files, or ending of a file, that holds the inputs. Default: the task's."
    )
    target: FilePath | None = Field(default=None, description="The same for the targets.")
    train_examples: Positive | None = Field(
        default=None, description="Number of training examples to use, drawn with seed 1234. Default: all."
    )
    split: Literal["dev", "test"] = Field(default="dev", description="Split on which the best checkpoint is scored at the end.")
    beams: Positive = Field(default=4, description="Beams of the beam search (arXiv:1910.10683, section 3.1.4).")
    length_penalty: Annotated[float, Field(ge=0)] = Field(
        default=0.6, description="Exponent of the length in a beam's score (arXiv:1910.10683, section 3.1.2 and appendix E)."
    )
    generation_batch_size: Positive = Field(default=32, description="Inputs per batch of generation.")

    renamed: ClassVar[dict[str, str]] = {"write_batch": "generation_batch_size"}

    @classmethod
    def resume_keys(cls) -> Set[str]:
        return {"data", "patience", "split", "beams", "length_penalty", "generation_batch_size"}


class Config(finetuning.Config):
    model: Model
    data: Data = Data()
    task: Task

    @classmethod
    def complete(cls, values: dict[str, Any]) -> dict[str, Any]:
        return finetuning.with_shapes(values, task.model_from_hf_config, HF_MODEL_TYPES, {"dropout"})


class ResolvedConfig(Config):
    """A config that has been checked, with its model resolved."""

    model: ResolvedModel


def model_from_hf_config(config: dict[str, Any]) -> ResolvedModel:
    """The `model` section for the config.json of a folder. Raises KeyError if a shape is missing."""
    return ResolvedModel(**task.model_from_hf_config(config).model_dump())


# ---- examples --------------------------------------------------------------------------------------------------------

SUBSET_SEED = 1234


def dataset(cfg: Config, split: str, shuffle: bool, stack: str = "baseline") -> finetune_samples.Samples:
    """The tokenized examples of a split. Raises BadInput for a task, a file or a tokenizer that cannot be used."""
    from common.data import tokenizer as tokenizers
    from common.paths import find

    given = cfg.data.tokenizer or (cfg.init.from_ if cfg.init.from_ != "scratch" else None)
    if given is None:
        raise BadInput("data.tokenizer: is missing, and init.from=scratch does not provide one; give data.tokenizer=DIR")
    folder = find(given) if find(given).is_dir() else given
    tokenizer = tokenizers.load(folder)
    if tokenizer.eod_id is None:
        raise BadInput(f"{given}: its tokenizer has no end of sequence; T5 takes a SentencePiece tokenizer with </s>")
    pairs = text.each_reference(read(cfg, split)) if cfg.task.name in text.PAIRS else read(cfg, split)
    if not shuffle:
        read(cfg, cfg.task.split)  # raises BadInput before anything starts
    size, used, notes = len(pairs.inputs), list(range(len(pairs.inputs))), list(pairs.notes)
    if shuffle and cfg.task.train_examples:
        if cfg.task.train_examples > size:
            raise BadInput(f"task.train_examples={cfg.task.train_examples}: train has only {size:,}; give at most that")
        chosen = np.random.default_rng(SUBSET_SEED).permutation(size)[: cfg.task.train_examples]
        notes.append(f"{len(chosen):,} of {size:,} examples of train, drawn by seed {SUBSET_SEED}")
        used = np.sort(chosen).tolist()
    sources, targets = (
        finetune_samples.encoded(tokenizer, [texts[i] for i in used]) for texts in (pairs.inputs, pairs.targets)
    )
    d = cfg.data
    for what, key, limit, (flat, starts) in (
        ("inputs", "seq_len", d.seq_len, sources),
        ("targets", "target_len", d.target_len, targets),
    ):
        truncated = int((np.diff(starts) >= limit).sum())
        notes += [f"{truncated:,} {what} of {split} are truncated to data.{key}={limit}"] if truncated else []
        unknown = np.flatnonzero(flat == tokenizer.unk_id) if tokenizer.unk_id is not None else np.empty(0, np.int64)
        count = len(np.unique(np.searchsorted(starts, unknown, side="right")))
        notes += [text.unknown_note(count, len(used), f"{what} of {split}")] if count else []
    largest = max(int(flat.max(initial=0)) for flat, _ in (sources, targets))
    source = examples.Source(f"{cfg.task.name} {split}", pairs.hash, folder, tokenizer, largest)
    return finetune_samples.Samples(
        source, (sources, targets), eos=tokenizer.eod_id, pad=tokenizer.pad_id or 0, seq_len=cfg.data.seq_len,
        target_len=cfg.data.target_len, seed=cfg.train.seed, shuffle=shuffle, notes=notes,
        length_window=cfg.data.length_window, global_batch=cfg.train.global_batch,
        pad_multiple=finetuning.pad_multiple(cfg, stack),
    )  # fmt: skip


def read(cfg: Config, split: str) -> text.Examples:
    from common.paths import find

    t = cfg.task
    return text.read(t.name, find(t.data) if t.data else None, split, t.prefix, t.source, t.target)


# ---- evaluation and export -------------------------------------------------------------------------------------------


def selection_metric(cfg: Config) -> str:
    """The metric that selects the best checkpoint."""
    return "loss"


def validation_metrics(run: Run, predictions: None) -> dict[str, float]:
    """None besides the loss: the published scores need generated texts."""
    return {}


def best_results(run: Run, loss: float, n: int, predictions: None) -> None:
    """None: `after_export` scores the best checkpoint at the end of the run."""


def before_start(run: Run) -> None:
    """Do nothing: the tokenizer is exported unchanged."""


def after_export(run: Run, ranks: Ranks) -> None:
    """Score the export in plain transformers, unless its scores are already in OUT/eval.json.

    The outputs for the inputs of task.split are written to OUT/predictions/SPLIT.txt, one per line, and for GLUE and SQuAD also
    in the formats of these benchmarks. The scores are written to OUT/eval.json.
    """
    import torch
    import transformers

    if not run.is_last_phase:
        return
    cfg = finetuning.settings(run, Config)
    t, folder = cfg.task, run.out / "hf"
    step = integrity.exported_step(folder)
    search = text.Search(t.beams, t.length_penalty, cfg.data.target_len, t.generation_batch_size)
    how = f"{t.name} {t.split}, step {step}, the best by dev loss, {search}"
    if step is None or _is_scored(run.out / "eval.json", how):
        return
    pairs = read(cfg, t.split)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()  # else it warns that T5 1.1 is not tied
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    net = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=torch.float32).to(ranks.device).eval()
    pretrained.reset_generation_config(net)
    with finetuning.progress(len(pairs.inputs), t.generation_batch_size, ranks) as report:
        written = text.write(net, tokenizer, pairs.inputs, cfg.data.seq_len, search, ranks, report)
    finetuning.exit_if_signaled(ranks, step)
    if ranks.rank == 0:
        (run.out / "predictions").mkdir(exist_ok=True)
        files = {f"{t.split}.txt": "\n".join(written) + "\n"} | text.files(t.name, written, pairs)
        for file, content in files.items():
            (run.out / "predictions" / file).write_text(content, encoding="utf-8")
        known = [*data_notes(run.train, run.valid), *text.unknown(tokenizer, pairs.targets, t.split)]
        notes = "".join(f"; {note}" for note in dict.fromkeys(known))
        counts = text.counts(t.name, len(written), pairs)
        rows = [
            metrics.row(t.name, name, value, counts.get(name, len(written)), f"{how}; {computation}{notes}")
            for name, value, computation in text.scores(t.name, written, pairs, tokenizer)
        ]
        write_json(run.out / "eval.json", rows)
        print("\n".join(f"{t.split:<9} {row['metric']} {row['value']:.4f}  {row['protocol']}" for row in rows), flush=True)


def _is_scored(path: Path, how: str) -> bool:
    try:
        return any(row["protocol"].startswith(how) for row in json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):  # missing or damaged
        return False
