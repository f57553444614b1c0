"""BERT with a head for a class or a score of one text or two: GLUE (Devlin et al., arXiv:1810.04805, section 4.1).

A task module as task.py is: what it leaves out it has from there. The head is transformers' own: dropout and a linear layer on
the pooled [CLS]. Letters in shapes: B samples, T positions, L labels (1 for a score).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import model_validator

from common import batches, config, examples
from common.config import NonEmpty, Positive, Section, Share
from common.errors import BadInput
from common.evaluation import glue

from . import samples, task
from .task import FAMILY, MODEL_TYPES, decays, hf_type, stored_names  # noqa: F401 (what stays as it is)

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

ROUND = 8  # a micro batch is padded to its longest example, rounded up to a multiple of this


class Model(task.Model):
    """Its shapes come from init.from where the config gives none."""

    labels: Positive | None = None  # as the task has them; 1 for a score
    pair_head: bool | None = False  # of pretraining
    dropout: Share = 0.1

    def head_problems(self, cfg: Config) -> Iterator[str]:
        if (self.positions or cfg.data.seq_len) < cfg.data.seq_len:
            yield f"data.seq_len={cfg.data.seq_len}: the model has {self.positions} positions; give at most {self.positions}"

    def resolve(self, cfg: Config, tokenizer_size: int | None) -> Model:
        labels = len(glue.TASKS[cfg.task.name].labels) or 1
        return super().resolve(cfg, tokenizer_size).model_copy(update={"labels": labels})

    def parameters(self) -> int:
        h = self.hidden
        mlm_head = h * h + h + 2 * h + self.vocab_size
        return super().parameters() - mlm_head + h * h + h + self.labels * (h + 1)


class Data(config.Data):
    train: str = "train"  # splits of the task
    valid: NonEmpty | None = "dev"
    seq_len: Positive = 128  # longer examples are cut, the longer of two texts first


class Task(Section):
    name: Literal[*glue.TASKS]  # common/evaluation/glue.py
    data: NonEmpty | None = None  # folder of its files; default: the hub
    train_examples: Positive | None = None  # a fixed part of train, drawn by seed 1234; default: all
    patience: Positive | None = None  # evaluations without a better one after which the run ends; default: never


class Config(config.Config):
    model: Model
    data: Data = Data()
    task: Task

    @model_validator(mode="before")
    @classmethod
    def _shapes_of_the_folder(cls, values: Any) -> Any:
        """model from init.from, a Hugging Face folder or a run; what the config says of it counts more."""
        start = (values.get("init") or {}).get("from") if isinstance(values, dict) else None
        if not isinstance(start, str) or start == "scratch":
            return values
        folder = hf_folder(start)
        try:
            known = task.model_of(json.loads((folder / "config.json").read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError):
            return values  # told by common/run.py
        shapes = known.model_dump(exclude={"pair_head", "dropout", "init_std"})
        return values | {"model": shapes | (values.get("model") or {}), "init": {"from": str(folder)}}


def hf_folder(start: str) -> Path:
    """Of init.from: the folder itself, or the export of a run."""
    from common.run import find

    folder = find(start)
    return folder / "hf" if (folder / "run.json").is_file() else folder


# ---- examples --------------------------------------------------------------------------------------------------------


class Samples(examples.Examples):
    """Texts as BERT takes them: [CLS] first [SEP], or [CLS] first [SEP] second [SEP]."""

    def __init__(self, source: examples.Source, ids: list[list[list[int]]], labels: np.ndarray, special: samples.Special,
                 seq_len: int, whole: bool, **order: Any):  # fmt: skip
        super().__init__(source, len(labels), **order)
        self.ids, self.labels, self.special, self.seq_len, self.whole = ids, labels, special, seq_len, whole

    def rows(self, numbers: Any) -> batches.Rows:
        """tokens, token_types (B, T) int64; lengths (B,) int64; labels (B,); loss_mask (B,) bool: counts; places (B,) int64.

        T: the longest of these rounded up, or seq_len where every batch must have one length (pipeline stages)."""
        places = self.locate(numbers)
        pieces = [cut([column[i] for column in self.ids], self.seq_len) for i in places.tolist()]
        lengths = np.array([sum(map(len, piece)) + len(piece) + 1 for piece in pieces])
        longest = self.seq_len if self.whole else min(self.seq_len, -(-int(lengths.max()) // ROUND) * ROUND)
        tokens = np.full((len(places), longest), self.special.pad, np.int64)
        types = np.zeros_like(tokens)
        for row, piece in enumerate(pieces):
            ids = [self.special.cls, *piece[0], self.special.sep]
            first = len(ids)
            for more in piece[1:]:
                ids += [*more, self.special.sep]
            tokens[row, : len(ids)] = ids
            types[row, first : len(ids)] = 1
        return {
            "tokens": tokens, "token_types": types, "lengths": lengths, "labels": self.labels[places],
            "loss_mask": np.ones(len(places), bool), "places": places,
        }  # fmt: skip


def cut(texts: list[list[int]], seq_len: int) -> list[list[int]]:
    """Ids of one or two texts, so many that they fit with [CLS] and [SEP]: of two the longer is cut first (BERT's
    run_classifier.py, _truncate_seq_pair)."""
    room = seq_len - 1 - len(texts)
    if len(texts) == 1:
        return [texts[0][:room]]
    a, b = map(len, texts)
    if a + b > room:
        a, b = (a, room - a) if a <= room // 2 else (room - b, b) if b <= room // 2 else (room - room // 2, room // 2)
    return [texts[0][:a], texts[1][:b]]


SUBSET_SEED = 1234


def stream(cfg: Config, split: str, shuffle: bool) -> Samples:
    """The examples of a split, tokenized. BadInput for a task, a file, a label or a tokenizer that does not do."""
    from common import tokenizer as tokenizers
    from common.run import find

    given = cfg.data.tokenizer or (cfg.init.from_ if cfg.init.from_ != "scratch" else None)
    if given is None:
        raise BadInput("data.tokenizer: is missing, and init.from=scratch has none to take; give data.tokenizer=DIR")
    folder = find(given) if find(given).is_dir() else given
    tokenizer = tokenizers.load(folder)
    special = samples.special_ids(tokenizer, str(given))
    found = glue.read(cfg.task.name, find(cfg.task.data) if cfg.task.data else None, split)
    labels, notes = found.labels, [found.note] if found.note else []
    keep, content = np.arange(len(labels)), found.hash
    if shuffle and cfg.task.train_examples:
        if cfg.task.train_examples > len(labels):
            raise BadInput(f"task.train_examples={cfg.task.train_examples}: train has {len(labels):,}; give at most that")
        keep = np.sort(np.random.default_rng(SUBSET_SEED).permutation(len(labels))[: cfg.task.train_examples])
        notes.append(f"{len(keep):,} of {len(labels):,} examples of train, drawn by seed {SUBSET_SEED}")
    ids = [tokenizer.encode_batch([column[i] for i in keep.tolist()]) for column in found.texts]
    largest = max(max(text, default=0) for column in ids for text in column)
    source = examples.Source(f"{cfg.task.name} {split}", content, folder, tokenizer, largest)
    order = {"seed": cfg.train.seed, "shuffle": shuffle, "notes": notes}
    return Samples(source, ids, labels[keep], special, cfg.data.seq_len, cfg.megatron.pp > 1, **order)


# ---- the model -------------------------------------------------------------------------------------------------------


def is_score(model: Model) -> bool:
    return model.labels == 1


def hf_config(model: Model) -> PreTrainedConfig:
    made = task.hf_config(model)
    made.num_labels = model.labels
    return made


def hf_model(model: Model) -> PreTrainedModel:
    """The `transformers` class that baseline and DeepSpeed train."""
    from transformers import BertForSequenceClassification, MegatronBertForSequenceClassification

    from .modeling import use_sdpa

    if model.arch == "bert":
        return BertForSequenceClassification(hf_config(model))
    return use_sdpa(MegatronBertForSequenceClassification(hf_config(model)))


def hf_class(model: Model) -> str:
    """The `transformers` class that loads an export."""
    return ("Bert" if model.arch == "bert" else "MegatronBert") + "ForSequenceClassification"


def export_config(model: Model) -> dict[str, Any]:
    """What config.json of an export must say otherwise than hf_config."""
    return {"problem_type": "regression" if is_score(model) else "single_label_classification"}


def hf_parameters(model: Model) -> dict[str, tuple[int, ...]]:
    """{Hugging Face name: full shape}, from the class itself on the meta device."""
    import torch

    with torch.device("meta"):
        net = hf_model(model)
    return {name: tuple(parameter.shape) for name, parameter in net.named_parameters()}


def initial(model: Model, name: str) -> float | str:
    """As task.initial; the new head as transformers has it, whatever the model began with."""
    if name == "classifier.weight":
        return 0.02
    return task.initial(model, name)


def heads(model: Model) -> tuple[str, ...]:
    """Beginnings of names that a folder to begin from may lack: those begin from the seed."""
    return ("classifier.", "bert.pooler.")


def hf_shapes(model: Model) -> dict[str, Any]:
    """What config.json of a folder to begin from must say."""
    return task.hf_shapes(model)


def model_of(config: dict[str, Any]) -> Model:
    """The `model` section for the content of a folder's config.json. KeyError where it lacks a shape."""
    return Model(**task.model_of(config).model_dump(exclude={"pair_head"}), labels=len(config.get("id2label") or "12"))


