"""What every Megatron recipe needs: groups, attention and norm modules, optimizer, state in and out.

Checked with megatron-core 0.19.2. Its own distributed checkpoint cannot be read by another stack, and in that version does
not load a distributed optimizer over torch's AdamW; the state here goes parameter by parameter instead.
"""

import datetime
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from functools import cache, partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import optimizer as megatron_optimizer, parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, clip_grads, get_megatron_optimizer
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import attention, transformer_block
from megatron.core.transformer.attention import (
    CrossAttention,
    CrossAttentionSubmodules,
    SelfAttention,
    SelfAttentionSubmodules,
)
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.module import Float16Module, MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch.nn.attention.bias import causal_lower_right

from common.checkpoints import parameters, pieces, state
from common.checkpoints.parameters import Shapes
from common.checkpoints.pieces import Batch, Batches, Piece, Placement
from common.config import Config
from common.errors import BadInput
from common.launch import heartbeat, processes
from common.launch.processes import Ranks
from common.layout import Layout
from common.stacks import cuda_stand_in, fusions, pipeline
from common.stacks.parameter_map import Conversion, ParameterMap
from common.training import optim

MOMENTS = ("exp_avg", "exp_avg_sq")
# What a loss function returns to Megatron's schedule: summed loss, number of targets, values that the schedule passes on
StepLoss = tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]

# ---- kernels, groups and random states -------------------------------------------------------------------------------


def norm_of_all(_chunk_size: int, _overflow: torch.Tensor, lists: Sequence[list[torch.Tensor]], _each: bool) -> Any:
    """amp_C.multi_tensor_l2norm by torch: the norm (1,) of all tensors together, without a wait for the GPU."""
    norm = optim.total_norm(lists[0]).view(1)
    return norm if AdamScale.of_targets is None else norm * AdamScale.of_targets, None


def scale_all(_chunk_size: int, _overflow: torch.Tensor, lists: Sequence[list[torch.Tensor]], scale: float) -> None:
    """amp_C.multi_tensor_scale by torch, for tensors that are scaled in place, as Megatron clips."""
    if AdamScale.of_targets is None:
        torch._foreach_mul_(lists[0], scale)
    else:
        AdamScale.of_clipping = scale


class AdamScale:
    """On a GPU: factors of the gradients that the kernel of AdamW applies (torch/optim/adam.py: grad_scale), where Megatron
    passes over all gradients to divide them by the number of targets, and again to clip them."""

    of_targets: torch.Tensor | None = None
    of_clipping = 1.0

    @classmethod
    def install(cls, chunks: Iterable[Any], optimizer: MegatronOptimizer) -> None:
        for chunk in chunks:
            chunk.scale_gradients = cls._divide_by_targets
        for one in each(optimizer):
            one.optimizer.register_step_pre_hook(cls._pass_on)

    @classmethod
    def _divide_by_targets(cls, factor: torch.Tensor) -> None:
        cls.of_targets, cls.of_clipping = factor, 1.0

    @classmethod
    def _pass_on(cls, optimizer: Any, *_: Any) -> None:
        assert cls.of_targets is not None, "Megatron scales the gradients by their targets before each step"
        optimizer.grad_scale = (1.0 / (cls.of_targets * cls.of_clipping)).float()


def use_torch() -> None:
    """Replace what Megatron takes unasked from TransformerEngine or Apex where they can be imported, so that a run does not
    depend on what is installed: AdamW, the norm of the gradients, clipping, the split into q, k and v.

    Where neither can be imported, Megatron computes the norm one parameter at a time and waits for the GPU each time.
    """
    megatron_optimizer.Adam = torch.optim.AdamW
    megatron_optimizer.USING_PYTORCH_OPTIMIZER = True
    attention.SplitAlongDim = None
    fusions.install()
    clip_grads.multi_tensor_applier = lambda function, overflow, lists, *more: function(0, overflow, lists, *more)
    clip_grads.l2_norm_impl, clip_grads.multi_tensor_scale_impl = norm_of_all, scale_all
    clip_grads.multi_tensor_scale_tensor_impl = None  # TransformerEngine's: the norm stays on the GPU


