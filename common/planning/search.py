"""Which layouts a config can have on a number of GPUs, how long a step of each takes, and which fit. Imports no torch."""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

from common import config
from common.config import Config
from common.errors import BadInput
from common.layout import MODEL_PARALLEL, WHOLE, Layout, layout_for
from common.planning import memory, step_time, validation
from common.planning.hardware import Cluster
from common.planning.step_time import Elementwise, Plan, Seconds, Software
from common.planning.workload import Workload, share_of_sequence
from common.stacks import pipeline, stages
from common.stacks.extra import granularity

HOST = 1.0e-3  # seconds of the CPU per layer and forward pass in eager PyTorch (docs/planner.md)
DDP_HIDDEN = 0.8  # share of the gradients' traffic that the backward pass hides: torch's DDP in PTD-P's table 1


@dataclass(frozen=True)
class Prediction:
    """What a layout of a stack takes. Times in seconds per step, memory in bytes per GPU."""

    stack: str
    layout: dict[str, Any]  # the keys of the stack's section that it sets
    shared: Layout
    seconds: float
    time: dict[str, float]  # by what takes it
    memory: dict[str, int]
    host_memory: int  # bytes that a node's GPUs offload to it
    fits: bool
    tokens_per_s: float  # of all GPUs
    mfu_full: float
    mfu_causal: float
    near: tuple[str, float] | None  # published rows, and the largest error of a prediction of them
    cfg: Config = field(repr=False)

    def as_json(self, tokens: float, price: float | None) -> dict[str, Any]:
        """tokens: of the whole run. price: per GPU and hour."""
        hours = tokens / self.tokens_per_s / 3600
        return {
            "stack": self.stack, "layout": self.layout, "seconds_per_step": self.seconds, "tokens_per_s": self.tokens_per_s,
            "mfu_full": self.mfu_full, "mfu_causal": self.mfu_causal, "memory": self.memory, "time": self.time,
            "host_memory": self.host_memory,
            "fits": self.fits, "days": hours / 24, "cost": None if price is None else hours * self.shared.world * price,
            "error_of_nearest": self.near[1] if self.near else None, "nearest": self.near[0] if self.near else None,
        }  # fmt: skip


@dataclass(frozen=True)
class Assumed:
    """What a published row may need: the kernels of its attention, and how its FLOPs are counted."""

    attention: str | None = None  # unfused or flash; default: what the stack chooses
    recompute_counted: bool = False  # MFU counts the forward pass of recomputed layers twice (PTD-P, eq. 3)
    host: float = HOST  # seconds of the CPU per layer and forward pass


class NotModelled(BadInput):
    """A layout that runs, and whose time or memory is not predicted."""


def step_of(
    cfg: Config, stack: str, cluster: Cluster, gpus: int, assumed: Assumed = Assumed()
) -> tuple[Layout, Workload, Plan, Seconds]:
    """The layout that a resolved config gives, and its time. BadInput as in layout_for."""
    shared, work = layout_for(cfg, stack, gpus), cfg.model.workload(cfg.data)
    plan, software = plan_of(cfg, stack, shared, work), software_of(cfg, stack, cluster, work, assumed.host)
    if assumed.attention:
        software = replace(software, attention={"flash": "fa2"}.get(assumed.attention, assumed.attention))
    return shared, work, plan, step_time.step_seconds(cluster, software, work, plan)


