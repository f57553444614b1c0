"""The recipes are siblings: the scripts of gpt and t5 differ only in the name, and on DeepSpeed by the pipeline, which t5 does
not have. Those of bert differ too by the two parts of the pretraining loss, and in finetuning by the head of a task and its
predictions.

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


def difference(family: str, name: str) -> str:
    """A family's script against gpt's: the lines that differ, without their numbers."""
    lines = difflib.unified_diff(script("gpt", name), script(family, name), "gpt", family, n=0)
    return "".join("@@\n" if line.startswith("@@") else line for line in lines)


def golden(family: str, name: str) -> Path:
    return DIFFERENCES / f"{family}_{name.replace('/', '_').removesuffix('.py')}.diff"


@pytest.mark.parametrize("name", [name for name in SCRIPTS if not name.startswith("deepspeed/")])
def test_gpt_and_t5_differ_only_in_their_name(name):
    assert "".join(script("gpt", name)) == "".join(script("t5", name))


def test_deepspeed_builds_bert_and_t5_alike():
    assert "".join(script("bert", "deepspeed/model.py")) == "".join(script("t5", "deepspeed/model.py"))


MEANT = [("bert", name) for name in SCRIPTS] + [("t5", name) for name in SCRIPTS if name.startswith("deepspeed/")]


@pytest.mark.parametrize(("family", "name"), MEANT)
def test_bert_differs_only_by_its_loss_and_predictions_and_t5_by_the_pipeline(family, name):
    path = golden(family, name)
    assert difference(family, name) == path.read_text(), f"if it is meant: python -m tests.test_siblings ({path.name})"


if __name__ == "__main__":
    DIFFERENCES.mkdir(exist_ok=True)
    for pair in MEANT:
        golden(*pair).write_text(difference(*pair))
