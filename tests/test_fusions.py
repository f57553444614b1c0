"""megatron.fusions: its loss and its weight gradients against torch's own, and whole runs against the plain functions."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import case, losses

from common.stacks import fusions
from common.training import loss
from tests import warm

LOSS = 1e-5  # invariant 1
# On two ranks, each with half of the vocabulary: losses and gradients against cross entropy in double precision
SPLIT_LOSS = """
import types
import torch, torch.nn.functional as F
from common.launch import processes
from common.layout import Layout
ranks = processes.start()
from common.stacks import fusions, mcore
mcore.start(ranks, Layout(world=2, dp=1, tp=2, pp=1, micro_batch=1, accumulate=1))
config = types.SimpleNamespace(cross_entropy_loss_fusion=True, bias_dropout_fusion=False)
torch.manual_seed(0)
whole, targets, weights = torch.randn(6, 5, 38) * 8, torch.randint(0, 38, (6, 5)), torch.randn(6, 5)
whole[0, 0] += 500  # exp of it is infinite
for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
    given = whole.to(dtype)
    expected = given.double().requires_grad_()
    losses = F.cross_entropy(expected.flatten(0, 1), targets.flatten(), reduction="none").view(6, 5)
    (losses * weights).sum().backward()
    shard = given.chunk(2, -1)[ranks.rank].clone().requires_grad_()
    found = fusions.cross_entropy(config, shard * 1, targets)
    (found * weights).sum().backward()
    assert found.dtype == torch.float32
    assert (found - losses).abs().max() < 1e-4, (found - losses).abs().max()  # logits of 500 have 3e-5 of precision
    assert shard.grad.dtype == dtype
    assert (shard.grad - expected.grad.chunk(2, -1)[ranks.rank]).abs().max() < bound
"""


def test_loss_over_a_split_vocabulary() -> None:
    done = warm.run(["-c", SPLIT_LOSS], nproc=2, merged=True)
    assert done.returncode == 0, done.stdout


def test_weight_gradient_is_added_to_what_is_there() -> None:
    torch.manual_seed(0)
    x, grad, main_grad = torch.randn(12, 5), torch.randn(12, 7), torch.randn(7, 5)
    expected = main_grad.double() + grad.double().t() @ x.double()
    fusions.WeightGradient.wgrad_gemm_accum_fp32(x, grad, main_grad)
    torch.testing.assert_close(main_grad.double(), expected, atol=1e-5, rtol=0)


RUNS = {
    "gpt": ("tiny", ["megatron.tp=2", "megatron.sequence_parallel=true"]),
    "llama": ("tiny_llama", ["megatron.pp=2"]),
    "bert": ("tiny", ["megatron.distributed_optimizer=true"]),
    "postln": ("tiny_postln", ["megatron.tp=2"]),
    "t5": ("tiny", ["megatron.recompute=true"]),
    "t5_v1_1": ("tiny_v1_1", ["megatron.tp=2", "megatron.sequence_parallel=true"]),
}


@pytest.mark.slow
def test_fused_runs_have_the_losses_of_plain_ones(drive, settings, bert_settings, t5_settings, tmp_path: Path) -> None:
    """With torch.compile's own kernels for a CPU; dropout draws the same again where layers are recomputed."""
    cases = []
    for name, (tiny, layout) in RUNS.items():
        family = {"gpt": "gpt", "llama": "gpt", "bert": "bert", "postln": "bert"}.get(name, "t5")
        given = [*{"gpt": settings, "bert": bert_settings, "t5": t5_settings}[family], "train.steps=20", *layout]
        for fused in ("false", "true"):
            cases.append(case("megatron", tiny, tmp_path / name / fused, [*given, f"megatron.fusions={fused}"], family=family))
    dropped = [*settings, "train.steps=5", "model.dropout=0.1", "megatron.fusions=true"]
    for recompute in ("false", "true"):
        given = [*dropped, f"megatron.recompute={recompute}"]
        cases.append(case("megatron", "tiny", tmp_path / "recompute" / recompute, given))
    drive(cases, 2)
    for name in (*RUNS, "recompute"):
        plain, fused = losses(tmp_path / name / "false"), losses(tmp_path / name / "true")
        assert len(plain) == len(fused) > 4
        assert max(abs(fused[step]["loss"] - plain[step]["loss"]) for step in plain) <= LOSS, name


@pytest.mark.gpu
def test_on_a_gpu_each_function_is_that_of_torch() -> None:
    """Compiled by Triton, in bf16, against the same in double precision."""
    torch.manual_seed(0)
    config = SimpleNamespace(cross_entropy_loss_fusion=True, bias_dropout_fusion=True)
    x, grad = torch.randn(64, 4, 128, device="cuda").bfloat16(), torch.randn(64, 4, 128, device="cuda").bfloat16()
    weight, bias = torch.randn(128, device="cuda").bfloat16(), torch.randn(128, device="cuda").bfloat16()
    of_residual = torch.randn_like(grad)

    def gradients(function: Callable[..., Any], *inputs: torch.Tensor) -> list[torch.Tensor]:
        leaves = [tensor.detach().requires_grad_() for tensor in inputs]
        outs = function(*leaves)
        torch.autograd.backward(outs, [(grad, of_residual)[i].to(out.dtype) for i, out in enumerate(outs)])
        return [leaf.grad for leaf in leaves]

    found = gradients(lambda *given: fusions.NormAndResidual.apply(*given, 1e-5, config), x, weight, bias)
    doubles = [tensor.double() for tensor in (x, weight, bias)]
    expected = gradients(lambda x, w, b: (F.layer_norm(x, (128,), w, b), x * 1), *doubles)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=2e-2, atol=2e-2 * other.abs().max().item())

    main_grad = torch.randn(128, 128, device="cuda")
    rows, columns = grad.flatten(0, 1), x.flatten(0, 1)
    product = main_grad.double() + rows.double().t() @ columns.double()
    fusions.WeightGradient.wgrad_gemm_accum_fp32(columns, rows, main_grad)  # the sum is in fp32: no rounding to bf16
    torch.testing.assert_close(main_grad.double(), product, rtol=1e-4, atol=1e-3)

    logits, targets = torch.randn(32, 1000, device="cuda").bfloat16() * 4, torch.randint(0, 1000, (32,), device="cuda")
    whole = logits.double().requires_grad_()
    losses = F.cross_entropy(whole, targets, reduction="none")
    losses.sum().backward()
    statistics = torch.compile(loss.statistics)(logits, targets)
    largest, sums, picked = statistics
    torch.testing.assert_close((sums.log() - (picked - largest)).double(), losses.detach(), rtol=1e-4, atol=1e-4)
    torch.compile(loss.gradient_)(logits, targets, statistics, torch.ones(32, device="cuda"))
    torch.testing.assert_close(logits.double(), whole.grad, rtol=1e-2, atol=1e-3)
