"""The tasks that BERT is finetuned on, with their types, heads and datasets."""

from typing import Any, NamedTuple

from common.evaluation import glue

from . import multiple_choice, question_answering, sequence_classification, token_classification
from .base import Head, TaskDataset

# by model.task_type, which follows from task.name
HEADS: dict[str, Head] = {
    "sequence_classification": sequence_classification.HEAD,
    "multiple_choice": multiple_choice.HEAD,
    "token_classification": token_classification.HEAD,
    "question_answering": question_answering.HEAD,
}


class Task(NamedTuple):
    task_type: str  # key of HEADS
    dataset: type[TaskDataset]


TASKS: dict[str, Task] = {
    **dict.fromkeys(glue.TASKS, Task("sequence_classification", sequence_classification.GlueDataset)),
    "classify": Task("sequence_classification", sequence_classification.LabelledDataset),
    "squad": Task("question_answering", question_answering.SquadDataset),
    "squad2": Task("question_answering", question_answering.SquadDataset),
    "race": Task("multiple_choice", multiple_choice.RaceDataset),
    "ner": Task("token_classification", token_classification.TaggedDataset),
}
LABEL_KEYS = {"classify": "labels", "ner": "tags"}  # {task: key of the `task` section that lists its labels}


# Values of model.task_type in earlier versions, which called the key model.kind.
_EARLIER = {
    "text": "sequence_classification", "labelled": "sequence_classification", "choice": "multiple_choice",
    "token": "token_classification", "span": "question_answering",
}  # fmt: skip


def task_type_now(value: Any) -> Any:
    return _EARLIER.get(value, value) if isinstance(value, str) else value
