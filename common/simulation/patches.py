"""What has to be answered for a process that is alone, on a device that computes nothing: each patch with its reason.

Nothing else is changed: the recipes, the stacks and torch run as they are.
"""

import importlib
import itertools
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from common.simulation import null_gpu, regions

_kept: list[Any] = []  # what is installed; torch.library takes an override back when its object is gone
gloo_groups: list[int] = []  # sizes of the groups for CPU tensors that were asked for
object_collectives: Counter[str] = Counter()  # all_gather_object and the like, which wait for all ranks


def before_imports(rank: int, world: int) -> None:
    """What the stacks read when they are imported."""
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK="0", LOCAL_WORLD_SIZE=str(min(world, 8)), MASTER_ADDR="127.0.0.1",
        MASTER_PORT="1", DS_ACCELERATOR="cuda",
        # threads that watch over collectives; there is nothing to wait for
        TORCH_NCCL_ENABLE_MONITORING="0", TORCH_NCCL_DUMP_ON_TIMEOUT="0", TORCH_NCCL_ASYNC_ERROR_HANDLING="0",
    )  # fmt: skip
    if not _kept:
        regions.install()
        _kept.append(regions)


def install(rank: int, world: int) -> None:
    """All patches but those of one stack, and the process group of `world` ranks."""
    _reads()
    _groups(rank, world)
    _objects(world)
    _questions()
    _saving()


# ---- values that no kernel has computed ------------------------------------------------------------------------------


def _reads() -> None:
    """A float that the host reads from the device is 0 and a bool is False: no kernel has computed it, and what lies there
    may be NaN, which ends a run, or an overflow, which skips a step. Integers are read as they are: token counts and signals
    that the host has sent. The copy and the wait stay."""
    import torch

    def read(tensor: torch.Tensor) -> Any:
        host = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu").copy_(tensor)
        if tensor.is_floating_point():
            return 0.0
        return False if tensor.dtype == torch.bool else host.item()

    library = torch.library.Library("aten", "IMPL")
    library.impl("_local_scalar_dense", read, "CUDA")
    _kept.append(library)
    for name in ("cpu", "tolist", "numpy"):
        setattr(torch.Tensor, name, _without_values(getattr(torch.Tensor, name)))