def start(ranks: Ranks, layout: Layout) -> None:
    """Tensor-, context-, pipeline- and data-parallel groups for this layout."""
    use_torch()
    if ranks.device.type == "cpu":
        cuda_stand_in.install()
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        layout.tp, layout.pp, layout.vpp if layout.vpp > 1 else None, context_parallel_size=layout.cp,
        distributed_timeout_minutes=processes.TIMEOUT // datetime.timedelta(minutes=1),  # its own default is half an hour
        create_gloo_process_groups=False,  # only its own checkpoints use them: three per data-parallel group
    )  # fmt: skip
    tensor_parallel.model_parallel_cuda_manual_seed(1, force_reset_rng=True)


def begin_micro_batch(seed: int, chunk: torch.nn.Module) -> None:
    """On each chunk of layers, of training with the seed of ranks.seed_micro_batch (0: of an evaluation): a heartbeat, and the
    states that dropout inside tensor- and sequence-parallel regions draws from.

    These add the tp rank; both add the number of the chunk and the context-parallel rank, so that no two chunks or ranks with
    different activations drop the same units.
    """
    heartbeat.beat("forward and backward")
    if not seed:
        return
    stages, stage = parallel_state.get_pipeline_model_parallel_world_size(), parallel_state.get_pipeline_model_parallel_rank()
    cp_rank, cp = parallel_state.get_context_parallel_rank(), parallel_state.get_context_parallel_world_size()
    number = ((_core(chunk).vp_stage or 0) * cp + cp_rank) * stages + stage
    tensor_parallel.model_parallel_cuda_manual_seed((seed + 100 * number) % 2**62)


# ---- context parallelism ---------------------------------------------------------------------------------------------


def own_positions(x: torch.Tensor, dim: int) -> torch.Tensor:
    """(..., T, ...) -> (..., T / cp, ...): this context-parallel rank's part of a sequence. Of 2 x cp chunks, rank r has r and
    2 x cp - 1 - r, so that causal attention is the same work on each rank (Megatron-LM, get_batch_on_this_cp_rank)."""
    group = parallel_state.get_context_parallel_group()
    if group.size() == 1:
        return x
    assert x.size(dim) % (2 * group.size()) == 0, f"{x.size(dim)} positions are not 2 x {group.size()} chunks of one length"
    chunks = x.chunk(2 * group.size(), dim)
    return torch.cat([chunks[i] for i in chunks_of(group.rank(), group.size())], dim)


def chunks_of(rank: int, size: int) -> tuple[int, int]:
    """The chunks of a sequence that a context-parallel rank has."""
    return rank, 2 * size - 1 - rank


class _WholeSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group, size = group, group.size()
        gathered = x.new_empty(len(x) * size, *x.shape[1:])
        dist.all_gather_into_tensor(gathered, x.contiguous(), group=group)
        chunks = gathered.chunk(2 * size)
        order = [chunk for rank in range(size) for chunk in chunks_of(rank, size)]  # as they were gathered
        return torch.cat([chunks[order.index(number)] for number in range(2 * size)])

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        size = ctx.group.size()
        chunks = grads[0].chunk(2 * size)
        of_ranks = torch.cat([chunks[i] for rank in range(size) for i in chunks_of(rank, size)])
        own = of_ranks.new_empty(len(of_ranks) // size, *of_ranks.shape[1:])
        dist.reduce_scatter_tensor(own, of_ranks, group=ctx.group)
        return own, None


def whole_sequence(x: torch.Tensor) -> torch.Tensor:
    """own_positions (T / cp, ...) of the context-parallel ranks -> (T, ...) on each. In the backward pass, each rank gets the
    gradients of its positions, summed over the ranks."""
    group = parallel_state.get_context_parallel_group()
    whole: torch.Tensor = _WholeSequence.apply(x, group) if group.size() > 1 else x
    return whole


def causal_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **settings: Any) -> list[torch.Tensor]:
    """Attention of own_positions to all before them: q (B, heads, T / cp, D), k and v (B, kv_heads, T, D) -> that of each of
    the rank's two chunks, (B, heads, T / 2 cp, D).

    One call per chunk, over the keys up to its end. A mask of booleans would need memory of T x T / cp, and keep
    scaled_dot_product_attention from its flash kernel; this one is a flag of that kernel.
    """
    group, outputs = parallel_state.get_context_parallel_group(), []
    for chunk, number in zip(q.chunk(2, 2), chunks_of(group.rank(), group.size()), strict=True):
        length = chunk.size(2)
        seen = (number + 1) * length
        mask = _lower_right(length, seen)
        outputs.append(F.scaled_dot_product_attention(chunk, k[:, :, :seen], v[:, :, :seen], attn_mask=mask, **settings))
    return outputs


