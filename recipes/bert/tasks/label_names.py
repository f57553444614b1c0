"""Names and order of a head's labels: in the config.json of an export, and in that of a folder to begin from."""

from collections.abc import Sequence
from typing import Any

from common.errors import BadInput
from common.evaluation import glue

from .base import Head


def hf_config_entries(head: Head, labels: Sequence[str]) -> dict[str, Any]:
    """What config.json says of the labels of a head."""
    if not head.labels_have_names:
        return {}
    names = {"id2label": dict(enumerate(labels)), "label2id": {name: i for i, name in enumerate(labels)}}
    if not head.pooled:
        return names
    return names | {"problem_type": "regression" if len(labels) == 1 else "single_label_classification"}


def stored_labels(stored: dict[str, Any]) -> list[str] | None:
    """id2label of a config.json, in the order of the outputs. None where it is missing, or holds transformers' defaults,
    LABEL_0 and so on. BadInput where it is damaged."""
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
    """Which output of the head in a folder, whose config.json is `stored`, stands for each label of the task. Names are
    compared without case; for the numbers in GLUE's files also by their words (glue.WORDS).

    None where the order is the task's, or is assumed to be because the outputs have no names: the default names of
    transformers, and heads of answers and spans. BadInput where the names are not the task's.
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
            ours, known = [*map(form, expected)], [*map(form, names)]
            if sorted(ours) == sorted(known) and len(set(known)) == len(known):
                order = [known.index(label) for label in ours]
                return None if order == sorted(order) else order
    raise BadInput(
        f"the labels of its head are {', '.join(names)}, those of {task} are {', '.join(labels)}; correct id2label in its "
        "config.json"
    )


def unnamed_note(head: Head, labels: Sequence[str], stored: dict[str, Any]) -> list[str]:
    """A note where the outputs of a folder's head have no names, so that the task's order is assumed."""
    if not head.labels_have_names or len(labels) == 1 or stored_labels(stored) is not None:
        return []
    return [f"the labels of its head have no names (id2label): assumed to be {', '.join(labels)}, in this order"]
