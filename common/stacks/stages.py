"""Which layers each stage of DeepSpeed's pipeline has: deepspeed.partition. Torch-free."""

from collections.abc import Iterator, Sequence
from functools import cache
from itertools import accumulate, pairwise
from typing import Any


def bounds(partition: str | list[int], sizes: Sequence[int], stages: int) -> list[int]:
    """Stage i has the layers from bounds[i] up to bounds[i + 1], and none is empty.

    sizes: the parameters of the embedding, of each transformer layer, and of the output. partition: as deepspeed.partition.
    """
    layers = len(sizes) - 2
    if partition == "parameters":
        return _balanced(sizes, stages)
    share, rest = divmod(layers, stages)
    of_stage = [share + (stage < rest) for stage in range(stages)] if isinstance(partition, str) else partition
    ends = [1 + end for end in accumulate(of_stage)]
    return [0, *ends[:-1], len(sizes)]


def sizes_of(partition: str | list[int], sizes: tuple[int, ...], stages: int, stage: int) -> tuple[int, ...]:
    """Those of `sizes` that a stage has; arguments as of `bounds`."""
    ends = _bounds(partition if isinstance(partition, str) else tuple(partition), sizes, stages)
    return sizes[ends[stage] : ends[stage + 1]]


def transformer_layers(partition: str | list[int], sizes: tuple[int, ...], stages: int) -> tuple[int, ...]:
    """The number of transformer layers of each stage; arguments as of `bounds`."""
    ends = _bounds(partition if isinstance(partition, str) else tuple(partition), sizes, stages)
    return tuple(min(end, len(sizes) - 1) - max(begin, 1) for begin, end in pairwise(ends))


@cache
def _bounds(partition: str | tuple[int, ...], sizes: tuple[int, ...], stages: int) -> list[int]:
    return bounds(partition if isinstance(partition, str) else list(partition), sizes, stages)


def _balanced(sizes: Sequence[int], stages: int) -> list[int]:
    """The bounds whose largest stage is smallest, as DeepSpeed's partition_balanced has them (deepspeed/runtime/utils.py), but
    without the empty stages at the end that it leaves where one layer is larger than all others together."""
    low, high = max(sizes), sum(sizes)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if len(_filled(sizes, stages, middle)) <= stages + 1 else (middle + 1, high)
    return _filled(sizes, stages, low)


def _filled(sizes: Sequence[int], stages: int, limit: int) -> list[int]:
    """Fill one stage after the other up to `limit`, and leave a layer for each of the `stages` that are still to come."""
    found, total = [0], 0
    for number, size in enumerate(sizes):
        if number and (total + size > limit or len(sizes) - number <= stages - len(found)):
            found.append(number)
            total = 0
        total += size
    return [*found, len(sizes)]


def problems(layers: int, system: Any) -> Iterator[str]:
    """Why a model of so many transformer layers cannot have the stages of the section `deepspeed`."""
    pp, partition = system.pp, system.partition
    if pp > layers:
        yield f"deepspeed.pp={pp} is above model.layers={layers}: a stage would have no layer; give {layers} or less"
    elif isinstance(partition, list) and (len(partition) != pp or sum(partition) != layers):
        yield (
            f"deepspeed.partition={partition}: give the layers of each of the deepspeed.pp={pp} stages, which together are "
            f"model.layers={layers}"
        )
