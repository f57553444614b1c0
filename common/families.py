"""Which recipes there are: the families under recipes/, the stacks of each, and the family that a config belongs to.

A family is a folder of recipes/ that has a task.py. A stack of a family is a folder there that has a pretrain.py. A copied
recipe is therefore found without an edit, and a deleted stack is not looked for.
"""

import importlib
import os
from pathlib import Path
from types import ModuleType

from common.config import STACKS
from common.errors import BadInput
from common.paths import ROOT

RECIPES = ROOT / "recipes"


def names() -> list[str]:
    """The names of all families, sorted."""
    return sorted(path.parent.name for path in RECIPES.glob("*/task.py"))


def stacks(family: str) -> list[str]:
    """The stacks that a family has, in the order of config.STACKS: the baseline first, if the family has it."""
    return [stack for stack in STACKS if (RECIPES / family / stack / "pretrain.py").is_file()]


def module_of(file: str, family: str | None = None, holding: str = "") -> ModuleType | None:
    """The module recipes/FAMILY/FILE.py of the family, else of the first family with such a file, else None. holding: a text
    that the file must contain."""
    paths = {name: RECIPES / name / f"{file}.py" for name in names()}
    having = [name for name, path in paths.items() if path.is_file() and holding in path.read_text(encoding="utf-8")]
    chosen = family if family in having else next(iter(having), None)
    return importlib.import_module(f"recipes.{chosen}.{file}") if chosen else None


def of_config(config_path: str | Path) -> str:
    """The family whose folder a config lies in: recipes/gpt/configs/tiny.yaml -> gpt. BadInput for a config elsewhere."""
    parts = Path(config_path).resolve().parts
    if "recipes" in parts[:-2]:
        family = parts[len(parts) - 1 - parts[::-1].index("recipes") + 1]
        if family in names():
            return family
    if os.path.isfile(os.path.join(config_path, "config.yaml")):  # Path.is_file raises for a name that is too long
        raise BadInput(f"{config_path}: is a run; give the config that it was started with, recipes/FAMILY/configs/NAME.yaml")
    raise BadInput(
        f"{config_path}: lies in no recipe, and its folder says which one it is for; "
        f"put it into recipes/FAMILY/configs/, where FAMILY is {', '.join(names())}"
    )
