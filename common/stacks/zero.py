"""What every DeepSpeed recipe needs: its configuration, and the training state in and out by Hugging Face name.

DeepSpeed's own checkpoints cannot change stage or rank count in general (stage 1 to 3 is refused, stage 0 has no
universal form); ours go through the engine parameter by parameter: deepspeed/utils/tensor_fragment.py.
"""

import contextlib
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.sequence_parallel import parallel_state_sp
from deepspeed.runtime.utils import is_model_parallel_parameter
from deepspeed.runtime.zero import stage3, stage_1_and_2
from deepspeed.utils import (
    groups,
)

from common.checkpoints import parameters, pieces, state
from common.checkpoints.checkpoint import PARTS
from common.checkpoints.parameters import Shapes
from common.checkpoints.pieces import Batch, Batches, Piece, Placement
from common.config import Config
from common.launch import processes
from common.launch.heartbeat import SWAP_FOLDER
from common.launch.processes import Ranks
from common.layout import Layout
from common.paths import find
from common.stacks.parameter_map import Conversion
from common.training import optim

MOMENTS = ("exp_avg", "exp_avg_sq")
_accumulate = stage_1_and_2.DeepSpeedZeroOptimizer.async_accumulate_grad_in_cpu_via_gpu
_collect = stage_1_and_2.DeepSpeedZeroOptimizer.reduce_independent_p_g_buckets_and_remove_grads
_reduce_collected = stage_1_and_2.DeepSpeedZeroOptimizer.reduce_ipg_grads


def start(ranks: Ranks) -> None:
    """Let DeepSpeed use the process group that is there. On a CPU its shared-memory collectives would be compiled first:
    gloo serves."""
    if ranks.device.type == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.runtime.engine.clip_grad_norm_ = _clip_0
    else:
        _adapt_to_gpu()
    deepspeed.init_distributed("nccl" if ranks.device.type == "cuda" else "gloo", verbose=False)
    # the groups that it creates do not take the timeout of the default one
    deepspeed.comm.comm.cdb.new_group = partial(dist.new_group, timeout=processes.TIMEOUT)


def _clip_0(parameters: Iterable[torch.Tensor], max_norm: float, mpu: Any = None) -> None:
    """As clip_grad_norm_ in deepspeed/runtime/utils.py, for stage 0 on a CPU, with norms that are right for large parameters
    too. It also averages the norm over the replicas, which have the same gradients here."""
    reduced = [p for p in parameters if p.grad is not None]
    counted = [p for p in reduced if mpu is None or mpu.get_model_parallel_rank() == 0 or is_model_parallel_parameter(p)]
    square = torch.zeros(())
    if counted:
        square = optim.total_norm([p.grad for p in counted if p.grad is not None]).square()
    if mpu is not None:
        dist.all_reduce(square, group=mpu.get_model_parallel_group())
    torch._foreach_mul_([p.grad for p in reduced if p.grad is not None], (max_norm / (square.sqrt() + 1e-6)).clamp(max=1.0))


def _adapt_to_gpu() -> None:
    """Replace functions of DeepSpeed 0.19.8 that make the host wait for the GPU, or pass over all gradients, without need
    (deepspeed/runtime/zero)."""
    zero_12, zero_3 = stage_1_and_2.DeepSpeedZeroOptimizer, stage3.DeepSpeedZeroOptimizer_Stage3
    stage_1_and_2.is_invalid_grad_norm = stage3.is_invalid_grad_norm = _skip_no_step
    stage_1_and_2.mask_nan_or_inf_with_val_inplace = stage3.mask_nan_or_inf_with_val_inplace = _mask_invalid
    zero_12.allreduce_and_copy = _reduce_on_stream
    zero_12.get_grad_norm_direct, zero_3.get_grad_norm_direct = _norm_12, _norm_3
    zero_12.unscale_and_clip_grads, zero_3.unscale_and_clip_grads = _clip_12, _clip_3
    zero_12.update_offload_overflow_tracker = _track_nothing
    zero_12.complete_grad_norm_calculation_for_cpu_offload = _norm_offloaded
    zero_12.async_accumulate_grad_in_cpu_via_gpu = _accumulate_in_order
    zero_12.reduce_independent_p_g_buckets_and_remove_grads = _collect_if_shared
    zero_12.reduce_ipg_grads = _reduce_if_collected


