"""DeepSpeed's configuration, what replaces two of its functions on a GPU, and what tensor parallelism divides."""

import importlib

import pytest
import torch
from conftest import ROOT
from deepspeed.runtime.utils import mask_nan_or_inf_with_val_inplace
from deepspeed.utils import groups

from common import config
from common.stacks import attention, zero
from recipes.gpt.deepspeed import gpt2_tp


@pytest.mark.parametrize(
    ("parameters", "dp", "bucket", "all_reduce"),
    [
        (1_316_000_000, 8, 40_000_000, False),  # GPT 1.3B: an owner has 164 million gradients
        (1_316_000_000, 64, 64_000_000, True),  # 20 million, which 64 ranks in a row would hand on
        (124_000_000, 8, 40_000_000, False),
        (200_000, 2, 200_000, True),  # the tiny configs
        (200_000, 1, 200_000, True),
    ],
)
def test_buckets_and_the_operation_that_reduces_them(parameters: int, dp: int, bucket: int, all_reduce: bool) -> None:
    found = zero._reduction(parameters, dp)
    assert found == {"reduce_bucket_size": bucket, "use_multi_rank_bucket_allreduce": all_reduce}


@pytest.mark.parametrize("value", [0.0, 1.5, float("inf"), -float("inf"), float("nan")])
def test_a_norm_is_masked_as_deepspeed_masks_it(value: float) -> None:
    ours, theirs = torch.tensor(value), torch.tensor(value)
    zero._mask_invalid(ours)
    mask_nan_or_inf_with_val_inplace(theirs)
    assert ours.equal(theirs)


def test_gpt2_gives_each_rank_its_share_of_queries_keys_and_values() -> None:
    tp, hidden = 2, 8
    whole = torch.randn(hidden, 3 * hidden)  # Conv1D: (in, out), outputs of queries, keys, values
    rows = gpt2_tp.from_conv1d(whole, 3, tp)
    for rank, share in enumerate(rows.chunk(tp)):
        heads = slice(rank * hidden // tp, (rank + 1) * hidden // tp)
        assert share.equal(torch.cat([part[:, heads].t() for part in whole.split(hidden, dim=1)]))
    [back] = gpt2_tp.to_conv1d(rows, 3, tp)
    assert back.equal(whole) and back.is_contiguous()
    [bias] = gpt2_tp.to_conv1d(gpt2_tp.from_conv1d(whole[0], 3, tp), 3, tp)
    assert bias.equal(whole[0])


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_ranks_drop_different_scores_and_go_on_with_equal_generators(monkeypatch: pytest.MonkeyPatch, dropout: float) -> None:
    module, states, outputs = torch.nn.Module(), [], []
    query, key, value = torch.randn(3, 2, 4, 16, 8)  # (B, N, T, D) each
    for rank in (0, 1, 1):
        monkeypatch.setattr(groups, "get_tensor_model_parallel_rank", lambda rank=rank: rank)
        torch.manual_seed(7)
        outputs.append(attention.tensor_parallel(module, query, key, value, None, dropout=dropout)[0])
        states.append(torch.random.get_rng_state())
    assert outputs[1].equal(outputs[2]) and outputs[0].equal(outputs[1]) == (dropout == 0)
    assert states[0].equal(states[1])


def test_ranks_drop_different_units_of_a_split_mlp(monkeypatch: pytest.MonkeyPatch) -> None:
    dropout, outputs, states = attention.SplitDropout(0.5), [], []
    for rank in (0, 1, 1):
        monkeypatch.setattr(groups, "get_tensor_model_parallel_rank", lambda rank=rank: rank)
        torch.manual_seed(7)
        outputs.append(dropout(torch.ones(64)))
        states.append(torch.random.get_rng_state())
    assert outputs[1].equal(outputs[2]) and not outputs[0].equal(outputs[1]) and states[0].equal(states[1])
    assert dropout.eval()(torch.ones(64)).equal(torch.ones(64))


@pytest.mark.parametrize("family", ["bert", "t5"])
def test_autotp_draws_dropout_for_the_heads_of_a_rank(family: str) -> None:
    """Other heads on each rank, and for T5 another part of the MLP, which has dropout."""
    task, model = (importlib.import_module(f"recipes.{family}.{name}") for name in ("task", "deepspeed.model"))
    words = ["data.valid=null", "model.vocab_size=512", "model.dropout=0.1", "deepspeed.tp=2"]
    cfg = config.load(ROOT / f"recipes/{family}/configs/tiny.yaml", words, task.Config)
    net = model.build(config.resolve(cfg, task.ResolvedConfig, 512), {})
    names = {module.config._attn_implementation for module in net.modules() if hasattr(module, "config")}
    assert names == {"twinstack_masked"}
    split = {name: module.p for name, module in net.named_modules() if isinstance(module, attention.SplitDropout)}
    inner = [name for name, _ in net.named_modules() if name.endswith("DenseReluDense.dropout")]
    assert split == dict.fromkeys(inner, 0.1) and bool(split) == (family == "t5")
