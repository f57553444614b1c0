"""common/comparison/ecosystem.py and claims.py: each cell's test exists, each source is dated, the page is what is written."""

import inspect
import re
from importlib.util import find_spec
from pathlib import Path

import pytest
from conftest import ROOT

from common import families
from common.comparison import claims, ease, ecosystem
from common.comparison.figures import Options, tables
from common.config import STACKS
from common.training import trackers
from scripts import benchmark, document_claims, document_comparison

EVERY_STACK = ("STACKS", "LAYOUTS", "recipes/*/*/", "families.stacks", "STACKS_OF")


@pytest.fixture(scope="module")
def found() -> dict:
    options = Options(stacks=STACKS)
    figures = [*ecosystem.run(options, Path()), *claims.run(options, Path())]
    return {table.section: table for table in tables(figures)}


def text_of(test: str) -> str:
    """The file of a test that must exist."""
    path, _, name = test.partition("::")
    text = (ROOT / path).read_text(encoding="utf-8")
    assert re.search(rf"^def {name}\(", text, re.M), f"no test {test}"
    return text


@pytest.mark.parametrize("stack", STACKS)
def test_each_checked_cell_has_a_test_that_runs_its_stack(stack: str) -> None:
    for row, cells in ecosystem.CHECKED.items():
        if cells[stack].value is None:
            assert cells[stack].test.startswith("not run here"), row
            continue
        text = text_of(cells[stack].test)
        assert f'"{stack}"' in text or f" {stack}" in text or any(word in text for word in EVERY_STACK), (row, stack)
    for test in (*ecosystem.OF_FAMILIES.values(), ecosystem.OPTIMIZERS, ecosystem.COMPARED):
        text_of(test)


def test_every_stack_logs_to_the_same_trackers() -> None:
    """tests/test_trackers.py has what they write."""
    source = inspect.getsource(trackers.started)
    assert "TensorBoard(" in source and "WandB(" in source
    scripts = [path for name in ("pretrain.py", "finetune.py") for path in ROOT.glob(f"recipes/*/*/{name}")]
    assert len(scripts) >= 2 * len(families.stacks("gpt"))
    for path in scripts:
        assert "log = Log(run" in path.read_text(encoding="utf-8"), path


def test_optimizers_are_those_that_some_layout_takes() -> None:
    assert ecosystem.optimizers("baseline") == ecosystem.optimizers("deepspeed") == ["adamw", "lamb", "adafactor"]
    assert ecosystem.optimizers("megatron") == ["adamw"]


@pytest.mark.parametrize("package", ["deepspeed", "megatron"])
def test_no_file_of_a_stack_imports_tensorflow_or_keras(package: str, tmp_path: Path) -> None:
    if find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    assert list(ecosystem.foreign_files(ecosystem.package_folder(package))) == []
    (tmp_path / "a.py").write_text("import torch\nif True:\n    import tensorflow as tf\n")
    (tmp_path / "b.py").write_text('"""import keras"""\n# from keras import layers\n')
    assert [path.name for path in ecosystem.foreign_files(tmp_path)] == ["a.py"]


def test_whatever_is_cited_has_a_date_and_what_is_not_found_has_no_value() -> None:
    for cells in ecosystem.CITED.values():
        assert cells.keys() == set(STACKS)
        for cell in cells.values():
            assert (cell.value is None) == cell.source.startswith("not found"), cell
            assert cell.value is None or re.search(r"\b20\d\d\b", cell.source), cell


def test_tables_have_a_row_for_each_stack(found: dict) -> None:
    assert {"Ecosystem / Checked here", "Ecosystem / Installed packages", "Ecosystem / The projects", "Claims"} <= found.keys()
    for section, table in found.items():
        if section.startswith("Ecosystem"):
            assert table.columns == list(STACKS)
            assert len({figure.kind for figure in table.cells.values()}) == 1


# ---- claims


def test_the_page_is_what_the_command_writes() -> None:
    page = claims.page(document_comparison.read().figures)
    assert document_claims.PAGE.read_text(encoding="utf-8") == page, "type: python -m scripts.document_claims"


def test_every_claim_is_sourced_and_answered_by_figures_of_the_report(found: dict) -> None:
    counted = {t.section: t for t in tables([*ease.recipe_lines(STACKS), *ease.shared_lines(STACKS), *ease.layouts(STACKS)])}
    known = found | counted
    assert len({claim.name for claim in claims.CLAIMS}) == len(claims.CLAIMS) > 9
    for claim in claims.CLAIMS:
        assert claim.verdict in ("true", "half true", "not today", "contradicted", "no source", "false")
        assert re.search(r"\b20\d\d\b", claim.sources) and (re.match(r"20\d\d", claim.when) or claim.when.startswith("not "))
        for section, subject, metric in claim.ours:
            assert section.partition(" / ")[0] in benchmark.ORDER, section
            if section.startswith(("Ease of use", "Ecosystem")):
                assert (subject, metric) in known[section].cells, (section, subject, metric)


def test_megatron_has_more_lines_of_its_own_in_every_family() -> None:
    """As docs/claims.md says."""
    cells = {t.section: t for t in tables(ease.recipe_lines(STACKS))}["Ease of use / Lines of a recipe"].cells
    for family in ("gpt", "bert", "t5"):
        ours = [cells[f"{family} {stack}", "lines in them"].value for stack in ("deepspeed", "megatron")]
        assert ours[0] < ours[1], family
