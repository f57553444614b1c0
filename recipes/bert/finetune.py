"""Finetuning of BERT with a task head: GLUE, SQuAD, RACE, tagging of words (Devlin et al., arXiv:1810.04805, sections 4 and
5.3), and classification of texts with your own labels.

A family module like task.py, from which it imports what does not change. tasks/ has the heads and datasets of the task types.
Letters in shapes are those of tasks/base.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import BeforeValidator, Field

from common import config
from common.config import FilePath, NonEmpty, Positive, Share
from common.data import batches
from common.errors import BadInput
from common.evaluation import glue, labelled, metrics
from common.huggingface import hf_folder
from common.json_files import read_object
from common.paths import find
from common.planning.workload import Workload
from common.training import finetuning, init

from . import samples, task
from .task import (  # the same in pretraining and finetuning
    FAMILY as FAMILY,
    HF_BUFFER_PATTERNS as HF_BUFFER_PATTERNS,
    HF_MODEL_TYPES as HF_MODEL_TYPES,
    IGNORED_HF_HEADS as IGNORED_HF_HEADS,
    IGNORED_HF_KEYS as IGNORED_HF_KEYS,
    duplicate_names as duplicate_names,
    has_weight_decay as has_weight_decay,
    hf_model_type as hf_model_type,
    layer_count as layer_count,
    normalized_hf_config as normalized_hf_config,
    stored_names as stored_names,
)
from .tasks import base, label_names, registry

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

    from common.launch.processes import Ranks
    from common.preflight import Run


if TYPE_CHECKING:
    TaskType = str
    Name = str
else:  # a type checker cannot read computed names
    TaskType = Literal[*registry.HEADS]
    Name = Literal[*registry.TASKS]


class Model(task.Model):
    """The architecture. Shapes that the config does not give come from init.from."""

    renamed = {"kind": "task_type"}

    task_type: Annotated[TaskType | None, BeforeValidator(registry.task_type_now)] = Field(
        default=None, description="Type of the task, which determines the head. It follows from task.name."
    )
    labels: list[NonEmpty] = Field(default=[], description="Names of the head's outputs. They follow from the task.")
    new_head: bool = Field(default=False, description="Initialize a new head from train.seed even if init.from has one.")
    pair_head: bool | None = Field(default=False, description="Used in pretraining only; false here.")
    dropout: Share = Field(default=0.1, description="Dropout of embedding, attention, residual and head.")

    @classmethod
    def resume_keys(cls) -> Set[str]:
        return {"task_type"}  # task.name is compared

    def head_problems(self, cfg: Any) -> Iterator[str]:
        if self.positions and self.positions < cfg.data.seq_len:  # common/config.py reports it
            return
        if cfg.task.name == "ner" and not cfg.task.tags:
            yield "task.tags: is missing; give the tags of ner, for example task.tags=[O, B-PER, I-PER]"
        if cfg.data.valid == "test":
            yield (
                "data.valid=test: the best checkpoint is chosen on dev; leave it out, and evaluate the finished run by "
                f"python -m scripts.evaluate OUT {cfg.task.name} --split test"
            )
        for task_name, key in registry.LABEL_KEYS.items():
            given = getattr(cfg.task, key)
            if given and cfg.task.name != task_name:
                yield f"task.{key}: is only for task.name={task_name}; leave it out"
            if len(set(given)) < len(given):
                yield f"task.{key}={config.written(given)}: a name appears twice"
        if len(cfg.task.labels) == 1:
            yield f"task.labels={config.written(cfg.task.labels)}: give two or more, or leave it out to take those of train"
        least = min_seq_len(cfg.task)
        if cfg.data.seq_len < least:
            yield (
                f"data.seq_len={cfg.data.seq_len} leaves no room for a context beside "
                f"task.question_len={cfg.task.question_len}; give data.seq_len={least} or more"
            )

    def filled(self, cfg: Any, tokenizer_size: int | None) -> dict[str, Any]:
        try:
            names = task_labels(cfg.task)
        except BadInput:  # labels of train that cannot be read; `dataset` has reported this
            names = []
        task_type = registry.TASKS[cfg.task.name].task_type
        return super().filled(cfg, tokenizer_size) | {"labels": names, "task_type": task_type}

    def resolve(self, cfg: Any, tokenizer_size: int | None) -> ResolvedModel:
        return ResolvedModel(**self.filled(cfg, tokenizer_size))


class ResolvedModel(task.ResolvedModel, Model):
    """A model with all defaults filled in, as in the config.yaml of a run."""

    task_type: Annotated[TaskType, BeforeValidator(registry.task_type_now)]
    labels: list[NonEmpty]
    pair_head: bool = False

    @property
    def task_head(self) -> base.Head:
        return registry.HEADS[self.task_type]

    @property
    def classifier(self) -> str:
        return self.task_head.parameter

    def workload(self, data: Any) -> Workload:
        return replace(super().workload(data), ends=None)  # the head has no embedding

    def parameter_count(self) -> int:
        h = self.hidden
        mlm_head = h * h + h + 2 * h + self.vocab_size
        pooler = h * h + h if self.task_head.pooled else 0
        return super().parameter_count() - mlm_head + pooler + len(self.labels) * (h + 1)


class Data(finetuning.Data):
    """Splits of the task's dataset."""

    train: Literal["train"] = Field(default="train", description="Split that is trained on.")
    valid: Literal["dev", "test"] = Field(default="dev", description="Split on which the best checkpoint is chosen: dev.")
    seq_len: Annotated[int, Field(ge=8)] = Field(
        default=128,
        description="Tokens per sample, with special tokens. Longer examples are truncated, of two texts the longer first.",
    )


