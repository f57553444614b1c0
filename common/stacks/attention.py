"""Attention of the `transformers` classes where the ranks of a group compute different heads.

Letters in shapes: B samples, T positions, N heads of this rank, D head size.
"""

from collections.abc import Callable
from typing import Any

import torch
from deepspeed.utils import groups
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

NAME = "twinstack"  # of the attention of this run among those of transformers
Attention = Callable[..., tuple[torch.Tensor, None]]


def use(net: Any, attention: Attention) -> None:
    """Let a model compute its attention by this function. Other models of this process keep theirs: transformers' own "sdpa" is
    not replaced, as deepspeed's UlyssesSPAttentionHF would do.

    transformers makes no masks for a function that it does not know: without one, attention is causal.
    """
    AttentionInterface.register(NAME, attention)
    net.set_attn_implementation(NAME)


def tensor_parallel(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' "sdpa" with different dropout on each rank of the tensor-parallel group, which has different heads. query,
    key, value: (B, N, T, D).

    All other dropout is of activations that each rank has a copy of: the generators are left as the other ranks have them.
    """
    if not dropout:
        return sdpa_attention_forward(module, query, key, value, mask, **kwargs)
    seed = int(torch.randint(2**62, ()))  # of the CPU's generator: equal on all ranks, and again when a layer is recomputed
    with torch.random.fork_rng([query.device] if query.is_cuda else []):
        torch.manual_seed(seed + groups.get_tensor_model_parallel_rank())
        return sdpa_attention_forward(module, query, key, value, mask, dropout=dropout, **kwargs)
