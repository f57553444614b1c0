"""How the processes of a run share one step: data, tensor and pipeline parallel, micro batches. Torch-free."""

import math
from collections.abc import Iterator, Sequence

from common.config import Config, DeepSpeed, Section
from common.errors import BadInput
from common.stacks import pipeline


class Layout(Section):
    """How `world` ranks share one step."""

    world: int
    dp: int  # data-parallel replicas
    tp: int  # ranks that share each layer's matrices
    pp: int  # pipeline stages
    vpp: int = 1  # chunks of layers per pipeline stage
    cp: int = 1  # ranks that share each sequence, by context parallelism
    sp: int = 1  # ranks that share each sequence, by DeepSpeed's Ulysses
    micro_batch: int  # samples
    accumulate: int  # micro batches per step and replica

    @property
    def shares(self) -> str:
        """'8 ranks = 2 dp x 2 tp x 1 pp x 2 cp, 4 micro batches of 1'"""
        sequence = "".join(f" x {ranks} {key}" for key, ranks in (("cp", self.cp), ("sp", self.sp)) if ranks > 1)
        chunks = f" of {self.vpp} chunks" if self.vpp > 1 else ""
        ranks = f"{self.world} rank{'s' * (self.world > 1)} = {self.dp} dp x {self.tp} tp x {self.pp} pp{chunks}{sequence}"
        return f"{ranks}, {self.accumulate} micro batch{'es' * (self.accumulate > 1)} of {self.micro_batch}"

    @property
    def group(self) -> int:
        """Micro batches that run together: their number on a replica is a multiple of it, in evaluations too."""
        return self.pp if self.vpp > 1 else 1


MODEL_PARALLEL = ("tp", "pp", "cp", "sp")  # keys of a stack that divide one replica of the model among ranks


