"""The repository itself: what is tracked stays small, what is generated stays out, and its metadata agree."""

import json
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

from scripts import sizes

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_what_is_tracked_is_small() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("needs a git checkout")
    assert not sizes.problems(sizes.tracked(ROOT))


def test_large_files_are_named(tmp_path: Path) -> None:
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    for name in ("log.txt", "ignored.txt"):
        (tmp_path / name).write_bytes(bytes(sizes.FILE_BYTES + 1))
    subprocess.run(["git", "add", "log.txt"], cwd=tmp_path, check=True)
    assert sizes.problems(sizes.tracked(tmp_path)) == ["log.txt: 262,145 bytes; at most 262,144 per file"]
    assert sizes.problems({f"{i}": sizes.FILE_BYTES for i in range(33)}) == ["8,650,752 bytes in all; at most 8,388,608"]


def test_generated_folders_are_ignored_and_links_to_them_too(tmp_path: Path) -> None:
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    (tmp_path / ".gitignore").write_text((ROOT / ".gitignore").read_text())
    (tmp_path / "elsewhere").mkdir()
    for name in ("corpora", "out", ".venv"):
        (tmp_path / name).symlink_to("elsewhere")
    (tmp_path / "run.log").touch()
    shown = subprocess.run(["git", "status", "--porcelain", "-uall"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert shown.stdout.split() == ["??", ".gitignore", "??", "run.log"]


def test_hooks_run_what_the_environment_has() -> None:
    """pre-commit starts each entry in the root; none is fetched from elsewhere."""
    [repo] = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert repo["repo"] == "local" and {hook["language"] for hook in repo["hooks"]} == {"system"}
    packages = " ".join(PROJECT["optional-dependencies"]["dev"] + PROJECT["optional-dependencies"]["test"])
    for hook in repo["hooks"]:
        program = hook["entry"].split()[0].removeprefix(".venv/bin/")
        assert program == "python" or re.search(rf"\b{program}\b", packages), hook
    assert "pre-commit" in packages


def test_the_citation_agrees_with_the_project() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == PROJECT["version"] and citation["license"] == PROJECT["license"]
    assert citation["cff-version"] == "1.2.0" and citation["authors"] == [{"name": "The Twinstack project"}]


@pytest.mark.parametrize("path", sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml")), ids=lambda path: path.name)
def test_issue_forms_have_what_they_need(path: Path) -> None:
    form = yaml.safe_load(path.read_text())
    assert form["name"] and form["description"] and any(field["type"] != "markdown" for field in form["body"])
    assert all(field["attributes"]["label"] for field in form["body"])
    ids = [field["id"] for field in form["body"]]
    assert len(ids) == len(set(ids))


def instructions(name: str) -> list[str]:
    """The values of one instruction of the Dockerfile, continued lines joined."""
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    return re.findall(rf"^{name} +(.*)$", text, re.M)


def test_the_image_has_the_python_and_the_files_of_the_repository() -> None:
    [base], [workdir] = instructions("FROM"), instructions("WORKDIR")
    assert base.startswith(f"python:{(ROOT / '.python-version').read_text().strip()}-")
    copied = [word for line in instructions("COPY") for word in line.split()[:-1]]
    assert copied[-1] == "." and all((ROOT / path).exists() for path in copied)
    runs = " ".join(instructions("RUN"))
    assert "bash scripts/setup.sh test" in runs, "what scripts/test.sh installs"
    assert instructions("ENV") == [f"PATH={workdir}/.venv/bin:$PATH"]
    left_out = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    ignored = [line for line in (ROOT / ".gitignore").read_text().splitlines() if not line.startswith("#")]
    assert {line.removeprefix("**/") for line in left_out} == set(ignored) - {"*.whl"}


def test_the_devcontainer_opens_the_image_where_its_environment_is() -> None:
    file = ROOT / ".devcontainer/devcontainer.json"
    container = json.loads(file.read_text(encoding="utf-8"))
    [workdir] = instructions("WORKDIR")
    assert (file.parent / container["build"]["dockerfile"]).resolve() == ROOT / "Dockerfile"
    assert (file.parent / container["build"]["context"]).resolve() == ROOT
    assert container["workspaceFolder"] == workdir and f"target={workdir}," in container["workspaceMount"]
    assert [f"target={workdir}/.venv," in mount for mount in container["mounts"]] == [True]
    assert container["postCreateCommand"].startswith("bash scripts/setup.sh dev && ")
    settings = container["customizations"]["vscode"]["settings"]
    assert settings == {"python.defaultInterpreterPath": f"{workdir}/.venv/bin/python"}