def _skip_no_step(norm: torch.Tensor) -> bool:
    """Whether DeepSpeed is to skip a step because of its gradient norm: never. A norm that is not finite ends the run after the
    step (processes.must_be_finite), which reads it anyway, and nothing is saved."""
    return False


def _mask_invalid(norm: torch.Tensor, device: Any = None, val: float = -1.0) -> None:
    """As in deepspeed/runtime/utils.py, where `val` is copied to the device and back: two host syncs per parameter group."""
    norm.masked_fill_(~norm.isfinite(), val)


def _reduce_on_stream(
    optimizer: Any, bucket: list[torch.Tensor], dtype: torch.dtype, rank: int | None = None, log: Any = None,
    divide: bool = True, process_group: Any = None, output_bucket: Any = None,
) -> None:  # fmt: skip
    """Reduce gradients to the rank that owns them.

    With overlap_comm, DeepSpeed calls torch.cuda.synchronize() here before each reduction, so that it can free gradients that
    are not contiguous; all of ours are. The caller, average_tensor, has ordered the streams already and made the reduction
    stream the current one. DeepSpeed also copies a reduced gradient over itself where it has been reduced in place.
    """
    reduced = optimizer.allreduce_bucket(bucket, dtype, rank=rank, divide=divide, process_group=process_group)
    for gradient in (*bucket, reduced) if optimizer.overlap_comm else ():
        gradient.record_stream(optimizer.reduction_stream)  # its memory is not reused before it has been read
    if rank is not None and rank != dist.get_rank(process_group or optimizer.dp_process_group):
        return
    outputs = output_bucket or [None] * len(bucket)
    for gradient, whole, output in zip(bucket, optimizer.unflatten(reduced, bucket), outputs, strict=True):
        optimizer._add_to_grad_partition_buffer(output, whole)
        if whole.data_ptr() != gradient.data_ptr():
            gradient.copy_(whole)


def _collect_if_shared(optimizer: Any, parameter: torch.Tensor, group: int) -> None:
    """Copy a gradient to the bucket that is reduced next; on a rank without replicas, leave it where it is. DeepSpeed copies it
    to the bucket, divides it by 1, and copies it back. With offload it goes on to host memory from there."""
    if optimizer.cpu_offload or dist.get_world_size(optimizer.dp_process_group) > 1:
        _collect(optimizer, parameter, group)


def _reduce_if_collected(optimizer: Any, comm_dtype: torch.dtype | None = None) -> None:
    if any(bucket.params for bucket in optimizer.ipg_buckets.values()):
        _reduce_collected(optimizer, comm_dtype)


def _norm_12(optimizer: Any, gradients: Any, params: Sequence[torch.Tensor], norm_type: float = 2.0) -> torch.Tensor:
    counted = [gradient for gradient in gradients if not getattr(gradient, "_zero_padding", False)]
    return _norm(optimizer, counted, params, optimizer.dp_process_group, False)


def _norm_3(optimizer: Any, gradients: Any, params: Sequence[torch.Tensor], norm_type: float = 2.0) -> torch.Tensor:
    group = optimizer._get_param_partition_group(params[0])
    return _norm(optimizer, gradients, params, group, optimizer._grad_norm_counts_every_rank(params, group))


def _norm(
    optimizer: Any, gradients: Sequence[torch.Tensor], params: Sequence[torch.Tensor], group: Any, is_split: bool
) -> torch.Tensor:
    """The norm of the gradients of all ranks, -1 if it is not finite. DeepSpeed makes an fp64 copy of each gradient, and at
    stage 3 the host waits for a -1 that it sends to the GPU.

    params: of the gradients. is_split: over the ranks of tensor parallelism too, so that each counts its own.
    """
    pairs = zip(gradients, params, strict=False)  # the last rank may hold padding
    counted = [gradient for gradient, parameter in pairs if _counts(optimizer, parameter, is_split)]
    total = torch.zeros((), device=optimizer.device)
    if counted:
        total = torch.stack(optim.norms(counted)).square().sum()
    dist.all_reduce(total, group=group)
    if not is_split:
        optimizer._model_parallel_all_reduce(tensor=total, op=dist.ReduceOp.SUM)
    norm = total.sqrt()
    _mask_invalid(norm)
    return norm


