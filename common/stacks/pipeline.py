"""Which layers each rank of Megatron's pipeline holds. Torch-free.

With megatron.vpp above 1 each of the pp stages holds vpp chunks of layers, and a micro batch passes through all stages once
per chunk: chunk c of stage s is number c x pp + s on its way (interleaved 1F1B, arXiv:2104.04473, section 2.2).
"""

import re
from collections.abc import Iterator
from typing import Any

EVEN, EMBEDDING_AND_LOSS = "even", "embedding_and_loss"  # values of megatron.pipeline_layout; others are Megatron's strings
LONGEST = 20_000  # characters of an unrolled string: 10,000 layers, as a config allows, and as many bars


def chunk_layers(layers: int, system: Any) -> list[int]:
    """The number of layers of each chunk, in the order of the forward pass. ValueError with the reason if there is no such
    pipeline.

    system: the section `megatron`.
    """
    chunks = system.pp * system.vpp
    if system.pipeline_layout == EVEN:
        if layers % chunks:
            raise ValueError(f"{_given(system)} does not divide model.layers={layers}{_instead(layers, chunks)}")
        return [layers // chunks] * chunks
    if system.pipeline_layout == EMBEDDING_AND_LOSS:
        if (layers + 2) % chunks:
            raise ValueError(
                f"megatron.pipeline_layout=embedding_and_loss: {_given(system)} does not divide model.layers={layers} + 2, "
                f"where embedding and loss count as a layer each{_instead(layers, chunks)}"
            )
        counts = [(layers + 2) // chunks] * chunks
        counts[0] -= 1
        counts[-1] -= 1
        return counts
    given = f"megatron.pipeline_layout={system.pipeline_layout}"
    stages = unrolled(system.pipeline_layout).split("|")
    if len(stages) != chunks:
        raise ValueError(f"{given} has {len(stages)} stages, divided by |, and {_given(system)} gives {chunks}")
    counts = [stage.count("t") for stage in stages]
    if sum(counts) != layers:
        raise ValueError(f"{given} has {sum(counts)} layers (t), and model.layers={layers}")
    wanted = ["t" * count for count in counts]
    wanted[0], wanted[-1] = "E" + wanted[0], wanted[-1] + "L"
    if stages != wanted:
        raise ValueError(f"{given}: the first stage must begin with E, the embedding, and the last one end with L, the loss")
    if 0 in counts[1:-1]:
        raise ValueError(f"{given}: a stage between the first and the last one has no layer (t)")
    return counts


def unrolled(text: str) -> str:
    """Megatron's layout string without *, parentheses and commas: 'E(t|)*2t*2L' is 'Et|t|ttL'. ValueError where it is none
    (megatron/core/transformer/pipeline_parallel_layer_layout.py, parse_str_to_list)."""
    length = 0

    def repeated(match: re.Match[str]) -> str:
        nonlocal length
        length += len(match[1]) * int(match[2])
        if length > LONGEST:
            raise ValueError(f"megatron.pipeline_layout={text}: is longer than {LONGEST:,} layers and stages")
        return match[1] * int(match[2])

    plain = text.replace(",", "")
    for pattern in (r"\(([^)]+)\)\*(\d{1,6})", r"(.)\*(\d{1,6})"):
        plain, length = re.sub(pattern, repeated, plain), 0
    if odd := re.search(r"[^EtL|]", plain):
        raise ValueError(
            f"megatron.pipeline_layout={text}: {odd[0]!r} has no meaning there; it is even, embedding_and_loss, or Megatron's "
            "string of E (embedding), t (a layer), L (loss), | (next stage), t*4 and (t|)*4"
        )
    return plain


def _given(system: Any) -> str:
    """'megatron.pp=2 x megatron.vpp=2'"""
    return f"megatron.pp={system.pp}" + (f" x megatron.vpp={system.vpp}" if system.vpp > 1 else "")


def _instead(layers: int, chunks: int) -> str:
    """What to type in place of a layout that does not divide."""
    if chunks > layers:
        return ""
    more = layers % chunks
    counts = [layers // chunks + (0 < chunk <= more) for chunk in range(chunks)]  # the first stage has the embedding
    counts[-1] += layers - sum(counts)
    string = "E" + "|".join(f"t*{count}" for count in counts) + "L"
    even = f"pipeline_layout={EMBEDDING_AND_LOSS} or " if (layers + 2) % chunks == 0 else ""
    return f"; give megatron.{even}'pipeline_layout={string}'" if chunks <= 16 else ""


def problems(layers: int, system: Any) -> Iterator[str]:
    """Why a model of so many layers cannot have the pipeline that the section `megatron` gives, one line each."""
    if system.pp == 1 and system.vpp > 1:
        yield (
            f"megatron.vpp={system.vpp} with megatron.pp=1: it divides the layers of a pipeline stage into chunks, and there "
            "is one stage; use megatron.vpp=1, or megatron.pp above 1"
        )
    if system.pp == 1 and system.pipeline_layout != EVEN:
        yield f"megatron.pipeline_layout={system.pipeline_layout}: is read only with megatron.pp above 1; leave it out"
    if system.pp == 1:
        return
    try:
        chunk_layers(layers, system)
    except ValueError as error:
        yield str(error)


def settings(system: Any) -> dict[str, Any]:
    """The fields of Megatron's TransformerConfig that divide the layers into stages."""
    if system.pipeline_layout == EMBEDDING_AND_LOSS:
        return {"account_for_embedding_in_pipeline_split": True, "account_for_loss_in_pipeline_split": True}
    return {} if system.pipeline_layout == EVEN else {"pipeline_model_parallel_layout": system.pipeline_layout}


def stage_layers(layers: int, system: Any) -> list[int]:
    """The number of layers of each stage, all its chunks together."""
    counts = chunk_layers(layers, system)
    return [sum(counts[stage :: system.pp]) for stage in range(system.pp)]


def micro_batch_problem(system: Any, accumulate: int) -> str | None:
    """Why the interleaved schedule cannot take this number of micro batches per step and replica; None where it can."""
    if system.vpp == 1 or accumulate % system.pp == 0:
        return None
    return (
        f"megatron.vpp={system.vpp} passes micro batches on in groups of megatron.pp={system.pp}, and a step has {accumulate} "
        "per replica; change train.global_batch or megatron.micro_batch so that it has a multiple, or use megatron.vpp=1"
    )
