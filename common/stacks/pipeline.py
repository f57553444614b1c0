"""Which layers each rank of Megatron's pipeline holds. Torch-free.

With megatron.vpp above 1 each of the pp stages holds vpp chunks of layers, and a micro batch passes through all stages once
per chunk: chunk c of stage s is number c x pp + s on its way (interleaved 1F1B, arXiv:2104.04473, section 2.2).
"""

from collections.abc import Iterator
from typing import Any


def chunk_layers(layers: int, system: Any) -> list[int]:
    """The number of layers of each chunk, in the order of the forward pass. ValueError with the reason if there is no such
    pipeline.

    system: the section `megatron`.
    """
    chunks = system.pp * system.vpp
    if layers % chunks:
        raise ValueError(f"{_given(system)} does not divide model.layers={layers}")
    return [layers // chunks] * chunks


def _given(system: Any) -> str:
    """'megatron.pp=2 x megatron.vpp=2'"""
    return f"megatron.pp={system.pp}" + (f" x megatron.vpp={system.vpp}" if system.vpp > 1 else "")


def problems(layers: int, system: Any) -> Iterator[str]:
    """Why a model of so many layers cannot have the pipeline that the section `megatron` gives, one line each."""
    if system.pp == 1 and system.vpp > 1:
        yield (
            f"megatron.vpp={system.vpp} with megatron.pp=1: it divides the layers of a pipeline stage into chunks, and there "
            "is one stage; use megatron.vpp=1, or megatron.pp above 1"
        )
        return
    try:
        chunk_layers(layers, system)
    except ValueError as error:
        yield str(error)


def micro_batch_problem(system: Any, accumulate: int) -> str | None:
    """Why the interleaved schedule cannot take this number of micro batches per step and replica; None where it can."""
    if system.vpp == 1 or accumulate % system.pp == 0:
        return None
    return (
        f"megatron.vpp={system.vpp} passes micro batches on in groups of megatron.pp={system.pp}, and a step has {accumulate} "
        "per replica; change train.global_batch or megatron.micro_batch so that it has a multiple, or use megatron.vpp=1"
    )
