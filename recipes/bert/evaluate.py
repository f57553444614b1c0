"""Evaluation of an export with a task head on the data of its task, in plain transformers. scripts/evaluate.py calls this."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pydantic import ValidationError

from common import config
from common.errors import BadInput
from common.huggingface import hf_folder
from common.json_files import read_object
from common.launch.processes import Ranks
from common.yaml_files import read_yaml

from . import finetune
from .tasks import label_names, sequence_classification
from .tasks.base import MIN_SEQ_LEN as MIN_SEQ_LEN, TaskDataset
from .tasks.registry import HEADS, LABEL_KEYS, TASKS

PUBLIC_DEV_ALONE = ("squad", "squad2")
SEQ_LEN = {"squad": 384, "squad2": 384, "race": 512}  # 128 for other tasks


def tasks_of(architecture: str) -> list[str]:
    """The tasks that a transformers class can be evaluated on. [] if the class has no head for a task."""
    return [name for name, task in TASKS.items() if architecture.endswith(HEADS[task.task_type].exported_class)]


class Task(NamedTuple):
    """The task to evaluate. order: for each label of the task, the output of the head; None if they are in the same order."""

    cfg: finetune.ResolvedConfig
    examples: TaskDataset
    order: list[int] | None


def read(source: Path, folder: Path, name: str, data: Path | None, seq_len: int | None, split: str) -> Task:
    """The task for the model in `folder`. source: that folder, or the run that exported it.

    Raises BadInput if the model has another head or other labels, or if its sequences are too short.
    """
    stored = read_object(folder / "config.json") or {}
    cfg = settings(source, folder, stored, name, data, seq_len, split)
    head = f"{cfg.model.task_head.parameter}.weight"
    tensors = hf_folder.tensors(folder, str(folder), [])
    outputs = tensors[head].shape[0] if head in tensors else 0
    if outputs != len(cfg.model.labels):
        mismatch = f"its head has {outputs} outputs, {name} wants {len(cfg.model.labels)}"
        raise BadInput(f"{folder}: {mismatch}; finetune it on {name} first")
    try:
        order = label_names.output_order(name, cfg.model.task_head, cfg.model.labels, stored)
    except BadInput as error:
        raise BadInput(f"{folder}: {error}, or finetune it on {name} first") from None
    examples = finetune.dataset(cfg, cfg.data.valid, shuffle=False)
    examples.notes += label_names.unnamed_note(cfg.model.task_head, cfg.model.labels, stored)
    return Task(cfg, examples, order)


def settings(
    source: Path, folder: Path, stored: dict[str, Any], name: str, data: Path | None, seq_len: int | None, split: str
) -> finetune.ResolvedConfig:
    """The config of the run `source` if it is of this task, else one with the task's defaults. stored: config.json."""
    recorded = read_yaml(source / "config.yaml") if (source / "config.yaml").is_file() else {}
    is_own = isinstance(recorded.get("task"), dict) and recorded["task"].get("name") == name
    task = dict(recorded["task"]) if is_own else {"name": name}
    key = LABEL_KEYS.get(name)
    if key and not task.get(key):
        task[key] = own_labels(folder, stored, name)
    positions = stored.get("max_position_embeddings")
    positions = positions if isinstance(positions, int) else 512
    recorded_data = recorded.get("data") if is_own else None
    recorded_len = recorded_data.get("seq_len") if isinstance(recorded_data, dict) else None
    length = seq_len or recorded_len or min(positions, SEQ_LEN.get(name, 128))
    values = {
        "init": {"from": str(folder)}, "task": task | ({"data": str(data)} if data else {}),
        "data": {"seq_len": length, "valid": split}, "optim": {"lr": 1e-5}, "train": {"steps": 1, "global_batch": 1},
    }  # fmt: skip
    try:
        cfg = finetune.Config.model_validate(finetune.Config.complete(values))
    except ValidationError as error:
        where = "; ".join(f"{'.'.join(map(str, e['loc']))}={e['input']!r}: {e['msg'].lower()}" for e in error.errors()[:3])
        raise BadInput(f"{source}: {where}; correct its config.yaml, or give the folder of the export") from None
    least = finetune.min_seq_len(cfg.task)
    if length < least:
        beside = f"a context beside a question of {cfg.task.question_len} tokens (task.question_len)"
        has = f"; the model has {positions} positions: finetune it with shorter questions" if positions < least else ""
        raise BadInput(f"--seq-len {length}: leaves no room for {beside}; give --seq-len {least} or more{has}")
    return config.resolve(cfg, finetune.ResolvedConfig, None)


