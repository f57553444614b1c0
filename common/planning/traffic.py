"""Bytes of every collective that a rank takes part in during an optimizer step, counted from shapes. Imports no torch.

As scripts.simulate counts them: of an all-gather the output, of a reduce-scatter the input. Sums of a few numbers, such as the
loss and the targets, are left out, and groups of one rank. tests/test_planner.py compares with tests/simulated.json.
"""

import math
from collections import Counter
from typing import Any

from common.config import Config
from common.errors import BadInput
from common.layout import Layout, layout_for
from common.stacks import extra

PERSISTENT = 100_000  # elements of a parameter up to which ZeRO 3 keeps it whole (stage3_param_persistence_threshold)


def collectives(cfg: Config, stack: str, world: int, stage: int = 0) -> dict[str, int]:
    """{'all_reduce bf16 of 8': bytes} of a resolved config in pretraining, on a rank of a pipeline stage. BadInput where they
    are not counted.
    """
    layout = layout_for(cfg, stack, world)
    if layout.cp * layout.sp * layout.vpp > 1 or stack != "megatron" and layout.tp * layout.pp > 1:
        raise BadInput(f"{stack}: the collectives of cp, vpp, sp, AutoTP and DeepSpeed's pipeline are not counted")
    if getattr(getattr(cfg, stack), "shard", "none") != "none" or getattr(getattr(cfg, stack), "extra", {}):
        raise BadInput(f"{stack}: the collectives of FSDP2 and of {stack}.extra are not counted")
    found = _megatron(cfg, layout, stage) if stack == "megatron" else _replicas(cfg, stack, layout)
    return {name: size for name, size in found.items() if size and not name.endswith(" of 1")}


