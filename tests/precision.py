"""Run recipes and print the dtypes of their training steps, as seen in the tensors: one JSON object per run.

`torchrun --nproc-per-node 2 tests/precision.py CASES`; CASES: JSON, a list of [module, [CONFIG, OUT, a.b=c ...]].
"""

import json
import os
import sys
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

sys.path.insert(0, os.getcwd())  # the repository's root

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from common.launch import in_process, processes  # noqa: E402
from common.training.log import Log  # noqa: E402

LARGE = 4096  # elements; smaller tensors are norms, totals and counts


class Dtypes(TorchDispatchMode):
    """{"operator position": {dtype of a large floating-point argument}} of the training steps, backward passes included."""

    def __init__(self) -> None:
        super().__init__()
        self.in_step = False
        self.seen: dict[str, set[str]] = defaultdict(set)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if self.in_step:
            operator = func.name().partition("::")[2].partition(".")[0]
            for position, value in enumerate(args):
                for tensor in tensors_in(value):
                    if tensor.is_floating_point() and tensor.numel() >= LARGE:
                        self.seen[f"{operator} {position}"].add(str(tensor.dtype).removeprefix("torch."))
        return func(*args, **(kwargs or {}))


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """The tensors of an argument: a tensor, or lists of them."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for one in value:
            yield from tensors_in(one)


def observed(module: str, arguments: list[str]) -> dict[str, list[str]]:
    mode = Dtypes()
    begin, end = Log.begin_step, Log.step

    def begin_step(log: Log) -> None:
        mode.in_step = True
        begin(log)

    def step(log: Log, *values: Any) -> None:
        mode.in_step = False
        end(log, *values)

    Log.begin_step, Log.step = begin_step, step  # type: ignore[method-assign, assignment]
    try:
        with mode:
            in_process.run(module, arguments)
    finally:
        Log.begin_step, Log.step = begin, end  # type: ignore[method-assign]
    return {name: sorted(kinds) for name, kinds in sorted(mode.seen.items())}


def main(cases: str) -> None:
    processes.quiet()
    for module, arguments in json.loads(cases):
        found = observed(module, arguments)
        if dist.get_rank() == 0:
            print("DTYPES " + json.dumps(found), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