class Task(finetuning.Task):
    """The task and its files."""

    name: Name = Field(
        description="GLUE's tasks (arXiv:1804.07461), SQuAD, RACE, entities (ner), or your own texts and labels (classify)."
    )
    data: FilePath | None = Field(default=None, description="Folder of the task's files. Default: the dataset on the hub.")
    train_examples: Positive | None = Field(
        default=None, description="Number of training examples to use, drawn with seed 1234. Default: all."
    )
    labels: list[NonEmpty] = Field(default=[], description="classify: all labels. Default: those of train, sorted.")
    tags: list[NonEmpty] = Field(default=[], description="ner: all tags.")
    stride: Positive = Field(default=128, description="squad: tokens by which the window moves over a context.")
    question_len: Positive = Field(default=64, description="squad: tokens of a question; longer questions are truncated.")
    null_threshold: Annotated[float, Field(allow_inf_nan=False)] = Field(
        default=0.0, description="squad2: difference of scores above which no answer is predicted."
    )

    @classmethod
    def resume_keys(cls) -> Set[str]:
        return {"data", "patience"}


class Config(finetuning.Config):
    model: Model
    data: Data = Data()
    task: Task

    @classmethod
    def complete(cls, values: dict[str, Any]) -> dict[str, Any]:
        return finetuning.with_shapes(values, task.model_from_hf_config, HF_MODEL_TYPES, {"pair_head", "dropout", "init_std"})


class ResolvedConfig(Config):
    """A config that has been checked, with its model resolved."""

    model: ResolvedModel


def dataset(cfg: Config, split: str, shuffle: bool, stack: str = "baseline") -> base.TaskDataset:
    """The tokenized examples of a split. Raises BadInput for a task, a file, a label or a tokenizer that cannot be used."""
    from common.data import tokenizer as tokenizers

    name_or_dir = cfg.data.tokenizer or (cfg.init.from_ if cfg.init.from_ != "scratch" else None)
    if name_or_dir is None:
        raise BadInput("data.tokenizer: is missing, and init.from=scratch does not provide one; give data.tokenizer=DIR")
    folder = find(name_or_dir) if find(name_or_dir).is_dir() else name_or_dir
    tokenizer = tokenizers.load(folder)
    special = samples.special_ids(tokenizer, str(name_or_dir))
    t = cfg.task
    return registry.TASKS[t.name].dataset.open(
        base.Split(
            task=t.name, name=split, folder=find(t.data) if t.data else None, labels=task_labels(t),
            tokenizer_dir=folder, tokenizer=tokenizer, special=special, seq_len=cfg.data.seq_len,
            pad_to_seq_len=stack != "baseline" and getattr(cfg, stack).pp > 1, seed=cfg.train.seed, shuffle=shuffle,
            subset=t.train_examples if shuffle else None, stride=t.stride, question_len=t.question_len,
            null_threshold=t.null_threshold, length_window=cfg.data.length_window, global_batch=cfg.train.global_batch,
            pad_multiple=finetuning.pad_multiple(cfg, stack),
        )
    )  # fmt: skip