@cache
def _lower_right(queries: int, keys: int) -> torch.Tensor:
    """A mask without elements that stands for the causal one of the last queries."""
    return causal_lower_right(queries, keys)


# ---- modules ---------------------------------------------------------------------------------------------------------


class Norm(torch.nn.Module):
    """LayerNorm or RMSNorm as config.normalization says, whose gradients are summed over tp with sequence parallelism."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any):
        super().__init__()
        self.eps, self.shape = eps, (hidden_size,)
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        layer_norm = config.normalization == "LayerNorm"
        self.bias = torch.nn.Parameter(torch.zeros(hidden_size, dtype=config.params_dtype)) if layer_norm else None
        marked: list[Any] = list(self.parameters())  # Megatron reads an attribute of them
        for parameter in marked:
            parameter.sequence_parallel = config.sequence_parallel

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (T, B, H) -> (T, B, H)
        if self.bias is None:
            return F.rms_norm(x, self.shape, self.weight, self.eps)
        return F.layer_norm(x, self.shape, self.weight, self.bias, self.eps)


class ResidualNorm(Norm):
    """The norm before attention and MLP. With megatron.fusions it also returns its input, which TransformerLayer then takes for
    the residual connection."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any):
        super().__init__(config, hidden_size, eps)
        self.config = config

    def forward(self, x: torch.Tensor) -> Any:
        if not self.config.bias_dropout_fusion:
            return super().forward(x)
        return fusions.NormAndResidual.apply(x, self.weight, self.bias, self.eps, self.config)


class SdpaAttention(MegatronModule):  # type: ignore[misc]  # megatron-core has no annotations
    """Core attention by torch's scaled_dot_product_attention: causal, or by a mask whose True means masked out, or by a bias
    that holds the mask: it is -inf where a key is masked out. A model makes such a bias once for all its layers.

    With context parallelism, a rank has the queries of own_positions, and gathers the keys and values of all."""

    def __init__(
        self, config: TransformerConfig, layer_number: int, attn_mask_type: AttnMaskType, attention_type: str,
        attention_dropout: float | None = None, softmax_scale: float | None = None, **_: Any,
    ):  # fmt: skip
        super().__init__(config=config)
        self.mask_type, self.scale = attn_mask_type, softmax_scale
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None = None,
        attn_mask_type: AttnMaskType | None = None, attention_bias: torch.Tensor | None = None, **_: Any,
    ) -> torch.Tensor:  # fmt: skip
        """query (T, B, heads, D), key and value (S, B, kv_heads, D), attention_mask (B, 1, T, S) or attention_bias
        (B or 1, heads, T, S) -> (T, B, heads x D). With context parallelism T / cp for T, and key and value (S / cp, ...)."""
        is_divided = self.config.context_parallel_size > 1
        if is_divided:
            key, value = whole_sequence(torch.stack([key, value], 1)).unbind(1)
        q, k, v = (t.permute(1, 2, 0, 3) for t in (query, key, value))  # (B, heads, T, D)
        mask = attention_bias
        if attention_bias is not None:
            assert attention_mask is None, "attention_bias is added to the scores: it holds the mask"
        elif attention_mask is not None:
            mask = ~attention_mask  # True: seen
        causal = mask is None and (attn_mask_type or self.mask_type) == AttnMaskType.causal
        p = self.dropout if self.training else 0.0
        # the heads are split over tp: each rank drops its own; with sequence parallelism the region is forked already
        fork = p > 0 and not self.config.sequence_parallel
        with tensor_parallel.get_cuda_rng_tracker().fork() if fork else nullcontext():
            settings: dict[str, Any] = {"dropout_p": p, "scale": self.scale, "enable_gqa": q.size(1) != k.size(1)}
            if causal and is_divided:
                outputs = causal_attention(q, k, v, **settings)
            else:
                outputs = [F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, **settings)]
        whole, *rest = [output.permute(2, 0, 1, 3).flatten(2) for output in outputs]
        return torch.cat([whole, *rest]) if rest else whole


