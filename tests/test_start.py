"""The start of a run: each parameter is drawn, or read from a checkpoint, by one rank, which sends it to the others."""

import multiprocessing
from math import ceil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from common.checkpoints import state
from common.checkpoints.checkpoint import PARTS
from common.training import init

# name: (shape, with AdamW's moments)
WANTED = {
    "a": ((5, 3), True),
    "b": ((4, 4), False),
    "c": ((9,), True),
    "d": ((2, 2), False),
    "e": ((3,), True),
    "f": ((1,), False),
}
WANTED |= {"g": ((2,), True)}


def values(name: str, shape: tuple[int, ...]) -> state.Parts:
    draw = init.scratch(1234, lambda _: 0.02)
    return {part: draw(f"{name}.{part}", shape) for part in PARTS}


def rank_main(rank: int, world: int, members: list[int], store: Path, results: Any) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    group = dist.new_group(members)
    read: list[str] = []

    def recorded(name: str, shape: tuple[int, ...]) -> state.Parts:
        read.append(name)
        return values(name, shape)

    got = []
    if rank in members:
        wanted = [(name, state.part_shapes(shape, moments)) for name, (shape, moments) in WANTED.items()]
        for (name, _), parts in zip(wanted, state.in_turns(recorded, wanted, torch.device("cpu"), group), strict=True):
            got.append((name, {part: tensor.tolist() for part, tensor in parts.items()}))
    results.put((rank, read, got))
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize(("world", "members"), [(1, [0]), (2, [0, 1]), (3, [0, 1, 2]), (3, [1, 2])])
def test_each_parameter_is_read_by_one_rank_and_the_same_on_all(tmp_path: Path, world: int, members: list[int]) -> None:
    fork = multiprocessing.get_context("fork")
    results = fork.SimpleQueue()
    processes = [
        fork.Process(target=rank_main, args=(rank, world, members, tmp_path / "store", results)) for rank in range(world)
    ]
    for process in processes:
        process.start()
    found = [results.get() for _ in processes]
    for process in processes:
        process.join()
        assert process.exitcode == 0

    expected = [
        (name, {part: values(name, shape)[part].tolist() for part in PARTS[: 3 if moments or len(members) == 1 else 1]})
        for name, (shape, moments) in WANTED.items()
    ]
    for rank, read, got in found:
        assert len(read) <= ceil(len(WANTED) / len(members)) * (rank in members)
        assert got == (expected if rank in members else [])
    assert sorted(name for _, read, _ in found for name in read) == sorted(WANTED)