def task_labels(task: Task) -> list[str]:
    """Names of the head's outputs: classes, a score, an answer or the ends of a span. Raises BadInput if they are the labels of
    a train split that cannot be read."""
    if task.name in glue.TASKS:
        return list(glue.TASKS[task.name].labels) or ["score"]
    if task.name == "classify":
        return task.labels or labelled.label_set(find(task.data) if task.data else None)
    by_type = {"question_answering": ["begin", "end"], "multiple_choice": ["answer"], "token_classification": task.tags}
    return by_type[registry.TASKS[task.name].task_type]


def min_seq_len(task: Task) -> int:
    """Smallest allowed data.seq_len. In question answering, it has room for the longest question and some context."""
    is_span = registry.TASKS[task.name].task_type == "question_answering"
    return task.question_len + base.MIN_SEQ_LEN if is_span else base.MIN_SEQ_LEN


def selection_metric(cfg: Config) -> str:
    """The metric that selects the best checkpoint."""
    return next(iter(metrics.TASKS[cfg.task.name]))


# ---- the model -------------------------------------------------------------------------------------------------------


def hf_config(model: ResolvedModel) -> PreTrainedConfig:
    hf = task.hf_config(model)
    hf.num_labels = len(model.labels)
    return hf


def hf_model(model: ResolvedModel) -> PreTrainedModel:
    """The `transformers` model that the baseline and DeepSpeed train."""
    import transformers

    from .modeling import use_sdpa

    net = getattr(transformers, trained_class(model))(hf_config(model))
    return net if model.arch == "bert" else use_sdpa(net)


def trained_class(model: ResolvedModel) -> str:
    return _class(model, model.task_head.trained_class)


def _class(model: ResolvedModel, suffix: str) -> str:
    return ("Bert" if model.arch == "bert" else "MegatronBert") + suffix


def hf_class_name(model: ResolvedModel) -> str:
    """The `transformers` class that loads an export."""
    return _class(model, model.task_head.exported_class)


def hf_config_overrides(model: ResolvedModel) -> dict[str, Any]:
    """The keys of an export's config.json whose values differ from those of hf_config."""
    return label_names.hf_config_entries(model.task_head, model.labels)


def parameter_shapes(model: ResolvedModel) -> dict[str, tuple[int, ...]]:
    """{Hugging Face name: full shape}, read from the `transformers` class on the meta device."""
    import torch

    with torch.device("meta"):
        net = hf_model(model)
    return {name: tuple(parameter.shape) for name, parameter in net.named_parameters()}


def initializer(model: ResolvedModel, name: str) -> float | str:
    """As task.initializer, except for a new head, which is initialized as in transformers."""
    if name == f"{model.task_head.parameter}.weight":
        return 0.02
    return task.initializer(model, name)


def optional_prefixes(model: ResolvedModel) -> tuple[str, ...]:
    """Prefixes of parameters that may be missing in the folder that a run starts from; the seed initializes them."""
    return f"{model.task_head.parameter}.", "bert.pooler."


def new_head_prefixes(model: ResolvedModel) -> tuple[str, ...]:
    """Prefixes of parameters that are always initialized from the seed."""
    return (
        (f"{model.task_head.parameter}.",) if model.new_head or not model.labels else ()
    )  # without labels, `dataset` has failed


def head_problems(cfg: ResolvedConfig, shapes: Mapping[str, Sequence[int]], stored: dict[str, Any]) -> Iterator[str]:
    """Report problems with the task head in the folder that a run starts from. stored: the content of its config.json."""
    model = cfg.model
    name = f"{model.task_head.parameter}.weight"
    if name not in shapes or model.new_head or not model.labels:
        return
    instead = "give model.new_head=true to initialize it from train.seed"
    named = stored.get("architectures")
    architecture = str(named[0]) if isinstance(named, list) and named else "no class"
    if shapes[name] != (len(model.labels), model.hidden):
        yield f"its head {name} is {shapes[name]}, the task wants {(len(model.labels), model.hidden)}; {instead}"
    elif not architecture.endswith(model.task_head.exported_class):
        yield f"its head is of {architecture}, the task wants one of {hf_class_name(model)}; {instead}"
    else:
        try:
            label_names.output_order(cfg.task.name, model.task_head, model.labels, stored)
        except BadInput as error:
            yield f"{error}; or {instead}"


