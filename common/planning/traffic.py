"""Bytes of every collective that a rank takes part in during an optimizer step, counted from shapes. Imports no torch.

As scripts.simulate counts them: of an all-gather the output, of a reduce-scatter the input. Sums of a few numbers, such as the
loss and the targets, are left out, and groups of one rank. tests/test_planner.py compares with tests/simulated.json.

The formulas stand first: step_time.py turns what they give into seconds, and `collectives` adds it up for a config.
"""

import math
from collections import Counter
from typing import Any

from common.config import Config
from common.errors import BadInput
from common.layout import Layout, layout_for
from common.planning.workload import Block
from common.stacks import extra, stages

# ---- formulas --------------------------------------------------------------------------------------------------------

Bytes = dict[str, float]  # by operation: all_reduce, all_gather, reduce_scatter or all_to_all


def tensor_parallel(activation: float, blocks: int, is_scattered: bool) -> Bytes:
    """In one pass through a layer of `blocks` residual blocks, whose input and output take `activation` bytes: two products of
    each block are divided (arXiv:1909.08053, section 3). is_scattered: sequence parallelism gathers before the first and
    scatters after the second (arXiv:2205.05198, section 4.2.2); the backward pass then gathers the inputs once more, beside its
    first product, so that nothing waits for it."""
    if is_scattered:
        return {"all_gather": blocks * activation, "reduce_scatter": blocks * activation}
    return {"all_reduce": blocks * activation}


def context_parallel(block: Block, positions: float, width: int, tp: int, cp: int) -> Bytes:
    """In the forward pass of a layer, for `positions` of this rank: the keys and values of all ranks' positions, whose
    gradients are scattered in the backward pass (SdpaAttention of common/stacks/mcore.py)."""
    return {"all_gather": width * 2 * block.kv_inner / tp * positions * cp}


def ulysses(block: Block, positions: float, width: int, tp: int) -> Bytes:
    """In the forward pass of a layer, and again in its backward pass, for `positions` of this rank: queries, keys, values and
    outputs, which exchange positions for heads (DeepSpeed-Ulysses, arXiv:2309.14509, section 3.2)."""
    return {"all_to_all": width * (2 * block.inner + 2 * block.kv_inner) / tp * positions}


def boundary(activation: float, tp: int, is_scattered: bool) -> float:
    """Between two pipeline stages, for a micro batch: a rank's part of its activation, or of the gradient of it."""
    return activation / (tp if is_scattered else 1)


def tied_embedding(vocabulary: float, hidden: int, width: int) -> Bytes:
    """Between the first and the last pipeline stage, which both have a gradient of these rows of the embedding."""
    return {"all_reduce": width * vocabulary * hidden}


def replicas(
    size: float, shard: str, gradient: int, weight: int, accumulate: int, all_reduced: bool = False, kept: float = 0.0,
    persistent: float = 0.0,
) -> Bytes:  # fmt: skip
    """Between ranks that hold copies of `size` parameters, or a share of each, in a step. gradient, weight: bytes of an
    element.

    shard, all_reduced: as Plan of step_time.py. With shard=parameters, `kept` are gathered once for the forward and the
    backward pass of a micro batch, `persistent` once in a step, all others for either pass.
    """
    if shard == "none":
        return {"all_reduce": gradient * size}
    if shard == "parameters":
        gathered = accumulate * (2 * (size - persistent) - kept) + persistent
        return {"all_gather": weight * gathered, "reduce_scatter": accumulate * gradient * size}
    times = accumulate if shard == "gradients" else 1  # ZeRO 2 reduces in every micro batch
    return {"all_reduce" if all_reduced else "reduce_scatter": times * gradient * size, "all_gather": weight * size}


# ---- a config --------------------------------------------------------------------------------------------------------

PERSISTENT = 100_000  # elements of a parameter up to which ZeRO 3 keeps it whole (stage3_param_persistence_threshold)


