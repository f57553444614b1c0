"""docs/simulation_report.md: what its data give, and that a run gives the data."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from common.simulation import report
from tests.conftest import ROOT

QUICK = (report.path_of("bert/bert_large"), "megatron", 8)  # the row that is simulated in the fewest seconds


def test_the_page_is_what_the_data_give() -> None:
    assert report.PAGE.read_text(encoding="utf-8") == report.page()


def test_the_data_have_a_row_for_each_case_and_no_other() -> None:
    assert list(report.recorded()) == [report.key(case) for case in report.cases()]


def test_no_product_is_in_fp32_and_the_host_waits_six_times_at_most() -> None:
    for key, row in report.recorded().items():
        assert "fault" in row or (set(row["gemm_flops"]) == {"bf16"} and row["host_syncs"] <= 6), key


def test_the_estimate_is_within_3_percent_of_the_peak() -> None:
    """Of the rank that needs the most. What torch.compile keeps is not estimated."""
    for key, row in report.recorded().items():
        if "fault" not in row and ".compile=true" not in key and row["rank"] == 0:
            assert row["estimate_bytes"] == pytest.approx(row["peak_bytes"], rel=0.03), key


def test_a_row_is_simulated_again(tmp_path: Path) -> None:
    if torch.__version__ != json.loads(report.DATA.read_text(encoding="utf-8"))["torch"]:
        pytest.skip("the data are of another torch, which may launch other kernels")
    case = next(one for one in report.cases() if (one.config, one.stack, one.world) == QUICK)
    words = ["--stack", case.stack, "--world", str(case.world), "--steps", str(case.steps), *case.overrides]
    command = [sys.executable, "-m", "scripts.simulate", case.config, *words, "--json", str(tmp_path / "found.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode == 2 and "null GPU" in done.stderr:
        pytest.skip(done.stderr.strip())
    found = report.kept(json.loads((tmp_path / "found.json").read_text(encoding="utf-8")))
    row = report.recorded()[report.key(case)]
    assert found.pop("seconds") == pytest.approx(row.pop("seconds"), rel=1e-5)
    for name in report.COUNTED:
        assert found[name] == row[name], name
