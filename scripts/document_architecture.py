"""Write the picture of docs/architecture.md from the imports of the code: which part calls which.

python -m scripts.document_architecture
"""

import ast
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from common.command_line import Parser
from common.errors import exit_cleanly
from common.paths import ROOT

PAGE = ROOT / "docs/architecture.md"
STACKS = ("baseline", "deepspeed", "megatron")
PARTS = {  # regular expression of files -> node; the first that matches counts
    r"recipes/\w+/baseline/": "baseline",
    r"recipes/\w+/deepspeed/": "deepspeed",
    r"recipes/\w+/megatron/": "megatron",
    r"recipes/": "family",
    r"common/(planning|simulation|comparison)/": "tools",
    r"common/stacks/": "stacks",
    r"common/\w+/": "shared",
    r"common/": "core",
    r"data/": "corpora",
    r"scripts/": "scripts",
}
LABELS = {  # nodes in the order in which they are drawn
    "scripts": "scripts/<br>plan, simulate, parity, compare, evaluate, ...",
    "corpora": "data/<br>one module per corpus",
    "baseline": "recipes/FAMILY/baseline/<br>pretrain.py, finetune.py",
    "deepspeed": "recipes/FAMILY/deepspeed/<br>pretrain.py, finetune.py, model.py",
    "megatron": "recipes/FAMILY/megatron/<br>pretrain.py, finetune.py,<br>model.py, parameter_map.py",
    "family": "recipes/FAMILY/<br>task.py, finetune.py, samples.py:<br>model, batch, loss",
    "tools": "common/planning, simulation, comparison<br>memory and time, a GPU that computes nothing, figures",
    "stacks": "common/stacks/<br>what all recipes of a stack need",
    "shared": "common/launch: torchrun, signals, hangs<br>common/data: tokenizers, corpora, order of samples<br>"
              "common/training: initial values, optimizers, loss, log<br>common/checkpoints: state by Hugging Face name<br>"
              "common/huggingface: folders in and out<br>common/evaluation: protocols and scores",
}  # fmt: skip
LIBRARIES = {"deepspeed": "DeepSpeed", "megatron": "Megatron Core", "accelerate": "accelerate", "transformers": "transformers"}
TRAINS = (*STACKS, "family", "stacks")  # parts whose libraries are drawn
CORE = "core"  # the modules directly in common/: everything imports them, so no arrows are drawn
PICTURE = re.compile(
    r"(<!-- generated: imports \(python -m scripts\.document_architecture\) -->\n).*?(<!-- end of generated -->)", re.S
)


def main() -> None:
    Parser(prog="python -m scripts.document_architecture", description=__doc__.splitlines()[0]).parse_args()
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    print(PAGE)


def page(text: str) -> str:
    """A page with its picture drawn again."""
    return PICTURE.sub(lambda found: f"{found[1]}```mermaid\n{mermaid()}\n```\n{found[2]}", text)


def mermaid() -> str:
    """The picture: an arrow from a part to each that it imports, and from a part of the recipes to each library."""
    arrows, libraries = imports()
    order = list(LABELS)
    lines = ["flowchart TD"]
    lines += [f'  {node}["{label}"]' for node, label in LABELS.items()]
    lines += [f'  lib_{name}(["{label}"])' for name, label in LIBRARIES.items()]
    pairs = sorted((p for p in arrows if CORE not in p), key=lambda pair: (order.index(pair[0]), order.index(pair[1])))
    lines += [f"  {one} --> {other}" for one, other in pairs]
    uses = sorted((p for p in libraries if p[0] in TRAINS), key=lambda pair: (order.index(pair[0]), pair[1]))
    lines += [f"  {node} -.-> lib_{name}" for node, name in uses]
    return "\n".join(lines)


def imports() -> tuple[Counter[tuple[str, str]], set[tuple[str, str]]]:
    """({(part, part that it imports): modules that do}, {(part, library that it imports)})."""
    arrows: Counter[tuple[str, str]] = Counter()
    libraries: set[tuple[str, str]] = set()
    for folder in ("common", "data", "recipes", "scripts"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            file = path.relative_to(ROOT).as_posix()
            modules = set(imported(path, file))
            part = part_of(file)
            arrows.update({(part, other) for module in modules if (other := part_of_module(module)) and other != part})
            libraries |= {(part, name) for module in modules if (name := module.partition(".")[0]) in LIBRARIES}
    return arrows, {(part, name) for part, name in libraries if part != CORE}


def imported(path: Path, file: str) -> Iterator[str]:
    """The modules that a file imports, wherever the statement stands; names of `from a import b` as a.b."""
    package = file.split("/")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{stem}.{alias.name}" for alias in node.names)


def part_of_module(module: str) -> str | None:
    """The part that a module of this repository belongs to."""
    names = module.split(".")
    for length in range(len(names), 0, -1):
        file = "/".join(names[:length])
        if (ROOT / f"{file}.py").is_file():
            return part_of(f"{file}.py")
    return None


def part_of(file: str) -> str:
    for pattern, part in PARTS.items():
        if found := re.match(pattern, file):
            return found.expand(part)
    raise ValueError(file)


if __name__ == "__main__":
    exit_cleanly(main)
