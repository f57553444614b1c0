"""Estimate of the memory that one GPU needs, computed from numbers alone and without torch, before a run starts.

The peak of PyTorch's allocator is the largest of a few moments of a step: the end of the forward pass, the backward pass of the
output weights, that of a layer, the optimizer's step. `estimate` adds up what is alive at each. Formulas, bytes in bf16:

Model states per parameter (ZeRO, arXiv:1910.02054, section 3.1: 2 weight, 2 gradient, 12 master and Adam), on N
data-parallel ranks:
    baseline, stage 0     16                    fp32 (4 + 4 + 8) under autocast
    baseline, shard=full  16/N                  and the parameters that are gathered
    deepspeed stage 1     4 + 12/N              } deepspeed/runtime/zero/stage_1_and_2.py, stage3.py: gradients in bf16,
    deepspeed stage 2     2 + 14/N              } accumulated whole at stage 1, in a rank's share at stages 2 and 3
    deepspeed stage 3     16/N                  } and the parameters that are gathered
    megatron              18                    } gradients are accumulated in fp32 (Megatron Core user guide,
    its dist. optimizer   6 + 12/N              } "Distributed Optimizer"); in fp32 16 and 8 + 8/N

Activations of one layer and one micro batch (Korthikanti et al., arXiv:2205.05198, table 2), with s = seq_len,
b = micro_batch, h = hidden, t = tp:
    no parallelism         34sbh
    tp                     (10 + 24/t)sbh
    tp, sequence parallel  34sbh/t
    recompute              2sbh (megatron.recompute=selective saves the attention's logarithms alone)
The table's term 5as/h, the attention matrix, is left out: scaled_dot_product_attention does not store it. `attention` and
`mlp` extend these formulas to other widths, grouped queries, gated MLPs, RMSNorm, cross attention, relative biases, fp32, and
to the copies that the `transformers` classes make.

docs/memory.md has the estimates beside the peaks that scripts/simulate.py finds; tests/test_memory.py compares them, and
published values.
"""

from dataclasses import dataclass, replace
from typing import Any

from common.config import Config
from common.errors import BadInput
from common.layout import layout_for
from common.planning.workload import Block, Workload, share_of_sequence
from common.stacks import extra, pipeline, stages

# What is alive at the peak of the allocator, and what a GPU must have beside it
PARTS = ("weights", "gradients", "optimizer", "buffers", "activations")
BESIDE = ("unused", "context", "nccl")


@dataclass(frozen=True, kw_only=True)
class Traits:
    """How the layers of a model are computed, where it takes memory."""

    rms_norm: bool = False  # RMSNorm
    rotary: bool = False  # rotary positions
    fused_qkv: bool = False  # the transformers class has one product for queries, keys and values
    biases: bool = False  # of linear layers
    relative_biases: bool = False  # T5's, which are added to the scores
    inner_dropout: bool = False  # T5 drops units of the MLP too
    relu: bool = False
    python_gelu: bool = False  # the transformers class computes GELU by several operators


@dataclass(frozen=True, kw_only=True)
class Training:
    """How a stack trains the model."""

    stack: str  # baseline, deepspeed or megatron
    parameters: int  # of the whole model; tied weights count once
    micro_batch: int
    accumulate: int = 2  # micro batches per step
    dtype: str = "bf16"  # or fp32
    optimizer: str = "adamw"  # lamb or adafactor
    dropout: bool = False
    dp: int = 1
    tp: int = 1
    sp: int = 1  # ranks that share each sequence (DeepSpeed's Ulysses); they are counted in dp too, as they divide the states
    pp: int = 1
    cp: int = 1
    vpp: int = 1  # chunks of layers of a pipeline stage (interleaved schedule)
    stages: tuple[int, ...] = ()  # layers of each pipeline stage, if they are not equal; of DeepSpeed's always
    shard: str = "none"  # or full: the baseline by FSDP2
    zero_stage: int = 0
    offload: str = "none"  # or what is in CPU memory: optimizer, its state, or all, the weights too
    sequence_parallel: bool = False
    distributed_optimizer: bool = False
    recompute: bool = False  # of whole layers
    recompute_attention: bool = False  # of the attention alone
    transformer_engine: bool = False
    fusions: bool = True  # megatron.fusions, the default on a GPU

    @property
    def zero(self) -> int:
        return self.zero_stage if self.stack == "deepspeed" else 0

    @property
    def frees_gradients(self) -> bool:
        """Does a rank hold no gradients between steps? DDP's buckets stay, and so do Megatron's."""
        return self.stack == "baseline" and (self.is_sharded or self.dp == 1)

    @property
    def is_sharded(self) -> bool:
        return self.shard == "full"

    @property
    def autocast(self) -> bool:
        """fp32 weights and residual stream, whose products are computed from bf16 copies: the baseline, DeepSpeed's stage 0."""
        return self.dtype == "bf16" and self.stack != "megatron" and not self.zero and not self.is_sharded

    @property
    def fused(self) -> bool:
        """Is what lies between two products compiled?"""
        return self.stack == "megatron" and (self.fusions or self.transformer_engine)

    @property
    def width(self) -> int:
        """Bytes of an element of a product."""
        return 2 if self.dtype == "bf16" else 4

    @property
    def residual(self) -> int:
        """Bytes of an element of the residual stream, and of its gradient."""
        return 4 if self.autocast else self.width

    @property
    def whole(self) -> int:
        """Ranks that share what tensor parallelism alone leaves whole: norms, dropout, the residual stream."""
        return self.tp if self.sequence_parallel else 1


