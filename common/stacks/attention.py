"""Attention of the `transformers` classes where the ranks of a group compute different heads.

Letters in shapes: B samples, T positions, N heads of this rank, D head size.
"""

from collections.abc import Callable
from typing import Any

import torch
from deepspeed.sequence.layer import _SeqAllToAll
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


def ulysses(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' "sdpa" where the ranks of a group share each sequence (DeepSpeed-Ulysses, arXiv:2309.14509).

    query, key, value: (B, all heads, T / ranks, D), at the positions of this rank. They are exchanged for the positions of all
    ranks, for a share of the heads, and the result is exchanged back. mask: (B, 1, T, T), True where a query may see a key;
    deepspeed's UlyssesSPAttentionHF would drop it.
    """
    group = groups._get_sequence_parallel_group()

    def all_positions(tensor: torch.Tensor) -> torch.Tensor:
        """(B, all heads, T / ranks, D) -> (B, N, T, D)"""
        exchanged: torch.Tensor = _SeqAllToAll.apply(group, tensor.transpose(1, 2), 2, 1, 0)
        return exchanged.transpose(1, 2)

    query, key, value = map(all_positions, (query, key, value))
    output, _ = sdpa_attention_forward(module, query, key, value, mask, **kwargs)  # (B, T, N, D)
    return _SeqAllToAll.apply(group, output, 1, 2, 0), None  # (B, T / ranks, all heads, D)
