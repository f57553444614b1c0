"""How Megatron's parameters stand for Hugging Face ones: the type of the tables in recipes/*/convert.py."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch


class Rule(NamedTuple):
    """How one Megatron parameter stands for Hugging Face ones. Weights and moments convert alike: rows move, none mix."""

    hf: tuple[str, ...]
    to_hf: "Callable[[torch.Tensor], Sequence[torch.Tensor]]"  # whole Megatron tensor -> one for each name
    from_hf: "Callable[..., torch.Tensor]"  # those -> whole Megatron tensor
    blocks: int = 1  # stacked blocks that are each split over tp: 2 for gate and up
    rows: int | None = None  # rows without the padding that makes a vocabulary divisible by tp


Rules = Callable[[str], Rule]  # global Megatron name -> rule; KeyError for a name without one
