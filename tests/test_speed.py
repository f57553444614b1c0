"""How fast the recipes' steps are: scripts/bench_speed.py measures; its goals are asserted where time is given for them."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT

from scripts import bench_speed


def bench(out, *arguments: str) -> list[dict]:
    command = [sys.executable, "-m", "scripts.bench_speed", "--out", str(out), *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads(out.read_text(encoding="utf-8"))


@pytest.mark.parametrize("stack", bench_speed.STACKS)
def test_bench_speed_runs(stack, tmp_path):
    small = "--steps 3 --layers 2 --hidden 32 --heads 2 --seq-len 32 --batch 2 --vocab 256".split()
    (result,) = bench(tmp_path / "out.json", "--stacks", stack, *small)
    assert result["stack"] == stack and set(result["ratio"]) == {"minimal", "bare", "tuned"}
    assert all(0 < value < float("inf") for value in result["ratio"].values())  # steps of 3 ms: how large is chance
    first = {name: values[0] for name, values in result["loss"].items()}
    assert max(first.values()) - min(first.values()) < 0.1, first  # all began near ln(256) on the same samples
    assert bench_speed.table([result]).count("\n") == 2


def test_ratio_is_the_median_over_the_rounds():
    assert bench_speed.ratio([1.0, 2.0, 9.0], [1.0, 1.0, 1.0]) == 2.0
    goals = bench_speed.GOALS["megatron"]
    below = {"stack": "megatron", "ratio": {name: value - 0.01 for name, value in goals.items()}}
    assert len(bench_speed.missed(below)) == len(goals)
    assert not bench_speed.missed({"stack": "megatron", "ratio": goals})


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("stack", bench_speed.STACKS)
def test_the_goals_are_reached(stack, tmp_path):
    (result,) = bench(tmp_path / "out.json", "--stacks", stack)
    assert not bench_speed.missed(result), bench_speed.table([result])