def layer_spec(mask: AttnMaskType, cross: bool = False, mlp: type[fusions.Mlp] = fusions.Mlp) -> ModuleSpec:
    """A pre-norm transformer layer of the modules above: needs neither TransformerEngine nor Apex.

    cross: attends to an encoder too.
    """
    more: dict[str, Any] = {}
    if cross:
        more = {
            "pre_cross_attn_layernorm": ResidualNorm,
            "cross_attention": ModuleSpec(
                module=CrossAttention,
                params={"attn_mask_type": AttnMaskType.padding},
                submodules=CrossAttentionSubmodules(
                    linear_q=ColumnParallelLinear, linear_kv=ColumnParallelLinear, core_attention=SdpaAttention,
                    linear_proj=RowParallelLinear,
                ),
            ),
            "cross_attn_bda": get_bias_dropout_add,
        }  # fmt: skip
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=ResidualNorm,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": mask},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=fusions.BiasedLinear, core_attention=SdpaAttention, linear_proj=RowParallelLinear,
                    q_layernorm=IdentityOp, k_layernorm=IdentityOp,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=ResidualNorm,
            mlp=partial(
                mlp.as_mlp_submodule,
                submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear),
            ),
            mlp_bda=get_bias_dropout_add,
            **more,
        ),
    )  # fmt: skip


def use_own_norms() -> None:
    """Without TransformerEngine Megatron builds the final norm by itself: let it build Norm, for sequence parallelism."""
    transformer_block.LayerNormImpl = Norm


def transformer_config(cfg: Config, layout: Layout, **shapes: Any) -> TransformerConfig:
    """Megatron's configuration from the section `megatron` and the family's shapes. `megatron.extra` is merged last."""
    dtype = torch.bfloat16 if cfg.train.dtype == "bf16" else torch.float32
    system = cfg.megatron
    values: dict[str, Any] = {
        "tensor_model_parallel_size": layout.tp,
        "pipeline_model_parallel_size": layout.pp,
        "context_parallel_size": layout.cp,
        "sequence_parallel": system.sequence_parallel and layout.tp > 1,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": cfg.train.dtype == "bf16",
        "calculate_per_token_loss": True,  # invariant 5: gradients are summed, then divided by the targets of the global batch
        "finalize_model_grads_func": finalize_model_grads,
        "use_cpu_initialization": True,
        "deterministic_mode": torch.are_deterministic_algorithms_enabled(),  # processes.set_numerics
        "perform_initialization": False,  # load_state sets every value
        "masked_softmax_fusion": False,
        "bias_activation_fusion": False,
        "persist_layer_norm": False,
        "batch_p2p_sync": False,  # else the host waits for the GPU after each exchange, as torch before 2.0 needed it
    }
    if layout.vpp > 1:
        # Two stages send each other activations and gradients at the same time. In one batch of exchanges gloo matches them in
        # the order in which they were posted, so that a stage takes one for the other; Megatron itself refuses such batches
        # between two stages (megatron/training/arguments.py, overlap_p2p_comm).
        values |= {"virtual_pipeline_model_parallel_size": layout.vpp, "overlap_p2p_comm": True, "batch_p2p_comm": False}
    if layout.pp > 1:
        values |= pipeline.settings(system)
    values |= fusions.settings(cfg) | shapes
    if system.recompute == "selective":
        values["recompute_granularity"] = "selective"  # of recompute_modules the default: core_attn
    elif system.recompute == "full":
        values |= {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    return TransformerConfig(**(values | system.extra))


# ---- wrapping and optimizer ------------------------------------------------------------------------------------------


class Chunks(torch.nn.ModuleList):
    """The chunks of layers of this rank's pipeline stage, each in Megatron's DistributedDataParallel: one, or megatron.vpp."""

    @property
    def config(self) -> TransformerConfig:
        return self[0].config

    def zero_grad_buffer(self) -> None:
        chunks: list[Any] = list(self)
        for chunk in chunks:
            chunk.zero_grad_buffer()


def pre_and_post(layout: Layout) -> Iterator[dict[str, Any]]:
    """For each chunk of this rank what Megatron's models ask: which it is (None: the only one), and whether it holds the
    embedding or the head."""
    first, last = parallel_state.is_pipeline_first_stage(), parallel_state.is_pipeline_last_stage()
    for number in range(layout.vpp):
        yield {
            "vp_stage": number if layout.vpp > 1 else None, "pre_process": first and number == 0,
            "post_process": last and number == layout.vpp - 1,
        }  # fmt: skip


def wrap(nets: Sequence[torch.nn.Module], cfg: Config, ranks: Ranks) -> Chunks:
    """Megatron's data parallelism; gradients are accumulated and reduced in fp32."""
    config: TransformerConfig = nets[0].config
    nets = [net.to(ranks.device) for net in nets]
    if config.bf16:
        nets = [Float16Module(config, net) for net in nets]
    ddp_config = DistributedDataParallelConfig(
        use_distributed_optimizer=cfg.megatron.distributed_optimizer, grad_reduce_in_fp32=True, overlap_grad_reduce=True,
        # after a step, the next forward pass (of an evaluation too) gathers each part of the parameters while it computes with
        # those before; the state is saved from the masters, which each rank has of its own part
        overlap_param_gather=cfg.megatron.distributed_optimizer,
    )  # fmt: skip
    with cuda_stand_in.active(ranks):
        # one bucket for each chunk but the first: while it is reduced, the chunks before it go backward (megatron/training)
        chunks = [DistributedDataParallel(config, ddp_config, net, number > 0) for number, net in enumerate(nets)]
    # the schedules reduce gradients in the last micro batch's backward pass only
    config.no_sync_func = [chunk.no_sync for chunk in chunks] if len(chunks) > 1 else chunks[0].no_sync
    return Chunks(chunks)


def optimizer_for(model: Chunks, cfg: Config, ranks: Ranks) -> MegatronOptimizer:
    o = cfg.optim
    with cuda_stand_in.active(ranks):
        optimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam", lr=o.lr, min_lr=o.min_lr, weight_decay=o.weight_decay, adam_beta1=o.betas[0],
                adam_beta2=o.betas[1], adam_eps=o.eps, clip_grad=o.grad_clip or float("inf"),
                bf16=cfg.train.dtype == "bf16", params_dtype=model.config.params_dtype,
                use_distributed_optimizer=cfg.megatron.distributed_optimizer,
            ),
            list(model), use_gloo_process_groups=False,
        )  # fmt: skip
    for one in each(optimizer):
        for group in one.param_groups:
            group["fused"] = True  # as common/training/optim.py has it
    if ranks.device.type == "cuda":
        AdamScale.install(model, optimizer)
    return optimizer


