"""Checks that ride along in tests/drive.py: they wrap the functions that load the training state and list what is saved.

READBACK: right after the start or a resume, before the next step, masters and moments gathered by the stack's own means
(tests/gathered.py) are bit-equal to what was given (init, Hugging Face folder, checkpoint), and the model's weights are those
masters in the model's dtype.
REPLICATED: before a save, the parameters that tensor parallelism does not split are bit-equal on its ranks (not at ZeRO stage
3, where they are one copy, in parts).
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.utils import groups
from megatron.core import parallel_state

from common.checkpoints import checkpoint, state
from common.checkpoints.parameters import Shapes
from common.checkpoints.pieces import Batches
from common.checkpoints.state import Named, Values
from common.stacks import mcore, zero
from common.stacks.parameter_map import ParameterMap
from common.training.sharding import gathered
from tests.gathered import Entry, mcore_state, shard_of, torch_state, values_here, zero_state


def install() -> None:
    """Wrap the functions; the recipes call them through their modules."""
    load, load_zero, load_mcore = state.load, zero.load_state, mcore.load_state
    pieces_mcore, pieces_zero = mcore.pieces_of, zero.pieces_of

    def checked_load(net: torch.nn.Module, optimizer: torch.optim.Optimizer, shapes: Shapes, values: Values, step: int) -> None:
        load(net, optimizer, shapes, values, step)
        _compare_torch(net.named_parameters(), optimizer, values)

    def checked_zero(engine: Any, shapes: Shapes, values: Values, step: int) -> None:
        load_zero(engine, shapes, values, step)
        shards = _shards_of(engine, values, shapes)
        if engine.zero_optimization_stage():
            _compare(zero_state(engine, shapes), values, _zero_weights_equal(engine, shards))
        else:
            _compare_torch(engine.module.named_parameters(), engine.optimizer, shards)

    def checked_mcore(
        model: Any, optimizer: Any, parameter_map: ParameterMap, shapes: Shapes, values: Values, step: int
    ) -> None:
        load_mcore(model, optimizer, parameter_map, shapes, values, step)
        wrong = sum(
            not torch.equal(main.to(parameter.dtype).flatten(), parameter.detach().flatten()[start : start + main.numel()])
            for _, parameter in mcore.global_names(model)
            for main, start, _ in mcore._mains(optimizer, parameter)
        )
        _compare(mcore_state(model, optimizer, parameter_map), values, wrong)

    def checked_pieces(model: Any, optimizer: Any, parameter_map: ParameterMap, shapes: Shapes) -> Batches:
        split = {name for name, parameter in mcore.global_names(model) if getattr(parameter, "tensor_model_parallel", False)}
        _replicated(mcore.global_names(model), split, parallel_state.get_tensor_model_parallel_group())
        cp = parallel_state.get_context_parallel_group()
        if cp.size() > 1:  # its ranks are replicas
            _replicated(mcore.global_names(model), set(), cp)
        return pieces_mcore(model, optimizer, parameter_map, shapes)

    def checked_pieces_zero(engine: Any, shapes: Shapes) -> Batches:
        if engine.autotp_size() > 1 and engine.zero_optimization_stage() < 3:
            full, named = zero.shapes_here(engine, shapes), list(engine.module.named_parameters())
            split = {name for name, parameter in named if tuple(parameter.shape) != tuple(full[name])}
            _replicated(named, split, groups.get_tensor_model_parallel_group())
        return pieces_zero(engine, shapes)

    state.load, zero.load_state, zero.pieces_of = checked_load, checked_zero, checked_pieces_zero
    mcore.load_state, mcore.pieces_of = checked_mcore, checked_pieces


def _shards_of(engine: Any, values: Values, shapes: Shapes) -> Values:
    """`values` of this rank's AutoTP shards, as the engine's model stores them."""
    full, whole = zero.shapes_here(engine, shapes), values_here(engine, shapes, values)
    return lambda name, shape: shard_of(whole(name, full[name]), shape, full[name])


def _compare_torch(named: Named, optimizer: torch.optim.Optimizer, values: Values) -> None:
    named = list(named)
    _compare(torch_state(named, optimizer), values, _all_equal(named, values))


def _all_equal(named: Named, values: Values) -> int:
    weights = ((name, gathered(parameter.detach())) for name, parameter in named)
    return sum(not torch.equal(w.cpu(), values(name, w.shape)["weight"].to(w.dtype)) for name, w in weights)


def _zero_weights_equal(engine: Any, values: Values) -> int:
    import deepspeed

    wrong = 0
    for name, parameter in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            weight = values(name, parameter.shape)["weight"].to(parameter.dtype)
            wrong += not torch.equal(parameter.detach().cpu(), weight)
    return wrong


def _compare(entries: Iterable[Entry], values: Values, wrong: int) -> None:
    seen = 0
    for name, parts in entries:
        if parts is None:
            continue
        expected = values(name, parts["weight"].shape)
        seen += 1
        wrong += sum(not torch.equal(parts[part], expected[part]) for part in checkpoint.PARTS if part in expected)
    _report("READBACK", seen, wrong)


def _replicated(named: Named, split: set[str], group: dist.ProcessGroup) -> None:
    seen = wrong = 0
    for name, parameter in named:
        if name in split:
            continue
        copies = [torch.empty_like(parameter) for _ in range(group.size())]
        dist.all_gather(copies, parameter.detach().contiguous(), group=group)
        seen += 1
        wrong += sum(not torch.equal(copy, copies[0]) for copy in copies)
    _report("REPLICATED", seen, wrong)


def _report(what: str, seen: int, wrong: int) -> None:
    totals = torch.tensor([seen, wrong], device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(totals)
    if dist.get_rank() == 0:
        print(f"{what} {int(totals[0])} parameters, {int(totals[1])} wrong", flush=True)
