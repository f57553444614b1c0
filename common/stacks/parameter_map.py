"""The type of recipes/*/megatron/parameter_map.py: which Megatron parameter stands for which Hugging Face ones."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch


class Conversion(NamedTuple):
    """How one Megatron parameter stands for Hugging Face ones. Weights and moments convert alike: rows move and never mix."""

    hf: tuple[str, ...]
    to_hf: "Callable[[torch.Tensor], Sequence[torch.Tensor]]"  # whole Megatron tensor -> one for each name
    from_hf: "Callable[..., torch.Tensor]"  # those -> whole Megatron tensor
    blocks: int = 1  # stacked blocks that are each split over tp: 2 for gate and up
    unpadded_rows: int | None = None  # of a vocabulary, without the rows that make it divisible by tp
    is_transposed: bool = False  # Hugging Face has (in, out), Megatron (out, in)
    is_copy: bool = False  # the last pipeline stage's copy of a tied embedding: the first stage's stands for both


ParameterMap = Callable[[str], Conversion]  # global Megatron name -> conversion; KeyError for a name without one
