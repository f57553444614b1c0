"""docs/quickstart.ipynb: a notebook without outputs whose cells run in order, and whose three curves are one."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

NOTEBOOK = ROOT / "docs/quickstart.ipynb"
CELLS: list[dict[str, Any]] = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
CODE = ["".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "code"]
# Runs the cells as one program, and says what they have drawn and read.
PROGRAM = """\
import json, sys
from matplotlib import pyplot as plt
names = {"__name__": "__main__"}
for cell in json.load(sys.stdin):
    exec(compile(cell, "cell", "exec"), names)
drawn = [[list(line.get_ydata()) for line in axes.get_lines()] for axes in plt.gcf().axes]
with open(sys.argv[1], "w") as file:
    json.dump({"losses": names["losses"], "drawn": drawn}, file)
"""


def test_it_is_a_notebook_without_outputs() -> None:
    """The format of https://nbformat.readthedocs.io, version 4.5: each cell has an id of its own."""
    whole = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert (whole["nbformat"], whole["nbformat_minor"], whole["metadata"]["kernelspec"]["language"]) == (4, 5, "python")
    ids = [cell["id"] for cell in CELLS]
    assert len(set(ids)) == len(ids) and all(re.fullmatch(r"[\w-]{1,64}", one) for one in ids)
    for cell in CELLS:
        assert set(cell) - {"outputs", "execution_count"} == {"cell_type", "id", "metadata", "source"}
        assert cell["cell_type"] == "markdown" or (cell["outputs"], cell["execution_count"]) == ([], None), "clear the outputs"
    links = re.findall(r"\]\(([^)]+)\)", "".join("".join(cell["source"]) for cell in CELLS))
    assert links and all((NOTEBOOK.parent / link).is_file() for link in links)


def commands() -> list[list[str]]:
    """The words of each `run(...)` of the cells, with {NAME} for a value."""
    calls = [node for cell in CODE for node in ast.walk(ast.parse(cell)) if isinstance(node, ast.Call)]
    texts = [node.args[0] for node in calls if isinstance(node.func, ast.Name) and node.func.id == "run"]
    return [re.sub(r"^f?(['\"])(.*)\1$", r"\2", ast.unparse(text)).split() for text in texts]


def test_what_it_types_exists() -> None:
    found = commands()
    assert len(found) == sum(cell.startswith(("run(", "settings")) for cell in CODE) == 7
    for words in found:
        path = words[1] if words[0] == "bash" else words[2].replace(".", "/") + ".py"
        assert words[0] in ("bash", "python") and (ROOT / path).is_file(), words
        text = (ROOT / path).read_text(encoding="utf-8") + (ROOT / "data/build.py").read_text(encoding="utf-8")
        assert all(word in text for word in words if word.startswith("--")), words
    settings = dict(re.findall(r'^(CONFIG|STEPS|CORPUS|OUT)\b.*?= "?([\w/.]+)', CODE[0], re.M))
    assert (ROOT / settings["CONFIG"]).is_file() and int(settings["STEPS"]) <= 100


@pytest.mark.slow
def test_its_cells_run_and_draw_one_curve(tmp_path: Path) -> None:
    """In a folder with links to the repository's: what the cells write stays there."""
    for name in ("common", "data", "recipes", "scripts", ".venv"):
        if (ROOT / name).exists():
            (tmp_path / name).symlink_to(ROOT / name)
    env = {key: value for key, value in os.environ.items() if key not in ("NNODES", "RANK", "WORLD_SIZE")}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "result.json")], cwd=tmp_path, env=env | {"MPLBACKEND": "agg"},
        input=json.dumps(CODE), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    result = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))
    losses = result["losses"]
    assert list(losses) == ["baseline", "deepspeed", "megatron"] and len(losses["baseline"]) == 60
    assert losses["baseline"][0] > 6 > losses["baseline"][-1]
    for stack in ("deepspeed", "megatron"):
        assert max(abs(a - b) for a, b in zip(losses[stack], losses["baseline"], strict=True)) <= 1e-5, stack
    assert result["drawn"][0] == list(losses.values()) and len(result["drawn"][1]) == 2
    assert "def __init__(self" in done.stdout and (tmp_path / "out/notebook/curves.png").is_file()
