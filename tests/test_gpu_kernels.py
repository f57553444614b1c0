"""What replaces passes over all gradients on a GPU, here on a CPU: the losses and norms are those of the plain functions."""

import copy
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from conftest import case, losses

from common.config import Optim
from common.stacks import zero
from common.training import optim
from tests import warm

# a large eps, without which the updates of Adam do not depend on the scale of the gradients
CLIPPED = ["train.steps=3", "optim.grad_clip=0.25", "optim.warmup_steps=1", "optim.lr=0.05", "optim.eps=0.1"]
ZERO = {
    "zero1": ["deepspeed.zero_stage=1"],
    "zero2": ["deepspeed.zero_stage=2", "deepspeed.micro_batch=2"],
    "zero3": ["deepspeed.zero_stage=3"],
    "tp2": ["deepspeed.tp=2"],
    "tp2_zero2": ["deepspeed.tp=2", "deepspeed.zero_stage=2", "deepspeed.micro_batch=2"],
    "pp2": ["deepspeed.pp=2", "deepspeed.zero_stage=1"],
    "sp2": ["deepspeed.sp=2", "deepspeed.zero_stage=2"],
    "zero2_offload": ["deepspeed.zero_stage=2", "deepspeed.offload=true"],
}
MEGATRON = {
    "megatron": [],
    "interleaved": ["megatron.pp=2", "megatron.vpp=2"],
    "distributed_optimizer": ["megatron.distributed_optimizer=true", "megatron.micro_batch=2"],
}
# Runs the cases of a file as on a GPU
AS_ON_A_GPU = """
import sys
from common.launch import in_process, processes
processes.quiet()
from common.stacks import mcore, zero
zero._adapt_to_gpu()
optimizer_for = mcore.optimizer_for
def scaled(model, cfg, ranks):
    optimizer = optimizer_for(model, cfg, ranks)
    mcore.AdamScale.install(model, optimizer)
    return optimizer
mcore.optimizer_for = scaled
sys.argv = ["drive", sys.argv[1]]
from tests import drive
drive.main(sys.argv[1])
"""


def test_adamw_clips_in_its_kernel() -> None:
    torch.manual_seed(0)
    plain = [torch.nn.Parameter(torch.randn(8, 8)), torch.nn.Parameter(torch.randn(8)), torch.nn.Parameter(torch.randn(3))]
    scaled = copy.deepcopy(plain)
    settings = Optim(lr=0.1, weight_decay=0.1, betas=[0.9, 0.95], eps=0.1, schedule="constant")
    both = [optim.build(enumerate_names(params), lambda name: True, settings) for params in (plain, scaled)]
    for max_norm in (0.5, 1e6, 0.0):  # clips; is above the norm; is off
        for params in zip(plain, scaled, strict=True):
            params[0].grad = torch.randn_like(params[0])
            params[1].grad = params[0].grad.clone()
        plain[2].grad = scaled[2].grad = None  # was not used
        norms = optim.clip(both[0], plain, max_norm), optim.clip_in_kernel(both[1], scaled, max_norm)
        assert norms[0] == pytest.approx(norms[1], rel=1e-6)
        for optimizer in both:
            optimizer.step()
    for one, other in zip(plain, scaled, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def enumerate_names(params: list[torch.nn.Parameter]) -> list[tuple[str, torch.nn.Parameter]]:
    return [(str(number), parameter) for number, parameter in enumerate(params)]


@pytest.mark.parametrize("tp_rank", [0, 1])
def test_the_norm_at_zero_counts_each_gradient_once(monkeypatch: pytest.MonkeyPatch, tp_rank: int) -> None:
    monkeypatch.setattr(dist, "all_reduce", lambda *_, **__: None)
    optimizer = SimpleNamespace(
        device="cpu", model_parallel_rank=tp_rank, dp_process_group=None, _model_parallel_all_reduce=lambda **_: None
    )
    params, gradients = [torch.randn(5), torch.randn(7, 3)], [torch.randn(5).bfloat16(), torch.randn(7, 3).bfloat16()]
    params[1].tensor_model_parallel = True
    padding = torch.zeros(2)
    padding._zero_padding = True
    counted = gradients[tp_rank:]
    expected = torch.cat([gradient.double().flatten() for gradient in counted]).norm()
    found = zero._norm_12(optimizer, [*gradients, padding], params)
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)


def test_runs_as_on_a_gpu_have_the_losses_of_plain_ones(drive, settings, tmp_path: Path) -> None:
    rows = {name: ("deepspeed", layout) for name, layout in ZERO.items()}
    rows |= {name: ("megatron", layout) for name, layout in MEGATRON.items()}

    def cases(folder: str) -> list[dict[str, object]]:
        return [
            case(stack, "tiny", tmp_path / folder / name, [*settings, *CLIPPED, *layout])
            for name, (stack, layout) in rows.items()
        ]

    drive(cases("plain"), 2)
    (tmp_path / "cases.json").write_text(json.dumps(cases("gpu")))
    done = warm.run(["-c", AS_ON_A_GPU, tmp_path / "cases.json"], nproc=2, merged=True, timeout=600)
    assert done.returncode == 0, done.stdout[-5000:]
    for name in rows:
        plain, found = (losses(tmp_path / folder / name) for folder in ("plain", "gpu"))
        assert set(plain) == set(found) == {1, 2, 3}
        for step in plain:
            assert found[step]["loss"] == pytest.approx(plain[step]["loss"], rel=1e-6), name
            assert found[step]["grad_norm"] == pytest.approx(plain[step]["grad_norm"], rel=1e-5), name
            assert plain[step]["grad_norm"] > 0.25  # it clips