def own_labels(folder: Path, stored: dict[str, Any], name: str) -> list[str]:
    """The labels in the model's config.json, for a task that has no labels of its own."""
    try:
        names = label_names.stored_labels(stored)
    except BadInput as error:
        raise BadInput(f"{folder}: {error}") from None
    if names is None:
        raise BadInput(
            f"{folder}: its config.json does not name the labels of its head, which {name} needs; give them as id2label"
        )
    return names


def predict(
    net: Any, task: Task, batch_size: int, limit: int | None, ranks: Ranks, report: Callable[[int], None]
) -> np.ndarray:  # fmt: skip
    """Predictions (n, width) of the first n examples. Each example is computed once, by one rank, and the batches do not depend
    on the number of ranks. The results are therefore the same, bit for bit. report: called with the number of each batch."""
    import torch
    import torch.distributed as dist

    examples, head = task.examples, task.cfg.model.task_head
    n = min(limit or len(examples), len(examples))
    ordered = examples.batch_order(range(n))
    values = torch.zeros(n, head.prediction_width(task.cfg.data.seq_len), dtype=torch.float64, device=ranks.device)
    for number in range(ranks.rank, -(-n // batch_size), ranks.world):
        report(number)
        micro_batch = examples.collate(ordered[number * batch_size : (number + 1) * batch_size])
        inputs = finetune.make_batch(micro_batch, ranks.device)
        mask = inputs["attention_mask"].long()  # (B, T), as plain transformers takes it
        with torch.no_grad():
            output = net(inputs["tokens"], token_type_ids=inputs["token_types"], attention_mask=mask)
        logits = finetune.logits_of(output).float()
        predictions = head.predictions(logits if task.order is None else logits[..., task.order], inputs)
        values[micro_batch["indices"], : predictions.shape[1]] = predictions.double()
    if ranks.world > 1:
        dist.all_reduce(values)  # exact: the other ranks add zeros to a value
    return values.cpu().numpy()


def write_predictions(task: Task, predictions: np.ndarray, out: Path) -> list[Path]:
    """Write the prediction files to out/predictions. Those of test or of only the first examples go to a subfolder, so they
    never replace finetuning's predictions on dev."""
    part = f"first_{len(predictions)}" if len(predictions) < len(task.examples) else ""
    folder = out / "predictions" / ("test" if task.cfg.data.valid == "test" else "") / part
    folder.mkdir(parents=True, exist_ok=True)
    files = task.examples.files(predictions)
    for file, text in files.items():
        (folder / file).write_text(text, encoding="utf-8")
    return [folder / file for file in files]


def is_unanswered(task: Task) -> bool:
    """Whether the labels of this split are unknown."""
    return isinstance(task.examples, sequence_classification.TextDataset) and bool((task.examples.labels < 0).all())


def scores(task: Task, predictions: np.ndarray) -> list[dict[str, Any]]:
    """The entries of eval.json."""
    cfg, examples = task.cfg, task.examples
    n, whole = len(predictions), len(examples)
    part = "" if n == whole else f", the first {n:,} of {whole:,} {examples.unit}"
    notes = "".join(f"; {note}" for note in examples.notes)
    how = f"{cfg.task.name} {cfg.data.valid}{part}, {cfg.data.seq_len} tokens{notes}"
    counts = examples.counts(n)
    return [
        {"metric": name, "value": value, "n": counts.get(name, examples.scored(n)), "protocol": how}
        for name, value in examples.metrics(predictions).items()
    ]