def _replicas(cfg: Config, stack: str, layout: Layout) -> Counter[str]:
    """Of data-parallel ranks that hold, or gather, the whole model."""
    parameters, dp, found = cfg.model.parameter_count(), layout.dp, Counter[str]()
    width, name = (2, "bf16") if cfg.train.dtype == "bf16" else (4, "fp32")
    stage = cfg.deepspeed.zero_stage if stack == "deepspeed" else 0
    if stage == 0:
        found[f"all_reduce fp32 of {dp}"] = 4 * parameters + (4 if stack == "deepspeed" else 0)  # DeepSpeed's norm
        return found
    if stage == 3:
        largest = cfg.model.workload(cfg.data).vocab * cfg.model.hidden
        if max(largest, *(block.hidden * block.ffn for block in cfg.model.workload(cfg.data).blocks)) > PERSISTENT:
            raise BadInput("deepspeed.zero_stage=3: the gathers of parameters that are not kept whole are not counted")
        padded = -(-parameters // dp) * dp
        found[f"all_gather {name} of {dp}"] = width * padded  # after the step
        found[f"reduce_scatter {name} of {dp}"] = layout.accumulate * width * padded
        found[f"all_reduce fp32 of {dp}"] += 8  # as below
        return found
    if parameters // dp >= 1_000_000 * dp:  # use_multi_rank_bucket_allreduce of common/stacks/zero.py
        raise BadInput(f"deepspeed.zero_stage={stage}: reductions to the rank that owns a share are not counted")
    # a group of parameters is padded to two elements per rank (nccl_start_alignment_factor of zero/stage_1_and_2.py)
    found[f"all_gather {name} of {dp}"] = width * (-(-parameters // (2 * dp)) * 2 * dp)
    found[f"all_reduce {name} of {dp}"] = width * parameters * (layout.accumulate if stage == 2 else 1)
    found[f"all_reduce fp32 of {dp}"] += 8  # the norms of parameters with and without weight decay
    return found


def _megatron(cfg: Config, layout: Layout, stage: int) -> Counter[str]:
    model, system, t, found = cfg.model, cfg.megatron, layout.tp, Counter[str]()
    dp, pp, accumulate = layout.dp, layout.pp, layout.accumulate
    width, name = (2, "bf16") if cfg.train.dtype == "bf16" else (4, "fp32")
    is_whole = t == pp == 1
    if not is_whole and (getattr(model, "arch", "") != "gpt2" or getattr(system, "pipeline_layout", "even") != "even"):
        raise BadInput("megatron: the collectives of tp and pp are counted for GPT-2 style and even stages")
    h, vocabulary = model.hidden, -(-model.vocab_size // t)
    sizes = parameters_of_stage(cfg, layout, stage) if getattr(model, "arch", "") == "gpt2" else [model.parameter_count()]
    sequence, mp = system.sequence_parallel and t > 1, t * pp
    if system.distributed_optimizer:
        # each parameter begins at a multiple of 64 elements, a bucket ends at one of 128 and of the ranks
        # (megatron/core/distributed/param_and_grad_buffer.py)
        if sum(sizes) > max(40_000_000, 1_000_000 * dp):
            raise BadInput("megatron.distributed_optimizer: the padding of more than one bucket is not counted")
        end = math.lcm(dp, 128)
        padded = -(-sum(-(-size // 64) * 64 for size in sizes) // end) * end
        found[f"reduce_scatter fp32 of {dp}"] += 4 * padded
        found[f"all_gather {name} of {dp}"] += width * padded
        found[f"all_reduce fp32 of {dp * mp}"] += 4  # the norm
    else:
        found[f"all_reduce fp32 of {dp}"] += 4 * sum(sizes)
        found[f"all_reduce fp32 of {mp}"] += 4
    if is_whole:
        return found
    first, last, layers = stage == 0, stage == pp - 1, model.layers // pp
    tokens = cfg.data.seq_len * layout.micro_batch
    activation = accumulate * width * tokens * h
    passes = 3 if extra.granularity(system) == "full" else 2  # forward, backward, and forward again
    if sequence:
        # forward: gather, scatter around each of two products; backward: the same, and the gathered input once more
        found[f"all_gather {name} of {t}"] += activation * (layers * (2 * passes + 2) + first + 2 * last)
        found[f"reduce_scatter {name} of {t}"] += activation * (layers * 2 * passes + last)
        found[f"all_reduce {name} of {t}"] += activation * first  # of the embedding, before positions are added
        # gradients of norms and of the biases after row-parallel products
        found[f"all_reduce fp32 of {t}"] += 4 * (layers * 6 * h + 2 * h * last)
    elif t > 1:
        found[f"all_reduce {name} of {t}"] += activation * (layers * 2 * passes + first + last)
    if t > 1 and last:  # cross entropy: the largest logit; the sum and the target's logit
        found[f"all_reduce fp32 of {t}"] += accumulate * 3 * 4 * tokens
    if pp > 1:
        neighbours = (not first) + (not last)
        for op in ("send", "recv"):
            found[f"{op} {name} of {pp}"] += activation // (t if sequence else 1) * neighbours
        if model.tied and (first or last):
            found["all_reduce fp32 of 2"] += 4 * vocabulary * h
    return found


def parameters_of_stage(cfg: Config, layout: Layout, stage: int) -> list[int]:
    """Elements of each parameter of GPT-2 style that a rank of a Megatron stage holds."""
    model, t = cfg.model, layout.tp
    h, f = model.hidden, model.ffn
    layer = [h, h, h * h // t, h, 3 * h * h // t, 3 * h // t, h, h, h * f // t, f // t, h * f // t, h]
    first, last = stage == 0, stage == layout.pp - 1
    vocabulary = -(-model.vocab_size // t) * h
    return [
        *([vocabulary, model.positions * h] if first else []), *(layer * (model.layers // layout.pp)),
        *([h, h] if last else []), *([vocabulary] if last and (layout.pp > 1 or not model.tied) else []),
    ]  # fmt: skip


def reported(found: list[dict[str, Any]]) -> dict[str, int]:
    """What a simulation reports as `collectives`, without what `collectives` leaves out."""
    kept = [one for one in found if one["dtype"] in ("bf16", "fp32") and one["group_size"] > 1 and one["op"] != "broadcast"]
    sums: Counter[str] = Counter()
    for one in kept:
        sums[f"{one['op']} {one['dtype']} of {one['group_size']}"] += one["bytes"]
    return dict(sums)
