"""docs/coming_from.md: the keys that it gives exist, and the arguments of the installed transformers are its own."""

import ast
import re
from importlib.util import find_spec
from pathlib import Path

from conftest import ROOT

PAGE = (ROOT / "docs/coming_from.md").read_text(encoding="utf-8")
SECTIONS = "model|log|data|optim|train|init|baseline|deepspeed|megatron|objective"


def rows(heading: str) -> list[list[str]]:
    """The cells of a section's table, without its head."""
    section = re.split(r"^## ", PAGE, flags=re.M)
    text = next(part for part in section if part.startswith(heading))
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [re.split(r"(?<!\\) \| ", line.strip("| ")) for line in lines[1:]]


def test_every_key_exists() -> None:
    known = set(re.findall(r"^\| `([\w.]+)` \|", (ROOT / "docs/configs.md").read_text(encoding="utf-8"), re.M))
    for heading in ("Megatron-LM", "Megatron-DeepSpeed", "Megatron-Bridge", "transformers.Trainer", "nanoGPT"):
        cells = rows(heading)
        keys = {key for row in cells for key in re.findall(rf"`((?:{SECTIONS})\.\w+)", row[1])}
        assert len(cells) > 15 and len(keys) > 12, heading
        assert keys - known - {"data.openwebtext", "data.tinyshakespeare"} == set(), heading


def test_the_arguments_are_those_of_the_installed_transformers() -> None:
    spec = find_spec("transformers")
    assert spec and spec.origin
    tree = ast.parse((Path(spec.origin).parent / "training_args.py").read_text(encoding="utf-8"))
    class_ = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "TrainingArguments")
    fields = {n.target.id for n in class_.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)}
    given = {name for row in rows("transformers.Trainer") for name in re.findall(r"`(\w+)`", re.sub(r"\(.*?\)", "", row[0]))}
    assert len(given) > 30 and given - fields == set()
