"""The whole state of a run, gathered on every rank by each stack's own means: the oracle of what common/checkpoints/pieces.py
reads and writes in rectangles."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.utils import groups, safe_get_full_fp32_param, safe_get_full_optimizer_state
from megatron.core import parallel_state

from common.checkpoints.checkpoint import PARTS
from common.checkpoints.parameters import Shapes
from common.checkpoints.state import Named, Parts, Values
from common.stacks import mcore, zero
from common.stacks.parameter_map import ParameterMap
from common.training.sharding import gathered

MOMENTS = PARTS[1:]
Entry = tuple[str, dict[str, torch.Tensor]]  # name, parts


def torch_state(named: Named, optimizer: torch.optim.Optimizer) -> Iterator[Entry]:
    """Of trained parameters that every rank holds whole, or in rows."""
    trained = [(name, parameter) for name, parameter in named if parameter.requires_grad]
    for name, parameter in trained:
        state = {part: value for part, value in optimizer.state.get(parameter, {}).items() if part != "step"}
        parts = {part: gathered(value.detach()) for part, value in ({"weight": parameter} | state).items()}
        if "exp_avg" in state or not state:
            yield name, _parts_of(parts["weight"], parts.get("exp_avg"), parts.get("exp_avg_sq"))
        else:  # Adafactor's
            yield name, {part: value.float().cpu() for part, value in parts.items()}


def _parts_of(weight: torch.Tensor, exp_avg: torch.Tensor | None, exp_avg_sq: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """fp32 on the CPU; a moment that does not exist yet is zero."""
    weight = weight.detach().float().cpu()
    moments = [torch.zeros_like(weight) if m is None else m.detach().float().cpu() for m in (exp_avg, exp_avg_sq)]
    return dict(zip(("weight", "exp_avg", "exp_avg_sq"), (weight, *moments), strict=True))


def zero_state(engine: Any, shapes: Shapes) -> Iterator[Entry]:
    """Every trained parameter's master and moments, gathered one at a time."""
    stage, inner = engine.zero_optimization_stage(), engine.optimizer
    shapes, conversions = zero.shapes_here(engine, shapes), zero._conversions(engine)
    if stage == 0 and not isinstance(inner, torch.optim.AdamW):  # every rank has whole parameters, whatever the state holds
        yield from torch_state(engine.module.named_parameters(), inner)
        return
    stepped = stage > 0 and bool(inner.optimizer.state)
    if stepped and stage < 3:
        zero._link(inner)
    trained = [
        (name, parameter)
        for name, parameter in engine.module.named_parameters()
        if parameter.requires_grad and not getattr(parameter, "ds_pipe_replicated", False)  # the first stage has it too
    ]
    for name, parameter in trained:
        if stage == 0:
            moments = [inner.state.get(parameter, {}).get(part) for part in MOMENTS]
            parts = [parameter.detach(), *moments]
        else:
            parts = [safe_get_full_fp32_param(parameter)]  # a collective
            parts += [safe_get_full_optimizer_state(parameter, part) if stepped else None for part in MOMENTS]
        dim = zero.split_dim(getattr(parameter, "ds_shape", parameter.shape), shapes[name])
        if dim is not None:
            parts = [None if part is None else _gather_zero(part, dim) for part in parts]
        if name in conversions:
            parts = [None if part is None else conversions[name].to_hf(part)[0] for part in parts]
        yield name, _parts_of(*parts)


def _gather_zero(shard: torch.Tensor, dim: int) -> torch.Tensor:
    """AutoTP's shards of one tensor, put together on every rank."""
    group = groups.get_tensor_model_parallel_group()
    shards = [torch.empty_like(shard) for _ in range(dist.get_world_size(group))]
    dist.all_gather(shards, shard.contiguous(), group=group)
    return torch.cat(shards, dim)


def mcore_state(model: Any, optimizer: Any, parameter_map: ParameterMap) -> Iterator[Entry]:
    """Every parameter's master and moments by Hugging Face name, gathered over dp x cp and tp."""
    tp_group = parallel_state.get_tensor_model_parallel_group()
    dp_group = parallel_state.get_data_parallel_group(with_context_parallel=True)  # context-parallel ranks are replicas
    for name, parameter in mcore.global_names(model):
        conversion = parameter_map(name)
        if conversion.is_copy:
            continue
        parts = _local_parts(optimizer, parameter, dp_group)
        if mcore._is_split(parameter):
            dim = parameter.partition_dim
            parts = {part: _gather_mcore(tensor, dim, conversion.blocks, tp_group) for part, tensor in parts.items()}
        rows = slice(conversion.unpadded_rows)
        hf_parts = {part: conversion.to_hf(tensor[rows]) for part, tensor in parts.items()}
        for index, hf in enumerate(conversion.hf):
            yield hf, {part: tensors[index].contiguous().cpu() for part, tensors in hf_parts.items()}


def _local_parts(optimizer: Any, parameter: torch.nn.Parameter, dp_group: dist.ProcessGroup) -> dict[str, torch.Tensor]:
    """fp32 weight, exp_avg, exp_avg_sq of this tp rank's shard, whole over dp."""
    distributed = any(hasattr(one, "model_param_group_index_map") for one in mcore.each(optimizer))
    stacked = torch.zeros(3, parameter.numel(), device=parameter.device)
    for main, start, one in mcore._mains(optimizer, parameter):
        where = slice(start, start + main.numel())
        moments = one.state.get(main, {})
        stacked[0, where] = main.detach().flatten()
        for row, part in enumerate(MOMENTS, 1):
            if part in moments:
                stacked[row, where] = moments[part].flatten()
    if distributed and dp_group.size() > 1:
        dist.all_reduce(stacked, group=dp_group)  # each element is non-zero on one rank only: the sum is exact
    return {part: row.view(parameter.shape) for part, row in zip(PARTS, stacked, strict=True)}


def _gather_mcore(shard: torch.Tensor, dim: int, blocks: int, group: dist.ProcessGroup) -> torch.Tensor:
    shards = [torch.empty_like(shard) for _ in range(group.size())]
    dist.all_gather(shards, shard.contiguous(), group=group)
    return join(shards, dim, blocks)


def values_here(engine: Any, shapes: Shapes, values: Values) -> Values:
    """`values`, of parameters of these Hugging Face shapes, as the engine's model stores them."""
    conversions = zero._conversions(engine)

    def value(name: str, shape: Sequence[int]) -> Parts:
        if name not in conversions:
            return values(name, tuple(shape))
        parts = values(name, tuple(shapes[name]))
        return {part: conversions[name].from_hf(tensor).contiguous() for part, tensor in parts.items()}

    return value


def shard_of(parts: Parts, shape: Sequence[int], full: Sequence[int]) -> Parts:
    """This rank's shard, of this shape, of a parameter's parts."""
    dim = zero.split_dim(shape, full)
    if dim is None:
        return parts
    tp, rank = groups.get_tensor_model_parallel_world_size(), groups.get_tensor_model_parallel_rank()
    return {part: tensor.chunk(tp, dim)[rank].contiguous() for part, tensor in parts.items()}


def join(shards: Sequence[torch.Tensor], dim: int, blocks: int) -> torch.Tensor:
    """The inverse of mcore.split over all ranks."""
    pieces = [shard.chunk(blocks, dim) for shard in shards]
    return torch.cat([piece[block] for block in range(blocks) for piece in pieces], dim)
