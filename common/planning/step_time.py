"""Seconds of a training step, predicted from shapes, layout and GPU. Numbers in, seconds out; imports no torch.

A step is m micro batches through the slowest pipeline stage, the pipeline's bubble, what is not hidden of the exchange of
gradients and weights, and the optimizer (PTD-P, arXiv:2104.04473, section 2.2):

    T = m x slowest stage + (p - 1) / v x mean stage + exposed data-parallel traffic + optimizer

The structure is fixed. docs/planner.md compares it with every published row, and names the rows on which constants were fitted.
"""

from dataclasses import dataclass, replace

from common.planning import traffic
from common.planning.hardware import Cluster, Gpu
from common.planning.workload import Block, Workload, products_of, share_of_sequence


@dataclass(frozen=True)
class Elementwise:
    """Bytes that elementwise kernels read and write in a layer, (forward, backward)."""

    whole: tuple[float, float]  # per element of the residual stream and residual block: norm, bias, dropout, sum
    ffn: tuple[float, float]  # per unit of the MLP: activation
    qkv: tuple[float, float]  # per element of queries, keys and values: copies, rotary positions
    weights: tuple[float, float] = (0.0, 0.0)  # per parameter: copies under autocast
    scores: tuple[float, float] = (0.0, 0.0)  # per score, of relative biases that are as large, and of their gradient


# Fused, as in Megatron's kernels of 2021 and its compiled functions since; the MLP's by whether it is gated
FUSED = {
    gated: Elementwise((11, 17), (6, 10) if gated else (4, 6), (4, 16 / 3))
    for gated in (False, True)
}  # fmt: skip


@dataclass(frozen=True)
class Software:
    """What the kernels and the communication library of a stack do: which attention, and the share of traffic that is hidden
    behind computation."""

    attention: str = "fa2"  # "unfused", or a kernel of Gpu.attention
    tp_hidden: float = 0.0
    pp_hidden: float = 0.0
    dp_hidden: float = 0.0
    scattered: bool = False  # tensor-parallel ranks send a part each of what pipeline stages exchange (PTD-P, section 4.1)
    ddp_hidden: float = 0.8  # torch's DistributedDataParallel, without pipeline
    host: float = 0.0  # seconds that the CPU needs to launch a layer's forward pass; 1.5 x that backward
    elementwise: Elementwise | None = None  # default: FUSED
    loss: float = 24.0  # bytes per logit that the cross entropy reads and writes, several passes in fp32


# Megatron-LM of 2021: attention as separate kernels; its own data parallelism reduced gradients after the backward pass.
MEGATRON_2021 = Software(attention="unfused", scattered=True)
# Megatron Core with TransformerEngine, as in the H100 table. tp_hidden is fitted on that table; the others are set.
MEGATRON_TE = Software(attention="cudnn", tp_hidden=1.0, pp_hidden=0.9, dp_hidden=0.9)
# Eager PyTorch: about 1.0 ms of the CPU per layer (seen in 2023). That is why small models do not scale.
EAGER = Software(attention="fa2", dp_hidden=0.8, host=1.0e-3)


@dataclass(frozen=True)
class Plan:
    """How the ranks share a step."""

    dp: int = 1
    tp: int = 1
    pp: int = 1
    vpp: int = 1  # model chunks per pipeline stage
    cp: int = 1  # ranks that share each sequence and gather its keys and values
    sp: int = 1  # ranks that share each sequence and exchange positions for heads (Ulysses)
    micro_batch: int = 1  # samples
    accumulate: int = 1  # micro batches per step and replica
    sequence_parallel: bool = False
    recompute: str = "none"  # "none", "selective" (the scores, if the kernel keeps them), "attention" (all of it) or "full"
    shard: str = "none"  # none, optimizer (ZeRO 1, distributed optimizer), gradients (ZeRO 2), parameters (ZeRO 3, FSDP2)
    gradient_bytes: int = 2  # per parameter, as they are reduced
    width: int = 2  # bytes of a weight or an activation that is exchanged
    torch_ddp: bool = False  # gradients are reduced by torch's DDP
    all_reduced: bool = False  # ZeRO 1 and 2 all-reduce small models' gradients, of which each rank then keeps its share
    kept: int = 0  # parameters that ZeRO 3 or FSDP2 gathers once for forward and backward pass
    offload: str = "none"  # what is in the memory of the host: "optimizer", which steps there, or "all", also the weights
    # stages sum the gradient of a tied embedding. Of DeepSpeed's pipeline; the constants of Megatron's were fitted without it
    sums_embedding: bool = False
    layers_of_stages: tuple[int, ...] = ()  # of a pipeline with uneven stages; default: even

    @property
    def world(self) -> int:
        return self.dp * self.tp * self.pp * self.cp * self.sp

    @property
    def copies(self) -> int:
        """Ranks that hold copies of the same parameters: between them gradients are reduced, and states divided."""
        return self.dp * self.cp * self.sp

    @property
    def global_batch(self) -> int:
        """Samples per step."""
        return self.dp * self.micro_batch * self.accumulate


