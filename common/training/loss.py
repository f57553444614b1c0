"""Cross entropy over a vocabulary."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

LARGE = 16_384  # ids


def cross_entropy(logits: "torch.Tensor", targets: "torch.Tensor") -> "torch.Tensor":
    """logits (N, V) fp32, targets (N,) -> losses (N,).

    On a CPU F.cross_entropy sums over the vocabulary one number after another, so the loss for a large vocabulary is too low:
    by 1.7e-5 for SmolLM2's 49,152 ids, which is more than two stacks may differ. logsumexp sums in pairs, like Megatron's own
    loss, with an error of 1e-7. A GPU sums in blocks in any case.
    """
    import torch
    import torch.nn.functional as F

    if logits.device.type == "cpu" and logits.shape[-1] >= LARGE:
        return torch.logsumexp(logits, -1) - logits.gather(-1, targets[:, None])[:, 0]
    return F.cross_entropy(logits, targets, reduction="none")
