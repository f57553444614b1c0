"""Which layouts a config can have on a number of GPUs, how long a step of each takes, and which fit. Imports no torch."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from common.config import Config
from common.errors import BadInput
from common.layout import Layout, layout_for
from common.planning import memory, step_time, validation
from common.planning.hardware import Cluster
from common.planning.step_time import Plan, Software
from common.planning.workload import Workload
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
            "fits": self.fits, "days": hours / 24, "cost": None if price is None else hours * self.shared.world * price,
            "error_of_nearest": self.near[1] if self.near else None, "nearest": self.near[0] if self.near else None,
        }  # fmt: skip


def predict(cfg: Config, stack: str, cluster: Cluster, gpus: int) -> Prediction:
    """The prediction for the layout that a resolved config gives. BadInput as in layout_for."""
    shared, work = layout_for(cfg, stack, gpus), cfg.model.workload(cfg.data)
    plan, software = plan_of(cfg, stack, shared), software_of(cfg, stack, cluster, work)
    time = step_time.step_seconds(cluster, software, work, plan)
    needed = memory.estimate_for(cfg, cfg.model, stack, gpus)
    system = getattr(cfg, stack)
    return Prediction(
        stack=stack, layout=system.model_dump(exclude={"extra"}, exclude_defaults=True) | {"micro_batch": shared.micro_batch},
        shared=shared, seconds=time.total, time=vars(time), memory=needed, fits=needed["required"] <= cluster.gpu.memory,
        tokens_per_s=cfg.train.global_batch * cfg.data.sample_tokens / time.total,
        mfu_full=step_time.mfu(cluster, work, plan, time.total),
        mfu_causal=step_time.mfu(cluster, work, plan, time.total, causal=True),
        near=validation.nearest(kind_of(stack, plan), cluster, work), cfg=cfg,
    )  # fmt: skip


def plan_of(cfg: Config, stack: str, shared: Layout) -> Plan:
    """A stack's keys as those of step_time.py. BadInput for a layout whose time it does not know."""
    for key, ranks in (("cp", shared.cp), ("sp", shared.sp)):
        if ranks > 1:
            raise BadInput(
                f"{stack}.{key}={ranks}: no time is predicted for it, only memory; give {stack}.{key}=1, or no --gpu"
            )
    if getattr(getattr(cfg, stack), "pipeline_layout", "even") != "even":
        raise BadInput("megatron.pipeline_layout: no time is predicted for uneven stages, only memory; give even, or no --gpu")
    system = getattr(cfg, stack)
    width = 2 if cfg.train.dtype == "bf16" else 4
    plan: dict[str, Any] = {}
    if stack == "megatron":  # gradients are accumulated and reduced in fp32
        plan = {
            "shard": "optimizer" if system.distributed_optimizer else "none", "gradient_bytes": 4,
            "sequence_parallel": system.sequence_parallel and shared.tp > 1,
        }  # fmt: skip
    elif stack == "deepspeed" and system.zero_stage:
        shards = {1: "optimizer", 2: "gradients", 3: "parameters"}
        plan = {"shard": shards[system.zero_stage], "gradient_bytes": width, "offload": system.offload}
    else:  # fp32 weights under autocast
        plan = {"gradient_bytes": 4, "torch_ddp": True}
    recompute = "full" if system.recompute else "none"
    if stack == "megatron":  # its selective repeats the attention whatever the kernel keeps
        recompute = {"selective": "attention"}.get(granularity(system), granularity(system))
    return Plan(
        dp=shared.dp, tp=shared.tp, pp=shared.pp, vpp=getattr(system, "vpp", 1), micro_batch=shared.micro_batch,
        accumulate=shared.accumulate, recompute=recompute, **plan,
    )  # fmt: skip