# ---- kernels ---------------------------------------------------------------------------------------------------------

HBM_SHARE = 0.80  # of the bandwidth that elementwise kernels reach. Calculon's table 0.75 to 0.90 from 10 MB on; SimuMax 0.91
BUS_SHARE = (
    0.75  # of a link that a collective reaches. SimuMax measures 0.67 to 0.74 over NVLink; Calculon assumes 0.65 and 0.9
)
WEIGHT_GRADIENT = 1.05  # time of a weight gradient's product / that of the same shape forward (SimuMax's A100 products)


def gemm(gpu: Gpu, m: float, n: float, k: float) -> float:
    """Seconds of a product (m, k) x (k, n)."""
    a, b, c = gpu.gemm_sizes
    return 2.0 * m * n * k / (gpu.peak * gpu.gemm) * (1 + a / m) * (1 + b / n) * (1 + c / k)


def linear(gpu: Gpu, m: float, n: float, k: float) -> tuple[float, float]:
    """Seconds (forward, backward) of a linear layer: m tokens, k inputs, n outputs."""
    return gemm(gpu, m, n, k), gemm(gpu, m, k, n) + WEIGHT_GRADIENT * gemm(gpu, k, n, m)


def memory_bound(gpu: Gpu, size: float) -> float:
    """Seconds in which an elementwise kernel moves `size` bytes."""
    return size / (gpu.hbm * HBM_SHARE)


def collectives(sizes: traffic.Bytes, ranks: int, bandwidth: float) -> float:
    """Seconds of rings, one after the other: an all-reduce moves 2 (n - 1) / n of its bytes per rank; a gather, a scatter and
    an all-to-all half of that."""
    if ranks == 1:
        return 0.0
    moved = sum((2 if kind == "all_reduce" else 1) * size for kind, size in sizes.items())
    return moved * (ranks - 1) / ranks / (bandwidth * BUS_SHARE)


@dataclass(frozen=True)
class Seconds:
    """Seconds by what takes them."""

    gemm: float = 0.0
    attention: float = 0.0
    elementwise: float = 0.0
    logits: float = 0.0  # output layer and cross entropy
    tensor_parallel: float = 0.0  # exposed traffic
    context_parallel: float = 0.0  # exposed traffic of cp or sp
    pipeline_traffic: float = 0.0
    bubble: float = 0.0
    data_parallel: float = 0.0
    optimizer: float = 0.0
    host: float = 0.0  # the GPU waits for the CPU

    @property
    def total(self) -> float:
        return sum(vars(self).values())

    def __add__(self, other: "Seconds") -> "Seconds":
        return Seconds(**{name: value + vars(other)[name] for name, value in vars(self).items()})

    def __mul__(self, factor: float) -> "Seconds":
        return Seconds(**{name: value * factor for name, value in vars(self).items()})


# ---- one layer, one micro batch --------------------------------------------------------------------------------------


def attention(gpu: Gpu, software: Software, block: Block, plan: Plan) -> tuple[float, float]:
    """Seconds (forward, backward) of scores, softmax and weighted sum of a micro batch, on one tensor-parallel rank."""
    forward = backward = 0.0
    for one in block.attention:
        pairs = plan.micro_batch * one.queries * one.keys / plan.tp
        flops = 4.0 * pairs * block.inner
        if software.attention == "unfused" or software.attention not in gpu.attention:
            # separate kernels: 13 bytes per score forward (write, softmax in and out, dropout in and out and its mask, read),
            # 19 backward; the two products at 0.6 of the peak
            scores = pairs * block.heads
            forward += memory_bound(gpu, 13 * scores) + flops / (0.6 * gpu.peak)
            backward += memory_bound(gpu, 19 * scores) + 2 * flops / (0.6 * gpu.peak)
        else:
            # A causal kernel skips half of the pairs. Backward: 2.5 x the FLOPs at 0.8 of the rate (arXiv:2407.08608, sec. 4)
            done = flops * (0.5 * CAUSAL_LOSS if one.causal else 1.0) / gpu.attention[software.attention]
            forward += done
            backward += done * 2.5 / 0.8
    return forward, backward


CAUSAL_LOSS = 609 / 480  # a causal cuDNN kernel does its half of the work at 480 of 609 TFLOP/s (arXiv:2407.08608, figure 5)


