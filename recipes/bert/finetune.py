"""BERT with the head of a task: GLUE, SQuAD, RACE, tags of words (Devlin et al., arXiv:1810.04805, sections 4 and 5.3), texts
with labels of one's own.

A task module as task.py is: what it leaves out it has from there; kinds.py has the kinds of tasks. Letters in shapes as there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import Field

from common import config
from common.config import FilePath, NonEmpty, Positive, Section, Share
from common.data import batches
from common.errors import BadInput
from common.evaluation import glue
from common.huggingface import hf_folder
from common.json_files import read_object
from common.training import finetuning, init

from . import kinds, samples, task
from .task import (  # what finetuning takes over unchanged
    FAMILY as FAMILY,
)
from .task import (
    HF_BUFFER_PATTERNS as HF_BUFFER_PATTERNS,
)
from .task import (
    HF_MODEL_TYPES as HF_MODEL_TYPES,
)
from .task import (
    IGNORED_HF_HEADS as IGNORED_HF_HEADS,
)
from .task import (
    IGNORED_HF_KEYS as IGNORED_HF_KEYS,
)
from .task import (
    duplicate_names as duplicate_names,
)
from .task import (
    has_weight_decay as has_weight_decay,
)
from .task import (
    hf_model_type as hf_model_type,
)
from .task import (
    layer_count as layer_count,
)
from .task import (
    normalized_hf_config as normalized_hf_config,
)
from .task import (
    stored_names as stored_names,
)

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

    from common.preflight import Run
    from common.training.log import Log


class Model(task.Model):
    """Its shapes come from init.from where the config gives none."""

    kind: Literal[*kinds.KINDS] | None = Field(default=None, description="Kind of the task's head; the run sets it.")
    labels: list[NonEmpty] | None = Field(
        default=None, description="Names of the head's outputs; the run takes them from the task."
    )
    new_head: bool = Field(default=False, description="Draw the head from train.seed though init.from holds one.")
    pair_head: bool | None = Field(default=False, description="Of pretraining; false here.")
    dropout: Share = Field(default=0.1, description="Dropout of embedding, attention, residual and head.")

    def head_problems(self, cfg: Config) -> Iterator[str]:
        if self.positions and self.positions < cfg.data.seq_len:  # told by common/config.py
            return
        if cfg.task.name == "ner" and not cfg.task.tags:
            yield "task.tags: is missing; give the tags of ner, for example task.tags=[O, B-PER, I-PER]"
        if cfg.data.valid == "test":
            yield (
                "data.valid=test: the best checkpoint is chosen on dev; leave it out, and evaluate the finished run by "
                f"python -m scripts.evaluate OUT {cfg.task.name} --split test"
            )
        for task_name, key in kinds.OWN_LABELS.items():
            given = getattr(cfg.task, key)
            if given and cfg.task.name != task_name:
                yield f"task.{key}: is for task.name={task_name} alone; leave it out"
            if len(set(given)) < len(given):
                yield f"task.{key}={config.written(given)}: a name is given twice"
        if len(cfg.task.labels) == 1:
            yield f"task.labels={config.written(cfg.task.labels)}: give two or more, or leave it out to take those of train"
        least = kinds.least_seq_len(cfg.task)
        if cfg.data.seq_len < least:
            yield (
                f"data.seq_len={cfg.data.seq_len} leaves no room for a context beside "
                f"task.question_len={cfg.task.question_len}; give data.seq_len={least} or more"
            )

    def resolve(self, cfg: Config, tokenizer_size: int | None) -> Model:
        try:
            labels = kinds.labels(cfg.task)
        except BadInput:  # of train, which `dataset` has reported
            labels = []
        update = {"labels": labels, "kind": kinds.KIND_OF[cfg.task.name]}
        return super().resolve(cfg, tokenizer_size).model_copy(update=update)

    @property
    def does(self) -> type[kinds.Kind]:
        return kinds.KINDS[self.kind]

    def parameter_count(self) -> int:
        h = self.hidden
        mlm_head = h * h + h + 2 * h + self.vocab_size
        pooler = h * h + h if self.does.pooled else 0
        return super().parameter_count() - mlm_head + pooler + len(self.labels) * (h + 1)


class Data(config.Data):
    """Splits of the task's dataset."""

    train: Literal["train"] = Field(default="train", description="Split that is trained on.")
    valid: Literal["dev", "test"] = Field(default="dev", description="Split on which the best checkpoint is chosen: dev.")
    seq_len: Annotated[int, Field(ge=8)] = Field(
        default=128,
        description="Tokens per sample, special tokens included. Longer examples are cut, of two texts the longer first.",
    )


