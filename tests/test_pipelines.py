"""Megatron's recompute and pipelines, beside the parity and resume of each layout: what is drawn, what is refused."""

from pathlib import Path

import pytest
from conftest import ROOT, case, losses, valid_loss
from test_parity import LOSS, NORM, farthest, rows

from common import config
from common.stacks import extra
from recipes.gpt import task
from tests import plain, warm

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


# ---- interleaved chunks

# What each of the four chunks of two stages draws: from the default generator, and from that of a tensor-parallel region
DRAWS = """
import types
import torch, torch.distributed as dist
from common.launch import processes
from common.layout import Layout
ranks = processes.start()
from megatron.core import tensor_parallel
from common.stacks import mcore
mcore.start(ranks, Layout(world=2, dp=1, tp=1, pp=2, vpp=2, micro_batch=1, accumulate=2))
drawn = []
for number in range(2):
    mcore.begin_micro_batch(processes.seed_micro_batch(1, 2, 3, 0), types.SimpleNamespace(vp_stage=number))
    drawn.append(torch.rand(()).item())
    with tensor_parallel.get_cuda_rng_tracker().fork():
        drawn.append(torch.rand(()).item())
of_all = [None] * 2
dist.all_gather_object(of_all, drawn)
assert len({value for one in of_all for value in one}) == 8, of_all
"""


def test_no_two_chunks_drop_the_same_units() -> None:
    done = warm.run(["-c", DRAWS], nproc=2, merged=True)
    assert done.returncode == 0, done.stdout


DEEP = ["model.layers=8", "train.steps=10"]
DEEP_ROWS = {
    "tp2_pp2_vpp2": (4, ["megatron.tp=2", "megatron.pp=2", "megatron.vpp=2"]),
    "pp4_vpp2": (4, ["megatron.pp=4", "megatron.vpp=2"]),
    "tp2_sp_pp2_vpp2_dp2": (
        8,
        ["megatron.tp=2", "megatron.sequence_parallel=true", "megatron.pp=2", "megatron.vpp=2", "megatron.micro_batch=1"],
    ),
    "tp2_pp2_vpp4_dp2": (8, ["megatron.tp=2", "megatron.pp=2", "megatron.vpp=4", "megatron.distributed_optimizer=true"]),
}


@pytest.mark.parametrize("name", rows([("tp2_pp2_vpp2",)], [(name,) for name in DEEP_ROWS if name != "tp2_pp2_vpp2"]))
def test_eight_layers_follow_the_reference_loop(drive, settings, tmp_path: Path, name: str) -> None:
    nproc, layout = DEEP_ROWS[name]
    drive([case("megatron", "tiny_llama", tmp_path / "run", [*settings, *DEEP, *layout])], nproc)
    loss, norm = farthest(tmp_path / "run", plain.losses(ROOT / "recipes/gpt/configs/tiny_llama.yaml", settings + DEEP))
    assert loss <= LOSS and norm <= NORM


def test_an_evaluation_takes_any_number_of_samples(drive, settings, tmp_path: Path) -> None:
    """Five samples are three micro batches of two, and the interleaved schedule takes them in twos."""
    given = [*settings, "train.steps=2", "train.eval_samples=5"]
    layout = ["megatron.pp=2", "megatron.vpp=2", "megatron.micro_batch=2"]
    drive([case("baseline", "tiny", tmp_path / "plain", given)], 2)
    drive([case("megatron", "tiny", tmp_path / "vpp", given + layout)], 2)
    assert abs(valid_loss(tmp_path / "plain") - valid_loss(tmp_path / "vpp")) <= LOSS
