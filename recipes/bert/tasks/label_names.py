"""Names and order of a head's labels, in the config.json of an export and of the folder that a run starts from."""

from collections.abc import Sequence
from typing import Any

from common.errors import BadInput
from common.evaluation import glue

from .base import Head


def hf_config_entries(head: Head, labels: Sequence[str]) -> dict[str, Any]:
    """The entries of config.json for the labels of a head."""
    if not head.labels_have_names:
        return {}
    names = {"id2label": dict(enumerate(labels)), "label2id": {name: i for i, name in enumerate(labels)}}
    if not head.pooled:
        return names
    return names | {"problem_type": "regression" if len(labels) == 1 else "single_label_classification"}


def stored_labels(stored: dict[str, Any]) -> list[str] | None:
    """id2label of a config.json, in the order of the outputs. None if it is missing or has the default names of
    transformers, LABEL_0 and so on. Raises BadInput if it is damaged."""
    by_id, by_label = stored.get("id2label"), stored.get("label2id")
    if by_id is None:
        return None
    values = [by_id.get(str(i)) for i in range(len(by_id))] if isinstance(by_id, dict) else [None]
    names = [name for name in values if isinstance(name, str)]
    if len(names) < len(values) or len(set(names)) < len(names):
        raise BadInput("its id2label (config.json) must give each output, from 0 on, a different name; correct it")
    if isinstance(by_label, dict) and any(by_label.get(name, i) != i for i, name in enumerate(names)):
        raise BadInput("its id2label and label2id (config.json) contradict each other; correct one")
    return None if names == [f"LABEL_{i}" for i in range(len(names))] else names


def output_order(task: str, head: Head, labels: Sequence[str], stored: dict[str, Any]) -> list[int] | None:
    """For each label of the task, the index of the output of a stored head that stands for it. stored: its config.json.

    Names are compared without case. If GLUE's files number the labels, the words for them match too (glue.WORDS).
    None if the order is that of the task, or if the outputs have no names, so that this order is assumed: heads with the
    default names of transformers, and heads for answers and spans. Raises BadInput if the names are not those of the task.
    """
    if not head.labels_have_names:
        return None
    stored_type, task_type = stored.get("problem_type"), hf_config_entries(head, labels).get("problem_type")
    if None not in (stored_type, task_type) and stored_type != task_type:
        raise BadInput(f"its problem_type (config.json) is {stored_type}, {task} is {task_type}")
    names = stored_labels(stored)
    if names is None:
        return None
    for expected in (labels, glue.WORDS.get(task, ())):
        for form in (str, str.casefold):
            task_names, head_names = [*map(form, expected)], [*map(form, names)]
            if sorted(task_names) == sorted(head_names) and len(set(head_names)) == len(head_names):
                order = [head_names.index(label) for label in task_names]
                return None if order == sorted(order) else order
    raise BadInput(
        f"the labels of its head are {', '.join(names)}, those of {task} are {', '.join(labels)}; correct id2label in its "
        "config.json"
    )


def unnamed_note(head: Head, labels: Sequence[str], stored: dict[str, Any]) -> list[str]:
    """A note if the outputs of a stored head have no names, so that the order of the task is assumed."""
    if not head.labels_have_names or len(labels) == 1 or stored_labels(stored) is not None:
        return []
    return [f"the labels of its head have no names (id2label): assumed to be {', '.join(labels)}, in this order"]
