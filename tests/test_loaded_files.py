"""Pretraining loads what pretraining needs: no task, no evaluation, no finetuning, and few files in all."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT

from common import families

# A reader of a script who follows its imports reads so many files of this repository at most.
MOST = {"baseline": 44, "deepspeed": 49, "megatron": 50}
OTHERS = ("common/evaluation/", "common/training/finetuning.py", "common/training/lora.py", "recipes/bert/tasks/")
SCRIPTS = [(family, stack) for family in families.names() for stack in families.stacks(family)]
# The libraries are imported once; each script in a child of that process.
PROGRAM = """
import importlib, json, os, sys
import accelerate, deepspeed, torch, transformers
import megatron.core.models.bert.bert_model, megatron.core.models.gpt, megatron.core.models.T5

root, *names = sys.argv[1:]
for name in names:
    read, write = os.pipe()
    if os.fork() == 0:
        importlib.import_module(name)
        files = [getattr(module, "__file__", None) or "" for module in list(sys.modules.values())]
        own = {os.path.relpath(file, root) for file in files if file.startswith(root + os.sep) and "/.venv/" not in file}
        with open(write, "w") as pipe:
            json.dump(sorted(own), pipe)
        os._exit(0)
    os.close(write)
    with open(read) as pipe:
        print("loaded", name, pipe.read())
    os.wait()
"""


@pytest.fixture(scope="module")
def loaded() -> dict[str, list[str]]:
    names = [f"recipes.{family}.{stack}.pretrain" for family, stack in SCRIPTS]
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM, str(ROOT), *names]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    lines = [line.split(" ", 2)[1:] for line in done.stdout.splitlines() if line.startswith("loaded ")]
    assert len(lines) == len(names), done.stderr
    return {name: json.loads(files) for name, files in lines}


@pytest.mark.parametrize(("family", "stack"), SCRIPTS)
def test_pretraining_loads_no_task_and_few_files(loaded: dict[str, list[str]], family: str, stack: str) -> None:
    files = loaded[f"recipes.{family}.{stack}.pretrain"]
    assert f"recipes/{family}/task.py" in files and f"recipes/{family}/{stack}/pretrain.py" in files
    assert [file for file in files if file.startswith(OTHERS) or file.endswith("/finetune.py")] == []
    assert len(files) <= MOST[stack], f"{len(files)} files: {', '.join(files)}"
