"""The recipes are siblings: the scripts of gpt and t5 differ only in the name. Those of bert differ too by the two parts of the
pretraining loss, and in finetuning by the head of a task and its predictions.

Where a difference is meant, write the new ones down: `python -m tests.test_siblings`.
"""

import difflib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = tuple(f"{stack}/{name}.py" for stack in ("baseline", "deepspeed", "megatron") for name in ("pretrain", "finetune"))
NAMES = {"gpt": "GPT", "t5": "T5", "bert": "BERT"}
DIFFERENCES = ROOT / "tests/siblings"


def script(family: str, name: str) -> list[str]:
    """The lines of a script with FAMILY and Family in place of its family's name."""
    path = ROOT / "recipes" / family / name
    if not path.is_file():
        pytest.skip(f"recipes/{family} has no {name}")
    return path.read_text().replace(NAMES[family], "FAMILY").replace(family, "family").splitlines(keepends=True)


def difference(name: str) -> str:
    """bert's script against gpt's: the lines that differ, without their numbers."""
    lines = difflib.unified_diff(script("gpt", name), script("bert", name), "gpt", "bert", n=0)
    return "".join("@@\n" if line.startswith("@@") else line for line in lines)


def golden(name: str) -> Path:
    return DIFFERENCES / f"bert_{name.replace('/', '_').removesuffix('.py')}.diff"


@pytest.mark.parametrize("name", SCRIPTS)
def test_gpt_and_t5_differ_only_in_their_name(name):
    assert "".join(script("gpt", name)) == "".join(script("t5", name))


def test_deepspeed_builds_bert_and_t5_alike():
    assert "".join(script("bert", "deepspeed/model.py")) == "".join(script("t5", "deepspeed/model.py"))


@pytest.mark.parametrize("name", SCRIPTS)
def test_bert_differs_only_by_its_loss_and_predictions(name):
    assert difference(name) == golden(name).read_text(), f"if it is meant: python -m tests.test_siblings ({golden(name).name})"


if __name__ == "__main__":
    DIFFERENCES.mkdir(exist_ok=True)
    for script_name in SCRIPTS:
        golden(script_name).write_text(difference(script_name))