def _without_values(function: Callable[..., Any]) -> Callable[..., Any]:
    """Tensor.cpu or .tolist, which gives zeros for what lies on the device."""
    import torch

    def replaced(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if not tensor.is_cuda or not (tensor.is_floating_point() or tensor.dtype == torch.bool):
            return function(tensor, *args, **kwargs)
        host = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu").copy_(tensor.detach()).zero_()
        return function(host, *args, **kwargs)

    return replaced


def _questions() -> None:
    """Checks that read more than one number, and kernels that need more than a device that answers."""
    import torch

    ddp: Any = importlib.import_module("torch.nn.parallel.distributed")
    c10d: Any = importlib.import_module("torch._C._distributed_c10d")

    # cuDNN's attention asks libcudnn, which wants a real device. Flash attention keeps the same tensors
    torch.backends.cuda.enable_cudnn_sdp(False)
    # compares the shapes of all ranks, as numbers that a kernel gathers
    ddp._verify_param_shape_across_processes = lambda *_, **__: None
    # DDP waits for its events in the first ten steps and in every hundredth, to log statistics that nobody asks for
    c10d.Logger.set_runtime_stats_and_log = lambda *_: None
    # counted, to tell the math backend, which is made of other kernels
    functional: Any = torch.nn.functional
    attend = functional.scaled_dot_product_attention

    def counted_attention(*args: Any, **kwargs: Any) -> torch.Tensor:
        if not torch.compiler.is_compiling():
            null_gpu.count("attention\t")
        functional.scaled_dot_product_attention = attend  # torch.nn.attention.bias compares it with what is called
        try:
            return attend(*args, **kwargs)
        finally:
            functional.scaled_dot_product_attention = counted_attention

    functional.scaled_dot_product_attention = counted_attention
    # "is this batch that of the first rank?" (DeepSpeed's AutoTP): it is
    equal = torch.equal
    setattr(torch, "equal", lambda a, b: True if a.is_cuda else equal(a, b))  # noqa: B010  (mypy compares signatures)
    try:
        import transformers.masking_utils as masks
    except ImportError:
        return

    # "is any sequence packed?", asked of positions that no kernel has written: no. The question stays
    def find_packed_sequence_indices(position_ids: torch.Tensor) -> None:
        (position_ids[:, :1] == 0).all().item()

    masks.find_packed_sequence_indices = find_packed_sequence_indices


# ---- the other ranks -------------------------------------------------------------------------------------------------


def _groups(rank: int, world: int) -> None:
    """The process group: NCCL's own code, over a store in which every key of another rank is there. Groups of gloo, which
    would connect to the other ranks, become torch's fake ones. What NCCL would learn of a new group from the other ranks is
    passed to the null GPU."""
    import datetime

    import torch
    import torch.distributed as dist
    import torch.distributed.device_mesh as device_mesh
    import torch.testing._internal.distributed.fake_pg  # noqa: F401  (registers the backend "fake")
    from torch.distributed import distributed_c10d as c10d

    class Answers(dist.Store):  # type: ignore[name-defined, misc]  # exported only where torch has distributed
        def __init__(self) -> None:
            super().__init__()
            self.values: dict[str, bytes] = {}

        def set(self, key: str, value: Any) -> None:
            self.values[key] = value if isinstance(value, bytes) else str(value).encode()

        def get(self, key: str) -> bytes:
            return self.values.get(key, b"\7" * 128)  # as long as NCCL's id of a communicator

        def add(self, key: str, amount: int) -> int:
            self.values[key] = str(int(self.values.get(key, b"0")) + amount).encode()
            return int(self.values[key])

        def compare_set(self, key: str, expected: Any, desired: Any) -> bytes:
            self.set(key, desired)
            return self.values[key]

        def wait(self, *_: Any) -> None:
            pass

        def check(self, keys: Sequence[str]) -> bool:
            return True

        def clone(self) -> "Answers":
            return self

        def num_keys(self) -> int:
            return len(self.values)

        def delete_key(self, key: str) -> bool:
            return self.values.pop(key, None) is not None

        def set_timeout(self, _: Any) -> None:
            pass

    new_group, split_group = c10d.new_group, c10d.split_group

    def announce_group(members: Sequence[int]) -> None:
        null_gpu.next_group(*((len(members), members.index(rank)) if rank in members else (0, 0)))

    def new(ranks: Any = None, timeout: Any = None, backend: Any = None, *args: Any, **kwargs: Any) -> Any:
        members = sorted(ranks) if ranks is not None else list(range(world))
        if backend == "gloo":
            gloo_groups.append(len(members))
            backend = "fake"
        announce_group(members)
        return new_group(ranks, timeout, backend, *args, **kwargs)

    def split(parent_pg: Any = None, split_ranks: Any = None, *args: Any, **kwargs: Any) -> Any:
        of_parent = dist.get_process_group_ranks(parent_pg or dist.group.WORLD)
        groups = [[of_parent[i] for i in group] for group in split_ranks or []]
        announce_group(next((group for group in groups if rank in group), []))
        return split_group(parent_pg, split_ranks, *args, **kwargs)

    dist.new_group = c10d.new_group = new
    dist.split_group = c10d.split_group = split
    for name, replaced in {"new_group": new, "split_group": split}.items():
        if hasattr(device_mesh, name):
            setattr(device_mesh, name, replaced)
    torch.cuda.set_device(0)
    store = Answers()
    _kept.append(store)  # C++ calls its methods as long as Python has it
    dist.init_process_group("nccl", store=store, rank=rank, world_size=world, timeout=datetime.timedelta(hours=1))


def _objects(world: int) -> None:
    """Objects travel as bytes through the device: every rank says what this one says."""
    import torch.distributed as dist
    from torch.distributed import distributed_c10d as c10d

    def all_gather_object(object_list: list[Any], obj: Any, group: Any = None) -> None:
        object_collectives["all_gather_object"] += 1
        object_list[:] = [obj] * len(object_list)

    def gather_object(obj: Any, object_gather_list: list[Any] | None = None, *_: Any, **__: Any) -> None:
        object_collectives["gather_object"] += 1
        if object_gather_list is not None:
            object_gather_list[:] = [obj] * len(object_gather_list)

    def broadcast_object_list(object_list: list[Any], *_: Any, **__: Any) -> None:
        object_collectives["broadcast_object_list"] += 1

    for function in (all_gather_object, gather_object, broadcast_object_list):
        setattr(dist, function.__name__, function)
        setattr(c10d, function.__name__, function)


def _saving() -> None:
    """A checkpoint is written whole by this rank, so that a later simulation can resume from it: zeros stand for values, which
    no kernel has computed. It is read without the other ranks."""
    import torch

    from common.checkpoints import checkpoint, pieces, sharded

    module: Any = sharded
    write = sharded.write

    def save(writer: sharded.Writer, batches: pieces.Batches) -> None:
        writer.begin()
        held = [piece for batch in batches for piece in batch.pieces]
        for piece in pieces.own(held):
            piece.tensor.detach().to("cpu")
        shapes = {(piece.name, piece.part): piece.shape for piece in held if piece.is_saved}
        parts = {part for _, part in shapes}
        for name, shape in writer.shapes.items():
            if not any((name, part) in shapes for part in parts):  # of another rank
                shapes |= {(name, part): tuple(shape) for part in parts}
        zeros = [
            piece
            for (name, part), shape in shapes.items()
            for piece in pieces.cut(pieces.whole(name, shape), part, torch.zeros(1).expand(math.prod(shape)))
        ]
        writer.finish_step(sharded.index([[write(writer.tmp / "00000.safetensors", zeros)]], writer.shapes))

    def load(saved: checkpoint.Checkpoint, batches: pieces.Batches) -> None:
        reader = sharded.Reader(saved)
        for batch in batches:
            reader.read(batch.pieces)

    module.save, module.load = save, load


def after_imports(stack: str, world: int) -> None:
    """What belongs to one stack or to finetuning."""
    from common.training import finetuning

    def gather(predictions: Any, is_loss_rank: bool = True) -> Any:
        """The predictions of all ranks, with the number of examples that would have been counted."""
        import numpy as np
        import torch.distributed as dist

        predictions.totals *= is_loss_rank
        dist.all_reduce(predictions.totals)
        values = predictions.totals.cpu().numpy()[3:].reshape(-1, predictions.width)
        return 0.0, len(values), np.asarray(values)

    setattr(finetuning.Predictions, "gather", gather)  # noqa: B010
    if stack == "deepspeed":
        from deepspeed.runtime.zero import utils

        # ZeRO 3 compares lists with those of the first rank, which is not there
        utils.get_lst_from_rank0 = lambda lst: lst
        utils.assert_lst_len_same_as_other_ranks = lambda _: None
        _deepspeed_pipeline()
    if stack == "megatron":
        from common.stacks import mcore

        # the names of all stages together, which one stage does not know
        prove = mcore._prove
        mcore._prove = lambda *args: None if _pipeline_size() > 1 else prove(*args)


def _deepspeed_pipeline() -> None:
    """A stage of DeepSpeed's pipeline asks the one before it for the dtypes and shapes that it will send, as numbers on the
    device, in its first step. Here they are those that the first layer returns for the first micro batch, on the meta device:
    the other layers return the same shapes. The proof that all stages together have all parameters counts those of the others
    too, which lie on the meta device. The last stage alone counts targets; without it there is one, to divide by."""
    import torch
    from deepspeed.runtime.pipe import p2p
    from deepspeed.runtime.pipe.engine import PipelineEngine

    from common.launch import processes
    from common.stacks import ds_pipeline, zero

    totals = processes.totals
    train_batch, recv_tensor_meta, recv = PipelineEngine.train_batch, PipelineEngine._recv_tensor_meta, p2p.recv
    init, of_all_stages = ds_pipeline.Stage.__init__, zero._of_all_stages

    def totals_of_targets(numbers: Sequence[int], ranks: processes.Ranks, group: Any = None) -> list[int]:
        return [max(1, total) for total in totals(numbers, ranks, group)]

    def watched_train_batch(engine: Any, fed: Iterator[Any]) -> Any:
        if engine.pipe_recv_buf is None and not engine.is_first_stage():
            first = next(fed)
            engine.module.first_input = [tensor.to("meta") for tensor in first[0]]
            fed = itertools.chain([first], fed)
        return train_batch(engine, fed)

    def answered_recv_tensor_meta(engine: Any, stage: int) -> Any:
        layer = next(one for one in engine.module.entries if isinstance(one, ds_pipeline.Layer))
        held = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
        dtype = next(engine.module.parameters()).dtype  # those of other stages have kept fp32
        on_meta = {n: tensor.to("meta", dtype if tensor.is_floating_point() else None) for n, tensor in held.items()}
        with torch.no_grad():
            carried = torch.func.functional_call(layer, on_meta, (tuple(engine.module.first_input),))
        numbers = [2, len(carried)]  # 2: a tuple (PipelineEngine._send_tensor_meta)
        for tensor in carried:
            numbers += [engine.DTYPE_TO_ID[tensor.dtype], tensor.dim(), *tensor.shape]

        def answered(buffer: torch.Tensor, stage: int) -> None:
            recv(buffer, stage)
            buffer[: len(numbers)].copy_(torch.tensor(numbers, dtype=buffer.dtype))

        p2p.recv = answered
        try:
            return recv_tensor_meta(engine, stage)
        finally:
            p2p.recv = recv

    def keeping_init(stage: Any, entries: Any, layout: Any, bounds: Any, net: Any, loss_of: Any) -> None:
        init(stage, entries, layout, bounds, net, loss_of)
        stage.entries = list(entries)  # a list: no submodules
        stage.shapes = {name: tuple(parameter.shape) for name, parameter in net.named_parameters()}

    processes.totals = totals_of_targets
    PipelineEngine.train_batch, PipelineEngine._recv_tensor_meta = watched_train_batch, answered_recv_tensor_meta
    setattr(ds_pipeline.Stage, "__init__", keeping_init)  # noqa: B010
    zero._of_all_stages = lambda engine, shapes: {**getattr(engine.module, "shapes", {}), **of_all_stages(engine, shapes)}


def _pipeline_size() -> int:
    from megatron.core import parallel_state

    return int(parallel_state.get_pipeline_model_parallel_world_size())