# ---- model states ----------------------------------------------------------------------------------------------------


def states(run: Training, parameters: int) -> dict[str, int]:
    """weights, gradients and optimizer on a rank that holds `parameters`, and host, the same in CPU memory."""
    moments = {"adamw": 8, "lamb": 8, "adafactor": 0}[run.optimizer]  # Adafactor keeps means of rows and columns: 0.1 %
    if run.zero:  # its masters are fp32 copies, in fp32 too
        share = parameters // run.dp
        # else each is reduced, and freed, as soon as it is there
        whole_gradients = run.zero == 1 and (run.accumulate > 1 or run.pp > 1)
        at_once = run.zero == 1 or run.zero == 3 and run.offload != "none"  # accumulated in CPU memory
        on_host = run.width * share if run.offload == "all" else 0
        return {
            "weights": 0 if on_host else run.width * (share if run.zero == 3 else parameters),
            "gradients": run.width * (parameters if whole_gradients else 0 if at_once else share),
            "optimizer": 12 * share if run.offload == "none" else 0,
            "host": 0 if run.offload == "none" else 16 * share + on_host,
        }  # fmt: skip
    if run.stack == "megatron":
        master = 4 if run.dtype == "bf16" else 0
        optimizer = (master + moments) * parameters // (run.dp * run.cp if run.distributed_optimizer else 1)
        return {"weights": run.width * parameters, "gradients": 4 * parameters, "optimizer": optimizer, "host": 0}
    share = parameters // run.dp if run.is_sharded else parameters
    return {"weights": 4 * share, "gradients": 4 * share, "optimizer": moments * share, "host": 0}


# ---- activations -----------------------------------------------------------------------------------------------------


def norm(traits: Traits, run: Training, values: int, readers: int) -> int:
    """A norm's input and its output, `values` numbers each, which the products that read it keep. Under autocast each of these
    `readers` has a bf16 copy of its own."""
    inputs, outputs = run.residual, run.width * (readers if run.autocast else 1)
    if traits.rms_norm and run.stack != "megatron":  # in transformers several operators
        if run.residual == 2:
            inputs = 6 if traits.relative_biases else 4  # in fp32 (LlamaRMSNorm, T5LayerNorm), and T5's in bf16 too
        outputs += run.residual  # the quotient, before it is multiplied by the weight
    return values * (inputs + outputs) // run.whole


def attention(block: Block, traits: Traits, run: Training, queries: int, keys: int, cross: bool = False) -> int:
    """An attention of `queries` to `keys` positions per sample, with its norm."""
    tokens, sources = run.micro_batch * queries, run.micro_batch * keys
    kept = 2 * block.inner * tokens + 2 * block.kv_inner * sources  # queries and output, keys and values
    if traits.rotary and run.stack == "megatron":  # the values are a view of the product: all of it stays, and what is rotated
        kept += block.inner * tokens + block.kv_inner * sources
    if run.cp > 1:
        kept = divided_attention(block, traits, run, tokens, sources)
    if traits.relative_biases and run.stack != "megatron":
        kept += masked_biases(block, run, queries, keys)
    if run.sp > 1:  # what the ranks exchange after the attention is kept on both sides
        kept += block.inner * tokens
    split = run.width * kept + (
        0 if run.recompute_attention else 4 * block.heads * tokens
    )  # the logarithm of each softmax's sum
    values = tokens * block.hidden
    whole = norm(traits, run, values, 1 if traits.fused_qkv or cross else 3) + run.dropout * values // run.whole
    if cross and run.autocast:
        whole += 2 * run.width * sources * block.hidden  # copies of the encoder's output for keys and for values
    return whole + split // run.tp