def layout_for(cfg: Config, stack: str, world: int) -> Layout:
    """The layout of `stack` on `world` ranks; BadInput if the batch or the ranks do not divide. Torch-free."""
    system = getattr(cfg, stack)
    splits = {key: getattr(system, key, 1) for key in MODEL_PARALLEL}
    replica = math.prod(splits.values())  # ranks that share one micro batch
    product = " x ".join(f"{stack}.{key}={ranks}" for key, ranks in splits.items() if ranks > 1)
    problems = [*cfg.model.layout_problems(cfg, stack), *_optimizer_problems(cfg, stack)]
    if stack == "deepspeed":
        from common.stacks import host

        problems += [*host.problems(system), *_second_copy_problems(system, world)]
    if replica > world:
        lower = " or ".join(key for key, ranks in splits.items() if ranks > 1)
        problems.append(
            f"{product} needs {replica} processes and there are {world}; set NPROC={replica} (or more nodes), or lower {lower}"
        )
    elif world % replica:
        problems.append(f"{world} processes are not a multiple of {product}")
    dp = max(1, world // replica)
    batch, micro = cfg.train.global_batch, system.micro_batch
    if batch % (micro * dp):
        below, above = batch // (micro * dp) * micro * dp, -(-batch // (micro * dp)) * micro * dp
        batches = f"train.global_batch may be {f'{below} or ' if below else ''}{above}"
        problems.append(
            f"train.global_batch={batch} is not a multiple of {stack}.micro_batch={micro} x {dp} data-parallel ranks; "
            + (f"{stack}.micro_batch may be {fit}" if (fit := _divisors(batch, dp)) else f"{batches}, or change NPROC")
        )
    vpp = getattr(system, "vpp", 1)
    if not problems and (problem := pipeline.micro_batch_problem(system, batch // (micro * dp)) if vpp > 1 else None):
        problems.append(problem)
    if problems:
        raise BadInput(problems)
    return Layout(world=world, dp=dp, **splits, vpp=vpp, micro_batch=micro, accumulate=batch // (micro * dp))


def fitting(cfgs: Sequence[Config], stack: str, worlds: Sequence[int]) -> list[int]:
    """Those numbers of ranks with which each of these configs, the phases of a run, has a layout."""

    def fits(world: int) -> bool:
        try:
            return all(layout_for(cfg, stack, world) for cfg in cfgs)
        except BadInput:
            return False

    return [world for world in worlds if fits(world)]


def sequence_multiple(cfg: Config, stack: str) -> int:
    """Of what the length of a sequence must be a multiple: megatron.cp cuts it into 2 x cp chunks, of which each rank has two,
    and megatron.sequence_parallel cuts what a rank has into tp."""
    system = getattr(cfg, stack)
    cp, tp = getattr(system, "cp", 1), getattr(system, "tp", 1) if getattr(system, "sequence_parallel", False) else 1
    return int(cp * math.lcm(2 if cp > 1 else 1, tp))


def sequence_problems(cfg: Config, stack: str) -> Iterator[str]:
    """A data.seq_len that the ranks cannot share."""
    multiple, length = sequence_multiple(cfg, stack), cfg.data.seq_len
    if length % multiple == 0:
        return
    system = getattr(cfg, stack)
    if getattr(system, "cp", 1) == 1:
        yield f"{stack}.sequence_parallel=true: {stack}.tp={system.tp} does not divide data.seq_len={length}"
        return
    below, above = length // multiple * multiple, -(-length // multiple) * multiple
    tp = f" and {stack}.tp={system.tp} with sequence_parallel" if system.sequence_parallel and system.tp > 1 else ""
    yield (
        f"{stack}.cp={system.cp}{tp} needs a multiple of {multiple} and data.seq_len={length}; give "
        f"{f'{below} or ' if below else ''}{above}"
    )


# Optimizers that read a whole parameter: a layout that splits parameters cannot update them exactly.
WHOLE = {
    "lamb": "scales each parameter's update by the norms of the whole parameter",
    "adafactor": "keeps the mean squares of the rows and columns of the whole parameter, and scales by its root mean square",
}


def _optimizer_problems(cfg: Config, stack: str) -> Iterator[str]:
    name, system = cfg.optim.optimizer, getattr(cfg, stack)
    if name not in WHOLE:
        return
    instead = "use deepspeed.zero_stage=0, the baseline, or optim.optimizer=adamw"
    if stack == "megatron":
        yield (
            f"optim.optimizer={name} on megatron: it {WHOLE[name]}, and Megatron's layers fuse query, key and value into one "
            f"parameter and tensor parallelism splits it; {instead}"
        )
    elif stack == "baseline" and system.shard == "full":
        yield (
            f"optim.optimizer={name} with baseline.shard=full: it {WHOLE[name]}, and FSDP2 leaves each rank some of its rows; "
            "use baseline.shard=none or optim.optimizer=adamw"
        )
    elif stack == "deepspeed" and system.zero_stage:
        yield (
            f"optim.optimizer={name} with deepspeed.zero_stage={system.zero_stage}: it {WHOLE[name]}, and ZeRO steps flat "
            f"partitions; {instead}"
        )
    elif stack == "deepspeed" and system.tp > 1:
        yield f"optim.optimizer={name} with deepspeed.tp={system.tp}: it {WHOLE[name]}; use deepspeed.tp=1"


def _second_copy_problems(system: DeepSpeed, world: int) -> Iterator[str]:
    """Ranks that deepspeed.hpz cannot divide into groups (deepspeed/utils/groups.py, _create_zero_param_parallel_group)."""
    if system.hpz > 1 and world % system.hpz:
        yield f"{world} processes are not a multiple of deepspeed.hpz={system.hpz}; change NPROC, or deepspeed.hpz"


def _divisors(batch: int, dp: int) -> str:
    """'1, 2 or 4': the micro batches that fit, the smallest 16 and the largest."""
    share, rest = divmod(batch, dp)
    if rest:
        return ""
    small = [m for m in range(1, math.isqrt(share) + 1) if share % m == 0]
    fit = [str(m) for m in sorted({*small, *(share // m for m in small)})]
    if len(fit) > 17:
        fit[16:-1] = ["..."]
    return " or ".join([", ".join(fit[:-1]), fit[-1]]) if len(fit) > 1 else fit[0]
