"""Megatron as the recipes set it up: its groups, and that a run does not depend on which packages can be imported."""

import subprocess
import sys
from pathlib import Path

from conftest import ROOT, case, losses

from tests import warm

GROUPS = """
import torch.distributed as dist
from common.launch import processes
from common.layout import Layout
ranks, made, new_group = processes.start(), [], dist.new_group
def counted(*args, **kwargs):
    made.append((kwargs["timeout"], kwargs["backend"]))
    return new_group(*args, **kwargs)
dist.new_group = counted
from common.stacks import mcore
mcore.start(ranks, Layout(world=2, dp=1, tp=2, pp=1, micro_batch=1, accumulate=1))
assert len(made) > 10
assert set(made) == {(processes.TIMEOUT, None)}, set(made)
"""


def test_every_group_has_the_timeout_of_the_run_and_none_is_a_second_one_of_gloo() -> None:
    done = warm.run(["-c", GROUPS], nproc=2, merged=True)
    assert done.returncode == 0, done.stdout


def test_installed_transformer_engine_and_apex_change_nothing(drive, settings, tmp_path: Path) -> None:
    given = [*settings, "train.steps=3", "megatron.distributed_optimizer=true", "optim.grad_clip=0.5"]
    drive([case("megatron", "tiny", tmp_path / "without", given)], 1)
    words = ["recipes.gpt.megatron.pretrain", "recipes/gpt/configs/tiny.yaml", str(tmp_path / "with"), *given]
    done = subprocess.run(
        [sys.executable, "tests/fake_extensions.py", *words], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    without, found = losses(tmp_path / "without"), losses(tmp_path / "with")
    assert [(found[step]["loss"], found[step]["grad_norm"]) for step in (1, 2, 3)] == [
        (without[step]["loss"], without[step]["grad_norm"]) for step in (1, 2, 3)
    ]