def each(optimizer: MegatronOptimizer) -> Sequence[MegatronOptimizer]:
    return getattr(optimizer, "chained_optimizers", [optimizer])


def set_lr(optimizer: MegatronOptimizer, lr: float, weight_decay: float) -> None:
    """wd_mult is 0 for biases and norms; only Megatron's own scheduler would apply it."""
    for group in optimizer.param_groups:
        group["lr"] = lr
        group["weight_decay"] = weight_decay * group["wd_mult"]


def update(optimizer: MegatronOptimizer, ranks: Ranks) -> float:
    """Clip and step; returns the global gradient norm before clipping."""
    with cuda_stand_in.active(ranks):
        _, grad_norm, _ = optimizer.step()
    return float(grad_norm)


# ---- training state by Hugging Face name -----------------------------------------------------------------------------


def split(whole: torch.Tensor, dim: int, blocks: int, tp: int, rank: int) -> torch.Tensor:
    """This tp rank's part of a whole Megatron tensor."""
    return torch.cat([block.chunk(tp, dim)[rank] for block in whole.chunk(blocks, dim)], dim)


def _core(chunk: Any) -> Any:
    """The model without its wrappers."""
    while hasattr(chunk, "module"):
        chunk = chunk.module
    return chunk


def global_names(model: Chunks) -> list[tuple[str, Any]]:
    """Parameters, with the attributes that Megatron gives them, under the names that they have without pipeline stages and
    wrappers: layers.0 of stage 1 becomes layers.2."""
    return [named for chunk in model for named in _names_of(_core(chunk))]