def card(model: Model) -> dict[str, Any]:
    """What the model card says of the architecture."""
    return task.card(model) | {"labels": model.labels}


def forward_backward_flops(model: Model, data: Data) -> dict[str, float]:
    """FLOPs a token, forward and backward: as task.forward_backward_flops without the MLM head, for examples of seq_len."""
    h = model.hidden
    weights = model.layers * (4 * h * h + 2 * h * model.ffn)
    return {"full": 6.0 * weights + 12.0 * model.layers * h * data.seq_len}


# ---- batch and loss --------------------------------------------------------------------------------------------------


def batch(rows: batches.Rows, device: str | torch.device) -> dict[str, torch.Tensor]:
    """Rows -> tokens, token_types (B, T), attention_mask (B, T) bool, labels (B,), loss_mask (B,) bool."""
    import torch

    made = {name: rows[name] for name in ("tokens", "token_types", "labels", "loss_mask")}
    made["attention_mask"] = np.arange(rows["tokens"].shape[1]) < rows["lengths"][:, None]
    return {name: torch.from_numpy(values).to(device, non_blocking=True) for name, values in made.items()}


def inputs(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What of a batch the `transformers` class takes."""
    mask = batch["attention_mask"][:, None, None, :]
    return {"input_ids": batch["tokens"], "token_type_ids": batch["token_types"], "attention_mask": mask}


def loss_sum(logits: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits (B, L) -> cross entropy, or squared errors of a score, in fp32, summed over the examples that count."""
    import torch.nn.functional as F

    labels, counted = batch["labels"], batch["loss_mask"]
    if logits.shape[-1] == 1:
        return ((logits.float()[:, 0] - labels) ** 2 * counted).sum()
    return (F.cross_entropy(logits.float(), labels, reduction="none") * counted).sum()


def predictions(logits: torch.Tensor) -> torch.Tensor:
    """Logits (B, L) -> the likeliest class, or the score, (B,) float64."""
    return (logits[:, 0] if logits.shape[-1] == 1 else logits.argmax(-1)).double()


def metric_names(cfg: Config) -> tuple[str, ...]:
    """Of the task; the first decides which checkpoint is the best."""
    return glue.TASKS[cfg.task.name].metrics


def metrics(cfg: Config, predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """predictions, labels (N,) -> the task's metrics."""
    return glue.metrics(cfg.task.name, predictions, labels)


def written(cfg: Config, predictions: np.ndarray) -> list[str]:
    """Predictions as GLUE's files have them: the names of labels, or scores."""
    names = glue.TASKS[cfg.task.name].labels
    return [names[int(p)] for p in predictions] if names else [f"{p:.6f}" for p in np.clip(predictions, 0, 5)]


def export_sums(net: PreTrainedModel, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Of an export in plain transformers: summed loss (1,) and examples (1,) of a batch."""
    mask = batch["attention_mask"].long()
    logits = net(batch["tokens"], token_type_ids=batch["token_types"], attention_mask=mask).logits
    return loss_sum(logits, batch)[None], batch["loss_mask"].sum()[None]
