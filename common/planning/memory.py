"""Estimate of the memory that one rank needs, computed from numbers alone and without torch, before a run starts.

Model states, bytes per parameter in bf16 (ZeRO, arXiv:1910.02054, section 3.1: 2 weight, 2 gradient, 12 master and Adam):
    baseline, stage 0     16                    fp32 (4 + 4 + 8) under autocast; its bf16 copies count as activations
    deepspeed stage 1     4 + 16/N              } DeepSpeed keeps an fp32 copy of a rank's share of the gradients, hence
    deepspeed stage 2     2 + 18/N              } the 18 of its own estimators (deepspeed/runtime/zero/stage_1_and_2.py,
    deepspeed stage 3     18/N + 4 x largest    } stage3.py: estimate_zero{2,3}_model_states_mem_needs)
    megatron              18                    } gradients are accumulated in fp32 (Megatron Core user guide,
    its dist. optimizer   6 + 12/N              } "Distributed Optimizer"); in fp32 16 and 8 + 8/N
N is the number of data-parallel ranks; `largest` is the largest layer or embedding, which stage 3 gathers temporarily.

Activations of one layer and one micro batch, bytes in bf16 (Korthikanti et al., arXiv:2205.05198, table 2), with
s = seq_len, b = micro_batch, h = hidden, t = tp:
    no parallelism         34sbh
    tp                     (10 + 24/t)sbh
    tp, sequence parallel  34sbh/t
    recompute              2sbh, and one layer in full
The table's term 5as/h, the attention matrix, is left out: scaled_dot_product_attention does not store it. The formulas are
extended to other ffn widths, grouped queries, gated MLPs and fp32. With pp the first stage holds the activations of pp micro
batches (section 4.2.3).

The estimate leaves out communication buckets, workspace, the CUDA context (about half a GiB) and fragmentation.
"""

from typing import Any

from common.config import Config
from common.layout import layout_for

PARTS = ("weights", "gradients", "optimizer", "activations", "logits")


def estimate(
    *,
    stack: str,  # baseline, deepspeed or megatron
    parameters: int,  # of the whole model; tied weights count once
    layers: int,
    hidden: int,
    seq_len: int,
    vocab: int,
    micro_batch: int,
    dtype: str = "bf16",  # or fp32
    ffn: int | None = None,  # width of the MLP; default 4 x hidden
    kv_hidden: int | None = None,  # width of all keys of a token; default hidden
    gated: bool = False,  # SwiGLU
    tied: bool = True,
    predicted: float = 1.0,  # share of the positions for which logits are computed
    dropout: bool = False,
    dp: int = 1,
    tp: int = 1,
    pp: int = 1,
    accumulate: int = 1,  # micro batches per step
    zero_stage: int = 0,
    offload: bool = False,
    sequence_parallel: bool = False,
    distributed_optimizer: bool = False,
    recompute: bool = False,
) -> dict[str, int]:
    """Bytes on the rank that needs the most: weights, gradients, optimizer, activations, logits, total, host (CPU memory).

    With pp, `activations` are those of the first stage and `logits` those of the last; `total` is that of the larger stage.
    """
    width = 2 if dtype == "bf16" else 4  # bytes of a weight, gradient or activation
    embedding = vocab * hidden
    body = parameters - embedding * (1 if tied else 2)
    local = parameters // tp if pp == 1 else (body // pp + embedding) // tp  # parameters of the first stage
    host = 0

    if stack == "megatron":
        share = dp if distributed_optimizer else 1
        weights, gradients = width * local, 4 * local
        optimizer = (12 if dtype == "bf16" else 8) * local // share
    elif stack == "deepspeed" and zero_stage:
        layer = (body // layers) // tp
        largest = max(layer, embedding // tp)
        weights = width * local if zero_stage < 3 else width * (local // dp + largest)
        gradients = {1: width * local, 2: width * local // dp, 3: width * largest}[zero_stage]
        partition, optimizer = 4 * local // dp, 12 * local // dp
        if offload:
            host, optimizer = partition + optimizer, 0
        else:
            gradients += partition
    else:  # fp32 weights, gradients and moments; bf16 runs under autocast. deepspeed's stage 0 does the same
        weights, gradients, optimizer = 4 * local, 4 * local, 8 * local

    tokens = seq_len * micro_batch
    ffn, kv = ffn or 4 * hidden, kv_hidden or hidden
    whole = tokens * hidden * (4 * width + (2 if dropout else 0))  # inputs of norms, qkv, MLP; dropout masks
    split = tokens * width * (2 * hidden + 2 * kv + (4 if gated else 2) * ffn)  # q, k, v, output; MLP
    layer_bytes = (whole // tp if sequence_parallel else whole) + split // tp
    stored = tokens * hidden * width // (tp if sequence_parallel else 1) if recompute else layer_bytes
    in_flight = min(pp, max(1, accumulate))  # micro batches whose activations the first stage holds
    stage = layers // pp * stored
    activations = in_flight * stage + (layer_bytes if recompute else 0)
    autocast = stack == "baseline" or stack == "deepspeed" and not zero_stage
    if autocast and dtype == "bf16":
        activations += 2 * local  # autocast's copies of the weights live until the backward pass
    # fp32 logits (arXiv:2205.05198, section 4.3: 4sbv/t), their gradient, and in a bf16 run the model's own.
    logits = int(predicted * tokens) * vocab // tp * (8 if dtype == "fp32" else 10)

    last_stage = activations - (in_flight - 1) * stage + logits
    total = weights + gradients + optimizer + (max(activations, last_stage) if pp > 1 else activations + logits)
    return {
        "weights": weights, "gradients": gradients, "optimizer": optimizer, "activations": activations,
        "logits": logits, "total": total, "host": host,
    }  # fmt: skip


def estimate_for(cfg: Config, model: Any, stack: str, world: int) -> dict[str, int]:
    """`estimate` for a resolved model that `cfg` trains on `world` ranks. BadInput as in layout_for."""
    shared, system = layout_for(cfg, stack, world), getattr(cfg, stack)
    names = ("zero_stage", "offload", "sequence_parallel", "distributed_optimizer", "recompute")
    return estimate(
        stack=stack, parameters=model.parameter_count(), hidden=model.hidden, seq_len=cfg.data.seq_len,
        vocab=model.vocab_size, micro_batch=shared.micro_batch, dtype=cfg.train.dtype, dropout=model.dropout > 0,
        **({"layers": model.layers} | model.layer_shapes(cfg.data)),
        dp=shared.dp, tp=shared.tp, pp=shared.pp, accumulate=shared.accumulate,
        **{name: getattr(system, name) for name in names if hasattr(system, name)},
    )  # fmt: skip
