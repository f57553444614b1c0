"""Adafactor as T5 was trained with it, in plain torch: exact wherever a rank has whole parameters (common/layout.py)."""

from typing import Any

import torch

from common.config import Optim

DECAY = 0.8  # beta2 of step t is 1 - t^-0.8
SMALLEST = 1e-30  # added to squared gradients
LEAST_SCALE = 1e-3  # of a parameter's root mean square
CLIP = 1.0  # of an update's root mean square


class Adafactor(torch.optim.Optimizer):
    """Shazeer and Stern (arXiv:1804.04235, algorithm 4) with the settings of T5's code (mesh_tensorflow's AdafactorOptimizer):
    no momentum, updates clipped at 1.0, the rate multiplied by the parameter's root mean square.

    State: `step`; for matrices `rows` and `columns`, the mean squared gradients over each; for vectors `squares`.
    """

    def __init__(self, groups: list[dict[str, Any]], optim: Optim):
        super().__init__(groups, {"lr": optim.lr})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # no closure: the scripts compute the loss
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, p.grad, group["lr"], group["weight_decay"])

    def _update(self, p: torch.Tensor, grad: torch.Tensor, lr: float, weight_decay: float) -> None:
        state = self.state[p]
        if not state:
            state |= {"step": torch.zeros(())} | {name: torch.zeros_like(part) for name, part in parts_of(p).items()}
        state["step"] += 1
        rest = state["step"].item() ** -DECAY  # 1 - beta2
        squares = grad.square() + SMALLEST
        for name, part in parts_of(squares).items():
            state[name].lerp_(part, rest)
        if p.dim() > 1:
            rows, columns = state["rows"], state["columns"]
            update = grad * (rows / rows.mean(-1, keepdim=True)).rsqrt()[..., None] * columns.rsqrt()[..., None, :]
        else:
            update = grad * state["squares"].rsqrt()
        update /= (root_mean_square(update) / CLIP).clamp(min=1.0)
        rate = lr * root_mean_square(p).clamp(min=LEAST_SCALE)
        if weight_decay:
            p.mul_(1 - lr * weight_decay)
        p.sub_(update * rate)


def parts_of(squares: torch.Tensor) -> dict[str, torch.Tensor]:
    """The part of a parameter's squares that the state holds: the means over the columns and over the rows of a matrix, or all
    squares of a vector."""
    if squares.dim() > 1:
        return {"rows": squares.mean(-1), "columns": squares.mean(-2)}
    return {"squares": squares}


def root_mean_square(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.square().mean().sqrt()