def layer(cluster: Cluster, software: Software, block: Block, plan: Plan) -> tuple[Seconds, Seconds]:
    """Seconds (forward, backward) of one layer and micro batch, without recomputation."""
    gpu, t, h = cluster.gpu, plan.tp, block.hidden
    tokens = block.tokens * plan.micro_batch
    products = [linear(gpu, m * plan.micro_batch, n, k) for m, n, k in products_of(block, t)]
    blocks = len(block.attention) + 1  # residual blocks of the layer
    per = software.elementwise or FUSED[block.gated]
    whole = blocks * h / (t if plan.sequence_parallel else 1)  # elements per token
    qkv = (block.inner + 2 * block.kv_inner) * len(block.attention)
    pairs = plan.micro_batch * sum(a.queries * a.keys for a in block.attention) * block.heads / t
    moved = [
        pairs * per.scores[i]
        + tokens * (per.whole[i] * whole + (per.ffn[i] * block.ffn + per.qkv[i] * qkv) / t)
        + per.weights[i] * block.parameters / t
        for i in (0, 1)
    ]
    scores = attention(gpu, software, block, plan)
    sizes = traffic.tensor_parallel(plan.width * tokens * h, blocks, plan.sequence_parallel)
    waits = collectives(sizes, t, cluster.bandwidth(t, 1)) * (1 - software.tp_hidden)
    exchanged = sequence_traffic(cluster, block, plan)
    forward = Seconds(
        gemm=sum(f for f, _ in products), attention=scores[0], tensor_parallel=waits,
        context_parallel=exchanged, elementwise=memory_bound(gpu, moved[0]),
    )  # fmt: skip
    backward = Seconds(
        gemm=sum(b for _, b in products), attention=scores[1], tensor_parallel=waits,
        context_parallel=exchanged, elementwise=memory_bound(gpu, moved[1]),
    )  # fmt: skip
    return (
        replace(forward, host=max(0.0, software.host - forward.total)),
        replace(backward, host=max(0.0, 1.5 * software.host - backward.total)),
    )


def sequence_traffic(cluster: Cluster, block: Block, plan: Plan) -> float:
    """Seconds that the ranks of a sequence exchange activations in a layer's forward pass, and again in its backward pass.

    Nothing hides them.
    """
    positions = block.tokens * plan.micro_batch  # of this rank
    seconds = 0.0
    if plan.cp > 1:
        sizes = traffic.context_parallel(block, positions, plan.width, plan.tp, plan.cp)
        seconds += collectives(sizes, plan.cp, cluster.bandwidth(plan.cp, plan.tp))
    if plan.sp > 1:
        sizes = traffic.ulysses(block, positions, plan.width, plan.tp)
        seconds += collectives(sizes, plan.sp, cluster.bandwidth(plan.sp, plan.tp))
    return seconds


def output_layer(gpu: Gpu, work: Workload, plan: Plan, loss: float) -> float:
    """Seconds of logits and cross entropy of a micro batch, forward and backward."""
    tokens, ids = work.logit_tokens * plan.micro_batch, work.vocab / plan.tp
    seconds = sum(linear(gpu, tokens, ids, work.hidden)) + memory_bound(gpu, loss * tokens * ids)
    if work.head_matrices:
        seconds += sum(linear(gpu, tokens, work.head_matrices / work.hidden, work.hidden))
    return seconds


# ---- a step ----------------------------------------------------------------------------------------------------------

# read and written per parameter: gradient, master, two moments, weight, and the norm's pass; in fp32 no master, but clipping
OPTIMIZER_BYTES, FP32_OPTIMIZER_BYTES = 46, 40


@dataclass(frozen=True)
class Constants:
    """Of ZeRO 3 and FSDP. Both are fitted on the six ZeRO-3 rows of PTD-P's table 2."""

    sharded_network: float = 0.77  # share of one network card's rate that a GPU gets, however many GPUs there are
    sharded_exposed: float = 0.47  # share of the shorter of computation and traffic that is not hidden


CONSTANTS = Constants()


