"""megatron.cp, beside the parity and resume of its layouts: the pieces of a sequence, attention over them, what is dropped,
and what TransformerEngine cannot do."""

import pytest
from conftest import ROOT

from common import config
from common.layout import sequence_multiple
from recipes.bert import task as bert
from recipes.gpt import task as gpt
from tests import warm

# On two ranks, each with half of a sequence: values and gradients against one rank in double precision
PIECES = """
import torch, torch.distributed as dist, torch.nn.functional as F
from common.launch import processes
from common.layout import Layout
ranks = processes.start()
from common.stacks import mcore
mcore.start(ranks, Layout(world=2, dp=1, tp=1, pp=1, cp=2, micro_batch=1, accumulate=1))
torch.manual_seed(0)
T, r = 16, ranks.rank
positions = torch.arange(T)
chunks = positions.view(4, 4)
assert mcore.own_positions(positions, 0).tolist() == torch.cat([chunks[r], chunks[3 - r]]).tolist()
assert mcore.whole_sequence(mcore.own_positions(positions, 0)).equal(positions)

weights = torch.randn(2, T, 3)  # of the loss of each rank
own = mcore.own_positions(torch.randn(T, 3), 0).requires_grad_()
(mcore.whole_sequence(own) * weights[r]).sum().backward()
torch.testing.assert_close(own.grad, mcore.own_positions(weights.sum(0), 0))

q, k, v, grad = (torch.randn(2, heads, T, 8, dtype=torch.float64) for heads in (6, 2, 2, 6))
whole = [x.clone().requires_grad_() for x in (q, k, v)]
expected = F.scaled_dot_product_attention(*whole, is_causal=True, enable_gqa=True)
expected.backward(grad)
mine = mcore.own_positions(q, 2).requires_grad_()
keys = [mcore.own_positions(x.permute(2, 0, 1, 3), 0).requires_grad_() for x in (k, v)]
gathered = [mcore.whole_sequence(x).permute(1, 2, 0, 3) for x in keys]
found = torch.cat(mcore.causal_attention(mine, *gathered, enable_gqa=True), 2)
found.backward(mcore.own_positions(grad, 2))
torch.testing.assert_close(found, mcore.own_positions(expected, 2))
torch.testing.assert_close(mine.grad, mcore.own_positions(whole[0].grad, 2))
for part, full in zip(keys, whole[1:]):
    torch.testing.assert_close(part.grad, mcore.own_positions(full.grad.permute(2, 0, 1, 3), 0))
"""
# What dropout draws on two ranks: outside and inside the regions that tensor parallelism splits
DROPPED = """
import types
import torch, torch.distributed as dist
from common.launch import processes
from common.layout import Layout
ranks = processes.start()
from common.stacks import mcore
from megatron.core.tensor_parallel import get_cuda_rng_tracker

def drawn(**sizes):
    mcore.start(ranks, Layout(**({"world": 2, "dp": 1, "tp": 1, "pp": 1, "micro_batch": 1, "accumulate": 1} | sizes)))
    mcore.begin_micro_batch(processes.seed_micro_batch(1, 2, 3, 0), types.SimpleNamespace(vp_stage=None))
    outside = torch.rand(8)
    with get_cuda_rng_tracker().fork():
        inside = torch.rand(8)
    numbers = torch.stack([outside, inside])
    both = [torch.empty_like(numbers) for _ in range(2)]
    dist.all_gather(both, numbers)
    return [both[0][region].equal(both[1][region]) for region in (0, 1)]

assert drawn(cp=2) == [False, False]
assert drawn(pp=2) == [False, False]
assert drawn(tp=2) == [True, False]
"""


@pytest.mark.parametrize("script", [PIECES, DROPPED], ids=["pieces", "dropped"])
def test_on_two_ranks(script: str) -> None:
    done = warm.run(["-c", script], nproc=2, merged=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("task", "name", "masked", "plain"),
    [(gpt, "gpt", "data.reset_attention=true", "data.reset_attention=false"), (bert, "bert", "megatron.cp=2", "megatron.cp=1")],
)
def test_the_ring_of_transformer_engine_takes_no_mask(monkeypatch, task, name: str, masked: str, plain: str) -> None:
    monkeypatch.setattr(task, "find_spec", lambda name: True)  # TransformerEngine

    def problems(override: str) -> list[str]:
        words = ["megatron.cp=2", "megatron.transformer_engine=true", override]
        cfg = config.load(ROOT / f"recipes/{name}/configs/tiny.yaml", words, task.Config)
        return list(cfg.model.layout_problems(cfg, "megatron"))

    [problem] = problems(masked)
    assert "megatron.transformer_engine=true with megatron.cp=2" in problem and "mask" in problem
    assert problems(plain) == []


@pytest.mark.parametrize(
    ("keys", "multiple"),
    [("cp=1", 1), ("cp=2", 4), ("cp=3", 6), ("cp=2 tp=2", 4), ("cp=2 tp=3", 12), ("tp=3", 3), ("cp=3 tp=4", 12)],
)
def test_each_rank_gets_two_equal_chunks_and_each_tp_rank_its_share(keys: str, multiple: int) -> None:
    words = ["megatron.sequence_parallel=true", *(f"megatron.{key}" for key in keys.split())]
    cfg = config.load(ROOT / "recipes/gpt/configs/tiny.yaml", words, gpt.Config)
    assert sequence_multiple(cfg, "megatron") == multiple and sequence_multiple(cfg, "deepspeed") == 1
    cp, tp = cfg.megatron.cp, cfg.megatron.tp
    fits = [length for length in range(1, 50) if length % cp == length // cp % tp == 0 and (cp == 1 or length % (2 * cp) == 0)]
    assert fits[0] == multiple  # the definition
