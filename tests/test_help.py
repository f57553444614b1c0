"""`--help` of every command explains it, starts nothing and shows no traceback."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from common import command_line

SHELL = [*sorted(ROOT.glob("scripts/*.sh")), *sorted(ROOT.glob("recipes/*/*/*.sh"))]
MODULES = (path for folder in ("data", "scripts", "recipes") for path in ROOT.glob(f"{folder}/**/*.py"))
COMMANDS = sorted(
    path
    for path in MODULES
    if path.stem != "__main__" and "__name__ == " in (text := path.read_text("utf-8")) and "processes.run(main)" not in text
)
HELP = """\
import contextlib, io, runpy, sys
for module in sys.argv[1:]:
    sys.argv, texts = [module, "--help"], io.StringIO()
    with contextlib.redirect_stdout(texts), contextlib.suppress(SystemExit):
        runpy.run_module(module, run_name="__main__")
    print(f"==== {module}", texts.getvalue(), sep="\\n")
"""


@pytest.mark.parametrize("script", SHELL, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_shell_script(script: Path, tmp_path: Path):
    done = subprocess.run(["bash", str(script), "--help"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert script.name in done.stdout and not list(tmp_path.iterdir())
    assert [line for line in done.stdout.splitlines() if len(line) > 80] == []


def test_the_python_commands(tmp_path: Path):
    """All in one process: each imports what it needs."""
    names = [str(path.relative_to(ROOT)).removesuffix(".py").replace("/", ".") for path in COMMANDS]
    assert {"data.text", "data.pairs", "scripts.evaluate", "recipes.t5.convert"} <= set(names)
    command = [sys.executable, "-W", "ignore::RuntimeWarning", "-c", HELP, *names]
    done = subprocess.run(
        command, cwd=tmp_path, env={"PYTHONPATH": str(ROOT), "COLUMNS": "80"}, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
    texts = dict(re.findall(r"^==== (\S+)\n(.*?)(?=^====|\Z)", done.stdout, re.M | re.S))
    assert list(texts) == names
    assert [name for name, text in texts.items() if not text.startswith("usage: ") or len(text.splitlines()) < 6] == []
    assert [(name, line) for name, text in texts.items() for line in text.splitlines() if len(line) > 80] == []
    assert not list(tmp_path.iterdir())


def test_a_docstring_is_wrapped_again_and_keeps_its_lists_and_commands():
    long = "word " * 24 + "end"
    assert len(long) > command_line.WRAPPED
    text = f"{long}\nand more.\n\nname   {long}\n       and more\nother  x\n\n    python -m {long}\n    python -m b"
    lines = command_line.reflowed(text, 80)
    assert max(map(len, lines)) <= 80 and " ".join(" ".join(lines).split()) == " ".join(text.split())
    assert lines[1].endswith("end and more.") and lines[2] == ""
    assert lines[3].startswith("name   word") and lines[4].startswith("       word") and "other  x" in lines
    assert lines[-1] == "    python -m b" and lines[-2].startswith("    word")