def collectives(cfg: Config, stack: str, world: int, stage: int = 0) -> dict[str, int]:
    """{'all_reduce bf16 of 8': bytes} of a resolved config in pretraining, on a rank of a pipeline stage. BadInput where they
    are not counted.
    """
    layout = layout_for(cfg, stack, world)
    if layout.vpp > 1 or stack != "megatron" and layout.tp > 1:
        raise BadInput(f"{stack}: the collectives of vpp and AutoTP are not counted")
    if getattr(getattr(cfg, stack), "shard", "none") != "none" or getattr(getattr(cfg, stack), "extra", {}):
        raise BadInput(f"{stack}: the collectives of FSDP2 and of {stack}.extra are not counted")
    if stack == "deepspeed" and (given := cfg.deepspeed.zero_plus_plus):
        raise BadInput(f"the collectives of {given} are not counted")
    found = _megatron(cfg, layout, stage) if stack == "megatron" else _replicas(cfg, stack, layout, stage)
    return {name: int(size) for name, size in found.items() if size and not name.endswith(" of 1")}


def _add(found: Counter[str], sizes: Bytes, dtype: str, ranks: int, times: float = 1) -> None:
    for op, size in sizes.items():
        found[f"{op} {dtype} of {ranks}"] += times * size  # type: ignore[assignment]