def step_seconds(cluster: Cluster, software: Software, work: Workload, plan: Plan, constants: Constants = CONSTANTS) -> Seconds:
    """Seconds of an optimizer step on the rank that takes longest."""
    work = share_of_sequence(work, plan.cp * plan.sp)
    micro = Seconds()  # the layers of all stages, one micro batch, forward and backward
    for block in work.blocks:
        forward, backward = layer(cluster, software, block, plan)
        if plan.recompute == "full" or plan.shard == "parameters" and plan.recompute != "none":
            backward = backward + forward
        elif plan.recompute == "attention":
            backward = backward + Seconds(attention=forward.attention, context_parallel=forward.context_parallel)
        elif plan.recompute == "selective" and software.attention == "unfused":
            scores = sum(a.queries * a.keys for a in block.attention) * plan.micro_batch * block.heads / plan.tp
            backward = backward + Seconds(attention=memory_bound(cluster.gpu, 13 * scores))
        micro = micro + (forward + backward) * block.count
    head = output_layer(cluster.gpu, work, plan, software.loss)
    sent = 0.0
    if plan.pp > 1:  # an activation and its gradient at each boundary, for each chunk
        activation = plan.width * work.blocks[0].tokens * plan.micro_batch * work.hidden
        size = traffic.boundary(activation, plan.tp, plan.sequence_parallel or software.scattered)
        sent = 2 * plan.vpp * size / (stage_bandwidth(cluster, plan) * BUS_SHARE) * (1 - software.pp_hidden)
    layers = plan.layers_of_stages or (1,) * plan.pp
    stages = [replace(micro * (max(layers) / sum(layers)), pipeline_traffic=sent)]  # the largest, and the last
    stages.append(replace(micro * (layers[-1] / sum(layers)), pipeline_traffic=sent, logits=head))
    mean = (micro.total + head) / plan.pp + sent
    step = max(stages, key=lambda stage: stage.total) * plan.accumulate
    step = replace(step, bubble=(plan.pp - 1) / plan.vpp * mean, optimizer=_optimizer(cluster.gpu, work, plan))
    compute = step.total - step.optimizer - step.bubble
    return replace(step, data_parallel=_data_parallel(cluster, software, work, plan, constants, compute))


def stage_bandwidth(cluster: Cluster, plan: Plan) -> float:
    """Bytes/s at which a rank sends to its neighbour in the pipeline."""
    return cluster.bandwidth(2, plan.tp * plan.cp * plan.dp)


def rank_parameters(work: Workload, plan: Plan) -> float:
    """Parameters of the fullest rank: its layers and an embedding."""
    outside, stages = work.vocab * work.hidden + work.head_matrices, plan.layers_of_stages
    if not stages:
        return (work.body / plan.pp + outside) / plan.tp
    ends = (0, len(stages) - 1)
    return max(work.body * layers / sum(stages) + outside * (n in ends) for n, layers in enumerate(stages)) / plan.tp


def _optimizer(gpu: Gpu, work: Workload, plan: Plan) -> float:
    parameters = rank_parameters(work, plan) / (1 if plan.shard == "none" else plan.copies)
    if gpu.is_cpu:
        return FP32_OPTIMIZER_BYTES * parameters / (gpu.host_memory * HBM_SHARE)
    if plan.offload != "none":  # gradients to the host and weights back, and the step at the speed of the host's memory
        return 4 * parameters / (gpu.pcie * BUS_SHARE) + OPTIMIZER_BYTES * parameters / (gpu.host_memory * HBM_SHARE)
    return memory_bound(gpu, OPTIMIZER_BYTES * parameters)


def _data_parallel(
    cluster: Cluster, software: Software, work: Workload, plan: Plan, constants: Constants, compute: float
) -> float:
    """Seconds of exposed traffic of gradients and weights per step. compute: seconds of forward and backward passes."""
    ranks, tied = plan.copies, 0.0
    if plan.sums_embedding:
        shared = traffic.tied_embedding(work.vocab / plan.tp, work.hidden, plan.gradient_bytes)
        tied = collectives(shared, 2, stage_bandwidth(cluster, plan))
    if ranks == 1:
        return tied
    size, rate = rank_parameters(work, plan), cluster.bandwidth(ranks, plan.tp)
    kept = min(size, plan.kept)
    sizes = traffic.replicas(size, plan.shard, plan.gradient_bytes, plan.width, plan.accumulate, plan.all_reduced, kept)
    if plan.shard == "parameters":
        # weights are gathered for the forward and the backward pass, gradients scattered, in every micro batch
        inside = ranks * plan.tp <= cluster.gpus_per_node
        card = cluster.gpu.network if cluster.network is None else cluster.network
        moved = sum(sizes.values()) / (cluster.gpu.nvlink * BUS_SHARE if inside else card * constants.sharded_network)
        if plan.offload == "all":  # a rank's share of the weights comes over PCIe each time that they are gathered
            moved += sizes["all_gather"] / ranks / (cluster.gpu.pcie * BUS_SHARE)
        return max(compute, moved) + constants.sharded_exposed * min(compute, moved) - compute
    hidden = software.ddp_hidden if plan.torch_ddp else software.dp_hidden
    return tied + collectives(sizes, ranks, rate) * (1 - hidden)


def mfu(cluster: Cluster, work: Workload, plan: Plan, seconds: float, causal: bool = False, recomputed: bool = False) -> float:
    """Model FLOP utilization, 0 to 1 (PaLM, arXiv:2204.02311, appendix B). recomputed: as in Workload.flops."""
    return work.flops(causal, recomputed) * plan.global_batch / plan.world / seconds / cluster.gpu.peak
