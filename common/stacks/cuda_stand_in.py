"""A CPU where Megatron Core expects a GPU: what it asks of torch.cuda is answered for the CPU.

Checked with megatron-core 0.19.2.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from megatron.core.tensor_parallel import random as parallel_random
from torch.overrides import TorchFunctionMode

from common.launch.processes import Ranks


class _NoStream:
    """Stands for a CUDA stream or event: on a CPU everything is in order already."""

    def __init__(self, *_: Any, **__: Any):
        pass

    def __enter__(self) -> "_NoStream":
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def record_event(self, *_: Any) -> "_NoStream":
        return self

    def wait_stream(self, *_: Any) -> None:
        pass


class _CudaMeansCpu(TorchFunctionMode):
    """device='cuda' makes a CPU tensor, pinned memory is plain, and a tensor's type name reads as a GPU's."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if not kwargs:
            result = func(*args)
            return result.replace("torch.", "torch.cuda.", 1) if func is torch.Tensor.type and len(args) == 1 else result
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs = kwargs | {"device": "cpu"}
        if kwargs.get("pin_memory"):  # of the index in get_pos_emb_on_this_cp_rank
            kwargs = kwargs | {"pin_memory": False}
        return func(*args, **kwargs)


def install() -> None:
    """Replace the few torch.cuda functions that Megatron calls, once per process."""
    cuda: Any = torch.cuda  # replaced by functions of other types
    # a separate function for each: torch.compile keeps them in a table by identity
    for name in ("synchronize", "empty_cache", "set_device"):
        setattr(cuda, name, lambda *_, **__: None)
    for name in ("current_stream", "default_stream"):
        setattr(cuda, name, lambda *_, **__: _NoStream())
    cuda.current_device = lambda: torch.device("cpu")
    cuda.Stream = cuda.Event = _NoStream
    cuda.stream = lambda stream: nullcontext()
    cuda.get_rng_state = lambda *_, **__: torch.get_rng_state()
    cuda.set_rng_state = lambda new, *_, **__: torch.set_rng_state(new)
    cuda.manual_seed = lambda seed: torch.default_generator.manual_seed(seed)
    tensor_class: Any = torch.Tensor
    tensor_class.cuda = lambda tensor, *_, **__: tensor
    parallel_random._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    parallel_random._set_cuda_rng_state = lambda new, *_, **__: torch.set_rng_state(new)


def active(ranks: Ranks) -> AbstractContextManager[object]:
    """For Megatron's own code that writes device='cuda': building, schedules, optimizer. On a GPU it changes nothing."""
    return _CudaMeansCpu() if ranks.device.type == "cpu" else nullcontext()