def predict(cfg: Config, stack: str, cluster: Cluster, gpus: int, assumed: Assumed = Assumed()) -> Prediction:
    """The prediction for the layout that a resolved config gives. BadInput as in layout_for; NotModelled."""
    shared, work, plan, time = step_of(cfg, stack, cluster, gpus, assumed)
    try:
        needed = memory.estimate_for(cfg, cfg.model, stack, gpus)
    except BadInput as error:
        raise NotModelled(error.problems) from None
    if assumed.attention == "unfused":  # the scores, softmax and dropout of a layer stay: 5 a s^2 b (arXiv:2205.05198, eq. 1)
        kept = kept_scores(work, plan)
        needed = {part: size + kept * (part in ("activations", "total", "required")) for part, size in needed.items()}
    recomputed = assumed.recompute_counted and plan.recompute == "full"
    system = getattr(cfg, stack)
    is_measured = cfg.train.dtype == "bf16"  # all published rows are; products in fp32 are slower than `Gpu.peak`
    on_host = needed["host"] * min(gpus, cluster.gpus_per_node)
    fits = needed["required"] <= cluster.gpu.memory and on_host <= cluster.host_memory
    return Prediction(
        stack=stack, layout=system.model_dump(exclude={"extra"}, exclude_defaults=True) | {"micro_batch": shared.micro_batch},
        shared=shared, seconds=time.total, time=vars(time), memory=needed, host_memory=on_host, fits=fits,
        tokens_per_s=cfg.train.global_batch * cfg.data.sample_tokens / time.total,
        mfu_full=step_time.mfu(cluster, work, plan, time.total, recomputed=recomputed),
        mfu_causal=step_time.mfu(cluster, work, plan, time.total, causal=True, recomputed=recomputed),
        near=validation.nearest(kind_of(stack, plan), cluster, work) if is_measured else None, cfg=cfg,
    )  # fmt: skip


def kept_scores(work: Workload, plan: Plan) -> int:
    """Bytes of attention scores that a stage keeps of the micro batches in flight where no kernel fuses them."""
    if plan.recompute != "none":
        return 0
    work = share_of_sequence(work, plan.cp * plan.sp)
    pairs = sum(block.count * block.heads * one.queries * one.keys for block in work.blocks for one in block.attention)
    chunks = (plan.vpp - 1) * plan.pp + 1 + 2 * (plan.pp - 1) if plan.vpp > 1 else plan.pp
    return int(5 * pairs * plan.micro_batch / plan.tp / (plan.pp * plan.vpp) * min(chunks, plan.accumulate * plan.vpp))


