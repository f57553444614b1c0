"""The published run of BERT from scratch: its logs say what recipes/bert/README.md says, against the text itself."""

import json
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import ROOT, losses

from common import config
from recipes.bert import task

RESULTS = ROOT / "recipes/bert/results/gutenberg_cpu"
STACKS = ("deepspeed", "megatron")
MARGIN = 1.5  # nats that the masked-token loss stays below the unigram entropy


def validations(stack: str) -> dict[int, dict[str, float]]:
    lines = map(json.loads, (RESULTS / stack / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return {line["step"]: line for line in lines if "valid_loss" in line}


def test_the_stacks_are_one_curve():
    runs = {stack: losses(RESULTS / stack) for stack in STACKS}
    first = runs["deepspeed"]
    assert sorted(first) == list(range(1, 2501))
    for stack in STACKS:
        assert max(abs(runs[stack][s]["loss"] - first[s]["loss"]) for s in range(1, 21)) <= 1e-5
    ends = [validations(stack)[2500]["valid_loss"] for stack in STACKS]
    assert max(ends) - min(ends) <= 0.02


@pytest.mark.slow
def test_masked_tokens_are_predicted_beyond_their_frequencies(source: Path, tmp_path: Path):
    """The loss of a model that knew nothing but how often each token is masked is the entropy of those frequencies."""
    books = sorted(str(path) for path in (source / "gutenberg").glob("*_*.txt"))
    command = [sys.executable, "-m", "data.wiki_books", str(tmp_path / "books"), "--source", *books]
    done = subprocess.run([*command, "--vocab-size", "4096", "--valid-share", "0.02"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    words = [f"data.{name}={tmp_path}/books/{name}" for name in ("train", "valid")]
    cfg = config.load(ROOT / "recipes/bert/configs/gutenberg_cpu.yaml", words, task.Config)
    train, valid = task.dataset(cfg, cfg.data.train, True), task.dataset(cfg, cfg.data.valid, False)
    for stack in STACKS:
        assert json.loads((RESULTS / stack / "run.json").read_text())["data"]["train"] == train.content_hash
    rows = valid.collate(range(len(valid)))
    counts = np.bincount(rows["labels"][rows["mlm_mask"]])
    shares = counts[counts > 0] / counts.sum()
    entropy = float(-(shares * np.log(shares)).sum())
    assert round(entropy, 2) == 6.1  # nats, as the config's head says
    for stack in STACKS:
        assert validations(stack)[2500]["valid_mlm_loss"] < entropy - MARGIN


MINILM = ROOT / "recipes/bert/results/finetune_minilm"


def test_real_weights_are_finetuned_on_one_curve():
    """MRPC from MiniLM's weights, dropout 0, two ranks: baseline, ZeRO 1 and Megatron tp 2."""
    runs = {stack: losses(MINILM / "first20" / stack) for stack in ("baseline", *STACKS)}
    for run in runs.values():
        assert sorted(run) == list(range(1, 21))
        assert max(abs(run[step]["loss"] - runs["baseline"][step]["loss"]) for step in run) <= 1e-5


@pytest.mark.parametrize("name", ["mrpc", "stsb", "rte"])
def test_medians_are_nearer_than_seeds(name: str):
    found = [json.loads((MINILM / name / stack / "seeds.json").read_text(encoding="utf-8")) for stack in ("baseline", *STACKS)]
    for of_metric in zip(*found, strict=True):
        assert len({row["metric"] for row in of_metric}) == 1 and all(len(row["values"]) == 3 for row in of_metric)
        for one, other in combinations(of_metric, 2):
            spread = min(row["greatest"] - row["least"] for row in (one, other))
            assert abs(one["median"] - other["median"]) <= spread


REVIEWS = [(f"sst2_10000/{stack}", 10_000, 0.86) for stack in ("baseline", *STACKS)]
REVIEWS += [("sst2_whole_5e-5/deepspeed", None, 0.9)]


@pytest.mark.parametrize(("run", "examples", "least"), REVIEWS, ids=[row[0] for row in REVIEWS])
def test_reviews_are_told_apart(run: str, examples: int | None, least: float):
    [row] = json.loads((MINILM / run / "eval.json").read_text(encoding="utf-8"))
    assert row["metric"] == "accuracy" and row["n"] == 872 and row["value"] >= least
    assert yaml.safe_load((MINILM / run / "config.yaml").read_text(encoding="utf-8"))["task"]["train_examples"] == examples