class Task(Section):
    """The task and its files."""

    name: Literal[*kinds.KIND_OF] = Field(
        description="GLUE's tasks (arXiv:1804.07461), SQuAD, RACE, entities (ner), or texts with labels of your own (classify)."
    )
    data: FilePath | None = Field(default=None, description="Folder of the task's files. Default: the dataset on the hub.")
    train_examples: Positive | None = Field(
        default=None, description="Examples of train that are used, drawn by seed 1234. Default: all."
    )
    patience: Positive | None = Field(
        default=None, description="Evaluations without a better one after which the run ends. Default: never."
    )
    labels: list[NonEmpty] = Field(default=[], description="classify: all labels. Default: those of train, sorted.")
    tags: list[NonEmpty] = Field(default=[], description="ner: all tags.")
    stride: Positive = Field(default=128, description="squad: tokens by which the window moves over a context.")
    question_len: Positive = Field(default=64, description="squad: tokens of a question; longer ones are cut.")
    null_threshold: Annotated[float, Field(allow_inf_nan=False)] = Field(
        default=0.0, description="squad2: difference of scores above which the answer is that there is none."
    )

    @classmethod
    def resume_keys(cls) -> Set[str]:
        return {"data", "patience"}


class Config(config.Config):
    model: Model
    data: Data = Data()
    task: Task

    @classmethod
    def complete(cls, values: dict[str, Any]) -> dict[str, Any]:
        return finetuning.with_shapes(values, task.model_from_hf_config, HF_MODEL_TYPES, {"pair_head", "dropout", "init_std"})


def dataset(cfg: Config, split: str, shuffle: bool) -> kinds.Kind:
    """The examples of a split, tokenized. BadInput for a task, a file, a label or a tokenizer that does not do."""
    from common.data import tokenizer as tokenizers
    from common.paths import find

    given = cfg.data.tokenizer or (cfg.init.from_ if cfg.init.from_ != "scratch" else None)
    if given is None:
        raise BadInput("data.tokenizer: is missing, and init.from=scratch has none to take; give data.tokenizer=DIR")
    folder = find(given) if find(given).is_dir() else given
    tokenizer = tokenizers.load(folder)
    special = samples.special_ids(tokenizer, str(given))
    data = find(cfg.task.data) if cfg.task.data else None
    reader = kinds.Reader(cfg, data, Path(split).name, folder, tokenizer, special, shuffle)
    return kinds.KINDS[kinds.KIND_OF[cfg.task.name]].open(reader)


# ---- the model -------------------------------------------------------------------------------------------------------


def hf_config(model: Model) -> PreTrainedConfig:
    made = task.hf_config(model)
    made.num_labels = len(model.labels)
    return made


def hf_model(model: Model) -> PreTrainedModel:
    """The `transformers` class that baseline and DeepSpeed train."""
    import transformers

    from .modeling import use_sdpa

    net = getattr(transformers, trained_class(model))(hf_config(model))
    return net if model.arch == "bert" else use_sdpa(net)


def trained_class(model: Model) -> str:
    return _class(model, model.does.hf_class_name)


def _class(model: Model, kind: str) -> str:
    return ("Bert" if model.arch == "bert" else "MegatronBert") + kind


def hf_class_name(model: Model) -> str:
    """The `transformers` class that loads an export."""
    return _class(model, model.does.export_class)


def hf_config_overrides(model: Model) -> dict[str, Any]:
    """What config.json of an export must say otherwise than hf_config."""
    if not model.does.named:
        return {}
    named = {"id2label": dict(enumerate(model.labels)), "label2id": {name: i for i, name in enumerate(model.labels)}}
    if not model.does.pooled:
        return named
    return named | {"problem_type": "regression" if len(model.labels) == 1 else "single_label_classification"}


