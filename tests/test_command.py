"""The command `twinstack`: it becomes the command that it stands for, installed or not, and changes nothing of it."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NoReturn

import pytest
from conftest import ROOT

import twinstack

# commands of those who work on the repository, and scripts that others start
NOT_LISTED = {"bench_data", "bench_plan", "bench_state", "sizes", "setup", "slurm", "test"}
TINY = "recipes/gpt/configs/tiny.yaml"


def run(*words: str, command: tuple[str, ...] = (sys.executable, str(ROOT / "twinstack.py")), cwd: Path = ROOT):
    env = {key: value for key, value in os.environ.items() if key not in ("NPROC", "NNODES", "PYTHONPATH")}
    return subprocess.run([*command, *words], cwd=cwd, env=env, capture_output=True, text=True, timeout=120)


def test_the_usage_comes_at_once_and_names_every_command() -> None:
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        done = run("--help")
        seconds.append(time.perf_counter() - start)
        assert done.returncode == 0 and max(map(len, done.stdout.splitlines())) <= 80
    assert min(seconds) < 1
    names = {path.stem for path in (*ROOT.glob("scripts/*.py"), *ROOT.glob("scripts/*.sh")) if not path.stem.startswith("__")}
    names -= {*NOT_LISTED, *(name for name in names if name.startswith("document_"))}
    assert names == {Path(file).stem for file in twinstack.COMMANDS}
    assert all((ROOT / "scripts" / file).is_file() for file in twinstack.COMMANDS)
    assert all(f"\n  {name} " in done.stdout for name in {*names, "pretrain", "finetune", "data", "convert"})
    assert {run(*words).stdout for words in ((), ("pretrain", "-h"), ("finetune", "gpt", "--help"))} == {done.stdout}


@pytest.mark.parametrize(("words", "expected"), [
    ("pretrain gpt megatron CONFIG OUT --dry-run", "bash recipes/gpt/megatron/pretrain.sh CONFIG OUT --dry-run"),
    ("finetune bert deepspeed --help", "bash recipes/bert/deepspeed/finetune.sh --help"),
    ("data text corpora/own --source x", "python -m data.text corpora/own --source x"),
    ("data", "python -m data"),
    ("convert t5 to-hf RUN HF", "python -m recipes.t5.convert to-hf RUN HF"),
    ("quickstart bert --steps 4", "bash scripts/quickstart.sh bert --steps 4"),
    ("plan CONFIG --gpus 8", "python -m scripts.plan CONFIG --gpus 8"),
])  # fmt: skip
def test_a_command_stands_for_another(words: str, expected: str) -> None:
    command = " ".join(twinstack.command_of(words.split()))
    assert command.replace(twinstack.python(), "python").replace(f"{ROOT}/", "") == expected


@pytest.mark.parametrize(("words", "message"), [
    ("pretrian", "error: 'pretrian': no such COMMAND; did you mean 'pretrain'? COMMAND is pretrain, "),
    ("pretrain", "error: FAMILY is missing; type: twinstack pretrain FAMILY ..., where FAMILY is "),
    ("pretrain gpt", "error: STACK is missing; type: twinstack pretrain gpt STACK ..., where STACK is baseline or "),
    (f"pretrain megatron gpt {TINY} OUT", "error: 'megatron': no such FAMILY; FAMILY is bert, gpt, t5"),
    ("data ../scripts/plan", "error: '../scripts/plan': no such NAME; NAME is c4, "),
    ("setup", "error: 'setup': no such COMMAND"),
    ("pretrain gpt megatron", "error: CONFIG and OUT are missing; type: "),  # of the launch script
])  # fmt: skip
def test_other_words_are_refused_in_one_line(words: str, message: str) -> None:
    done = run(*words.split())
    assert (done.returncode, done.stdout) == (2, "") and message in done.stderr.splitlines()[-1]


class Became(Exception):
    """In place of the other command."""


def test_a_run_is_that_of_venv_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """A launch script chooses .venv if there is one, and python3 otherwise: that must be the Python of `twinstack`."""

    def become(file: str, command: list[str]) -> NoReturn:
        raise Became(file, *command[1:])

    monkeypatch.setattr("os.execvp", become)
    monkeypatch.setattr("sys.argv", ["twinstack", "plan", "CONFIG"])
    monkeypatch.setenv("PYTHONSAFEPATH", "")  # restored at the end, as the others
    monkeypatch.setenv("PYTHONPATH", "/mine")
    monkeypatch.setenv("PATH", "/bin")
    own, python = tmp_path / ".venv", tmp_path / ".venv/bin/python"
    monkeypatch.setattr(twinstack, "OF_REPOSITORY", python)
    with pytest.raises(Became) as became:
        twinstack.main()
    assert became.value.args == (sys.executable, "-m", "scripts.plan", "CONFIG") and not capsys.readouterr().err
    assert os.environ["PATH"] == f"{Path(sys.executable).parent}:/bin"
    assert (os.environ["PYTHONPATH"], os.environ["PYTHONSAFEPATH"]) == (f"{ROOT}:/mine", "1")

    monkeypatch.setenv("PATH", "/bin")
    python.parent.mkdir(parents=True)
    python.symlink_to(sys.executable)
    with pytest.raises(Became) as became:
        twinstack.main()
    assert became.value.args[0] == str(python) and os.environ["PATH"] == "/bin"
    assert capsys.readouterr().err.startswith("note: running in ")
    monkeypatch.setattr("sys.prefix", str(own))
    with pytest.raises(Became):
        twinstack.main()
    assert not capsys.readouterr().err


def test_without_the_recipes_it_says_how_to_install_it(tmp_path: Path) -> None:
    shutil.copy(ROOT / "twinstack.py", tmp_path)
    done = run("--help", command=(sys.executable, str(tmp_path / "twinstack.py")))
    assert done.returncode == 2 and "pip install --no-deps -e ." in done.stderr and len(done.stderr.splitlines()) == 1


def test_installed_in_an_environment_of_its_own(tmp_path: Path, settings: list[str]) -> None:
    """`pip install -e .` without network, in a copy of the repository with a copied recipe, used from another folder."""
    clone, venv, elsewhere = tmp_path / "clone", tmp_path / "venv", tmp_path / "elsewhere"
    elsewhere.mkdir()
    for folder in ("common", "data", "scripts", "recipes"):
        shutil.copytree(ROOT / folder, clone / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "twinstack.py"):
        shutil.copy(ROOT / name, clone)
    shutil.copytree(clone / "recipes/gpt", clone / "recipes/mine")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    [packages] = venv.glob("lib/python*/site-packages")
    installed = Path(pytest.__file__).parent.parent  # this environment's
    (packages / "of_the_tests.pth").write_text(f"{installed}\n", encoding="utf-8")
    pip = (
        str(venv / "bin/python"),
        "-m",
        "pip",
        "install",
        "--no-index",
        "--no-build-isolation",
        "--no-deps",
        "-e",
        str(clone),
    )
    done = run(command=pip)
    assert done.returncode == 0, done.stderr

    def typed(*words: str):
        return run(*words, command=(str(venv / "bin/twinstack"),), cwd=elsewhere)

    def script(*words: str):
        return run(*words, command=("bash", str(clone / "recipes/mine/megatron/pretrain.sh")), cwd=elsewhere)

    config = str(clone / "recipes/mine/configs/tiny.yaml")
    words = (config, "out", "train.steps=7", *settings, "--dry-run")
    done, expected = typed("pretrain", "mine", "megatron", *words), script(*words)
    assert done.returncode == 0, done.stderr
    assert "-m recipes.mine.megatron.pretrain" in done.stdout and done.stdout == expected.stdout
    words = (config, "out", "model.layrs=3")
    done, expected = typed("pretrain", "mine", "megatron", *words), script(*words)
    assert (done.returncode, done.stderr) == (expected.returncode, expected.stderr) and "did you mean 'layers'" in done.stderr
    done = typed("data", "text", "--help")
    assert done.returncode == 0 and done.stdout.startswith("usage: python -m data.text")
    assert not list(elsewhere.iterdir())
