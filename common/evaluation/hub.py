"""Datasets from the Hugging Face hub."""

from typing import Any

from common.errors import BadInput

SPLITS = {"train": "train", "dev": "validation", "test": "test"}  # {name of a split here: its name on the hub}


def load_split(name: str, repository: str, config: str | None, split: str) -> Any:
    """A split, as a `datasets.Dataset`. BadInput, which names the task `name`, where it cannot be loaded."""
    import datasets

    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(repository, config, split=split)
    except Exception as error:  # no network, no access: each raises another class
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise BadInput(
            f"{name}: {repository} cannot be loaded: {reason}; give a local copy (task.data=DIR, --data DIR)"
        ) from None
