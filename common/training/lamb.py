"""LAMB in plain torch: exact wherever a rank has whole parameters (common/layout.py refuses the other layouts)."""

from typing import Any

import torch

from common.checkpoints import state
from common.config import Optim
from common.training.optim import norms


class Lamb(torch.optim.Optimizer):
    """You et al. (arXiv:1904.00962, algorithm 2), with DeepSpeed's bounds of the trust ratio (FusedLamb: min_coeff, max_coeff).

    Its state has AdamW's names, so a checkpoint holds it as it holds AdamW's. Weight decay is part of the update, before
    the ratio is taken, and parameters without decay are scaled too.
    """

    def __init__(self, groups: list[dict[str, Any]], optim: Optim):
        super().__init__(groups, {"lr": optim.lr})
        self.beta1, self.beta2 = optim.betas
        self.eps, self.settings = optim.eps, optim.lamb

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # no closure: the scripts compute the loss
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self._update(params, group["lr"], group["weight_decay"])

    def _update(self, params: list[torch.Tensor], lr: float, weight_decay: float) -> None:
        for p in params:
            if not self.state[p]:
                self.state[p] = state.adam_state(p, 0)
        grads = [p.grad for p in params if p.grad is not None]  # of all: `step` has left out those without
        first = [self.state[p]["exp_avg"] for p in params]
        second = [self.state[p]["exp_avg_sq"] for p in params]
        for p in params:
            self.state[p]["step"] += 1
        torch._foreach_lerp_(first, grads, 1 - self.beta1)
        torch._foreach_mul_(second, self.beta2)
        torch._foreach_addcmul_(second, grads, grads, 1 - self.beta2)

        count = self.state[params[0]]["step"].item() if self.settings.bias_correction else float("inf")
        deviations = torch._foreach_sqrt(torch._foreach_div(second, 1 - self.beta2**count))
        torch._foreach_add_(deviations, self.eps)
        updates = torch._foreach_div(torch._foreach_div(first, 1 - self.beta1**count), deviations)
        torch._foreach_add_(updates, params, alpha=weight_decay)

        lengths = zip(norms(params), norms(list(updates)), strict=True)
        for p, update, (weight, length) in zip(params, updates, lengths, strict=True):
            ratio = (weight / length).clamp(self.settings.min_coeff, self.settings.max_coeff)
            ratio = torch.where((weight > 0) & (length > 0), ratio, 1.0)
            p.sub_(update * (lr * ratio))
