"""The optimizer's definition, shared by every stack: AdamW or LAMB, their groups, and the learning rate of a step."""

import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from common.config import Optim

if TYPE_CHECKING:
    import torch


def lr_at(step: int, optim: Optim) -> float:
    """Learning rate of optimizer step `step` (the first is 1): linear warmup, then decay to min_lr at decay_steps.

    Cosine as in SGDR (arXiv:1608.03983, equation 5, no restarts). Exponential as in DeepSpeed's BERT recipe (its schedule
    "EE", DeepSpeedExamples bing_bert/deepspeed_train.py, which counts from 0 and adds its lr_offset, our min_lr): a warmup
    by the square, then decay_rate ^ (steps since / decay_interval), both above min_lr.
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
    done = min(1.0, (step - optim.warmup_steps) / max(1, optim.decay_steps - optim.warmup_steps))
    share = 1.0 - done if optim.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
    return optim.min_lr + share * (optim.lr - optim.min_lr)


def groups(
    named: Iterable[tuple[str, "torch.nn.Parameter"]], decays: Callable[[str], bool], optim: Optim
) -> list[dict[str, Any]]:
    """AdamW's two parameter groups of what is trained: matrices with weight decay, biases and norms without."""
    decayed, plain = [], []
    for name, parameter in named:
        if parameter.requires_grad:
            (decayed if decays(name) else plain).append(parameter)
    split = [(decayed, optim.weight_decay), (plain, 0.0)]
    return [{"params": params, "weight_decay": decay} for params, decay in split if params]


def build(
    named: Iterable[tuple[str, "torch.nn.Parameter"]], decays: Callable[[str], bool], optim: Optim
) -> "torch.optim.Optimizer":
    """The optimizer of optim.optimizer over named parameters.

    adamw: torch's (Loshchilov and Hutter, arXiv:1711.05101), fused: one kernel a group on the GPU and on the CPU.
    lamb, adafactor: lamb.py and adafactor.py here; only where every parameter is held whole (common/config.py
    refuses the other layouts).
    """
    import torch

    made = groups(named, decays, optim)
    if optim.optimizer == "lamb":
        from common.training.lamb import Lamb

        return Lamb(made, optim)
    if optim.optimizer == "adafactor":
        from common.training.adafactor import Adafactor

        return Adafactor(made, optim)
    return torch.optim.AdamW(made, lr=optim.lr, betas=tuple(optim.betas), eps=optim.eps, fused=True)
