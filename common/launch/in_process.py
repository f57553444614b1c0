"""Runs recipes one after the other in this process, as scripts/parity.py, scripts/gpu_check.py and the tests do.

The imports of the stacks take seconds per process, so that many layouts cost little this way. Every rank of a process group
calls `run` with the same arguments.
"""

import importlib
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from common.launch import lock, processes

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def run(module: str, arguments: Sequence[str]) -> None:
    """Calls the main function of a launch module (recipes.gpt.megatron.pretrain) with CONFIG, OUT and overrides.

    What it raises goes through: BadInput on all ranks, Stopped after a signal. After any other exception the ranks may wait for
    each other in a collective: the caller must end them all.
    """
    _reset_accelerator()
    processes.start()
    processes.forget_signal()
    before = _groups()
    try:
        importlib.import_module(module).main(list(arguments))
    finally:
        _destroy_groups_since(before)
        lock.release()


def _reset_accelerator() -> None:
    """accelerate keeps one precision per process."""
    if "accelerate" in sys.modules:
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state()


def _groups() -> set["ProcessGroup"]:
    import torch.distributed as dist

    return set(dist.distributed_c10d._world.pg_map) if dist.is_initialized() else set()


def _destroy_groups_since(before: set["ProcessGroup"]) -> None:
    """Megatron makes some twenty groups per layout, each with threads of its own, which would slow the next layouts down.
    DeepSpeed would take the groups of its first layout for those of the next ones."""
    if not before or not _forget_groups():
        return
    import torch.distributed as dist

    for group in _groups() - before:
        dist.destroy_process_group(group)


def _forget_groups() -> bool:
    """Let the stacks forget their groups. Whether one had any."""
    had_some = False
    if "megatron.core" in sys.modules:
        from megatron.core import parallel_state

        had_some = parallel_state.model_parallel_is_initialized()
        if had_some:
            parallel_state.destroy_model_parallel()
    if "deepspeed" in sys.modules:
        from deepspeed.utils import groups

        own = (groups._WORLD_GROUP, groups._TENSOR_MODEL_PARALLEL_GROUP, groups.mpu)  # mpu: the groups of a pipeline
        had_some = had_some or any(group is not None for group in own)
        groups._release_process_group_references()
    return had_some
