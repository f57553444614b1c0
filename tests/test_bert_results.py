"""The published runs of BERT: their records say what recipes/bert/README.md says, and the pretraining loss is compared with the
validation text itself."""

import json
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

from common import config
from recipes.bert import task
from scripts import check, seeds

RESULTS = ROOT / "docs/results/bert"
GUTENBERG = RESULTS / "gutenberg_cpu"
MINILM = RESULTS / "finetune_minilm"
STACKS = ("deepspeed", "megatron")
MARGIN = 1.5  # nats by which the loss of masked tokens is below their unigram entropy


def losses(run: Path, key: str = "loss") -> dict[int, float]:
    return {line["step"]: line[key] for line in check.logged(run) if key in line}


def test_the_stacks_are_one_curve() -> None:
    first, second = (losses(GUTENBERG / stack) for stack in STACKS)
    assert sorted(first) == sorted(second) == list(range(1, 2501))
    for last, printed in ((20, "9.5e-07"), (200, "7.2e-06")):
        assert f"{max(abs(first[step] - second[step]) for step in range(1, last + 1)):.1e}" == printed
    ends = [losses(GUTENBERG / stack, "valid_loss")[2500] for stack in STACKS]
    assert max(ends) - min(ends) <= 0.02
    text = (ROOT / "recipes/bert/README.md").read_text(encoding="utf-8")
    for stack in STACKS:
        mlm, nsp = (losses(GUTENBERG / stack, f"valid_{part}_loss")[2500] for part in ("mlm", "nsp"))
        right, whole = (losses(GUTENBERG / stack, key)[2500] for key in ("valid_mlm_accuracy", "valid_loss"))
        pairs = losses(GUTENBERG / stack, "valid_nsp_accuracy")[2500]
        assert f"| {mlm:.3f} | {100 * right:.1f} % | {nsp:.3f} | {100 * pairs:.1f} % | {whole:.4f} |" in text


@pytest.mark.slow
def test_masked_tokens_are_predicted_beyond_their_frequencies(source: Path, tmp_path: Path) -> None:
    """A model that knew only how often each token is masked would have the entropy of those frequencies as its loss."""
    books = sorted(str(path) for path in (source / "gutenberg").glob("*_*.txt"))
    command = [sys.executable, "-m", "data.wiki_books", str(tmp_path / "books"), "--source", *books]
    result = subprocess.run(
        [*command, "--vocab-size", "4096", "--valid-share", "0.02"], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    words = [f"data.{name}={tmp_path}/books/{name}" for name in ("train", "valid")]
    cfg = config.load(ROOT / "recipes/bert/configs/gutenberg_cpu.yaml", words, task.Config)
    train, valid = task.dataset(cfg, cfg.data.train, True), task.dataset(cfg, cfg.data.valid, False)
    for stack in STACKS:
        assert check.run_json(GUTENBERG / stack)["data"]["train"] == train.content_hash
    rows = valid.collate(range(len(valid)))
    counts = np.bincount(rows["labels"][rows["mlm_mask"]])
    shares = counts[counts > 0] / counts.sum()
    entropy = float(-(shares * np.log(shares)).sum())
    assert round(entropy, 2) == 6.1  # nats, as the config's head says
    for stack in STACKS:
        assert losses(GUTENBERG / stack, "valid_mlm_loss")[2500] < entropy - MARGIN


def test_real_weights_are_finetuned_on_one_curve() -> None:
    """MRPC from MiniLM's weights, dropout 0, two ranks: baseline, ZeRO 1 and Megatron tp 2."""
    runs = [losses(MINILM / "first20" / stack) for stack in ("baseline", *STACKS)]
    assert all(sorted(run) == list(range(1, 21)) for run in runs)
    assert f"{max(max(run[step] for run in runs) - min(run[step] for run in runs) for step in runs[0]):.1e}" == "6.7e-08"


@pytest.mark.parametrize("name", ["mrpc", "stsb", "rte"])
def test_medians_are_nearer_than_seeds(name: str) -> None:
    rows_by_stack = [
        seeds.summary({seed: MINILM / name / stack / f"seed_{seed}" for seed in (1, 2, 3)}) for stack in ("baseline", *STACKS)
    ]
    for of_metric in zip(*rows_by_stack, strict=True):
        assert len({row["metric"] for row in of_metric}) == 1 and all(len(row["values"]) == 3 for row in of_metric)
        for one, other in combinations(of_metric, 2):
            spread = min(row["greatest"] - row["least"] for row in (one, other))
            assert abs(one["median"] - other["median"]) <= spread


REVIEWS = [(f"sst2_10000/{stack}", 10_000, 0.86) for stack in ("baseline", *STACKS)]
REVIEWS += [("sst2_whole_5e-5/deepspeed", None, 0.9)]


@pytest.mark.parametrize(("name", "examples", "least"), REVIEWS, ids=[row[0] for row in REVIEWS])
def test_reviews_are_classified(name: str, examples: int | None, least: float) -> None:
    run = MINILM / name
    [row] = json.loads((run / "eval.json").read_text(encoding="utf-8"))
    assert row["metric"] == "accuracy" and row["n"] == 872 and row["value"] >= least
    assert check.task_section(check.recorded_config(run, check.run_json(run)))["train_examples"] == examples
