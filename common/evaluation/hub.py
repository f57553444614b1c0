"""Data sets from the Hugging Face hub, for those who have a network."""

from typing import Any

from common.errors import BadInput

SPLITS = {"train": "train", "dev": "validation", "test": "test"}  # our names of them, and theirs


def rows(name: str, repository: str, config: str | None, split: str) -> Any:
    """A split as `datasets` has it. name: of the task, for the message of the BadInput where it cannot be had."""
    import datasets

    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(repository, config, split=split)
    except Exception as error:  # no network, no access: each has a class of its own there
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise BadInput(f"{name}: {repository} cannot be had: {reason}; give a local copy (task.data=DIR, --data DIR)") from None