def parameter_shapes(model: Model) -> dict[str, tuple[int, ...]]:
    """{Hugging Face name: full shape}, from the class itself on the meta device."""
    import torch

    with torch.device("meta"):
        net = hf_model(model)
    return {name: tuple(parameter.shape) for name, parameter in net.named_parameters()}


def initializer(model: Model, name: str) -> float | str:
    """As task.initializer; the new head as transformers has it, whatever the model began with."""
    if name == f"{model.does.parameter}.weight":
        return 0.02
    return task.initializer(model, name)


def optional_prefixes(model: Model) -> tuple[str, ...]:
    """Beginnings of names that a folder to begin from may lack: those begin from the seed."""
    return f"{model.does.parameter}.", "bert.pooler."


def new_head_prefixes(model: Model) -> tuple[str, ...]:
    """Beginnings of names that begin from the seed whatever the folder holds."""
    return (f"{model.does.parameter}.",) if model.new_head or not model.labels else ()  # no labels: `dataset` has refused


def head_problems(cfg: Config, held: Mapping[str, Sequence[int]], stored: dict[str, Any]) -> Iterator[str]:
    """Of a folder to begin from whose tensors have these shapes, and whose config.json holds `stored`."""
    model = cfg.model
    name = f"{model.does.parameter}.weight"
    if name not in held or model.new_head or not model.labels:
        return
    instead = "give model.new_head=true to begin it from train.seed"
    named = stored.get("architectures")
    architecture = str(named[0]) if isinstance(named, list) and named else "no class"
    if held[name] != (len(model.labels), model.hidden):
        yield f"its head {name} is {held[name]}, the task wants {(len(model.labels), model.hidden)}; {instead}"
    elif not architecture.endswith(model.does.export_class):
        yield f"its head is of {architecture}, the task wants one of {hf_class_name(model)}; {instead}"
    else:
        try:
            head_order(cfg, stored)
        except BadInput as error:
            yield f"{error}; or {instead}"


def head_notes(cfg: Config, held: Mapping[str, Sequence[int]], stored: dict[str, Any]) -> Iterator[str]:
    """Of the same folder, which has no problems."""
    model = cfg.model
    if f"{model.does.parameter}.weight" in held and not model.new_head:
        yield f"its head {model.does.parameter}.* is trained on; give model.new_head=true to begin it from train.seed"
        yield from unnamed(cfg, stored)


def label_names(stored: dict[str, Any]) -> list[str] | None:
    """id2label of a config.json, in the order of the outputs. None where it carries no names: where it is missing, or holds
    transformers' defaults, LABEL_0 and so on. BadInput where it is damaged."""
    given, back = stored.get("id2label"), stored.get("label2id")
    if given is None:
        return None
    names = [given.get(str(i)) for i in range(len(given))] if isinstance(given, dict) else [None]
    if not all(isinstance(name, str) for name in names) or len(set(names)) < len(names):
        raise BadInput("its id2label (config.json) does not give each output, from 0 on, a name of its own; correct it")
    if isinstance(back, dict) and any(back.get(name, i) != i for i, name in enumerate(names)):
        raise BadInput("its id2label and label2id (config.json) contradict each other; correct one")
    return None if names == [f"LABEL_{i}" for i in range(len(names))] else names


def head_order(cfg: Config, stored: dict[str, Any]) -> list[int] | None:
    """Which output of the head in a folder, whose config.json holds `stored`, stands for each label of the task, by name:
    in any case, and for the numbers in GLUE's files also their words (glue.WORDS).

    None where the order is the task's, or is taken for it because the outputs have no names: the default names of
    transformers, and heads of answers and spans. BadInput where the names are not the task's.
    """
    if not cfg.model.does.named:
        return None
    problem, wanted = stored.get("problem_type"), hf_config_overrides(cfg.model).get("problem_type")
    if None not in (problem, wanted) and problem != wanted:
        raise BadInput(f"its problem_type (config.json) is {problem}, {cfg.task.name} is {wanted}")
    names = label_names(stored)
    if names is None:
        return None
    for labels in (cfg.model.labels, glue.WORDS.get(cfg.task.name, ())):
        for form in (str, str.casefold):
            wanted, given = [*map(form, labels)], [*map(form, names)]
            if sorted(wanted) == sorted(given) and len(set(given)) == len(given):
                order = [given.index(label) for label in wanted]
                return None if order == sorted(order) else order
    theirs, ours = ", ".join(names), ", ".join(cfg.model.labels)
    raise BadInput(
        f"the labels of its head are {theirs}, those of {cfg.task.name} are {ours}; correct id2label in its config.json"
    )