def plan_of(cfg: Config, stack: str, shared: Layout, work: Workload) -> Plan:
    """A stack's keys as those of step_time.py."""
    system = getattr(cfg, stack)
    uneven: tuple[int, ...] = ()
    if getattr(system, "pipeline_layout", pipeline.EVEN) != pipeline.EVEN:
        chunks = pipeline.chunk_layers(cfg.model.layers, system)
        uneven = tuple(sum(chunks[stage :: shared.pp]) for stage in range(shared.pp))
    elif stack == "deepspeed" and shared.pp > 1:
        uneven = stages.transformer_layers(system.partition, work.sizes(cfg.model.parameter_count()), shared.pp)
    width = 2 if cfg.train.dtype == "bf16" else 4
    plan: dict[str, Any] = {}
    if stack == "megatron":  # gradients are accumulated and reduced in fp32
        plan = {
            "shard": "optimizer" if system.distributed_optimizer else "none", "gradient_bytes": 4,
            "sequence_parallel": system.sequence_parallel and shared.tp > 1,
        }  # fmt: skip
    elif stack == "deepspeed" and system.zero_stage:
        shards = {1: "optimizer", 2: "gradients", 3: "parameters"}
        parameters = cfg.model.parameter_count() // (shared.tp * shared.pp)
        plan = {
            "shard": shards[system.zero_stage], "gradient_bytes": 4 if shared.sp > 1 else width,  # Ulysses reduces in fp32
            "kept": min(parameters, memory.LIVE // 2),
            # use_multi_rank_bucket_allreduce of common/stacks/zero.py
            "all_reduced": parameters // shared.dp < 1_000_000 * shared.dp,
            "offload": system.offload, "sums_embedding": shared.pp > 1 and work.tied,
        }  # fmt: skip
    elif getattr(system, "shard", "none") == "full":  # FSDP2: what is outside the layers is gathered once
        outside = cfg.model.parameter_count() - work.body
        plan = {"shard": "parameters", "gradient_bytes": 4, "kept": outside}
    else:  # fp32 weights under autocast
        plan = {"gradient_bytes": 4, "torch_ddp": True}
    recompute = "full" if system.recompute else "none"
    if stack == "megatron":  # its selective repeats the attention whatever the kernel keeps
        recompute = {"selective": "attention"}.get(granularity(system), granularity(system))
    return Plan(
        dp=shared.dp, tp=shared.tp, pp=shared.pp, cp=shared.cp, sp=shared.sp, vpp=getattr(system, "vpp", 1),
        micro_batch=shared.micro_batch, accumulate=shared.accumulate, width=width, recompute=recompute,
        layers_of_stages=uneven, **plan,
    )  # fmt: skip


def software_of(cfg: Config, stack: str, cluster: Cluster, work: Workload, host: float = HOST) -> Software:
    """The attention kernel that scaled_dot_product_attention chooses, and what the stack hides. Tensor-parallel traffic waits
    without TransformerEngine."""
    plain = all(a.causal for block in work.blocks for a in block.attention)
    kernel = "efficient"  # masks and biases
    if plain:
        kernel = "cudnn" if cfg.model.dropout == 0 and "cudnn" in cluster.gpu.attention else "fa2"
    moved = None if is_fused(cfg, stack, cluster) else eager_traffic(cfg, stack)
    if cfg.model.traits().relative_biases:
        moved = replace(moved or step_time.FUSED[work.blocks[0].gated], scores=biases_traffic(cfg, stack))
    # Megatron's plain loss (megatron/core/tensor_parallel/cross_entropy.py): max, subtract, exp, sum, divide; multiply
    loss = 40.0 if stack == "megatron" and not is_fused(cfg, stack, cluster) else 24.0
    if cluster.gpu.is_cpu:  # its processes compute and communicate on the same cores, and wait for no other device
        return Software(attention=kernel, ddp_hidden=0.0, elementwise=moved, loss=loss)
    hidden = 0.0 if stack == "deepspeed" and cfg.deepspeed.pp > 1 else 0.8  # its pipeline reduces after the last backward pass
    return Software(attention=kernel, dp_hidden=hidden, ddp_hidden=DDP_HIDDEN, host=host, elementwise=moved, loss=loss)


def is_fused(cfg: Config, stack: str, cluster: Cluster) -> bool:
    """Is what lies between two products compiled? megatron.fusions is on by default on a GPU."""
    system = getattr(cfg, stack)
    if stack != "megatron":
        return bool(system.compile)
    return system.transformer_engine or (not cluster.gpu.is_cpu if system.fusions is None else system.fusions)


def is_autocast(cfg: Config, stack: str) -> bool:
    """fp32 weights and residual stream, whose products are computed from bf16 copies: the baseline, DeepSpeed's stage 0."""
    system = getattr(cfg, stack)
    whole = getattr(system, "shard", "none") == "none" and not getattr(system, "zero_stage", 0)
    return cfg.train.dtype == "bf16" and stack != "megatron" and whole


def eager_traffic(cfg: Config, stack: str) -> Elementwise:
    """Bytes that the operators of a `transformers` class, or of Megatron without fusions, read and write, one kernel each: w
    bytes per element of a product, r of the residual stream. Counted in the source of modeling_gpt2, modeling_bert,
    modeling_llama and modeling_t5, and in megatron/core/transformer."""
    traits, megatron = cfg.model.traits(), stack == "megatron"
    mixed, autocast = cfg.train.dtype == "bf16", is_autocast(cfg, stack)
    w, r = 2 if mixed else 4, 2 if mixed and not autocast else 4
    readers = 1 if traits.fused_qkv or megatron else 2  # products that read a norm's output: in the attention, in a gated MLP
    # LayerNorm is a kernel forward and two backward; RMSNorm is cast to fp32, squared, averaged, scaled, cast and weighted
    several = traits.rms_norm and not megatron
    norm = (36, 76) if several and r == 2 else (28, 64) if several else (2 * r, 5 * r)
    copies = readers * (r + w) if autocast else 0  # casts of the norm's output, and of its gradients back
    sums = (readers - 1) * 3 * w
    dropout = 2 * w + 1 if cfg.model.dropout else 0
    bias = 2 * w if megatron and traits.biases else 0  # a kernel of its own
    whole = (norm[0] + copies + dropout + bias + w + 2 * r, norm[1] + copies + sums + dropout + 3 * r)
    gated = any(block.gated for block in cfg.model.workload(cfg.data).blocks)
    python_gelu = traits.python_gelu and not megatron
    ffn = (21 * w, 31 * w) if python_gelu else (5 * w, 9 * w) if gated else (bias + 2 * w, 3 * w)
    qkv = (bias + 2 * w + 7 * w * traits.rotary, 8 / 3 * w + 7 * w * traits.rotary)  # rotary: of queries and keys, 10 w of each
    # autocast: weights are cast in each forward pass, and their gradients back and added
    return Elementwise(whole, ffn, qkv, (6.0, 18.0) if autocast else (0.0, 6.0 if mixed else 12.0))


def biases_traffic(cfg: Config, stack: str) -> tuple[float, float]:
    """Bytes per score, forward and backward, of T5's biases where the attention kernel reads them, beside the kernel's own.

    transformers adds the mask to the biases in each layer, and sums the gradient over the samples (sdpa_attention.py); autocast
    casts the sum, and its gradient back. Megatron's are one tensor for all layers; each layer's gradient is added to it."""
    w = 2 if cfg.train.dtype == "bf16" else 4
    if stack == "megatron":
        return w, 5 * w
    return (12, 14) if w == 2 and is_autocast(cfg, stack) else (2 * w, 3 * w)


def kind_of(stack: str, plan: Plan) -> str:
    """The kind of published rows that a plan is like (validation.Table)."""
    if stack == "deepspeed" and plan.shard == "parameters":
        return "zero 3"
    if stack == "deepspeed" and plan.pp > 1:
        return "deepspeed pipeline"
    return "megatron" if stack == "megatron" and plan.cp == 1 else "others"  # of which there is no published row


# ---- search ----------------------------------------------------------------------------------------------------------


def powers_of_2(limit: int) -> list[int]:
    return [2**k for k in range(limit.bit_length()) if 2**k <= limit]


def changes(cfg: Config, stack: str, gpus: int, gpus_per_node: int) -> Iterator[dict[str, Any]]:
    """The values of a stack's keys that are tried. Layouts that the model or the batch does not allow are among them."""
    known, near = type(getattr(cfg, stack)).model_fields, powers_of_2(min(gpus, gpus_per_node))
    divisors = [n for n in range(1, cfg.model.layers + 1) if cfg.model.layers % n == 0]
    keys: dict[str, Sequence[Any]] = {"recompute": (False, True)}
    if stack == "baseline":
        keys["shard"] = ("none", "full")
    if stack == "deepspeed":
        zero = (0,) if cfg.optim.optimizer in WHOLE else (1, 2, 3)  # ZeRO divides parameters
        keys |= {"zero_stage": zero, "offload": ("none", "optimizer", "all"), "tp": near, "pp": divisors, "sp": near}
    if stack == "megatron":
        masks = not all(one.causal for block in cfg.model.workload(cfg.data).blocks for one in block.attention)
        # selective saves memory only where the attention kernel keeps a mask or biases
        keys["recompute"] = ("none", "selective", "full") if masks else ("none", "full")
        keys |= {
            "tp": near,
            "pp": divisors,
            "vpp": divisors,
            "cp": near,
            "distributed_optimizer": (True,),
            "pipeline_layout": ("even",),
        }
    keys = {key: values for key, values in keys.items() if key in known}
    for values in product(*keys.values()):
        change = dict(zip(keys, values, strict=True))
        pp, vpp = change.get("pp", 1), change.get("vpp", 1)
        if vpp > 1 and (pp == 1 or cfg.model.layers % (pp * vpp)):
            continue
        if stack == "megatron":
            change["sequence_parallel"] = change["tp"] > 1
        elif sum(change.get(key, 1) > 1 for key in MODEL_PARALLEL) > 1:
            continue  # AutoTP, the pipeline and Ulysses exclude each other
        changed = cfg.model_copy(update={stack: getattr(cfg, stack).model_copy(update=change)})
        if any(config.problems(changed)):
            continue
        parts = math.prod(change.get(key, 1) for key in MODEL_PARALLEL)
        if gpus % parts or cfg.train.global_batch % (gpus // parts):
            continue
        share = cfg.train.global_batch // (gpus // parts)  # samples per replica and step
        for micro in powers_of_2(min(share, 64)):
            if share % micro == 0:
                yield change | {"micro_batch": micro}


def search(
    cfg: Config, stacks: Sequence[str], cluster: Cluster, gpus: int, assumed: Assumed = Assumed()
) -> tuple[list[Prediction], list[str]]:
    """Every layout of these stacks on which the resolved config can run: those that fit first, the fastest first. And a line
    for each reason for which layouts that would run are left out."""
    found, left_out = [], {}
    for stack in stacks:
        section = getattr(cfg, stack)
        for change in changes(cfg, stack, gpus, cluster.gpus_per_node):
            changed = cfg.model_copy(update={stack: section.model_copy(update=change)})
            try:
                found.append(predict(changed, stack, cluster, gpus, assumed))
            except NotModelled as error:
                left_out[re.sub(r"=\S+", "", error.problems[0])] = error.problems[0]
            except BadInput:  # the model or the optimizer does not allow it
                continue
    return sorted(found, key=lambda one: (not one.fits, one.seconds if one.fits else one.memory["required"])), [
        *left_out.values()
    ]


def needs(cfg: Config, stack: str, cluster: Cluster, gpus: int) -> str:
    """What would make a config fit that fits on none of a stack's layouts: the smallest number of GPUs, up to 65,536, in whole
    nodes; one line."""
    enough = next((more for more in powers_of_2(65_536) if more > gpus and _fitting(cfg, stack, cluster, more)), None)
    if enough is None:
        try:
            layout_for(cfg, stack, gpus)
        except BadInput as error:
            return f"{stack} has none: {error.problems[0]}"
        return f"{stack} fits on no number of GPUs up to 65,536"
    node = cluster.gpus_per_node
    step = max(node, enough // 2 // 32 // node * node)  # at most 32 numbers
    between = range(max(gpus, enough // 2) // node * node + node, enough, step)
    more = next((more for more in between if more > gpus and _fitting(cfg, stack, cluster, more)), enough)
    best, own = _fitting(cfg, stack, cluster, more)[0], getattr(cfg, stack)
    # also the defaults that replace other values of the config
    values = getattr(best.cfg, stack)
    replaced = {key: value for key, value in values if value != getattr(own, key)}
    return f"{stack} fits on {more} GPUs: {_keys(stack, best.layout | replaced)}"


def instead(own: Prediction, cluster: Cluster) -> str:
    """What would make a layout fit that does not: the fewest other keys of its stack on as many GPUs, the fastest of those, or
    more GPUs; one line."""
    gpus = own.shared.world
    fitting = _fitting(own.cfg, own.stack, cluster, gpus)
    if not fitting:
        return needs(own.cfg, own.stack, cluster, gpus)
    system = getattr(own.cfg, own.stack)
    news = [getattr(one.cfg, own.stack) for one in fitting]
    others = [
        {key: getattr(new, key) for key in type(new).model_fields if getattr(new, key) != getattr(system, key)} for new in news
    ]
    return f"{own.stack} fits on {gpus} GPUs with {_keys(own.stack, min(others, key=len))}"


def _fitting(cfg: Config, stack: str, cluster: Cluster, gpus: int) -> list[Prediction]:
    return [one for one in search(cfg, [stack], cluster, gpus)[0] if one.fits]


def _keys(stack: str, values: dict[str, Any]) -> str:
    return ", ".join(f"{stack}.{key}={str(value).lower()}" for key, value in values.items())
