"""Cross entropy over a vocabulary. N targets, V ids."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from common.training import compiling

LARGE = 16_384  # ids
# Logits per chunk: 1 MiB in fp32, which the cache of a core holds; 64 MiB, for few kernels on a GPU.
CPU_CHUNK, GPU_CHUNK = 2**18, 2**24


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """logits (N, V), targets (N,) -> losses (N,), in fp32 whatever the logits' dtype.

    The backward pass writes the gradient of a large vocabulary over the logits: read them before, not after.
    """
    if logits.shape[-1] < LARGE:
        return F.cross_entropy(logits.float(), targets, reduction="none")
    if logits.is_cuda and len(targets) and compiling.has_triton():
        fused: torch.Tensor = FusedVocabulary.apply(logits, targets, None, True)
        return fused
    losses: torch.Tensor = LargeVocabulary.apply(logits, targets)
    return losses


class LargeVocabulary(torch.autograd.Function):
    """F.cross_entropy, with two differences.

    On a CPU F.cross_entropy sums over the vocabulary one number after another, so the loss for a large vocabulary is too low:
    by 1.7e-5 for SmolLM2's 49,152 ids, which is more than two stacks may differ. Tensor.sum adds in pairs, like Megatron's own
    loss, with an error of 1e-7.

    F.cross_entropy reads logits in fp32, and has three more tensors of (N, V) in fp32: the logits, their log softmax, and the
    gradient. Here one chunk of rows at a time is in fp32. A chunk stays in the cache, so the memory sees the logits once in
    the forward pass and once in the backward pass, which keeps nothing else of their size.
    """

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        # largest logits, and sums of exp(logit - largest)
        largest, sums = torch.empty(2, len(logits), 1, dtype=torch.float32, device=logits.device)
        for rows, buffer in chunks(logits):
            largest[rows] = logits[rows].amax(-1, keepdim=True)
            torch.sum(torch.sub(logits[rows], largest[rows], out=buffer).exp_(), -1, keepdim=True, out=sums[rows])
        ctx.save_for_backward(logits, targets, largest, sums)
        return (sums.log() - (logits.gather(-1, targets[:, None]) - largest))[:, 0]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        logits, targets, largest, sums = ctx.saved_tensors
        grad, targets = grad[:, None], targets[:, None]  # (N, 1)
        at_targets = (logits.gather(-1, targets) - largest - sums.log()).expm1_().mul_(grad)
        result, scale = logits.clone() if logits.is_leaf else logits, grad / sums
        for rows, buffer in chunks(result):
            torch.mul(torch.sub(result[rows], largest[rows], out=buffer).exp_(), scale[rows], out=result[rows])
        return result.scatter_(-1, targets, at_targets.to(result.dtype)), None


def chunks(logits: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """Chunks of rows of the logits, each with an fp32 buffer of its size."""
    chunk = CPU_CHUNK if logits.device.type == "cpu" else GPU_CHUNK
    size = max(1, chunk // logits.shape[-1])
    buffer = torch.empty(min(size, len(logits)), logits.shape[-1], dtype=torch.float32, device=logits.device)
    for start in range(0, len(logits), size):
        rows = slice(start, min(start + size, len(logits)))
        yield rows, buffer[: rows.stop - rows.start]


# ---- as few kernels ---------------------------------------------------------------------------------------------------


def statistics(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """logits (N, V / tp), targets (N,), below 0 or above V / tp where another rank has them -> (3, N): the largest logit, the
    sum of exp(logit - largest), and the target's logit, 0 on the other ranks."""
    held = (targets >= 0) & (targets < logits.size(-1))
    picked = logits.gather(-1, (targets * held)[:, None])[:, 0].float()
    whole = logits.float()
    largest = whole.amax(-1)
    return torch.stack([largest, (whole - largest[:, None]).exp().sum(-1), picked * held])


def gradient_(logits: torch.Tensor, targets: torch.Tensor, found: torch.Tensor, grad: torch.Tensor) -> None:
    """Write the gradient over the logits: softmax minus 1 at the target, times the gradient of the loss. found: `statistics`"""
    largest, sums, picked = found
    at_targets = (picked - largest - sums.log()).expm1() * grad
    others = (logits.float() - largest[:, None]).exp() * (grad / sums)[:, None]
    ids = torch.arange(logits.size(-1), device=logits.device)
    logits.copy_(torch.where(ids == targets[:, None], at_targets[:, None], others))


class FusedVocabulary(torch.autograd.Function):
    """Cross entropy over a vocabulary that is whole, or split over the ranks of a group. Compiled, it reads the logits once
    forward and once backward, where it writes their gradient over them, and keeps nothing else of their size."""

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, targets: torch.Tensor, group: dist.ProcessGroup | None, compiled: bool
    ) -> torch.Tensor:
        """logits (..., V / tp), targets (...), from 0 at this rank's first id -> losses (...) in fp32"""
        rows, targets = logits.flatten(0, -2), targets.flatten()
        found = (compiling.kernel(statistics) if compiled else statistics)(rows, targets)
        if group and group.size() > 1:
            own = found[0].clone()
            dist.all_reduce(found[0], dist.ReduceOp.MAX, group=group)
            found[1] *= (own - found[0]).exp()
            dist.all_reduce(found[1:], group=group)
        ctx.compiled = compiled
        ctx.save_for_backward(logits, targets, found)
        largest, sums, picked = found
        return (sums.log() - (picked - largest)).view(logits.shape[:-1])

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        logits, targets, found = ctx.saved_tensors
        result = logits.clone() if logits.is_leaf else logits
        (compiling.kernel(gradient_) if ctx.compiled else gradient_)(result.flatten(0, -2), targets, found, grad.flatten())
        return result, None, None, None