def head_notes(cfg: ResolvedConfig, shapes: Mapping[str, Sequence[int]], stored: dict[str, Any]) -> Iterator[str]:
    """Notes for the user about the task head in a folder for which head_problems reports nothing."""
    model = cfg.model
    if f"{model.task_head.parameter}.weight" in shapes and not model.new_head:
        yield f"its head {model.task_head.parameter}.* is trained on; give model.new_head=true to initialize it from train.seed"
        yield from label_names.unnamed_note(model.task_head, model.labels, stored)


def reorder_labels(cfg: ResolvedConfig, folder: Path, source: init.Source) -> init.Source:
    """`source`, which reads the parameters of a folder, with the outputs of its head in the order of the task's labels."""
    model, parameter = cfg.model, f"{cfg.model.task_head.parameter}."
    if model.new_head or f"{parameter}weight" not in hf_folder.tensors(folder, str(folder), []):
        return source
    stored = read_object(folder / "config.json") or {}
    order = label_names.output_order(cfg.task.name, model.task_head, model.labels, stored)
    if order is None:
        return source

    def read(name: str, shape: init.Shape) -> torch.Tensor:
        tensor = source(name, shape)
        return tensor[order] if name.startswith(parameter) else tensor

    return read


def parameter_patterns(model: ResolvedModel) -> dict[str, tuple[int, ...]]:
    """As task.parameter_patterns, with the task head in place of the pretraining heads."""
    head = task.named_linear(model.task_head.parameter, model.hidden, len(model.labels))
    return task.encoder_tensors(model, model.task_head.pooled) | head


def model_card(model: ResolvedModel) -> dict[str, Any]:
    """Entries of the model card that describe the architecture."""
    return task.model_card(model) | {"labels": ", ".join(model.labels)}


def forward_backward_flops(model: ResolvedModel, data: Data) -> dict[str, float]:
    """FLOPs per token, forward and backward: as task.forward_backward_flops without the MLM head, for examples of seq_len."""
    h = model.hidden
    weights = model.layers * (4 * h * h + 2 * h * model.ffn)
    return {"full": 6.0 * weights + 12.0 * model.layers * h * data.seq_len}


# ---- batch and loss --------------------------------------------------------------------------------------------------


def counts(micro_batches: Sequence[batches.MicroBatch]) -> list[int]:
    """[number of targets, number of tokens without padding] in these micro batches."""
    return [batches.targets(micro_batches), batches.tokens(micro_batches)]


def make_batch(micro_batch: batches.MicroBatch, device: str | torch.device) -> dict[str, torch.Tensor]:
    """A micro batch of a TaskDataset as tensors, with attention_mask (B x C, T) bool in place of lengths."""
    arrays = {name: values for name, values in micro_batch.items() if name not in ("lengths", "indices", "example_mask")}
    arrays["attention_mask"] = np.arange(micro_batch["tokens"].shape[1]) < micro_batch["lengths"][:, None]
    return batches.to_device(arrays, device)


def model_inputs(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The keyword arguments of the `transformers` class."""
    mask = batch["attention_mask"][:, None, None, :]
    return {"input_ids": batch["tokens"], "token_type_ids": batch["token_types"], "attention_mask": mask}


def logits_of(output: Any) -> torch.Tensor:
    """The output of the `transformers` class -> logits: (B x C, L) of a pooled head, (B, T, L) of other heads."""
    import torch

    return torch.stack([output.start_logits, output.end_logits], -1) if "start_logits" in output else output.logits


# ---- evaluation ------------------------------------------------------------------------------------------------------


def validation_set(run: Run) -> base.TaskDataset:
    if not isinstance(run.valid, base.TaskDataset):
        raise TypeError("the validation set of a task is needed")
    return run.valid


def validation_metrics(run: Run, predictions: np.ndarray) -> dict[str, float]:
    """The task's metrics of predictions (n, width)."""
    return validation_set(run).metrics(predictions)


def best_results(run: Run, loss: float, n: int, predictions: np.ndarray) -> finetuning.Results:
    """The task's metrics, and the predictions in the benchmark's format."""
    valid = validation_set(run)
    return finetuning.Results(valid.metrics(predictions), valid.scored(n), valid.counts(n), valid.files(predictions))


def before_start(run: Run) -> None:
    """Do nothing: the tokenizer is exported unchanged."""


def after_export(run: Run, ranks: Ranks) -> None:
    """Do nothing: BERT does not generate text."""
