"""docs/reproducing.md and docs/loss_differences.md: their tables are those of the configs, the records and the plan."""

import json
import re
import subprocess
import sys

import pytest
from conftest import ROOT

from scripts import document_results

HINT = "type: python -m scripts.document_results"


def test_the_pages_are_those_of_the_data() -> None:
    assert document_results.REPRODUCING.read_text(encoding="utf-8") == document_results.reproducing(), HINT
    page = document_results.DIFFERENCES.read_text(encoding="utf-8")
    assert page == document_results.differences(page) and page.count("<!-- generated: ") == 2, HINT


def test_commands_exist() -> None:
    commands = re.findall(r"`bash (\S+) (\S+) out/\S+`", document_results.REPRODUCING.read_text(encoding="utf-8"))
    assert len(commands) > 15
    for command in commands:
        assert all((ROOT / path).is_file() for path in command), command


def test_hours_are_those_of_the_plan() -> None:
    command = ["scripts.plan", "recipes/gpt/configs/gpt3_1.3b.yaml", "--gpu", "H100", "--own", "--json", "--price", "2"]
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    page = document_results.REPRODUCING.read_text(encoding="utf-8")
    row = re.search(r"^\| \[gpt/gpt3_1\.3b\].*$", page, re.M)
    assert row
    cells = dict(zip(document_results.STACKS, row.group().split("|")[3:], strict=False))
    for one in json.loads(done.stdout):
        hours, cost = (float(text.replace(",", "")) for text in re.findall(r"[\d,.]+", cells[one["stack"]].replace(", $", " ")))
        assert (hours, cost) == pytest.approx((one["days"] * 24, one["cost"]), rel=5e-3)


def test_growth_is_that_of_the_table_of_a_comparison() -> None:
    """scripts/compare.py wrote the largest difference into table.md."""
    page = document_results.DIFFERENCES.read_text(encoding="utf-8")
    for name in ("gpt/quickstart", "t5/gutenberg_cpu"):
        table = (document_results.RECORDS / name / "table.md").read_text(encoding="utf-8")
        largest = re.findall(r"\| (\S+) at step \d+ \|", table)
        rows = re.findall(rf"^\| {name} \|.*?\| (\S+) of [\d,]+ \|", page, re.M)
        assert largest and rows == largest