def _names_of(core: torch.nn.Module) -> list[tuple[str, Any]]:
    numbers = {
        name: f"{name.rpartition('.')[0]}.{layer.layer_number - 1}"
        for name, layer in core.named_modules()
        if hasattr(layer, "layer_number") and name.rpartition(".")[0].endswith("layers")
    }
    named = []
    for name, parameter in core.named_parameters():
        layer = next((n for n in numbers if name.startswith(n + ".")), None)
        named.append((numbers[layer] + name[len(layer) :] if layer else name, parameter))
    return named


def load_state(
    model: Chunks, optimizer: MegatronOptimizer, parameter_map: ParameterMap, shapes: Shapes,
    values: state.Values, step: int,
) -> None:  # fmt: skip
    """Set weights, fp32 masters and moments from `values` after `step` steps; a collective.

    shapes: the full shape of each Hugging Face parameter. BadInput unless all stages and shards together have exactly these.
    """
    _prove(model, parameter_map, shapes)
    named = sorted(global_names(model), key=lambda item: -item[1].numel())  # as state.fill wants it
    for name, parameter in named:
        has_padding = parameter_map(name).unpadded_rows is not None
        if has_padding:
            parameter.detach().zero_()
        for main, _, one in _mains(optimizer, parameter):
            if has_padding:
                main.detach().zero_()
            if step:
                one.state[main] = state.adam_state(main, step)
                if not isinstance(one, torch.optim.AdamW):
                    one.state[main].pop("step")  # the fused optimizers count in their groups
    names = [hf for name, _ in named for hf in parameter_map(name).hf]
    wanted = [(hf, state.part_shapes(shapes[hf], bool(step))) for hf in names]
    group = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)  # the ranks of this stage
    held = _pieces(named, optimizer, parameter_map, shapes, with_moments=bool(step))
    state.fill([Batch(names, list(held))], wanted, values, named[0][1].device, group)
    for one in each(optimizer):
        if step and not isinstance(one.optimizer, torch.optim.AdamW):
            for group in one.optimizer.param_groups:
                group["step"] = step


def pieces_of(model: Chunks, optimizer: MegatronOptimizer, parameter_map: ParameterMap, shapes: Shapes) -> Batches:
    """What this rank holds of the parameters and their moments, to save."""
    named = global_names(model)
    names = [hf for name, _ in named for hf in parameter_map(name).hf]
    return [Batch(names, list(_pieces(named, optimizer, parameter_map, shapes, with_moments=True)))]


def _pieces(
    named: Iterable[tuple[str, Any]], optimizer: MegatronOptimizer, parameter_map: ParameterMap, shapes: Shapes,
    with_moments: bool,
) -> Iterator[Piece]:  # fmt: skip
    """Masters and moments by Hugging Face name, and the model's weights, which are only loaded."""
    tp = parallel_state.get_tensor_model_parallel_group()
    dp = parallel_state.get_data_parallel_group(with_context_parallel=True)  # context-parallel ranks are replicas
    is_distributed = any(hasattr(one, "model_param_group_index_map") for one in each(optimizer))
    for name, parameter in named:
        conversion = parameter_map(name)
        placement = _placement(parameter, conversion, shapes)
        replica, replicas = (0, 1) if is_distributed else (dp.rank(), dp.size())
        if not _is_split(parameter):
            replica, replicas = replica * tp.size() + tp.rank(), replicas * tp.size()
        yield from pieces.cut(placement, "weight", parameter.detach().view(-1), is_saved=False)
        for main, start, one in _mains(optimizer, parameter):
            parts = {"weight": main.detach()}
            if with_moments:
                parts |= state.optimizer_parts(main, one.state.get(main, {}))
            for part, tensor in parts.items():
                yield from pieces.cut(
                    placement, part, tensor.view(-1), start, replica, replicas, is_saved=not conversion.is_copy
                )


