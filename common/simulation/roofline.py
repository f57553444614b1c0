"""A lower bound of the time of a step on an H100: every operator at the speed of the memory or of the arithmetic that it needs
most. Collectives, the host and bubbles of a pipeline take no time here.

The constants are what the best kernels sustain on an H100 SXM, below the peaks of its data sheet.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from common.simulation import regions

GEMM = {"bfloat16": 650e12, "float16": 650e12, "float32": 45e12}  # FLOP/s; peaks 989 and 67 (H100 white paper, table 2)
FLASH_FORWARD, FLASH_BACKWARD = 400e12, 320e12  # FLOP/s; FlashAttention 2 reaches 35% of the peak (arXiv:2407.08608): 346e12
EFFICIENT = 0.5  # of flash: kernels written for Ampere
BANDWIDTH = 2.8e12  # bytes/s; 3.35e12 in the data sheet
LAUNCH = 2.5e-6  # seconds between two kernels of one stream


class Roofline(TorchDispatchMode):
    """Adds up the operators of a step, those of the backward pass too."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: dict[str, float] = defaultdict(float)
        self.calls: Counter[str] = Counter()

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True  # else torch.compile would do nothing while this mode is on

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        namespace, name = func._schema.name.split("::")
        if namespace == "c10d":
            return out
        ins = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor) and t.is_cuda]
        outs = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor) and t.is_cuda]
        if (ins or outs) and not _moves_nothing(func, name, ins, outs):
            scaled = (kwargs or {}).get("grad_scale") is not None
            self.add(*_cost(func, name, args, ins, outs, scaled))
        return out

    def __enter__(self) -> "Roofline":
        regions.watchers.append(self._add_region)
        super().__enter__()
        return self

    def __exit__(self, *reason: Any) -> None:
        regions.watchers.remove(self._add_region)
        super().__exit__(*reason)

    def _add_region(self, name: str, moved: float) -> None:
        self.add(f"compiled {name}", moved, 0.0, 1.0)

    def add(self, label: str, moved: float, flops: float, rate: float) -> None:
        self.seconds[label] += max(moved / BANDWIDTH, flops / rate, LAUNCH)
        self.calls[label] += 1

    def found(self) -> dict[str, Any]:
        slowest = sorted(self.seconds.items(), key=lambda item: -item[1])
        top = [{"operator": name, "calls": self.calls[name], "seconds": s} for name, s in slowest[:25]]
        return {"seconds": sum(self.seconds.values()), "operators": top}


def _moves_nothing(func: Any, name: str, ins: Sequence[torch.Tensor], outs: Sequence[torch.Tensor]) -> bool:
    """Views, and memory that is only allocated."""
    if func._schema.is_mutable:
        return False
    if name.startswith(("empty", "new_empty", "_local_scalar", "is_pinned", "record_stream")):
        return True
    storages = {t.untyped_storage()._cdata for t in ins}
    return bool(outs) and all(t.untyped_storage()._cdata in storages for t in outs)


def _size(tensor: torch.Tensor) -> int:
    """Bytes that lie behind it: an expanded tensor is read once."""
    width = tensor.element_size()
    return min(tensor.numel() * width, tensor.untyped_storage().nbytes())


def _cost(
    func: Any, name: str, args: Any, ins: Sequence[torch.Tensor], outs: Sequence[torch.Tensor], scales_gradient: bool
) -> tuple[str, float, float, float]:
    """label, bytes, FLOPs, FLOP/s. scales_gradient: of Adam, which then writes the gradient too (fused_adam_utils.cuh)"""
    moved: float = sum(map(_size, ins))
    if not func._schema.is_mutable:
        moved += sum(map(_size, outs))
    elif name.startswith("_fused_adam"):  # reads weight, gradient and moments; writes all, or all but the gradient
        moved *= 2 if scales_gradient else 7 / 4
    elif name in ("zero_", "fill_", "normal_", "copy_", "uniform_", "bernoulli_", "_foreach_copy_", "_foreach_zero_"):
        pass  # what it writes is the first of `ins`
    elif name.startswith("_foreach"):  # reads all, writes the first list
        moved += sum(map(_size, args[0]))
    elif name.endswith("_") and ins:  # reads and writes it
        moved += _size(ins[0])
    if name in ("mm", "addmm", "bmm", "baddbmm"):
        a, b = args[1:3] if name in ("addmm", "baddbmm") else args[:2]
        dtype = str(a.dtype).removeprefix("torch.")
        return f"gemm {dtype}", moved, 2.0 * a.numel() * b.shape[-1], GEMM.get(dtype, GEMM["float32"])
    if "attention" in name:
        return _attention(name, args, moved)
    dtypes = "/".join(sorted({str(t.dtype).removeprefix("torch.") for t in [*ins, *outs]}))
    return f"{name} {dtypes}", moved, 0.0, 1.0


def _attention(name: str, args: Any, moved: float) -> tuple[str, float, float, float]:
    backward = "backward" in name
    query, key = args[1:3] if backward else args[:2]  # (B, heads, T, D)
    pairs = query.shape[0] * query.shape[1] * query.shape[2] * key.shape[2]
    flops = 4.0 * pairs * query.shape[3] * (2.5 if backward else 1.0)
    if "flash" in name and True in [value for value in args if isinstance(value, bool)]:
        flops *= 1 - query.shape[2] / (2 * key.shape[2])  # causal, and the last query sees all keys
    rate = FLASH_BACKWARD if backward else FLASH_FORWARD
    return name, moved, flops, rate * (EFFICIENT if "efficient" in name else 1.0)