def _counts(optimizer: Any, parameter: torch.Tensor, is_split: bool) -> bool:
    """Does this rank add the gradient of a parameter to the norm? As DeepSpeed's functions ask."""
    if getattr(parameter, "ds_pipe_replicated", False):  # the first stage of a pipeline adds it
        return False
    return is_split or is_model_parallel_parameter(parameter) or optimizer.model_parallel_rank == 0


def _norm_offloaded(optimizer: Any, params: Sequence[torch.Tensor]) -> torch.Tensor:
    """As _norm, from the norm of each gradient, which DeepSpeed reads one after the other."""
    found = optimizer.norm_for_param_grads
    numbers = [optimizer.get_param_id(parameter) for parameter in params if _counts(optimizer, parameter, False)]
    norms = [found[number] for number in numbers if number in found]
    total = torch.zeros((), device=params[0].device)
    if norms:
        total = torch.stack(norms).square().sum().float()
    dist.all_reduce(total, group=optimizer.dp_process_group)
    optimizer._model_parallel_all_reduce(tensor=total, op=dist.ReduceOp.SUM)
    norm = total.sqrt()
    _mask_invalid(norm)
    return norm.to(optimizer.device)


def _track_nothing(optimizer: Any, gradient: torch.Tensor) -> None:
    """Whether an offloaded gradient is finite is asked only with check_grad_overflow, which ds_config turns off."""


def _accumulate_in_order(optimizer: Any, param: torch.Tensor) -> None:
    """Add a gradient to the sum that is kept in host memory. DeepSpeed lets the host wait for the copies that are under way, as
    that memory may be pageable; ours is pinned (ds_config), so that it is enough if the stream waits."""

    def wait_on_stream() -> None:
        for event in optimizer._pending_offload_events.values():
            torch.cuda.current_stream().wait_event(event)

    optimizer._wait_for_offload_copies = wait_on_stream
    try:
        _accumulate(optimizer, param)
    finally:
        del optimizer._wait_for_offload_copies


def _clip_12(optimizer: Any, gradients: list[torch.Tensor], total_norm: torch.Tensor) -> None:
    """Let AdamW's kernel divide the gradients (torch/optim/adam.py: grad_scale), in place of a pass over all of them."""
    if optimizer.clip_grad:
        optimizer.optimizer.grad_scale = ((total_norm + 1e-6) / optimizer.clip_grad).clamp(min=1.0)


def _clip_3(optimizer: Any, sub_group_id: int, total_norm: torch.Tensor) -> None:
    _clip_12(optimizer, [], total_norm)


def ds_config(cfg: Config, layout: Layout) -> dict[str, Any]:
    """DeepSpeed's JSON configuration. `deepspeed.extra` is merged last."""
    system, on_gpu = cfg.deepspeed, torch.cuda.is_available()
    parameters_per_rank = cfg.model.parameter_count() // (layout.tp * layout.pp)
    replicas = layout.dp * layout.sp  # ranks whose gradients are summed: those that share a sequence too
    zero: dict[str, Any] = {"stage": system.zero_stage} | _reduction(parameters_per_rank, replicas)
    # on a CPU there is no second stream; it allocates a second bucket. A pipeline reduces after its last backward pass
    zero["overlap_comm"] = on_gpu and replicas > 1 and layout.pp == 1
    if system.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": on_gpu}
    if system.offload == "all":
        zero["offload_param"] = {"device": "cpu", "pin_memory": on_gpu}
    if system.nvme:
        _use_nvme(zero, cfg, layout)
    zero |= {
        "zero_hpz_partition_size": system.hpz, "zero_quantized_weights": system.quantized_weights,
        "zero_quantized_gradients": system.quantized_gradients,
    }  # fmt: skip
    bf16 = cfg.train.dtype == "bf16"
    values: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": layout.micro_batch,
        "gradient_accumulation_steps": layout.accumulate,
        "gradient_clipping": cfg.optim.grad_clip,
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,  # offload keeps torch's AdamW, the one that all stacks share
        # without ZeRO, DeepSpeed accumulates a bf16 model's gradients in bf16: there fp32 weights under autocast instead
        # the recipe ends the run if the norm of the gradients is not finite: no second pass over them to find that out
        "bf16": {"enabled": bf16 and system.zero_stage > 0, "check_grad_overflow": False},
        "torch_autocast": {"enabled": bf16 and system.zero_stage == 0, "dtype": "bfloat16"},
        "steps_per_print": 10**9,
        "timers": {"throughput": {"enabled": False}},  # waits for the GPU twice in every micro batch (deepspeed/utils/timer.py)
    }
    if layout.sp > 1:
        values["sequence_parallel_size"] = layout.sp
    if layout.tp > 1:
        # by default AutoTP splits an output that is tied to the embedding over the vocabulary, with a loss of its own
        values["tensor_parallel"] = {"autotp_size": layout.tp, "vocab_parallel_lm_head": False}
    return _merged(values, system.extra)


