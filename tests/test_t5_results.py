"""The published run of T5 from scratch: its logs say what recipes/t5/README.md says, against the text itself."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, losses

from common import config
from recipes.t5 import task

RESULTS = ROOT / "recipes/t5/results/gutenberg_cpu"
STACKS = ("deepspeed", "megatron")
STEPS = 2000
MARGIN = 0.3  # nats a target that the loss stays below what frequencies and places alone give


def validations(stack: str) -> dict[int, float]:
    lines = map(json.loads, (RESULTS / stack / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return {line["step"]: line["valid_loss"] for line in lines if "valid_loss" in line}


def test_the_stacks_are_one_curve():
    runs = {stack: losses(RESULTS / stack) for stack in STACKS}
    first = runs["deepspeed"]
    assert sorted(first) == list(range(1, STEPS + 1))
    for stack in STACKS:
        assert max(abs(runs[stack][s]["loss"] - first[s]["loss"]) for s in range(1, 21)) <= 1e-5
    ends = [validations(stack)[STEPS] for stack in STACKS]
    assert max(ends) - min(ends) <= 0.02


@pytest.mark.slow
def test_hidden_tokens_are_predicted_beyond_their_frequencies(source: Path, tmp_path: Path):
    """Who knew only where the sentinels stand, and how often each other token is hidden, would have this loss."""
    books = sorted(str(path) for path in (source / "gutenberg").glob("*_*.txt"))
    command = [sys.executable, "-m", "data.text", str(tmp_path / "books"), "--source", *books]
    command += ["--tokenizer-type", "sentencepiece", "--vocab-size", "4096", "--valid-share", "0.02"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    words = [f"data.{name}={tmp_path}/books/{name}" for name in ("train", "valid")]
    cfg = config.load(ROOT / "recipes/t5/configs/gutenberg_cpu.yaml", words, task.Config)
    train, valid = task.dataset(cfg, cfg.data.train, True), task.dataset(cfg, cfg.data.valid, False)
    for stack in STACKS:
        assert json.loads((RESULTS / stack / "run.json").read_text())["data"]["train"] == train.content_hash
    rows = valid.collate(range(len(valid)))
    targets = rows["targets"][rows["loss_mask"]]
    hidden = targets[~np.isin(targets, [*valid.sentinels.tolist(), valid.eos])]
    counts = np.bincount(hidden)
    shares = counts[counts > 0] / counts.sum()
    known = float(-(shares * np.log(shares)).sum()) * len(hidden) / len(targets)  # the others follow from their places
    assert round(known, 2) == 4.44  # nats a target, as the config's head says
    for stack in STACKS:
        assert validations(stack)[STEPS] < known - MARGIN
