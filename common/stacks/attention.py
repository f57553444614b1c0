"""Attention of the `transformers` classes where the ranks of a group compute different heads.

Letters in shapes: B samples, T positions, N heads of this rank, D head size.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from deepspeed.sequence.layer import _SeqAllToAll
from deepspeed.utils import groups
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "twinstack"  # of the attention of this run among those of transformers
Attention = Callable[..., tuple[torch.Tensor, None]]


def use(net: Any, attention: Attention, masked: bool = False) -> None:
    """Let a model compute its attention by this function. Other models of this process keep theirs: transformers' own "sdpa" is
    not replaced, as deepspeed's UlyssesSPAttentionHF would do.

    masked: with the masks that transformers makes for "sdpa". It makes none for a function that it does not know: without one,
    attention is causal.
    """
    name = f"{NAME}_masked" if masked else NAME
    AttentionInterface.register(name, attention)
    if masked:
        AttentionMaskInterface.register(name, sdpa_mask)
    net.set_attn_implementation(name)


@contextlib.contextmanager
def own_draws(tensor: torch.Tensor) -> Iterator[None]:
    """Draw other numbers than the other ranks of the tensor-parallel group. Afterwards the generators are equal again: other
    dropout is of activations that each rank has a copy of."""
    seed = int(torch.randint(2**62, ()))  # of the CPU's generator: equal on all ranks, and again when a layer is recomputed
    with torch.random.fork_rng([tensor.device] if tensor.is_cuda else []):
        torch.manual_seed(seed + groups.get_tensor_model_parallel_rank())
        yield


class SplitDropout(torch.nn.Dropout):
    """Dropout of activations of which each rank of the tensor-parallel group has a part."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if not (self.training and self.p):
            return input
        with own_draws(input):
            return super().forward(input)


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
    """
    if not dropout:
        return sdpa_attention_forward(module, query, key, value, mask, **kwargs)
    with own_draws(query):
        return sdpa_attention_forward(module, query, key, value, mask, dropout=dropout, **kwargs)


def draw_by_rank(net: Any) -> None:
    """Let AutoTP's ranks draw different dropout where they have different activations: heads, and T5's units of an MLP."""
    use(net, tensor_parallel, masked=True)
    for name, module in net.named_modules():
        if name.endswith(".DenseReluDense"):
            module.dropout = SplitDropout(module.dropout.p)


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