def divided_attention(block: Block, traits: Traits, run: Training, tokens: int, sources: int) -> int:
    """Numbers that an attention with megatron.cp keeps (SdpaAttention of common/stacks/mcore.py): of its own tokens the
    queries and the output, of all tokens, `sources`, the keys and values, which are gathered as a copy."""
    own = block.inner * tokens  # rotated queries; else the queries are a view of the product, and all of it stays
    if not traits.rotary or run.recompute_attention:
        own += 2 * block.kv_inner * tokens
    if run.recompute_attention:  # nothing is kept of what it gathers, but what is rotated
        return own + block.inner * tokens + (block.inner + block.kv_inner) * tokens * traits.rotary
    outputs = 2 if block.attention[0].causal else 1  # of each chunk, and both together
    return own + outputs * block.inner * tokens + 2 * block.kv_inner * sources


def masked_biases(block: Block, run: Training, queries: int, keys: int) -> int:
    """Numbers in relative biases with the mask, aligned: one tensor of transformers in each layer, of megatron for all."""
    return run.micro_batch * block.heads * queries * -(-keys // 8) * 8


def mlp(block: Block, traits: Traits, run: Training) -> int:
    """An MLP with its norm."""
    tokens, inner_dropout = run.micro_batch * block.tokens, traits.inner_dropout and run.dropout
    if run.fused:  # what torch's partitioner keeps of the function between the two products: its input, or signs, its result
        width = run.width * (3 if block.gated else 1 if traits.relu else 2) + traits.relu + inner_dropout
    elif block.gated:  # both halves of the first product, the activation, their product
        width = 4 * run.width + inner_dropout * (run.width + 1)
    else:  # the first product and the activation; ReLU keeps its result alone
        width = run.width * (1 if traits.relu else 2) + inner_dropout * (run.width + 1)
    if traits.python_gelu and run.stack != "megatron":
        width += 4 * run.residual - run.width
    values = tokens * block.hidden
    whole = norm(traits, run, values, 2 if block.gated else 1) + run.dropout * values // run.whole
    return whole + tokens * block.ffn * width // run.tp


def layer(block: Block, traits: Traits, run: Training) -> int:
    """What a layer keeps of a micro batch from its forward to its backward pass."""
    over_itself, *cross = block.attention
    kept = attention(block, traits, run, over_itself.queries, over_itself.keys) + mlp(block, traits, run)
    return kept + sum(attention(block, traits, run, one.queries, one.keys, cross=True) for one in cross)


def layer_backward(block: Block, traits: Traits, run: Training) -> int:
    """What the backward pass of a layer needs at its peak, the second product of its MLP, beside what was kept: gradients of
    its output, its input and its weight. The layer's own input waits for the gradient that passes by."""
    values = run.micro_batch * block.tokens * block.hidden
    gradients = values * (run.residual + run.dropout * run.width) // run.whole
    gathered = values * run.width if run.whole > 1 else 0
    inner = run.micro_batch * block.tokens * block.ffn * run.width * (2 if block.gated else 1) // run.tp
    weight = 0 if run.transformer_engine else block.hidden * block.ffn * run.width // run.tp  # else added to fp32 at once
    product = gathered + inner + weight
    rows = rows_sum_buffer(run.micro_batch * block.tokens, block.ffn // run.tp) if traits.biases else 0
    return gradients + max(product, rows)


def rows_sum_buffer(rows: int, columns: int) -> int:
    """What torch needs to add up the rows of a matrix on an H100, as for a bias's gradient: a partial sum per thread
    (aten/src/ATen/native/cuda/Reduce.cuh, setReduceConfig and global_memory_size: 132 x 16 blocks of 32 x 4 threads, each
    for four columns)."""
    blocks = max(min(-(-132 * 16 // -(-columns // 128)), -(-rows // 64)), -(-rows // 1024))
    return 4 * columns * 32 * 4 * blocks


def ends(work: Workload, traits: Traits, run: Training) -> int:
    """What is kept outside the layers: the dropout of the embeddings, and the norm after the last layer."""
    values = [run.micro_batch * block.tokens * block.hidden for block in work.blocks]
    kept = sum(norm(traits, run, size, 1) + run.dropout * size // run.whole for size in values)
    if traits.relative_biases and run.stack == "megatron":
        encoder = work.blocks[0]
        kept += run.width * masked_biases(encoder, run, encoder.tokens, encoder.tokens) // run.tp
    return kept


def logits(work: Workload, traits: Traits, run: Training) -> int:
    """Logits, over which their gradient is written (common/training/loss.py, common/stacks/fusions.py). AutoTP gathers those of
    all ranks (deepspeed/module_inject/layers.py, gather_output): its part, the whole, and the whole again as their gradient. It
    leaves GPT's output whole if it is tied to the embedding (common/stacks/zero.py)."""
    whole = int(run.micro_batch * work.logit_tokens) * work.vocab * run.width
    if run.stack == "deepspeed" and run.tp > 1:
        is_split = not (work.tied and (traits.fused_qkv or traits.rotary))
        return whole // run.tp + 2 * whole if is_split else whole
    return whole // run.tp


def chunks_in_flight(run: Training, stage: int) -> int:
    """Of how many chunks of layers a pipeline stage holds activations: 1F1B (arXiv:2205.05198, section
    4.2.3) and its interleaved form (num_warmup_microbatches of megatron/core/pipeline_parallel/schedules.py, and the one that
    runs)."""
    if run.vpp == 1:
        chunks = run.pp - stage
    else:
        chunks = (run.vpp - 1) * run.pp + 1 + 2 * (run.pp - 1 - stage)
    return min(chunks, run.accumulate * run.vpp)


def kept_chunks(run: Training, size: int, stage: int) -> int:
    """Of activations of `size` bytes in all layers of a micro batch, what a pipeline stage holds."""
    layers, of = (run.stages[stage], sum(run.stages)) if run.stages else (1, run.pp)
    return size * layers * chunks_in_flight(run, stage) // (of * run.vpp)


def exchanged(work: Workload, run: Training, stage: int) -> int:
    """What a stage of a pipeline keeps beside the activations of its layers: the output of each chunk in flight, what is
    received, and the dropout of the embeddings of earlier micro batches.

    Megatron receives ahead of its turn with vpp. DeepSpeed copies the input of each micro batch out of its buffer
    (deepspeed/runtime/pipe/engine.py, pipe_buffers)."""
    last = stage == run.pp - 1
    if run.pp == 1 or run.stack == "megatron" and run.vpp == 1 and last:
        return 0
    values = run.micro_batch * work.blocks[0].tokens * work.blocks[0].hidden // run.whole
    if run.stack == "deepspeed":
        chunks = chunks_in_flight(run, stage)
        return values * chunks * (run.residual * ((stage > 0) + (not last)) + (stage == 0 and run.dropout))
    kept = run.residual * (chunks_in_flight(run, stage) + (2 if run.vpp > 1 else 0))
    embedded = min(run.pp if run.vpp == 1 else 2 * run.pp - 1, run.accumulate) if stage == 0 and run.dropout else 0
    return values * (kept + embedded)


def moments(work: Workload, traits: Traits, run: Training, parameters: int, stage: int | None = None) -> dict[str, int]:
    """Activations, gradients of activations and weights, and autocast's copies at the moments that may be the peak.

    `parameters`: those of this rank. With pp, "head" and "forward" are moments of the last stage, the layers' of the first, or
    all are of `stage`.
    """
    last = run.pp - 1
    tied_weights = work.vocab * work.hidden // run.tp
    full = [layer(block, traits, run) for block in work.blocks]
    entry = [run.residual * run.micro_batch * block.tokens * block.hidden // run.whole for block in work.blocks]
    alive = [block.count * size for block, size in zip(work.blocks, entry if run.recompute else full, strict=True)]
    products = parameters - (0 if work.tied else tied_weights)  # the embedding is no product
    copies, copies_of_one = (2 * products, 2 * work.blocks[0].parameters) if run.autocast else (0, 0)
    forward = kept_chunks(run, sum(alive), last) + ends(work, traits, run) + logits(work, traits, run)
    if run.stack == "deepspeed" and run.pp > 1:  # the last stage has no embeddings
        forward -= run.dropout * run.micro_batch * work.blocks[0].tokens * work.hidden
    forward += exchanged(work, run, last)
    weight = 0 if run.transformer_engine else tied_weights * run.width
    hidden = int(run.micro_batch * work.logit_tokens) * work.hidden * run.width
    found = {"forward": forward + copies}
    found["head"] = forward + (2 * tied_weights * run.autocast if run.recompute else copies) + weight + hidden
    if run.stack == "megatron" and not run.fusions:  # the softmax is in fp32
        found["loss"] = forward + logits(work, traits, run) * 4 // run.width
    # of the gradients that `states` counts, those that the step's only micro batch has not made yet
    absent = states(run, parameters)["gradients"] if run.frees_gradients and run.accumulate == 1 else 0
    found = {moment: size - absent for moment, size in found.items()}
    if run.is_sharded:  # the last layer is gathered beside it
        found["head"] += run.width * work.blocks[-1].parameters
    if stage not in (None, last):
        found = {}
    # the gradient of tied weights waits for that of the embedding
    waiting = tied_weights * run.residual if work.tied and run.pp == 1 else 0
    for number, block in enumerate(work.blocks):
        size = kept_chunks(run, sum(alive[: number + 1]), stage or 0) + exchanged(work, run, stage or 0)
        if run.recompute:
            size += full[number] - entry[number]
        size += layer_backward(block, traits, run) + (copies_of_one if run.recompute else copies) + waiting
        size += early_share(block, traits, run, parameters, entry[number] if run.recompute else full[number])
        if traits.relative_biases and run.stack == "megatron":  # the gradient of the biases, to which each layer adds
            size += run.width * masked_biases(block, run, block.tokens, block.tokens) // run.tp
        if run.is_sharded:
            # gradients outside the layers are reduced at the end: of the output layer, and of the decoder's embedding
            embeddings = 1 if work.tied or number == len(work.blocks) - 1 else 2
            size = sum(alive[: number + 1]) + embeddings * tied_weights * run.width
            after = max(other.parameters for other in work.blocks[number:])
            size += sharded_layer(block, traits, run, after, full[number], entry[number])
        size -= min(sum(alive), absent)  # gradients come as activations go
        found[f"layers {number}"] = size
    return found


def early_share(block: Block, traits: Traits, run: Training, parameters: int, kept: int) -> int:
    """With ZeRO 1, the rank's share of the reduced gradients, beside all gradients that are accumulated. It is allocated whole
    with the first of them: on the last rank when the first bucket is reduced. By then the bucket holds those gradients, and
    their layers have freed the `kept` bytes of each (stage_1_and_2.py, copy_grads_in_partition)."""
    if run.zero != 1 or run.accumulate == 1 or run.dp == 1 or run.pp > 1 or run.offload != "none":
        return 0
    share = run.width * (parameters // run.dp)
    if beyond_bucket(block, traits, run, parameters):
        return share
    first = bucket(run, parameters)
    return share - run.width * first - kept * min(first, block.count * block.parameters) // block.parameters


def bucket(run: Training, parameters: int) -> int:
    """Elements of a bucket of gradients (reduce_bucket_size in common/stacks/zero.py)."""
    return min(parameters, max(BUCKET, BUCKET_PER_RANK * run.dp))


def beyond_bucket(block: Block, traits: Traits, run: Training, parameters: int) -> int:
    """Parameters of a layer in matrices that are larger than a bucket of gradients."""
    h, projections = block.hidden, [block.inner, block.kv_inner, block.kv_inner]
    widths = [sum(projections)] if traits.fused_qkv else projections
    widths = (widths + [block.inner]) * len(block.attention) + [block.ffn] * (3 if block.gated else 2)
    return sum(h * width // run.tp for width in widths if h * width // run.tp > bucket(run, parameters))


def pipeline_activations(work: Workload, traits: Traits, run: Training, parameters: int, stage: int) -> int:
    """The most that a stage of DeepSpeed's pipeline needs for activations beside all of its gradients. These are allocated in
    the first backward pass of a step: if no further micro batch comes in, there is one less of them in flight after it."""
    most, in_flight = max(moments(work, traits, run, parameters, stage).values()), chunks_in_flight(run, stage)
    if run.accumulate > in_flight:
        return most
    later = replace(run, accumulate=in_flight - 1)
    fewer = max(moments(work, traits, later, parameters, stage).values()) if in_flight > 1 else 0
    return max(most - states(run, parameters)["gradients"], fewer)


def sharded_layer(block: Block, traits: Traits, run: Training, after: int, full: int, entry: int) -> int:
    """What the backward pass of a layer needs beside what all layers have kept, where FSDP2 has gathered the parameters of it
    and of the layer before it, and reduces the gradients of the layer after it, which has `after` parameters, in fp32
    (torch/distributed/fsdp/_fully_shard/_fsdp_param_group.py, post_backward). full, entry: bytes that the layer keeps without
    and with recomputation."""
    gathered, reduced = 2 * run.width * block.parameters, 4 * after
    begin = layer_backward(block, traits, run) + (full - entry if run.recompute else 0)  # its activations are there
    begin += max(reduced - (entry if run.recompute else full), 0)  # those of the layer after it are not
    qkv = block.inner + 2 * block.kv_inner
    rows = rows_sum_buffer(run.micro_batch * block.tokens, qkv) if traits.biases and traits.fused_qkv else 0
    end = run.width * block.parameters + reduced + rows + run.micro_batch * block.tokens * (2 * block.hidden + qkv) * run.width
    return gathered + max(begin, end - (0 if run.recompute else full))


# ---- beside them -----------------------------------------------------------------------------------------------------

BUCKET, BUCKET_PER_RANK = 40_000_000, 1_000_000  # elements: reduce_bucket_size in common/stacks/zero.py
SUB_GROUP = 1_000_000_000  # numbers of a rank that ZeRO 3 steps at a time (sub_group_size)
LIVE = 1_000_000_000  # parameters that ZeRO 3 keeps gathered (stage3_max_live_parameters of deepspeed/runtime/zero/config.py)


def buffers(work: Workload, run: Training, parameters: int) -> int:
    """What the stack allocates for communication, and the parameters that ZeRO 3 has gathered."""
    if run.transformer_engine:  # empty gradients, one per shape, in place of those that are added to fp32 at once
        block = work.blocks[0]
        return run.width * block.parameters // run.tp
    if run.is_sharded:  # what is outside the layers, from its first use to the end of the backward pass
        return run.width * (parameters - work.body)
    if not run.zero:
        return 0
    if run.pp > 1:  # of activations that are received, and of gradients (pipe_recv_buf, grad_layer)
        return run.width * run.micro_batch * work.blocks[0].tokens * work.hidden
    buckets = run.width * bucket(run, parameters) * (2 if run.dp > 1 else 1)
    if run.zero < 3:
        return buckets
    block = work.blocks[0]  # a layer, and the attention of the next, which is fetched beside its computation
    layer_and_next = block.parameters + 2 * block.hidden * (block.inner + block.kv_inner)
    return buckets + run.width * max(min(LIVE, parameters), layer_and_next)


def optimizer_moment(work: Workload, run: Training, parameters: int) -> int:
    """Bytes in all while the optimizer steps, without activations."""
    held = states(run, parameters)
    start = held["weights"] + held["optimizer"]
    share = parameters // run.dp
    if run.offload == "all":
        return start
    if run.zero == 3:  # of SUB_GROUP numbers at a time, the gradients in fp32 and the new weights
        return start + held["gradients"] + 6 * min(SUB_GROUP, share)
    if run.zero:  # the rank's gradients in bf16 and in fp32, and the new weights
        return start + 8 * share
    block = work.blocks[0]
    largest = max(work.vocab * work.hidden, block.ffn * block.hidden)
    more = {"adamw": 0, "lamb": 3 * 4 * parameters, "adafactor": 3 * 4 * largest}[run.optimizer]  # common/training/
    return start + held["gradients"] + more


def reduced_moment(work: Workload, traits: Traits, run: Training, parameters: int) -> int:
    """Bytes in all at the end of ZeRO 1's backward pass. A gradient that was copied to a bucket has no memory of its own, one
    that is larger than a bucket stays until the step, but for those that rank 0 copies to its share, behind the embedding's
    (stage_1_and_2.py, reduce_ipg_grads). The gradient of a tied embedding is a sum: three matrices."""
    if run.zero != 1 or run.dp == 1 or run.pp > 1 or run.offload != "none":
        return 0
    held, share = states(run, parameters), parameters // run.dp
    embedding = work.vocab * work.hidden
    large = sum(block.count * beyond_bucket(block, traits, run, parameters) for block in work.blocks)
    kept = large - large * max(share - embedding, 0) // work.body
    more = 3 if work.tied else 2
    return held["weights"] + held["optimizer"] + buffers(work, run, parameters) + run.width * (kept + share + more * embedding)


def ddp_moment(run: Training, parameters: int) -> int:
    """Bytes in all while torch's DDP moves the gradients to new buckets, in the order of the backward pass: in the second
    step, before its forward pass (torch/csrc/distributed/c10d/reducer.cpp, rebuild_buckets)."""
    held = states(run, parameters)
    copies = 2 if run.stack == "baseline" and run.dp > 1 and not run.is_sharded else 1
    return held["weights"] + held["optimizer"] + copies * held["gradients"]


def buffers_moment(run: Training, parameters: int) -> int:
    """Bytes in all while Megatron moves the weights to the buffer in which its distributed optimizer gathers them, when that of
    the gradients is there too (megatron/core/distributed/param_and_grad_buffer.py)."""
    return (2 * run.width + 4) * parameters if run.stack == "megatron" and run.distributed_optimizer else 0


# ---- in all ----------------------------------------------------------------------------------------------------------

# Of the peak: what the allocator with expandable segments reserves beside it (docs/memory.md). It returns what is unused before
# it fails, so this is what a step takes undisturbed.
UNUSED = {"baseline": 0.02, "baseline shard=full": 0.12, "deepspeed": 0.08, "megatron": 0.02}
CONTEXT = 2**29  # the CUDA context with the kernels that are loaded: about half a GiB (pytorch/pytorch issue 107667)
NCCL = 2**29  # each communicator: 544 to 688 MB on A100 (NVIDIA/nccl issue 964)


def estimate(work: Workload, traits: Traits, run: Training) -> dict[str, int]:
    """Bytes on the GPU that needs the most, as `on_stage` gives them."""
    if not run.stages:
        return on_stage(work, traits, run)
    return max((on_stage(work, traits, run, stage) for stage in range(run.pp)), key=lambda found: found["total"])


def on_stage(work: Workload, traits: Traits, run: Training, stage: int | None = None) -> dict[str, int]:
    """Bytes on a GPU of a pipeline stage; without one, of the first or the last, where they hold as many layers as the others.

    PARTS at the peak; `total`, the peak of the allocator; BESIDE, what a GPU must have besides; `required`, all of it; `host`,
    CPU memory for offloaded states.
    """
    work = share_of_sequence(work, run.cp)
    tables = work.vocab * work.hidden
    body = run.parameters - tables * (1 if work.tied else 2)
    parameters = (run.parameters if run.pp == 1 else body // run.pp + tables) // run.tp  # of the first or the last stage
    if stage is not None and run.stack == "deepspeed":
        embedding, *layers, output = work.sizes(run.parameters)
        parameters = embedding * (stage == 0) + layers[0] * run.stages[stage] + output * (stage == run.pp - 1)
    elif stage is not None:
        parameters = (body * run.stages[stage] // sum(run.stages) + tables * (stage in (0, run.pp - 1))) // run.tp
    if run.stack == "deepspeed" and run.tp > 1:  # AutoTP leaves the embedding whole
        parameters += tables - tables // run.tp
    found = states(run, parameters) | {"buffers": buffers(work, run, parameters)}
    found["activations"] = max(moments(work, traits, run, parameters, stage).values())
    if run.stack == "deepspeed" and run.pp > 1 and stage is not None:
        found["activations"] = pipeline_activations(work, traits, run, parameters, stage)
    peak = sum(found[part] for part in PARTS)
    if run.stack == "baseline" and run.dp > 1 and run.accumulate > 1 and not run.is_sharded:
        # in the first step DDP's buckets are a second copy of the gradients; the optimizer has no state yet
        peak = max(peak, peak - found["optimizer"] + found["gradients"])
    found["total"] = max(
        peak, optimizer_moment(work, run, parameters), ddp_moment(run, parameters), buffers_moment(run, parameters),
        reduced_moment(work, traits, run, parameters),
    )  # fmt: skip
    unused = UNUSED["baseline shard=full" if run.is_sharded else run.stack]
    found |= {"unused": int(unused * found["total"]), "context": CONTEXT, "nccl": NCCL * communicators(run)}
    found["required"] = found["total"] + sum(found[part] for part in BESIDE)
    return found


def communicators(run: Training) -> int:
    """Groups of more than one rank, of which each has a communicator of NCCL: all ranks, and those of the stack."""
    if run.dp * run.tp * run.pp * run.cp == 1:
        return 0
    megatron = [run.dp, run.tp, run.pp, *([run.cp, run.dp * run.cp] if run.cp > 1 else [])]
    own = {"baseline": [], "deepspeed": [run.dp, run.tp, run.sp], "megatron": megatron}[run.stack]
    return 1 + sum(size > 1 for size in own)


def estimate_for(cfg: Config, model: Any, stack: str, world: int, stage: int | None = None) -> dict[str, int]:
    """`estimate` for a resolved model that `cfg` trains on `world` ranks, or `on_stage` for a stage of DeepSpeed's pipeline.
    BadInput as in layout_for, and for a layout whose memory is not estimated."""
    work, system = model.workload(cfg.data), getattr(cfg, stack)
    run = training(cfg, model, stack, world, work)
    # compiled, GPT-2 style and BERT keep as much as they do without (docs/memory.md); what others keep is the compiler's choice
    if getattr(system, "compile", False) and (model.traits().rms_norm or run.recompute):
        which = f"{stack}.recompute=true" if run.recompute else "RMSNorm"
        raise BadInput(f"the memory of {stack}.compile=true with {which} is not estimated: the compiler chooses what it keeps")
    if stack == "deepspeed" and (given := cfg.deepspeed.zero_plus_plus):
        raise BadInput(f"the memory of {given} is not estimated: a second copy, or copies in 8 or 4 bits, come and go")
    if stack == "deepspeed" and cfg.deepspeed.nvme is not None:
        raise BadInput("the memory of deepspeed.nvme is not estimated: its buffers hold what is on its way to the disk")
    if run.zero == 3 and run.tp > 1 and not all(one.causal for block in work.blocks for one in block.attention):
        raise BadInput(f"the memory of deepspeed.tp={run.tp} with zero_stage=3 is estimated for GPT alone")
    if run.is_sharded and system.compile:
        raise BadInput("the memory of baseline.compile=true with shard=full is not estimated: it was not simulated")
    work, traits = shared_sequence(work, run.sp), model.traits()
    return estimate(work, traits, run) if stage is None else on_stage(work, traits, run, stage)


def shared_sequence(work: Workload, ranks: int) -> Workload:
    """The activations of one of the ranks that share each sequence: its part of the positions; in the attention its part of the
    heads, whose queries, keys and values are as many numbers."""

    def part(block: Block) -> Block:
        attention = (replace(a, queries=a.queries // ranks, keys=a.keys // ranks) for a in block.attention)
        return replace(block, tokens=block.tokens // ranks, attention=tuple(attention))

    return replace(work, blocks=tuple(map(part, work.blocks)), logit_tokens=work.logit_tokens / ranks) if ranks > 1 else work


def training(cfg: Config, model: Any, stack: str, world: int, work: Workload) -> Training:
    layout, system = layout_for(cfg, stack, world), getattr(cfg, stack)
    names = ("shard", "zero_stage", "offload", "sequence_parallel", "distributed_optimizer", "vpp", "transformer_engine")
    fusions = getattr(system, "fusions", None)  # the default is that of a GPU
    recompute = extra.granularity(system) if stack == "megatron" else "full" if system.recompute else "none"
    of_stages: tuple[int, ...] = ()
    if getattr(system, "pipeline_layout", pipeline.EVEN) != pipeline.EVEN:
        of_stages = tuple(pipeline.stage_layers(model.layers, system))
    if stack == "deepspeed" and layout.pp > 1:
        of_stages = stages.transformer_layers(system.partition, work.sizes(model.parameter_count()), layout.pp)
    return Training(
        stack=stack, stages=of_stages,
        parameters=model.parameter_count(), micro_batch=layout.micro_batch, accumulate=layout.accumulate,
        dtype=cfg.train.dtype, optimizer=cfg.optim.optimizer, dropout=model.dropout > 0,
        dp=layout.dp * layout.sp, tp=layout.tp, sp=layout.sp, pp=layout.pp, cp=layout.cp,
        fusions=fusions is not False, recompute=recompute == "full",
        recompute_attention=recompute == "selective",
        **{name: getattr(system, name) for name in names if hasattr(system, name)},
    )  # fmt: skip