def unnamed(cfg: Config, stored: dict[str, Any]) -> list[str]:
    """A note where the outputs of a folder's head have no names, and so are taken in the task's order."""
    labels = cfg.model.labels
    if not cfg.model.does.named or len(labels) == 1 or label_names(stored) is not None:
        return []
    return [f"the labels of its head have no names (id2label): taken for {', '.join(labels)}, in this order"]


def reorder_labels(cfg: Config, folder: Path, source: init.Source) -> init.Source:
    """`source`, the parameters of a folder to begin from, with the outputs of its head in the order of the task's labels."""
    head, held = f"{cfg.model.does.parameter}.", hf_folder.tensors(folder, str(folder), [])
    begins_anew = cfg.model.new_head or f"{head}weight" not in held
    order = None if begins_anew else head_order(cfg, read_object(folder / "config.json") or {})
    if order is None:
        return source

    def read(name: str, shape: init.Shape) -> torch.Tensor:
        tensor = source(name, shape)
        return tensor[order] if name.startswith(head) else tensor

    return read


def parameter_patterns(model: Model) -> dict[str, tuple[int, ...]]:
    """As task.parameter_patterns, with the head of the task in place of those of pretraining."""
    head = task.named_linear(model.does.parameter, model.hidden, len(model.labels))
    return task.encoder_tensors(model, model.does.pooled) | head


def model_card(model: Model) -> dict[str, Any]:
    """What the model card says of the architecture."""
    return task.model_card(model) | {"labels": ", ".join(model.labels)}


def forward_backward_flops(model: Model, data: Data) -> dict[str, float]:
    """FLOPs a token, forward and backward: as task.forward_backward_flops without the MLM head, for examples of seq_len."""
    h = model.hidden
    weights = model.layers * (4 * h * h + 2 * h * model.ffn)
    return {"full": 6.0 * weights + 12.0 * model.layers * h * data.seq_len}


# ---- batch and loss --------------------------------------------------------------------------------------------------


def make_batch(rows: batches.MicroBatch, device: str | torch.device) -> dict[str, torch.Tensor]:
    """Rows of a kind -> the same as tensors, and attention_mask (B x C, T) bool in place of lengths."""
    import torch

    made = {name: values for name, values in rows.items() if name not in ("lengths", "places", "example_mask")}
    made["attention_mask"] = np.arange(rows["tokens"].shape[1]) < rows["lengths"][:, None]
    return {name: torch.from_numpy(values).to(device, non_blocking=True) for name, values in made.items()}


def model_inputs(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What of a batch the `transformers` class takes."""
    mask = batch["attention_mask"][:, None, None, :]
    return {"input_ids": batch["tokens"], "token_type_ids": batch["token_types"], "attention_mask": mask}


def logits_of(output: Any) -> torch.Tensor:
    """What the `transformers` class gives: logits (B x C, L) of pooled heads, (B, T, L) of the others."""
    import torch

    return torch.stack([output.start_logits, output.end_logits], -1) if "start_logits" in output else output.logits


def judge(run: Run, selection: finetuning.Selection, log: Log, step: int, found: finetuning.Predictions) -> bool:
    """Score an evaluation, alike on every rank, and tell it; is it the best so far?"""
    loss, predictions = found.read()
    values = run.valid.metrics(predictions)
    log.valid(step, loss, len(predictions), **values)
    best = selection.enter(step, values[selection.metric])
    if best and log.first:
        n = len(predictions)
        files, counts = run.valid.files(predictions), run.valid.counts(n)
        finetuning.write_results(run, selection, values, run.valid.scored(n), files, counts)
    return best
