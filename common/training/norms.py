"""Norms of gradients and parameters, which torch computes too low on a CPU if a tensor is large."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

BLOCK = 2**14  # values of a tensor that are added up one after the other


def norms(tensors: "list[torch.Tensor]") -> "list[torch.Tensor]":
    """The fp32 norm () of each tensor.

    On a CPU, torch adds up the squares of a whole tensor in a few fp32 sums (aten/src/ATen/native/cpu/ReduceOpsKernel.cpp,
    norm_kernel_tensor_iterator_impl): the norm is too low by 1e-5 of itself at a million values and by 3e-3 at forty million,
    an embedding of GPT-2. There, the norm is taken of each block of values, and then of those norms.
    """
    import torch

    large = [tensor.device.type == "cpu" and tensor.numel() > BLOCK for tensor in tensors]
    others = [tensor for tensor, is_large in zip(tensors, large, strict=True) if not is_large]
    found = iter(torch._foreach_norm(others, 2, torch.float32) if others else ())
    return [
        _by_blocks(tensor.detach().reshape(-1)) if is_large else next(found)
        for tensor, is_large in zip(tensors, large, strict=True)
    ]


def _by_blocks(values: "torch.Tensor") -> "torch.Tensor":
    import torch

    whole = values.numel() // BLOCK * BLOCK
    parts = torch.linalg.vector_norm(values[:whole].view(-1, BLOCK), dim=1, dtype=torch.float32)
    rest = torch.linalg.vector_norm(values[whole:], dtype=torch.float32)
    return torch.linalg.vector_norm(torch.cat([parts, rest.view(1)]))


def total_norm(tensors: "list[torch.Tensor]") -> "torch.Tensor":
    """The fp32 norm () of all tensors together, of which there is at least one."""
    import torch

    return torch.linalg.vector_norm(torch.stack(norms(tensors)))
