"""baseline.shard: full, FSDP2 (torch's fully_shard): each rank keeps its rows of every weight, gradient and moment."""

from typing import TYPE_CHECKING, Any

from common.launch.processes import Ranks
from common.training import init
from common.training.compiling import transformer_layers

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def shard(net: "PreTrainedModel", dtype: str, ranks: Ranks) -> Any:
    """Divide a model whose parameters are on the meta device among all ranks, in place. Its parameters become DTensors, whose
    memory has no values yet. Returns the model.

    Each transformer layer is a unit, and what is outside the layers is one. A layer's parameters are gathered for its forward
    pass and again for its backward pass; the others once, for both. Gradients are averaged over the ranks in every micro batch,
    as in DDP, so that no rank accumulates whole ones. dtype bf16: fp32 weights, which are gathered as bf16 for the computation;
    gradients are reduced and accumulated in fp32.
    """
    # accelerate (1.15, utils/fsdp_utils.py) would need the whole model on rank 0 or on every rank, and finds the optimizer's
    # parameters by their addresses, which those on the meta device do not have
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(ranks.device.type, (ranks.world,))
    is_bf16 = dtype == "bf16"
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if is_bf16 else MixedPrecisionPolicy()
    net.tie_weights()  # on the meta device a shared weight is two: each would be gathered and reduced
    for layer in transformer_layers(net):
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(net, mesh=mesh, mp_policy=policy)
    init.allocate(net, torch.float32, device=ranks.device)
    return net


def gathered(tensor: "torch.Tensor") -> "torch.Tensor":
    """The whole of a tensor that is divided among the ranks: a collective. Other tensors as they are."""
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own_rows(tensor: "torch.Tensor") -> "torch.Tensor":
    """The rows of a tensor that this rank holds; all of them if it is not divided. They share its memory."""
    from torch.distributed.tensor import DTensor

    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def first_row(tensor: "torch.Tensor") -> int | None:
    """Of a tensor that is divided among the ranks, the first row that this rank holds; None for other tensors. Of n rows each
    rank has ceil(n / ranks), and the last one that has any what is left (torch.chunk)."""
    from torch.distributed.tensor import DTensor

    if not isinstance(tensor, DTensor):
        return None
    return -(-len(tensor) // tensor.device_mesh.size()) * tensor.device_mesh.get_local_rank()