def _replicas(cfg: Config, stack: str, layout: Layout, stage: int) -> Counter[str]:
    """Of data-parallel ranks that hold, or gather, the whole model, or a stage of DeepSpeed's pipeline, or share sequences."""
    parameters, found, work = cfg.model.parameter_count(), Counter[str](), cfg.model.workload(cfg.data)
    dp = layout.dp * layout.sp  # ranks that hold copies
    width, name = (2, "bf16") if cfg.train.dtype == "bf16" else (4, "fp32")
    gradient, gradients = (4, "fp32") if layout.sp > 1 else (width, name)  # Ulysses reduces in fp32
    zero = cfg.deepspeed.zero_stage if stack == "deepspeed" else 0
    if zero == 0:
        _add(found, replicas(parameters, "none", 4, 4, layout.accumulate), "fp32", dp)
        found[f"all_reduce fp32 of {dp}"] += 4 if stack == "deepspeed" else 0  # DeepSpeed's norm
        return found
    found[f"all_reduce fp32 of {dp}"] += 8  # the norms of parameters with and without weight decay
    if zero == 3:
        largest = max(work.vocab * work.hidden, *(block.hidden * block.ffn for block in work.blocks))
        if largest > PERSISTENT:
            raise BadInput("deepspeed.zero_stage=3: the gathers of parameters that are not kept whole are not counted")
        padded = -(-parameters // dp) * dp
        sizes = replicas(padded, "parameters", gradient, width, layout.accumulate, persistent=padded)
    elif parameters // layout.pp // dp >= 1_000_000 * dp:  # use_multi_rank_bucket_allreduce of common/stacks/zero.py
        raise BadInput(f"deepspeed.zero_stage={zero}: reductions to the rank that owns a share are not counted")
    else:
        if layout.pp > 1:
            parameters = sum(stages.sizes_of(cfg.deepspeed.partition, work.sizes(parameters), layout.pp, stage))
            _deepspeed_pipeline(found, cfg, layout, stage, name)
        shard = {1: "optimizer", 2: "gradients"}[zero]
        sizes = replicas(parameters, shard, gradient, width, layout.accumulate, all_reduced=True)
        # a group of parameters is padded to two elements per rank (nccl_start_alignment_factor of zero/stage_1_and_2.py)
        sizes["all_gather"] = width * (-(-parameters // (2 * dp)) * 2 * dp)
    _add(found, {"all_gather": sizes.pop("all_gather")}, name, dp)
    _add(found, sizes, gradients, dp)
    if layout.sp > 1:
        block = work.blocks[0]
        exchanged = ulysses(block, block.tokens * layout.micro_batch / layout.sp, width, 1)
        passes = 3 if cfg.deepspeed.recompute else 2
        _add(found, exchanged, name, layout.sp, layout.accumulate * block.count * passes)
    return found


def _deepspeed_pipeline(found: Counter[str], cfg: Config, layout: Layout, stage: int, name: str) -> None:
    """Add what a stage of DeepSpeed's pipeline exchanges with others. Masks and positions, which are sent as other dtypes, are
    left out."""
    work, first, last = cfg.model.workload(cfg.data), stage == 0, stage == layout.pp - 1
    width = 2 if name == "bf16" else 4
    activation = width * layout.micro_batch * work.blocks[0].tokens * work.hidden
    for op in ("send", "recv"):  # in the default group: of each micro batch an activation and its gradient
        size = boundary(activation, 1, is_scattered=False)
        _add(found, {op: size}, name, layout.world, layout.accumulate * ((not first) + (not last)))
    if work.tied and (first or last):
        _add(found, tied_embedding(work.vocab, work.hidden, width), name, 2)
    found[f"all_reduce fp32 of {layout.pp}"] += 8  # the norms
    found[f"all_reduce fp32 of {layout.dp}"] += 4 * last  # the mean loss


def _megatron(cfg: Config, layout: Layout, stage: int) -> Counter[str]:
    model, system, t, found = cfg.model, cfg.megatron, layout.tp, Counter[str]()
    dp, pp, accumulate = layout.dp * layout.cp, layout.pp, layout.accumulate  # dp: ranks that hold copies
    width, name = (2, "bf16") if cfg.train.dtype == "bf16" else (4, "fp32")
    is_whole = t == pp == 1
    if layout.cp > 1 and (not is_whole or getattr(model, "arch", "") != "gpt2" or system.transformer_engine):
        raise BadInput("megatron: the collectives of cp with tp, pp or TransformerEngine, and of Llama style, are not counted")
    if not is_whole and (getattr(model, "arch", "") != "gpt2" or getattr(system, "pipeline_layout", "even") != "even"):
        raise BadInput("megatron: the collectives of tp and pp are counted for GPT-2 style and even stages")
    h, vocabulary = model.hidden, -(-model.vocab_size // t)
    sizes = parameters_of_stage(cfg, layout, stage) if getattr(model, "arch", "") == "gpt2" else [model.parameter_count()]
    sequence, mp = system.sequence_parallel and t > 1, t * pp
    shard, held = "none", sum(sizes)
    if system.distributed_optimizer:
        # each parameter begins at a multiple of 64 elements, a bucket ends at one of 128 and of the ranks
        # (megatron/core/distributed/param_and_grad_buffer.py)
        if held > max(40_000_000, 1_000_000 * dp):
            raise BadInput("megatron.distributed_optimizer: the padding of more than one bucket is not counted")
        end = math.lcm(dp, 128)
        shard, held = "optimizer", -(-sum(-(-size // 64) * 64 for size in sizes) // end) * end
    exchanged = replicas(held, shard, 4, width, accumulate)
    _add(found, {"all_gather": exchanged.pop("all_gather", 0)}, name, dp)
    _add(found, exchanged, "fp32", dp)
    found[f"all_reduce fp32 of {dp * mp if system.distributed_optimizer else mp}"] += 4  # the norm
    if layout.cp > 1:
        block = model.workload(cfg.data).blocks[0]
        [size] = context_parallel(block, block.tokens * layout.micro_batch / layout.cp, width, t, layout.cp).values()
        times, forwards = accumulate * block.count, 1 if extra.granularity(system) == "none" else 2
        _add(found, {"all_gather": size * forwards, "reduce_scatter": size}, name, layout.cp, times)
    if is_whole:
        return found
    first, last, layers = stage == 0, stage == pp - 1, model.layers // pp
    tokens = cfg.data.seq_len * layout.micro_batch
    activation = width * tokens * h
    passes = 3 if extra.granularity(system) == "full" else 2  # forward, backward, and forward again
    if t > 1:
        _add(found, tensor_parallel(activation, 2, sequence), name, t, accumulate * layers * passes)
    if sequence:
        # the backward passes of the two products, and of the head, gather once more; the embedding's gathers, the head scatters
        found[f"all_gather {name} of {t}"] += accumulate * activation * (2 * layers + first + 2 * last)
        found[f"reduce_scatter {name} of {t}"] += accumulate * activation * last
        found[f"all_reduce {name} of {t}"] += accumulate * activation * first  # of the embedding, before positions are added
        # gradients of norms and of the biases after row-parallel products
        found[f"all_reduce fp32 of {t}"] += 4 * (layers * 6 * h + 2 * h * last)
    elif t > 1:
        found[f"all_reduce {name} of {t}"] += accumulate * activation * (first + last)
    if t > 1 and last:  # cross entropy: the largest logit; the sum and the target's logit
        found[f"all_reduce fp32 of {t}"] += accumulate * 3 * 4 * tokens
    if pp > 1:
        for op in ("send", "recv"):
            _add(found, {op: boundary(activation, t, sequence)}, name, pp, accumulate * ((not first) + (not last)))
        if model.tied and (first or last):
            _add(found, tied_embedding(vocabulary, h, 4), "fp32", 2)
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
