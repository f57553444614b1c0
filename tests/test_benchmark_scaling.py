"""Scaling over the processes of this machine: which runs there are, and the efficiency that follows from their speeds."""

import json
from pathlib import Path

import pytest

from common.comparison import scaling, small
from common.comparison.figures import Disagreement, Options, tables
from common.comparison.layouts import Case
from common.errors import BadInput

ROOT = Path(__file__).resolve().parents[1]


def test_efficiency_is_of_one_round() -> None:
    """The machine is half as fast in the second round, and the shares are not."""
    rates = {("megatron", 1, 8): 100.0, ("megatron", 2, 8): 180.0, (scaling.TENSOR, 2, 8): 120.0, ("megatron", 1, 4): 90.0}
    speeds = [
        scaling.Speed(*key, number, rate / (1 + number)) for number in (0, 1) for key, rate in rates.items()
    ]  # fmt: skip
    [strong] = tables(scaling.figures(speeds, "Strong", lambda size: 8, 2, "here"))
    cells = {key: (figure.value, figure.spread) for key, figure in strong.cells.items()}
    assert cells["megatron", "2 processes"] == (135.0, (90.0, 180.0))
    assert cells["megatron", "efficiency at 2"] == (90.0, (90.0, 90.0))
    assert cells[scaling.TENSOR, "efficiency at 2"] == (60.0, (60.0, 60.0))  # beside megatron on one process
    [weak] = tables(scaling.figures(speeds, "Weak", lambda size: 4 * size, 2, "here"))
    assert weak.cells["megatron", "efficiency at 2"].value == 100.0


def test_runs_of_weak_and_strong_scaling(tmp_path: Path) -> None:
    config = str(ROOT / "recipes/gpt/configs/tiny.yaml")
    runs = scaling.runs_of(Options(processes=4), config, [], 8, tmp_path)
    assert [(run.processes, run.batch) for run in runs if run.layout == "baseline"] == [(1, 8), (1, 2), (2, 8), (2, 4), (4, 8)]
    assert {run.processes for run in runs if run.layout == scaling.TENSOR} == {2, 4}
    assert "megatron.tp=4" in next(run for run in runs if (run.layout, run.processes) == (scaling.TENSOR, 4)).case.overrides
    assert scaling.counts(6) == [1, 2, 4, 6]


def test_curves_that_part_are_refused(tmp_path: Path) -> None:
    runs = [scaling.Run(name, 1, 8, Case(name, "", "", str(tmp_path / name), [])) for name in ("baseline", "megatron")]
    for run, loss in zip(runs, (4.0, 4.001), strict=True):
        out = Path(f"{run.case.out}_0")
        out.mkdir()
        values = [{"step": step, "loss": loss if step == 3 else 4.0, "grad_norm": 1.0} for step in (1, 2, 3)]
        (out / "metrics.jsonl").write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")
    scaling.agree(runs[:1], "fp32")
    with pytest.raises(Disagreement, match="megatron on 1 .* at step 3 the loss"):
        scaling.agree(runs, "fp32")


def test_a_batch_that_does_not_divide_is_refused(tmp_path: Path) -> None:
    options = Options(configs=(ROOT / "recipes/gpt/configs/tiny.yaml",), processes=3)
    with pytest.raises(BadInput, match="train.global_batch=8 does not divide among 3 processes"):
        scaling.scaling_measured(options, tmp_path)
    with pytest.raises(BadInput, match="--processes 2 or more"):
        scaling.scaling_measured(Options(processes=1), tmp_path)


@pytest.mark.parametrize("processes, batch", [(2, 8), (3, 24), (8, 8)])
def test_the_small_model_divides_among_all_processes(
    processes: int, batch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(small, "make_corpus", lambda *_: None)
    monkeypatch.setattr(small, "has_gpu", lambda: False)
    path, overrides, samples = scaling.workload_of(Options(processes=processes), tmp_path)
    assert samples == batch
    runs = scaling.runs_of(Options(processes=processes), path, overrides, samples, tmp_path)
    assert {run.processes for run in runs} == set(scaling.counts(processes))


@pytest.mark.slow
def test_scaling_is_measured(tmp_path: Path) -> None:
    figures = scaling.scaling_measured(Options(stacks=("baseline", "megatron"), rounds=1), tmp_path)
    strong, weak = tables(figures)
    assert strong.rows == ["baseline", "megatron", scaling.TENSOR] and "1 process" in strong.columns
    assert all(0 < f.value < 150 for f in figures if "efficiency" in f.metric)  # type: ignore[operator]
    assert weak.cells["baseline", "2 processes"].value == strong.cells["baseline", "2 processes"].value  # one run
