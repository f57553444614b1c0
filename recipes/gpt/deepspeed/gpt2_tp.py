"""GPT-2 under AutoTP, which splits torch.nn.Linear: the `transformers` class has Conv1D, whose weights are (in, out).

Letters in shapes: H hidden, F width of the MLP.
"""

import re
from functools import partial
from typing import Any

import torch
from torch import nn

from common.stacks import attention
from common.stacks.parameter_map import Conversion

COLUMN = ("attn.c_attn", "mlp.c_fc")  # a rank has a part of the outputs
ROW = ("attn.c_proj", "mlp.c_proj")  # a rank has a part of the inputs; the ranks add up their outputs


def prepare(net: Any, ds_config: dict[str, Any], tp: int) -> None:
    """Make GPT2LMHeadModel ready for deepspeed.initialize: Linear in place of Conv1D, its attention with the heads of one rank.

    Adds to ds_config which layers AutoTP splits, and to `net` the `conversions` of their parameters: c_attn's outputs are
    queries, keys and values, and rank i takes the i-th share of each.
    """
    net.conversions = {}
    for number, block in enumerate(net.transformer.h):
        for path in (*COLUMN, *ROW):
            part, _, name = path.partition(".")
            conv = getattr(getattr(block, part), name)
            setattr(getattr(block, part), name, nn.Linear(conv.nx, conv.nf))
            for leaf in ("weight", "bias"):
                full = f"transformer.h.{number}.{path}.{leaf}"
                net.conversions[full] = conversion(full, 3 if name == "c_attn" else 1, tp)
        block.attn.split_size //= tp
        block.attn.num_heads //= tp
    attention.use(net, attention.tensor_parallel)
    specs = [_spec(COLUMN, "column"), _spec(ROW, "row")]
    ds_config["tensor_parallel"]["partition_config"] = {"use_default_specs": False, "layer_specs": specs}


def _spec(paths: tuple[str, ...], partition_type: str) -> dict[str, Any]:
    return {"patterns": [rf".*{re.escape(path)}\.weight$" for path in paths], "partition_type": partition_type}


def conversion(name: str, blocks: int, tp: int) -> Conversion:
    """How a parameter stands for that of Conv1D: a weight transposed, and rows of `blocks` blocks, each in `tp` shares, ordered
    by share: AutoTP gives each rank the rows that follow each other."""
    to_hf, from_hf = partial(to_conv1d, blocks=blocks, tp=tp), partial(from_conv1d, blocks=blocks, tp=tp)
    return Conversion((name,), to_hf, from_hf, is_transposed=True)


def from_conv1d(whole: torch.Tensor, blocks: int, tp: int) -> torch.Tensor:
    """(in, out) -> (out, in), or (out,) -> (out,)"""
    rows = whole.t() if whole.dim() == 2 else whole
    return rows.unflatten(0, (blocks, tp, -1)).transpose(0, 1).flatten(0, 2)


def to_conv1d(rows: torch.Tensor, blocks: int, tp: int) -> tuple[torch.Tensor]:
    """The inverse of from_conv1d."""
    rows = rows.unflatten(0, (tp, blocks, -1)).transpose(0, 1).flatten(0, 2)
    return ((rows.t() if rows.dim() == 2 else rows).contiguous(),)
