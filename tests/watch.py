"""Checks that ride along in tests/drive.py: they wrap the doors of the training state and print one line each.

READBACK: right after the start or a resume, before the next step, masters and moments read back by name are bit-equal to
what was given (init, Hugging Face folder, checkpoint), and the model's weights are those masters in the model's dtype.
REPLICATED: before a save, the parameters that tensor parallelism does not split are bit-equal on its ranks.
"""

import torch
import torch.distributed as dist

from common.checkpoints import checkpoint, state
from common.launch.processes import Ranks
from common.stacks import mcore, zero

ALONE = Ranks(0, 1, torch.device("cpu"))  # every rank reads every parameter


def install() -> None:
    """Wrap the doors; the recipes call them through their modules."""
    load_torch_state, fill_zero, fill_mcore = state.load_torch_state, zero.load_state, mcore.load_state
    read_mcore = mcore.gather_state

    def torch_door(named, optimizer, values, step):
        named = list(named)
        load_torch_state(named, optimizer, values, step)
        _compare(state.gather_torch_state(named, optimizer, ALONE), values, _all_equal(named, values))

    def zero_door(engine, shapes, values, step):
        fill_zero(engine, shapes, values, step)
        if engine.zero_optimization_stage():
            shards = zero.shards_of(values, shapes)
            _compare(zero.gather_state(engine, ALONE, shapes), values, _zero_weights_equal(engine, shards))

    def mcore_door(model, optimizer, rules, shapes, values, step):
        fill_mcore(model, optimizer, rules, shapes, values, step)
        wrong = sum(
            not torch.equal(main.to(parameter.dtype), parameter.detach().flatten()[where].view_as(main))
            for _, parameter in mcore.global_names(model)
            for main, where in mcore._mains(optimizer, parameter)
        )
        _compare(read_mcore(model, optimizer, rules), values, wrong)

    def watched_read(model, optimizer, rules):
        _replicated(model)
        return read_mcore(model, optimizer, rules)

    state.load_torch_state, zero.load_state, mcore.load_state, mcore.gather_state = (
        torch_door,
        zero_door,
        mcore_door,
        watched_read,
    )


def _all_equal(named, values) -> int:
    return sum(not torch.equal(p.detach().cpu(), values(n, p.shape)["weight"].to(p.dtype)) for n, p in named)


def _zero_weights_equal(engine, values) -> int:
    import deepspeed

    wrong = 0
    for name, parameter in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            weight = values(name, parameter.shape)["weight"].to(parameter.dtype)
            wrong += not torch.equal(parameter.detach().cpu(), weight)
    return wrong


def _compare(entries, values, wrong: int) -> None:
    seen = 0
    for name, parts in entries:
        if parts is None:
            continue
        expected = values(name, parts["weight"].shape)
        seen += 1
        wrong += sum(not torch.equal(parts[part], expected[part]) for part in checkpoint.PARTS if part in expected)
    _tell("READBACK", seen, wrong)


def _replicated(model) -> None:
    group = mcore.parallel_state.get_tensor_model_parallel_group()
    seen = wrong = 0
    for _, parameter in mcore.global_names(model):
        if getattr(parameter, "tensor_model_parallel", False):
            continue
        copies = [torch.empty_like(parameter) for _ in range(group.size())]
        dist.all_gather(copies, parameter.detach().contiguous(), group=group)
        seen += 1
        wrong += sum(not torch.equal(copy, copies[0]) for copy in copies)
    _tell("REPLICATED", seen, wrong)


def _tell(what: str, seen: int, wrong: int) -> None:
    totals = torch.tensor([seen, wrong], device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(totals)
    if dist.get_rank() == 0:
        print(f"{what} {int(totals[0])} parameters, {int(totals[1])} wrong", flush=True)