def software_of(cfg: Config, stack: str, cluster: Cluster, work: Workload) -> Software:
    """The attention kernel that scaled_dot_product_attention chooses, and what the stack hides. Tensor-parallel traffic waits
    without TransformerEngine."""
    plain = all(a.causal for block in work.blocks for a in block.attention)
    kernel = "efficient"  # masks and biases
    if plain:
        kernel = "cudnn" if cfg.model.dropout == 0 and "cudnn" in cluster.gpu.attention else "fa2"
    hidden = 0.8 if stack != "megatron" or cfg.megatron.distributed_optimizer else DDP_HIDDEN
    return Software(attention=kernel, dp_hidden=hidden, ddp_hidden=DDP_HIDDEN, host=HOST)


def kind_of(stack: str, plan: Plan) -> str:
    """The kind of published rows that a plan is like (validation.Table)."""
    if plan.shard == "parameters":
        return "zero 3"
    if stack == "deepspeed" and plan.pp > 1:
        return "deepspeed pipeline"
    return "megatron" if stack == "megatron" else "data parallel"  # no published row


# ---- search ----------------------------------------------------------------------------------------------------------


def powers_of_2(limit: int) -> list[int]:
    return [2**k for k in range(limit.bit_length()) if 2**k <= limit]


def changes(cfg: Config, stack: str, gpus: int, gpus_per_node: int) -> Iterator[dict[str, Any]]:
    """The values of a stack's keys that are tried. Layouts that the model or the batch does not allow are among them."""
    keys: dict[str, Sequence[Any]] = {"recompute": (False, True)}
    if stack == "deepspeed":
        keys |= {"zero_stage": (1, 2, 3), "offload": (False, True), "tp": powers_of_2(min(gpus, gpus_per_node)), "sp": (1,)}
    if stack == "megatron":
        keys["recompute"] = ("none", "full")
        divisors = [n for n in range(1, cfg.model.layers + 1) if cfg.model.layers % n == 0]
        keys |= {
            "tp": powers_of_2(min(gpus, gpus_per_node)),
            "pp": divisors,
            "distributed_optimizer": (True,),
            "cp": (1,),
            "vpp": (1,),
            "pipeline_layout": ("even",),
        }
    for values in product(*keys.values()):
        change = dict(zip(keys, values, strict=True))
        if stack == "megatron":
            change["sequence_parallel"] = change["tp"] > 1
        parts = change.get("tp", 1) * change.get("pp", 1)
        if gpus % parts or cfg.train.global_batch % (gpus // parts):
            continue
        share = cfg.train.global_batch // (gpus // parts)  # samples per replica and step
        for micro in powers_of_2(min(share, 64)):
            if share % micro == 0:
                yield change | {"micro_batch": micro}


def search(cfg: Config, stacks: Sequence[str], cluster: Cluster, gpus: int) -> list[Prediction]:
    """Every layout of these stacks on which the resolved config can run: those that fit first, the fastest first."""
    found = []
    for stack in stacks:
        section = getattr(cfg, stack)
        for change in changes(cfg, stack, gpus, cluster.gpus_per_node):
            changed = cfg.model_copy(update={stack: section.model_copy(update=change)})
            try:
                found.append(predict(changed, stack, cluster, gpus))
            except BadInput:  # the model or the optimizer does not allow it
                continue
    return sorted(found, key=lambda one: (not one.fits, one.seconds if one.fits else one.memory["required"]))


def needs(cfg: Config, stack: str, cluster: Cluster, gpus: int) -> str:
    """The smallest number of GPUs, up to 65,536, on which a config fits that fits on none of a stack's layouts; one line."""
    for more in powers_of_2(65_536):
        if more > gpus:
            fitting = [one for one in search(cfg, [stack], cluster, more) if one.fits]
            if fitting:
                keys = ", ".join(f"{stack}.{key}={str(value).lower()}" for key, value in fitting[0].layout.items())
                return f"{stack} fits on {more} GPUs: {keys}"
    return f"{stack} fits on no number of GPUs up to 65,536"