def _use_nvme(zero: dict[str, Any], cfg: Config, layout: Layout) -> None:
    """Keep what is offloaded in deepspeed.nvme, in a folder that the launcher removes (without a launcher it stays).

    sub_group_size: numbers that are stepped at a time; DeepSpeed pins memory for four times as many.
    buffer_size: those of a rank's share of the largest parameter, the embedding or a product of the MLP.
    """
    folder = os.environ.get(SWAP_FOLDER) or tempfile.mkdtemp(prefix="twinstack_", dir=find(cfg.deepspeed.nvme or ""))
    work = cfg.model.workload(cfg.data)
    largest = max(work.vocab * work.hidden, *(block.hidden * block.ffn for block in work.blocks))
    place = {"device": "nvme", "nvme_path": folder}
    zero["sub_group_size"] = 100_000_000
    zero["offload_optimizer"] |= place
    if "offload_param" in zero:
        zero["offload_param"] |= place | {"buffer_size": largest // layout.world + 1024}


def _reduction(parameters: int, dp: int) -> dict[str, Any]:
    """How gradients are reduced over dp ranks.

    reduce_bucket_size: elements that are reduced together, in a buffer that is allocated whole (two with overlap_comm). The
        size is Megatron's (megatron/core/distributed/distributed_data_parallel.py): large enough for full bandwidth, small
        enough that the reduction begins early in the backward pass. A larger gradient is reduced by itself, in place.
    use_multi_rank_bucket_allreduce: at stages 1 and 2, all-reduce a bucket, or reduce each part of it to the rank that owns
        it, which sends half as much; DeepSpeed has no reduce-scatter there (docs/layouts.md). A reduction passes through the
        ranks one after the other, and fills that chain only if a rank's share of the gradients is large: the bound is
        Megatron's million elements per rank, for each share.
    """
    per_rank = 1_000_000
    bucket = min(parameters, max(40_000_000, per_rank * dp))
    return {"reduce_bucket_size": bucket, "use_multi_rank_bucket_allreduce": parameters // dp < per_rank * dp}


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    both = dict(base)
    for key, value in over.items():
        both[key] = _merged(both[key], value) if isinstance(value, dict) and isinstance(both.get(key), dict) else value
    return both


def weights_dtype(cfg: Config) -> torch.dtype:
    """The dtype of the model's weights: bf16 with fp32 masters from ZeRO 1 on; fp32 under autocast without ZeRO (ds_config)."""
    return torch.bfloat16 if cfg.train.dtype == "bf16" and cfg.deepspeed.zero_stage else torch.float32


def tp_rank(layout: Layout, ranks: Ranks) -> int:
    """AutoTP's groups are neighbouring ranks (deepspeed/utils/groups.py)."""
    return ranks.rank % layout.tp


def stage_of(layout: Layout, ranks: Ranks) -> int:
    """The pipeline stage of this rank. The replicas of a stage, which sum its gradients, are neighbouring ranks
    (PipeDataParallelTopology in deepspeed/runtime/pipe/topology.py)."""
    return ranks.rank // layout.dp if layout.pp > 1 else 0


def dp_rank(layout: Layout, ranks: Ranks) -> int:
    return ranks.rank % layout.dp if layout.pp > 1 else ranks.rank // (layout.tp * layout.sp)


def sp_rank(layout: Layout, ranks: Ranks) -> int:
    """Which part of a sequence this rank has, of those that neighbouring ranks share."""
    return ranks.rank // layout.tp % layout.sp


def reports_loss(layout: Layout, ranks: Ranks) -> bool:
    """Whether this is the one rank of its replica that reports the loss."""
    return tp_rank(layout, ranks) == 0 and stage_of(layout, ranks) == layout.pp - 1


def mpu(layout: Layout) -> Any:
    """What deepspeed.initialize is to know of the groups: those of Ulysses, neighbouring ranks that share each sequence."""
    if layout.sp == 1:
        return None
    parallel_state_sp.initialize_sequence_parallel(layout.sp)
    return parallel_state_sp


def averaging_ranks(layout: Layout, stage: int) -> int:
    """By how many ranks the engine divides a sum of gradients: by the data-parallel replicas; at stage 3 by all ranks, those
    too that share a sequence (deepspeed/runtime/comm/coalesced_collectives.py, reduce_scatter_coalesced)."""
    return layout.dp * (layout.sp if stage == 3 else 1)


def grad_norm(engine: Any, shapes: Shapes) -> float:
    """Global gradient norm before clipping. Call it before engine.step() at stage 0, where the engine records none, and after
    it at the other stages."""
    if engine.zero_optimization_stage() == 0:
        shapes = shapes_here(engine, shapes)
        grads = {n: p.grad for n, p in engine.module.named_parameters() if p.grad is not None}
        split = [g for n, g in grads.items() if tuple(g.shape) != tuple(shapes[n])]
        whole = [g for n, g in grads.items() if tuple(g.shape) == tuple(shapes[n])]
        squares = torch.stack([optim.total_norm(some) ** 2 for some in (split, whole) if some])
        if split:
            dist.all_reduce(squares[:1], group=groups.get_tensor_model_parallel_group())
        return squares.sum().sqrt().item()
    return float(engine.get_global_grad_norm())


def load_state(engine: Any, shapes: Shapes, values: state.Values, step: int) -> None:
    """Set weights, fp32 masters and moments from `values` after `step` steps; a collective.

    shapes: the full shape of each Hugging Face parameter; one that is smaller here is AutoTP's shard of it. BadInput unless
    the engine's model holds just these.
    """
    full, shapes = shapes, shapes_here(engine, shapes)
    stage, named = engine.zero_optimization_stage(), state.largest_first(engine.module.named_parameters(), shapes)
    local = {name: tuple(getattr(parameter, "ds_shape", parameter.shape)) for name, parameter in named}
    whole = {name: _full_shape(shape, shapes.get(name, shape), engine.autotp_size()) for name, shape in local.items()}
    parameters.prove(_of_all_stages(engine, whole), shapes, "the model on deepspeed")
    inner = engine.optimizer
    if step and stage == 0:
        state.begin_torch_state(named, inner, step)
    elif step:
        for group in inner.optimizer.param_groups:
            for flat in group["params"]:
                inner.optimizer.state[flat] = state.adam_state(flat, step)
        if stage == 3:
            for number, flat in enumerate(inner.fp32_partitioned_groups_flat):  # absent from param_groups between steps
                with _in_memory(inner, number):
                    inner.optimizer.state[flat] = state.adam_state(flat, step)
        else:
            _link(inner)
    for name, parameter in named if stage else ():
        if split_dim(local[name], shapes[name]) is not None:
            # AutoTP slices embeddings (T5's relative biases) without saying so, and the gradient norm, and with it the
            # clipping, would miss the other ranks' part (deepspeed/runtime/utils.py, is_model_parallel_parameter)
            marked: Any = parameter
            marked.tensor_model_parallel = True
    held = _batches(engine, named, full, bool(step), for_load=True)
    order = {name: parameter for name, parameter in named}
    names = [name for batch in _names_of_batches(engine, named) for name in batch]
    wanted = [(name, state.stored_shapes(order[name], full[name], inner, step)) for name in names]
    group = engine.grid.get_data_parallel_group() if engine.pipeline_parallelism else None  # the ranks of this stage
    state.fill(held, wanted, values, engine.device, group)
    if stage == 3:
        inner.invalidate_secondary_tensor()  # deepspeed.hpz: copied from the memory in which the model was built


@contextlib.contextmanager
def _in_memory(inner: Any, group: int) -> Iterator[None]:
    """Stage 3 with deepspeed.nvme: read the optimizer state of a group of parameters, and write it back at the end."""
    is_swapped = inner._swappable_optimizer_subgroup(group)
    if is_swapped:
        inner._optimizer_states_and_gradient_swap_in(group)
    yield
    if is_swapped:
        inner._optimizer_states_and_gradient_swap_out(group)


def _conversions(engine: Any) -> dict[str, Conversion]:
    """Those of parameters that a recipe stores otherwise than the `transformers` class: `conversions` of the model that it
    builds."""
    found: dict[str, Conversion] = getattr(engine.module, "conversions", {})
    return found


def shapes_here(engine: Any, shapes: Shapes) -> Shapes:
    """The full shapes that parameters of these Hugging Face shapes have in the engine's model."""
    converted = {name: _converted_shape(conversion, shapes[name]) for name, conversion in _conversions(engine).items()}
    return {**shapes, **converted}


def _converted_shape(conversion: Conversion, shape: Sequence[int]) -> Sequence[int]:
    return tuple(conversion.from_hf(torch.empty(*shape, device="meta")).shape)


def _of_all_stages(engine: Any, shapes: Shapes) -> Shapes:
    """`shapes` of this rank and, with a pipeline, of the other stages."""
    if not engine.pipeline_parallelism:
        return shapes
    group = engine.grid.get_pipe_parallel_group()
    gathered: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(gathered, shapes, group=group)
    return {name: shape for stage in gathered for name, shape in stage.items()}


def _full_shape(shape: Sequence[int], full: Sequence[int], tp: int) -> Sequence[int]:
    """The shape that a parameter has without AutoTP, which leaves each rank 1 / tp of one dimension."""
    dim = split_dim(shape, full) if len(full) == len(shape) else None
    return shape if dim is None else (*shape[:dim], shape[dim] * tp, *shape[dim + 1 :])


def _link(inner: Any) -> None:
    """Stage 1 and 2: let every parameter find its moments. DeepSpeed 0.19.8 links all groups after the step of the first,
    when the second has none yet (runtime/zero/stage_1_and_2.py, _optimizer_step)."""
    inner._hp_optimizer_states_linked = False
    inner._lazy_init_hp_params_optimizer_state()


def pieces_of(engine: Any, shapes: Shapes) -> Batches:
    """What this rank holds of the trained parameters' masters and moments, to save.

    shapes: the full shape of each Hugging Face parameter.
    """
    stage, inner = engine.zero_optimization_stage(), engine.optimizer
    if 0 < stage < 3 and inner.optimizer.state:
        _link(inner)
    named = [(name, parameter) for name, parameter in engine.module.named_parameters() if parameter.requires_grad]
    return _batches(engine, named, shapes, with_moments=True, for_load=False)


def _names_of_batches(engine: Any, named: Sequence[tuple[str, Any]]) -> list[list[str]]:
    """Of one batch, or with deepspeed.nvme of one for each group of parameters that is in memory at a time."""
    inner = engine.optimizer
    if engine.zero_optimization_stage() < 3 or not any(map(inner._swappable_optimizer_subgroup, range(len(inner.fp16_groups)))):
        return [[name for name, _ in named]]
    groups_of: dict[int, list[str]] = {}
    for name, parameter in named:
        number = inner.grad_position[inner.get_param_id(parameter)][0] if parameter.requires_grad else -1
        groups_of.setdefault(number, []).append(name)
    return [groups_of[number] for number in sorted(groups_of)]


def _batches(
    engine: Any, named: Sequence[tuple[str, Any]], shapes: Shapes, with_moments: bool, for_load: bool
) -> Iterator[Batch]:
    """The pieces of this rank. for_load: those of the model's weights too."""
    stage, inner, found = engine.zero_optimization_stage(), engine.optimizer, dict(named)
    of_stage = _pieces_stage3 if stage == 3 else _pieces_stage12 if stage else _pieces_stage0
    for names in _names_of_batches(engine, named):
        numbers = {
            inner.grad_position[inner.get_param_id(found[name])][0]
            for name in names
            if stage == 3 and found[name].requires_grad
        }
        with contextlib.ExitStack() as stack:
            for number in numbers:
                stack.enter_context(_in_memory(inner, number))
            held: list[Piece] = []
            for name in names:
                parameter = found[name]
                if for_load and stage == 3:
                    stack.enter_context(_weight_in_memory(parameter))
                placement, replica, replicas = _placement(engine, name, parameter, shapes)
                for part, tensor, start, is_saved in of_stage(inner, parameter, with_moments, for_load):
                    place = placement if part in PARTS else pieces.whole(name, tensor.shape)  # Adafactor's means
                    is_saved = is_saved and not getattr(parameter, "ds_pipe_replicated", False)  # the first stage has it too
                    held += pieces.cut(place, part, tensor.view(-1), start, replica, replicas, is_saved)
            yield Batch(names, held)


def _placement(engine: Any, name: str, parameter: Any, shapes: Shapes) -> tuple[Placement, int, int]:
    """Where the elements of this rank's AutoTP shard are in the Hugging Face parameter; of the ranks that have the same
    elements to save, the number of this one, and their number."""
    conversion = _conversions(engine).get(name)
    local = tuple(getattr(parameter, "ds_shape", parameter.shape))
    full = tuple(_converted_shape(conversion, shapes[name]) if conversion else shapes[name])
    dim, tp = split_dim(local, full), max(1, engine.autotp_size())  # it is 0 without AutoTP
    rank = groups.get_tensor_model_parallel_rank() if tp > 1 else 0
    stage = engine.zero_optimization_stage()
    if stage == 3 and engine.optimizer._get_param_partition_world_size(parameter) == dist.get_world_size():
        replica, replicas = 0, 1  # what AutoTP does not split may be divided among its ranks too
    elif stage:
        replica, replicas = (rank, tp) if dim is None else (0, 1)
    elif dim is None:
        replica, replicas = dist.get_rank(), dist.get_world_size()
    else:
        replica, replicas = dist.get_rank() // tp, dist.get_world_size() // tp
    if conversion:
        split = {"dim": dim or 0, "tp": 1 if dim is None else tp, "rank": rank}
        return pieces.converted(conversion, [shapes[name]], **split), replica, replicas
    first = rank * local[dim] if dim is not None else 0
    row, column = (first, 0) if not dim else (0, first)
    return pieces.rows_of(name, full, row, local[0])._replace(local=local, column=column), replica, replicas


Held = Iterator[tuple[str, torch.Tensor, int, bool]]  # part, memory, its first element in the local parameter, is it saved

# Below, `parameter` is a torch.nn.Parameter to which DeepSpeed adds attributes: _hp_mapping, ds_tensor and so on.


def _pieces_stage0(inner: Any, parameter: Any, with_moments: bool, for_load: bool) -> Held:
    yield "weight", parameter.detach(), 0, True
    if with_moments and parameter.requires_grad:
        for part, tensor in state.optimizer_parts(parameter, inner.state.get(parameter, {})).items():
            yield part, tensor, 0, True


def _pieces_stage12(inner: Any, parameter: Any, with_moments: bool, for_load: bool) -> Held:
    if for_load:
        yield "weight", parameter.detach(), 0, False
    if not parameter.requires_grad or parameter._hp_mapping is None:  # this rank owns no piece of its master
        return
    mapping = parameter._hp_mapping
    start, master = mapping.lp_fragment_address.start, mapping.hp_fragment.detach()
    yield "weight", master, start, True
    if with_moments:
        moments = {part: mapping.get_hp_fragment(part) for part in MOMENTS} if inner.optimizer.state else {}
        for part, tensor in state.optimizer_parts(master, moments).items():
            yield part, tensor, start, True


def _pieces_stage3(inner: Any, parameter: Any, with_moments: bool, for_load: bool) -> Held:
    start = parameter.ds_tensor.ds_numel * inner._get_param_partition_rank(parameter)
    if for_load:
        yield "weight", parameter.ds_tensor.data, start, False
        if parameter.ds_status.name == "AVAILABLE":
            yield "weight", parameter.detach(), 0, False
    if not parameter.requires_grad:
        return
    group, begin, size = inner.grad_position[inner.get_param_id(parameter)]
    flat = inner.fp32_partitioned_groups_flat[group]
    master = flat.detach().narrow(0, begin, size)
    yield "weight", master, start, True
    if with_moments:
        moments = inner.optimizer.state.get(flat, {})
        own = {part: moments[part].narrow(0, begin, size) for part in MOMENTS} if moments else {}
        for part, tensor in state.optimizer_parts(master, own).items():
            yield part, tensor, start, True


@contextlib.contextmanager
def _weight_in_memory(parameter: Any) -> Iterator[None]:
    """Stage 3 with parameters in deepspeed.nvme: read this rank's share of a weight, and write it back at the end."""
    is_swapped = parameter.ds_tensor.status.name == "NOT_AVAILABLE"
    if is_swapped:
        parameter.nvme_swapper.swap_in([parameter], async_op=False)
    yield
    if is_swapped:
        parameter.nvme_swapper.swap_out_and_release([parameter])


def split_dim(shape: Sequence[int], full: Sequence[int]) -> int | None:
    """The dimension in which a shard is smaller than its parameter; None if it is the whole one."""
    return next((dim for dim, (size, whole) in enumerate(zip(shape, full, strict=True)) if size != whole), None)
