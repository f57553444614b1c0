"""Megatron's recompute and pipelines, beside the parity and resume of each layout: what is drawn, what is refused."""

from pathlib import Path

import pytest
from conftest import ROOT, case, losses

from common import config
from common.stacks import extra
from recipes.gpt import task

TINY = ROOT / "recipes/gpt/configs/tiny.yaml"


@pytest.mark.parametrize(("value", "read"), [("false", "none"), ("true", "full"), ("selective", "selective")])
def test_recompute_reads_the_values_of_earlier_versions(value: str, read: str) -> None:
    cfg = config.load(TINY, [f"megatron.recompute={value}"], task.Config)
    assert cfg.megatron.recompute == extra.granularity(cfg.megatron) == read
    assert cfg.dump()["megatron"]["recompute"] == read


def test_recomputation_draws_the_same_dropout(drive, settings, tmp_path: Path) -> None:
    """Else the gradients would be those of other units than the loss."""
    given = [*settings, "train.steps=3", "train.eval_samples=8", "model.dropout=0.1", "megatron.tp=2", "megatron.micro_batch=4"]
    kinds = ("none", "selective", "full")
    drive([case("megatron", "tiny", tmp_path / kind, [*given, f"megatron.recompute={kind}"]) for kind in kinds], 2)
    plain, *others = (losses(tmp_path / kind) for kind in kinds)
    assert len(plain) == 3
    for lines in others:
        for step, line in plain.items():
            assert lines[step]["loss"] == pytest.approx(line["loss"], rel=1e-6)
            assert lines[step]["grad_norm"] == pytest.approx(line["grad_norm"], rel=1e-6)
