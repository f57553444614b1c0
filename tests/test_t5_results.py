"""The published runs of T5: their records say what recipes/t5/README.md says, and the pretraining loss is compared with the
validation text itself."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

from common import config
from recipes.t5 import task
from scripts import check

RESULTS = ROOT / "docs/results/t5"
GUTENBERG = RESULTS / "gutenberg_cpu"
STACKS = ("deepspeed", "megatron")
STEPS = 2000
MARGIN = 0.3  # nats per target by which the loss is below what frequencies and positions alone give


def losses(run: Path, key: str = "loss") -> dict[int, float]:
    return {line["step"]: line[key] for line in check.logged(run) if key in line}


def largest_difference(runs: list[dict[int, float]], last: int) -> float:
    first, second = runs
    return max(abs(first[step] - second[step]) for step in range(1, last + 1))


def test_the_stacks_are_one_curve() -> None:
    runs = [losses(GUTENBERG / stack) for stack in STACKS]
    assert all(sorted(run) == list(range(1, STEPS + 1)) for run in runs)
    assert f"{largest_difference(runs, 20):.1e}" == "1.9e-06"
    assert f"{largest_difference(runs, 50):.1e}" == "4.7e-06"
    ends = [losses(GUTENBERG / stack, "valid_loss")[STEPS] for stack in STACKS]
    assert max(ends) - min(ends) <= 0.02
    text = (ROOT / "recipes/t5/README.md").read_text(encoding="utf-8")
    assert all(f"| {end:.4f} |" in text for end in ends)


def test_multi30k_is_what_the_readme_says() -> None:
    published = [RESULTS / "finetune_multi30k" / stack for stack in STACKS]
    text = (ROOT / "recipes/t5/README.md").read_text(encoding="utf-8")
    curves = [losses(run) for run in published]
    assert f"{largest_difference(curves, 20):.1e}" == "2.6e-06"
    assert f"{largest_difference(curves, 100):.1e}" == "8.7e-06"
    last_epoch = [sum(curve[step] for step in range(9063 - 905, 9064)) / 906 for curve in curves]
    assert f"{last_epoch[0]:.2f} on DeepSpeed and {last_epoch[1]:.2f} on Megatron" in " ".join(text.split())
    for run in published:
        scores = {row["metric"]: row for row in json.loads((run / "eval.json").read_text(encoding="utf-8"))}
        bleu, chrf = scores["bleu"]["value"], scores["chrf"]["value"]
        assert f"| {losses(run, 'valid_loss')[9063]:.4f} | {bleu:.2f} | {chrf:.2f} |" in text
        assert scores["bleu"]["n"] == 1000 and "+changes" not in check.run_json(run)["commit"]


@pytest.mark.slow
def test_hidden_tokens_are_predicted_beyond_their_frequencies(source: Path, tmp_path: Path) -> None:
    """A model that knew only where the sentinels stand and how often each other token is hidden would have this loss."""
    books = sorted(str(path) for path in (source / "gutenberg").glob("*_*.txt"))
    command = [sys.executable, "-m", "data.text", str(tmp_path / "books"), "--source", *books]
    command += ["--tokenizer-type", "sentencepiece", "--vocab-size", "4096", "--valid-share", "0.02"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    words = [f"data.{name}={tmp_path}/books/{name}" for name in ("train", "valid")]
    cfg = config.load(ROOT / "recipes/t5/configs/gutenberg_cpu.yaml", words, task.Config)
    train, valid = task.dataset(cfg, cfg.data.train, True), task.dataset(cfg, cfg.data.valid, False)
    for stack in STACKS:
        assert check.run_json(GUTENBERG / stack)["data"]["train"] == train.content_hash
    rows = valid.collate(range(len(valid)))
    targets = rows["targets"][rows["loss_mask"]]
    hidden = targets[~np.isin(targets, [*valid.sentinels.tolist(), valid.eos])]
    counts = np.bincount(hidden)
    shares = counts[counts > 0] / counts.sum()
    known = float(-(shares * np.log(shares)).sum()) * len(hidden) / len(targets)  # the sentinels follow from their positions
    assert round(known, 2) == 4.44  # nats per target, as the config's head says
    for stack in STACKS:
        assert losses(GUTENBERG / stack, "valid_loss")[STEPS] < known - MARGIN