def _placement(parameter: Any, conversion: Conversion, shapes: Shapes) -> Placement:
    """Where the elements of this rank's part of a Megatron parameter are in Hugging Face parameters."""
    tp, rank = parallel_state.get_tensor_model_parallel_world_size(), parallel_state.get_tensor_model_parallel_rank()
    rows = conversion.unpadded_rows or 0
    padded, is_split = -(-rows // tp) * tp, _is_split(parameter)
    dim = parameter.partition_dim if is_split else 0
    of_hf = [shapes[hf] for hf in conversion.hf]
    placement = pieces.converted(conversion, of_hf, padded, dim, conversion.blocks, tp if is_split else 1, rank)
    assert placement.local == tuple(parameter.shape), f"{conversion.hf}: {placement.local}, {tuple(parameter.shape)}"
    return placement


def _local(conversion: Conversion, parameter: Any, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """This rank's part of a Megatron parameter, from the whole Hugging Face tensors that make it up."""
    tp, rank = parallel_state.get_tensor_model_parallel_world_size(), parallel_state.get_tensor_model_parallel_rank()
    whole = conversion.from_hf(*tensors)
    if conversion.unpadded_rows:
        padded = -(-conversion.unpadded_rows // tp) * tp
        whole = F.pad(whole, (0, 0) * (whole.dim() - 1) + (0, padded - conversion.unpadded_rows))
    return split(whole, parameter.partition_dim, conversion.blocks, tp, rank) if _is_split(parameter) else whole


def _is_split(parameter: Any) -> bool:
    """Has each tensor-parallel rank a part of this parameter? Megatron marks those that have."""
    tp = parallel_state.get_tensor_model_parallel_world_size()
    return tp > 1 and getattr(parameter, "tensor_model_parallel", False)


def _prove(model: Chunks, parameter_map: ParameterMap, shapes: Shapes) -> None:
    """BadInput, on every rank, unless each Megatron parameter is in the map and has the shape that its conversion gives,
    and all pipeline stages together name each parameter of the family once."""
    names: list[str] = []
    problems: dict[str, str] = {}  # by name without the number of the layer: one line speaks for all layers
    for name, parameter in global_names(model):
        layer_name = re.sub(r"layers\.\d+", "layers", name)
        try:
            conversion = parameter_map(name)
        except KeyError:
            problems.setdefault(layer_name, f"{name} of Megatron is not in parameter_map.py, which gives its Hugging Face name")
            continue
        names += [] if conversion.is_copy else conversion.hf
        problem = _shape_problem(name, parameter, conversion, shapes) if all(hf in shapes for hf in conversion.hf) else None
        if problem:
            problems.setdefault(layer_name, problem)
    group = parallel_state.get_pipeline_model_parallel_group()
    gathered: list[Any] = [None] * group.size()
    dist.all_gather_object(gathered, (names, problems), group=group)
    named = Counter(name for stage, _ in gathered for name in stage)
    problems = {layer_name: line for _, stage in reversed(gathered) for layer_name, line in stage.items()}
    lines = list(problems.values())
    lines += [f"parameter_map.py names {hf} {n} times; each parameter stands for one" for hf, n in named.items() if n > 1]
    lines += parameters.differences({hf: shapes.get(hf, ()) for hf in named}, shapes)
    if lines:
        raise BadInput([f"the model on megatron: {line}" for line in lines])


def _shape_problem(name: str, parameter: torch.nn.Parameter, conversion: Conversion, shapes: Shapes) -> str | None:
    try:
        shape = tuple(_local(conversion, parameter, [torch.empty(*shapes[hf], device="meta") for hf in conversion.hf]).shape)
    except (RuntimeError, ValueError, IndexError) as error:
        return f"{name} of Megatron: parameter_map.py cannot make it from {', '.join(conversion.hf)}: {error}"
    if shape == tuple(parameter.shape):
        return None
    return f"{name} of Megatron has shape {tuple(parameter.shape)}, parameter_map.py makes {shape}"


def _mains(
    optimizer: MegatronOptimizer, parameter: torch.nn.Parameter
) -> Iterator[tuple[torch.Tensor, int, torch.optim.Optimizer]]:
    """The fp32 tensor that is stepped for this parameter on this rank, its first element in the parameter, row-major, and the
    optimizer that steps it."""
    for one in each(optimizer):
        if hasattr(one, "model_param_group_index_map"):  # distributed optimizer
            if parameter in one.model_param_group_index_map:
                group, order = one.model_param_group_index_map[parameter]
                start = one._get_model_param_range_map(parameter)["param"].start
                yield one.optimizer.param_groups[group]["params"][order], start, one.optimizer
                return
        else:
            main = getattr(parameter, "main_param", parameter)  # bf16 has an fp32 copy
            if any(main is p for group in one.optimizer.param_groups for p in group["params"]):
                yield main, 0, one.optimizer
                return
