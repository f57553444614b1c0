"""The start of a run: each parameter is drawn, or read from a folder, by one rank, which sends the others what they hold."""

import multiprocessing
from collections.abc import Iterator
from math import ceil, prod
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from common.checkpoints import pieces, state
from common.checkpoints.checkpoint import PARTS
from common.checkpoints.pieces import Batch, Piece
from common.training import init

# name: (shape, with AdamW's moments)
WANTED = {
    "a": ((5, 6), True),
    "b": ((4, 4), False),
    "c": ((9,), True),
    "d": ((2, 2), False),
    "e": ((3,), True),
    "f": ((1,), False),
    "g": ((2,), True),
}


def values(name: str, shape: tuple[int, ...]) -> state.Parts:
    draw = init.scratch(1234, lambda _: 0.02)
    return {part: draw(f"{name}.{part}", shape) for part in PARTS}


def part_names(moments: bool) -> tuple[str, ...]:
    return PARTS if moments else PARTS[:1]


def replicated(name: str, shape: tuple[int, ...], moments: bool, rank: int, world: int) -> Iterator[Piece]:
    for part in part_names(moments):
        yield from pieces.cut(pieces.whole(name, shape), part, torch.zeros(prod(shape)))


def flat(name: str, shape: tuple[int, ...], moments: bool, rank: int, world: int) -> Iterator[Piece]:
    """A range of the elements, as ZeRO 3 has it, and a copy of it in bf16, as it has of weights."""
    begin, end = prod(shape) * rank // world, prod(shape) * (rank + 1) // world
    for part in part_names(moments) if end > begin else ():
        yield from pieces.cut(pieces.whole(name, shape), part, torch.zeros(end - begin), begin)
        yield from pieces.cut(pieces.whole(name, shape), part, torch.zeros(end - begin, dtype=torch.bfloat16), begin)


def columns(name: str, shape: tuple[int, ...], moments: bool, rank: int, world: int) -> Iterator[Piece]:
    """Columns of matrices, as tensor parallelism has them, all of anything else, and on rank 0 alone of the smallest."""
    if len(shape) != 2 or shape[1] % world:
        if len(shape) > 1 or rank == 0:
            yield from replicated(name, shape, moments, rank, world)
        return
    width = shape[1] // world
    place = pieces.whole(name, shape)._replace(local=(shape[0], width), column=rank * width)
    for part in part_names(moments):
        yield from pieces.cut(place, part, torch.zeros(shape[0] * width))


LAYOUTS = {layout.__name__: layout for layout in (replicated, flat, columns)}


def rank_main(rank: int, world: int, members: list[int], layout: str, batches: int, store: Path, results: Any) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    group = dist.new_group(members)
    read: list[str] = []
    received = [0]
    exchange = dist.all_to_all_single

    def counting(output: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        received[0] += output.numel()
        exchange(output, *args, **kwargs)

    dist.all_to_all_single = counting

    def recorded(name: str, shape: tuple[int, ...]) -> state.Parts:
        read.append(name)
        return values(name, shape)

    wrong: list[str] = []
    share = 0
    if rank in members:
        wanted = [(name, state.part_shapes(shape, moments)) for name, (shape, moments) in WANTED.items()]
        held = {
            name: list(LAYOUTS[layout](name, shape, moments, members.index(rank), len(members)))
            for name, (shape, moments) in WANTED.items()
        }
        share = sum(piece.tensor.numel() for of_name in held.values() for piece in of_name if piece.tensor.dtype == torch.float)
        names = list(WANTED)
        split = [names[:batches], names[batches:]] if batches else [names]
        state.fill(
            (Batch(some, [piece for name in some for piece in held[name]]) for some in split), wanted, recorded,
            torch.device("cpu"), group,
        )  # fmt: skip
        for name, of_name in held.items():
            expected = values(name, WANTED[name][0])
            wrong += [
                f"{name}/{piece.part}/{piece.offset}"
                for piece in of_name
                if not piece.tensor.equal(expected[piece.part][piece.region].to(piece.tensor.dtype))
            ]
    results.put((rank, read, wrong, share, received[0]))
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("batches", [0, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("world", "members"), [(1, [0]), (2, [0, 1]), (3, [0, 1, 2]), (3, [1, 2])])
def test_each_parameter_is_read_by_one_rank_and_sent_to_those_who_hold_it(
    tmp_path: Path, world: int, members: list[int], layout: str, batches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "LARGEST", 48)  # bytes: several pieces of a parameter
    monkeypatch.setattr(state, "TOGETHER", 2)
    fork = multiprocessing.get_context("fork")
    results = fork.Queue()
    processes = [
        fork.Process(target=rank_main, args=(rank, world, members, layout, batches, tmp_path / "store", results))
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    found = [results.get(timeout=100) for _ in processes]
    for process in processes:
        process.join()
        assert process.exitcode == 0

    for rank, read, wrong, share, received in found:
        assert not wrong
        assert len(read) <= ceil(len(WANTED) / len(members)) * (rank in members)
        assert received <= share  # nothing of what others hold
        assert layout == "replicated" or len(members) == 1 or rank not in members or received
    assert sorted(name for _, read, *_ in found for name in read) == sorted(WANTED)
