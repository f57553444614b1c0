"""The documents: each command names existing files, its `--help` or `--dry-run` works, and links have targets."""

import functools
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import ROOT, launch_script

import twinstack

FAMILIES = sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("recipes/*/README.md"))
OTHERS = sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("docs/**/*.md") if p.name != "table.md")
DOCUMENTS = ["README.md", "CONTRIBUTING.md", "DATA_LICENSES.md", *OTHERS, *FAMILIES]
# commands of the shell and of other tools: only their paths are checked
SHELL_WORDS = {"git", "cd", "rm", "cp", "ruff", "pytest", "lm_eval", ".", ".venv/bin/pre-commit", "pip", "docker"}
OWN = {"FAMILY", "STACK", "NAME", "mine", "own_text"}  # in a path, these stand for the reader's own


class Line(NamedTuple):
    document: str
    env: dict[str, str]
    words: list[str]

    @property
    def name(self) -> str:
        return f"{self.document}: {' '.join(self.words)}"


def of_gpt(word: str) -> str:
    """A path or module of the reader's own recipe, as that of GPT, from which it is copied."""
    return re.sub(r"^recipes([/.])(?:mine|FAMILY)\b", r"recipes\1gpt", word)


def lines_of(document: str) -> list[Line]:
    lines = []
    page = (ROOT / document).read_text(encoding="utf-8")
    for block, after in re.findall(r"^ *```(?:bash|sh)\n(.*?)^ *```\n(<!-- output)?", page, re.M | re.S):
        if after:  # scripts/document_tour.py runs these: their output stands below them
            block = "\n".join(line for line in block.splitlines() if "train.sh" not in line or "--dry-run" in line)
        for text in block.replace("\\\n", " ").splitlines():
            for part in text.split("&&"):
                words = shlex.split(part, comments=True)
                env = {}
                while words and re.match(r"[A-Z_]+=", words[0]):
                    key, _, env[key] = words.pop(0).partition("=")
                if words:
                    lines.append(Line(document, env, words))
    return lines


LINES = [line for document in DOCUMENTS for line in lines_of(document)]


def run(command: list[str], env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run in the repository's root, as on a machine without GPUs."""
    given = {k: v for k, v in os.environ.items() if k not in ("NPROC", "NNODES", "RANK", "WORLD_SIZE")}
    return subprocess.run(
        command, cwd=ROOT, env=given | {"CUDA_VISIBLE_DEVICES": ""} | env, capture_output=True, text=True, timeout=120
    )


@functools.cache
def help_of(*command: str) -> subprocess.CompletedProcess[str]:
    """`command --help`: pages repeat commands."""
    return run([*command, "--help"], {})


@pytest.mark.parametrize("line", LINES, ids=lambda line: line.name)
def test_command(line: Line, settings: list[str], bert_settings: list[str], t5_settings: list[str], tmp_path: Path) -> None:
    words, env = [of_gpt(word) for word in line.words], dict(line.env)
    for family, stack in re.findall(r"recipes/(\w+)/(baseline|deepspeed|megatron)/", " ".join(words)):
        launch_script(stack, family=family)
    if words[0] == "twinstack":  # the command that it stands for
        words = [word.removeprefix(f"{ROOT}/") for word in twinstack.command_of(words[1:])]
        words = ["python", *words[1:]] if words[1] == "-m" else words
    if words[0] == "sbatch":
        script = next(i for i, word in enumerate(words) if word.endswith(".sh"))
        assert (ROOT / words[script]).is_file()
        env["NPROC"] = next(word.partition("=")[2] for word in words if word.startswith("--gpus-per-node="))
        words = ["bash", *words[script + 1 :]]
    if words[:2] == ["python", "-c"]:  # prints the folder of an installed package
        done = run([sys.executable, *words[1:]], env)
        assert done.returncode == 0 and Path(done.stdout.strip()).is_dir(), done.stderr
    elif words[0] == "python":
        assert words[1] == "-m", line.name
        assert (ROOT / (words[2].replace(".", "/") + ".py")).is_file(), line.name
        done = help_of(sys.executable, "-m", words[2])
        assert done.returncode == 0, done.stderr
        options = {word.partition("=")[0] for word in words if word.startswith("--")}
        assert all(option in done.stdout for option in options), (options, done.stdout)
    elif words[0] == "torchrun":
        module = words[words.index("-m") + 1]
        done = help_of(sys.executable, "-m", module)
        assert done.returncode == 0, done.stderr
        assert all(word in done.stdout for word in words[words.index("-m") + 2 :] if word.startswith("--")), done.stdout
    elif words[0] == "bash":
        script = words[1]
        assert (ROOT / script).is_file(), line.name
        if script.endswith("pretrain.sh") and "CONFIG" not in words:
            # OUT may be there already, and the corpus, which then decides the vocabulary, may be not
            words_of_family = {"bert": bert_settings, "t5": t5_settings}.get(words[2].split("/")[1], settings)
            corpus = words_of_family if "corpora/python" in (ROOT / words[2]).read_text(encoding="utf-8") else []
            command = ["bash", script, words[2], str(tmp_path / "out"), *words[4:], *corpus, "--dry-run"]
            done = run(command, env | ({"MASTER_ADDR": "127.0.0.1"} if "MASTER_ADDR" in env else {}))
            assert done.returncode == 0, done.stderr
            assert "torchrun" in done.stdout
        else:
            done = help_of("bash", script)
            assert done.returncode == 0, done.stderr
            assert all(word in done.stdout for word in words if word.startswith("--")), done.stdout
    else:
        assert words[0] in SHELL_WORDS, line.name
    for word in words[1:]:
        if re.match(r"(recipes|scripts|common|data|docs|tests)/[\w/.-]+$", word) and not OWN & set(re.split(r"[/.]", word)):
            assert (ROOT / word).exists(), f"{line.name}: no {word}"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_have_targets(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)", text)
    missing = [t for t in targets if "://" not in t and not (ROOT / document).parent.joinpath(t).exists()]
    assert not missing


@functools.cache
def anchors(path: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    found: set[str] = set()
    text = re.sub(
        r"^ *```.*?^ *```", "", path.read_text(encoding="utf-8"), flags=re.M | re.S
    )  # comments of shell are no headings
    for heading in re.findall(r"^#+ +(.*)$", text, re.M):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
        slug = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        number = sum(slug == a or a.rpartition("-")[0] == slug and a.rpartition("-")[2].isdigit() for a in found)
        found.add(f"{slug}-{number}" if number else slug)
    return found


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_have_headings(document: str) -> None:
    path = ROOT / document
    links = re.findall(r"\]\(([^)#\s]*)#([^)\s]+)\)", path.read_text(encoding="utf-8"))
    missing = [
        f"{target}#{anchor}"
        for target, anchor in links
        if "://" not in target and anchor not in anchors((path.parent / target) if target else path)
    ]
    assert not missing


def test_the_index_lists_every_page() -> None:
    index = (ROOT / "docs/README.md").read_text(encoding="utf-8")
    pages = sorted(path.name for path in (ROOT / "docs").glob("*.md") if path.name != "README.md")
    assert [page for page in pages if f"]({page})" not in index] == []


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) < 150


@pytest.mark.parametrize("document", DOCUMENTS)
def test_paths_in_the_text_exist(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    paths = re.findall(r"`((?:recipes|scripts|common|data|tests|\.ci|\.github)/[\w/.-]+\.(?:py|sh|yaml|md|yml|toml))`", text)
    missing = [p for p in paths if not (ROOT / p).exists() and not OWN & set(re.split(r"[/.]", p))]
    assert not missing
