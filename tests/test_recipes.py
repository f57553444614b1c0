"""Layout of the repository: scripts that read alike, recipes that copy without an edit, folders that shadow no package."""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, launch_script, step_of

from common import families

FAMILIES = sorted(p.parent.name for p in (ROOT / "recipes").glob("*/task.py"))
STACKS = ("baseline", "deepspeed", "megatron")
BANNERS = ["config", "ranks", "model", "optimizer", "data", "resume", "loop", "export"]


SCRIPTS = sorted(path.relative_to(ROOT) for stack in STACKS for path in ROOT.glob(f"recipes/*/{stack}/*.sh"))


@pytest.mark.parametrize("script", SCRIPTS, ids=str)
def test_scripts_have_the_same_banners(script: Path) -> None:
    text = (ROOT / script).with_suffix(".py").read_text(encoding="utf-8")
    assert re.findall(r"^    # ---- (\w+)$", text, re.M) == BANNERS
    assert len(text.splitlines()) < 260


@pytest.mark.parametrize("name", ("pretrain", "finetune"))
@pytest.mark.parametrize("family", FAMILIES)
def test_launch_scripts_are_one_text(family: str, name: str) -> None:
    texts = {path.parent.name: (ROOT / path).read_text() for path in SCRIPTS if path.parts[1] == family and path.stem == name}
    assert (
        len({text.replace(f"/{stack}/", "/STACK/") for stack, text in texts.items()}) == 1 or name == "finetune" and not texts
    )


def test_no_init_file_under_recipes():
    assert not list((ROOT / "recipes").rglob("__init__.py"))


def test_common_imports_no_recipe():
    for path in (ROOT / "common").rglob("*.py"):
        assert not re.search(r"^\s*(from|import) recipes", path.read_text(encoding="utf-8"), re.M), path


@pytest.mark.parametrize("family", FAMILIES)
def test_the_code_of_a_recipe_names_no_family(family: str) -> None:
    """A message of a copy would send its reader to the original. Docstrings may: they describe."""
    for path in (ROOT / "recipes" / family).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            is_docstring = isinstance(node, ast.Expr)
            texts = [] if is_docstring else [str(c.value) for c in ast.iter_child_nodes(node) if isinstance(c, ast.Constant)]
            assert not any(re.search(r"recipes[/.](bert|gpt|t5)", text) for text in texts), path


def test_recipe_folders_shadow_no_package(tmp_path):
    """From inside recipes/gpt, where folders are named deepspeed and megatron, the packages are still the installed ones."""
    code = "import deepspeed, megatron.core; print(deepspeed.__file__, megatron.core.__file__)"
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "recipes/gpt", env=env, capture_output=True, text=True)
    assert done.stdout.count("site-packages") == 2, done.stdout + done.stderr


def test_validation_imports_no_torch():
    modules = "common.launch.launcher, common.preflight, common.data.indexed_dataset, recipes.gpt.task"
    code = f"import sys, {modules}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stdout + done.stderr


def copied_checkout(folder: Path) -> Path:
    """A checkout with recipes/mine beside recipes/gpt, as the README says to make it."""
    for name in ("common", "recipes/gpt"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    copy = folder / "recipes/mine"
    shutil.copytree(folder / "recipes/gpt", copy)
    for stack in set(families.stacks("gpt")) - {"deepspeed"}:
        shutil.rmtree(copy / stack)
    if (ROOT / ".venv").exists():
        (folder / ".venv").symlink_to(ROOT / ".venv")
    return folder


def test_a_copied_recipe_trains_without_an_edit(settings, tmp_path):
    launch_script("deepspeed")
    checkout = copied_checkout(tmp_path)
    config = checkout / "recipes/mine/configs/tiny.yaml"
    config.write_text(config.read_text().replace("layers: 4", "layers: 3"))
    command = ["bash", "recipes/mine/deepspeed/pretrain.sh", "recipes/mine/configs/tiny.yaml", "out/mine", *settings]
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "NPROC": "1"}
    env.pop("PYTHONPATH", None)
    done = subprocess.run([*command, "train.steps=3"], cwd=checkout, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "step    3 100%" in done.stdout and (checkout / "out/mine/hf/model.safetensors").is_file()
    assert "transformer.h.3.ln_1.weight" not in step_of(checkout / "out/mine", 3).names()
