"""docs/comparison.md, and the verdict in the README, are what docs/comparison/report.json.gz gives."""

import re
import shlex

import pytest

from common.comparison import render
from common.comparison.figures import Report
from common.paths import ROOT
from scripts import benchmark, document_comparison


@pytest.fixture(scope="module")
def report() -> Report:
    return document_comparison.read()


def test_the_page_and_the_readme_show_the_report(report: Report) -> None:
    how = "type: python -m scripts.document_comparison"
    assert document_comparison.PAGE.read_text(encoding="utf-8") == document_comparison.page(report), how
    text = document_comparison.README.read_text(encoding="utf-8")
    assert document_comparison.BLOCK.search(text) and text == document_comparison.readme(text, report), how
    for picture in re.findall(r"!\[[^]]*\]\(([^)]+)\)", document_comparison.PAGE.read_text(encoding="utf-8")):
        assert (document_comparison.PAGE.parent / picture).is_file()


def test_every_part_was_run_and_every_section_is_there(report: Report) -> None:
    assert {figure.section.partition(" / ")[0] for figure in report.figures} | {"Verdict"} == set(benchmark.ORDER)
    assert [line for line in report.left_out if not line.startswith("GPUs: ")] == [] and "+changes" not in report.commit
    assert {figure.kind for figure in report.figures} == set(render.KINDS)


def test_every_command_names_a_part_or_a_config_that_is_there(report: Report) -> None:
    parts = {task.name for task in benchmark.tasks()}
    for source in {figure.source for figure in report.figures if render.is_command(figure.source)}:
        words = shlex.split(source.partition("; ")[0])
        assert words[:2] != ["python", "-m"] or (ROOT / (words[2].replace(".", "/") + ".py")).is_file(), source
        if "--parts" in words:
            assert words[words.index("--parts") + 1] in parts, source
        assert all((ROOT / word).is_file() for word in words if word.startswith("recipes/")), source


def test_nothing_names_a_folder_of_the_machine(report: Report) -> None:
    texts = [*(figure.source for figure in report.figures), *(str(figure.value) for figure in report.figures), *report.left_out]
    assert not [text for text in texts if re.search(r"(?<![\w.])/(home|root|work|tmp)/", text)]
