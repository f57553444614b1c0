"""The optimizer, shared by every stack: AdamW, LAMB or Adafactor, their parameter groups, and the rate of a step."""

import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from common.config import Optim

if TYPE_CHECKING:
    import torch


def lr_at(step: int, optim: Optim) -> float:
    """Learning rate of optimizer step `step` (the first is 1): linear warmup, then decay to min_lr at decay_steps.

    cosine: as in SGDR (arXiv:1608.03983, equation 5, no restarts).
    exponential: as in DeepSpeed's BERT recipe (its schedule "EE", DeepSpeedExamples bing_bert/deepspeed_train.py, which counts
        from 0 and adds lr_offset, here min_lr): a quadratic warmup, then decay_rate ^ (steps since / decay_interval), both
        added to min_lr.
    wsd: warmup, stable, decay (MiniCPM, arXiv:2404.06395, section 4): the rate stays at lr until the last wsd_decay_steps, in
        which it falls to min_lr in one of the forms of Megatron's OptimizerParamScheduler.
    """
    step -= optim.begin_step
    if optim.schedule == "exponential":
        rising = step <= optim.warmup_steps
        since = max(0, step - optim.warmup_steps)
        share = (step / optim.warmup_steps) ** 2 if rising else optim.decay_rate ** (since / optim.decay_interval)
        return optim.min_lr + share * (optim.lr - optim.min_lr)
    if optim.schedule == "inverse_sqrt":  # T5, arXiv:1910.10683, section 3.1.2: 1 / sqrt(max(n, k)), with lr = 1 / sqrt(k)
        return optim.lr * math.sqrt(max(1, optim.warmup_steps) / max(1, step, optim.warmup_steps))
    if step <= optim.warmup_steps:
        return optim.lr * step / optim.warmup_steps
    if optim.schedule == "constant":
        return optim.lr
    assert optim.decay_steps is not None  # resolved by common/preflight.py
    form: str = optim.schedule
    begin = optim.warmup_steps  # the step after which the rate falls
    if optim.schedule == "wsd":
        assert optim.wsd_decay_steps is not None  # required by common/config.py
        form, begin = optim.wsd_decay_style, optim.decay_steps - optim.wsd_decay_steps
    done = min(1.0, max(0, step - begin) / max(1, optim.decay_steps - begin))
    share = {
        "linear": 1.0 - done,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * done)),
        "exponential": 2.0 * 0.5**done - 1.0,  # MiniCPM's 0.5^(steps / T), brought to 0 at the end
        "minus_sqrt": 1.0 - math.sqrt(done),  # 1-sqrt of Haegele et al., arXiv:2405.18392, section 3
    }[form]
    return optim.min_lr + share * (optim.lr - optim.min_lr)


def groups(
    named: Iterable[tuple[str, "torch.nn.Parameter"]], has_weight_decay: Callable[[str], bool], optim: Optim
) -> list[dict[str, Any]]:
    """AdamW's two groups of the trained parameters: matrices with weight decay, biases and norms without."""
    decayed: list[torch.nn.Parameter] = []
    plain: list[torch.nn.Parameter] = []
    for name, parameter in named:
        if parameter.requires_grad:
            (decayed if has_weight_decay(name) else plain).append(parameter)
    split = [(decayed, optim.weight_decay), (plain, 0.0)]
    return [{"params": params, "weight_decay": decay} for params, decay in split if params]


def build(
    named: Iterable[tuple[str, "torch.nn.Parameter"]], has_weight_decay: Callable[[str], bool], optim: Optim
) -> "torch.optim.Optimizer":
    """The optimizer of optim.optimizer over named parameters.

    adamw: torch's (Loshchilov and Hutter, arXiv:1711.05101), fused: one kernel per group on the GPU and on the CPU.
    lamb, adafactor: lamb.py and adafactor.py here; only where every rank has whole parameters (common/layout.py
    refuses the other layouts).
    """
    import torch

    parameter_groups = groups(named, has_weight_decay, optim)
    if optim.optimizer == "lamb":
        from common.training.lamb import Lamb

        return Lamb(parameter_groups, optim)
    if optim.optimizer == "adafactor":
        from common.training.adafactor import Adafactor

        return Adafactor(parameter_groups, optim)
    beta1, beta2 = optim.betas
    return torch.optim.AdamW(parameter_groups, lr=optim.lr, betas=(beta1, beta2), eps=optim.eps, fused=True)


def clip(optimizer: "torch.optim.Optimizer", parameters: Iterable["torch.nn.Parameter"], max_norm: float) -> float:
    """Clip the gradients to this norm (0: do not) before a step; returns the norm that they had."""
    import torch
    from torch.distributed.tensor import DTensor

    from common.training.sharding import gathered

    first = optimizer.param_groups[0]["params"][0]
    if not first.is_cuda:
        return clip_on_cpu(parameters, max_norm)
    if isinstance(optimizer, torch.optim.AdamW) and not isinstance(first, DTensor):
        return clip_in_kernel(optimizer, parameters, max_norm)
    return gathered(torch.nn.utils.clip_grad_norm_(parameters, max_norm or math.inf)).item()


def clip_on_cpu(parameters: Iterable["torch.nn.Parameter"], max_norm: float) -> float:
    """As clip, by total_norm."""
    import torch
    import torch.distributed as dist
    from torch.distributed.tensor import DTensor

    from common.training.sharding import own_rows

    gradients = [p.grad for p in parameters if p.grad is not None]
    rows = [own_rows(gradient) for gradient in gradients]
    norm = total_norm(rows)
    if isinstance(gradients[0], DTensor):  # baseline.shard: all of them are, over all ranks
        square = norm.square()
        dist.all_reduce(square)
        norm = square.sqrt()
    if max_norm:
        torch._foreach_mul_(rows, (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm.item()


def clip_in_kernel(optimizer: Any, parameters: Iterable["torch.nn.Parameter"], max_norm: float) -> float:
    """As clip, by AdamW's kernel, which divides the gradients in the step (torch/optim/adam.py: grad_scale), in place of a pass
    over all of them."""
    import torch

    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if max_norm:
        optimizer.grad_scale = ((norm + 1e-6) / max_norm).clamp(min=1.0)
    return norm.item()


# ---- norms

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
