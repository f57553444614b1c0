"""Parameters and optimizer state by Hugging Face name, for torch's own AdamW; where they come from; what state.json records.

DeepSpeed's counterpart is common/stacks/zero.py, Megatron's common/stacks/mcore.py. All use `Values` and `checkpoint.Entry`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from math import prod
from typing import TYPE_CHECKING, Any

from common import config
from common.checkpoints import parameters, pieces
from common.checkpoints.checkpoint import PARTS, Checkpoint
from common.checkpoints.parameters import Shapes
from common.checkpoints.pieces import Batch, Batches, Piece, Region
from common.config import Config
from common.contract import Family
from common.launch import heartbeat
from common.paths import find
from common.preflight import Run
from common.training import init

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist

Parts = Mapping[str, "torch.Tensor"]  # `weight`, and where the run has made steps its optimizer's, as `exp_avg`; fp32
PartShapes = Mapping[str, init.Shape]  # those of its parts
Values = Callable[[str, init.Shape], Parts]  # (Hugging Face name, full shape) -> parts on the CPU
Named = Iterable[tuple[str, "torch.nn.Parameter"]]


def values(cfg: Config, task: Family, shapes: Shapes, resume: Checkpoint | None) -> Values:
    """Where this run's parameters come from: its checkpoint, else the Hugging Face folder init.from, else the seed.

    shapes: the family's list; BadInput for a checkpoint of other parameters.
    """
    if resume and resume.is_sharded:
        parameters.prove(resume.shapes(), shapes, str(resume.path))
        return Stored(resume)
    source = _source(cfg, task, shapes, resume)

    def value(name: str, shape: init.Shape) -> Parts:
        heartbeat.beat("reading parameters")
        return source(name, shape)

    return value


class Stored:
    """The values of a checkpoint that each rank reads in part (`fill`)."""

    def __init__(self, checkpoint: Checkpoint):
        self.checkpoint = checkpoint

    def __call__(self, name: str, shape: init.Shape) -> Parts:
        return self.checkpoint.read(name)


def fill(
    batches: Batches, wanted: Sequence[tuple[str, PartShapes]], values: Values, device: "torch.device",
    group: "dist.ProcessGroup | None" = None,
) -> None:  # fmt: skip
    """Set the pieces that the ranks of `group` (default: all ranks) hold; a collective.

    wanted: (name, shapes of the parts that `values` has), of the batches' names in their order, the same on each rank of the
    group. Of as many successive parameters as there are ranks each rank reads or draws one, all at the same time, so that
    parameters of similar size should follow each other; of another rank's parameter a rank receives, on `device`, what it
    holds. A checkpoint is read by the ranks that need it, and nothing is sent.
    """
    if isinstance(values, Stored):
        from common.checkpoints import sharded

        sharded.load(values.checkpoint, batches)
        return
    import torch.distributed as dist

    world, rank, number, own = dist.get_world_size(group), dist.get_rank(group), 0, None
    for batch in batches:
        of_name: dict[str, dict[Region, list[Piece]]] = {name: {} for name in batch.names}
        for piece in batch.pieces:
            region = piece.part, piece.offset, tuple(piece.tensor.shape)
            of_name[piece.name].setdefault(region, []).append(piece)
        for begin in range(0, len(batch.names), TOGETHER):
            names = batch.names[begin : begin + TOGETHER]
            regions = _of_all_ranks([list(of_name[name]) for name in names], group)
            for index, name in enumerate(names):
                owner = number % world
                if owner == 0:
                    own = None
                    for drawn, shapes in wanted[number + rank : number + rank + 1]:
                        own = values(drawn, shapes["weight"])
                assert wanted[number][0] == name, f"{wanted[number][0]} in the place of {name}"
                here, parts = [of_rank[index] for of_rank in regions], own if owner == rank else None
                _fill_parameter(of_name[name], here, wanted[number][1], parts, owner, device, group)
                number += 1


TOGETHER = 32  # parameters of which the ranks say at a time what they hold


def _of_all_ranks(regions: list[list[Region]], group: "dist.ProcessGroup | None") -> list[list[list[Region]]]:
    import torch.distributed as dist

    gathered: list[Any] = [regions] * dist.get_world_size(group)
    if len(gathered) > 1:
        heartbeat.wait("parameters of other ranks")
        dist.all_gather_object(gathered, regions, group=group)
    return gathered


def _fill_parameter(
    held: Mapping[Region, Sequence[Piece]], regions: Sequence[Sequence[Region]], shapes: PartShapes, parts: Parts | None,
    owner: int, device: "torch.device", group: "dist.ProcessGroup | None",
) -> None:  # fmt: skip
    """Set this rank's pieces of one parameter, which the rank `owner` of the group has in `parts`; a collective.

    regions: those of the pieces of each rank. What all ranks hold whole is broadcast. Anything else is sent to those who hold
    it, a piece (pieces.LARGEST) to each rank at a time.
    """
    import torch
    import torch.distributed as dist

    world, rank = dist.get_world_size(group), dist.get_rank(group)
    heartbeat.wait("parameters of other ranks")
    size = sum(prod(shape) for shape in shapes.values())
    if all(sum(prod(extent) for _, _, extent in of_rank) >= size for of_rank in regions):
        whole = _broadcast(shapes, parts, owner, device, group)
        for piece in (piece for of_region in held.values() for piece in of_region):
            _set(piece, whole[piece.part][piece.region])
        return
    for turn in range(max(map(len, regions))):
        sizes = [prod(of_rank[turn][2]) if turn < len(of_rank) else 0 for of_rank in regions]
        received = torch.empty(sizes[rank], device=device)
        sent, sent_sizes = received.new_empty(0), [0] * world
        if parts is not None:
            sent, sent_sizes = torch.empty(sum(sizes)), sizes
            slots = [slot for slot in sent.split(sizes) if slot.numel()]
            wanted = [of_rank[turn] for of_rank in regions if turn < len(of_rank)]
            for slot, (part, offset, extent) in zip(slots, wanted, strict=True):
                slot.view(extent).copy_(parts[part][pieces.region(offset, extent)])
            sent = sent.to(device)
        from_owner = [sizes[rank] if sender == owner else 0 for sender in range(world)]
        dist.all_to_all_single(received, sent, from_owner, sent_sizes, group=group)
        if turn < len(regions[rank]):
            region = regions[rank][turn]
            for piece in held[region]:
                _set(piece, received.view(region[2]))
    heartbeat.beat("reading parameters")


def _broadcast(
    shapes: PartShapes, parts: Parts | None, owner: int, device: "torch.device", group: "dist.ProcessGroup | None"
) -> Parts:
    """The parts, on all ranks."""
    import torch
    import torch.distributed as dist

    if parts is not None and dist.get_world_size(group) == 1:
        return parts
    sizes = [prod(shape) for shape in shapes.values()]
    if parts is None:
        flat = torch.empty(sum(sizes), device=device)
    else:
        flat = torch.cat([parts[part].flatten() for part in shapes]).to(device)
    dist.broadcast(flat, group=group, group_src=owner)
    heartbeat.beat("reading parameters")
    return {part: piece.view(*shapes[part]) for part, piece in zip(shapes, flat.split(sizes), strict=True)}


def _set(piece: Piece, values: "torch.Tensor") -> None:
    import torch

    with torch.no_grad():
        piece.tensor.copy_(values)


def _source(cfg: Config, task: Family, shapes: Shapes, resume: Checkpoint | None) -> Values:
    if resume:
        return stored(resume, shapes)
    source = init.scratch(cfg.train.seed, lambda name: task.initializer(cfg.model, name))
    if cfg.init.from_ != "scratch":
        folder, new_heads = find(cfg.init.from_), task.new_head_prefixes(cfg.model)
        source = init.from_hf(folder, task.stored_names, task.optional_prefixes(cfg.model), source, new_heads)
        source = task.reorder_labels(cfg, folder, source)
    return lambda name, shape: {"weight": source(name, shape)}


def stored(checkpoint: Checkpoint, shapes: Shapes) -> Values:
    """The parameters of a checkpoint; BadInput unless it holds just those of `shapes`."""
    parameters.prove(checkpoint.shapes(), shapes, str(checkpoint.path))

    def read(name: str, shape: init.Shape) -> Parts:
        parts = checkpoint.read(name)
        parameters.prove({name: parts["weight"].shape}, {name: shape}, str(checkpoint.path))
        return parts

    return read


def part_shapes(shape: init.Shape, with_moments: bool) -> PartShapes:
    """What `fill` is to set of a parameter: its weight, and AdamW's moments."""
    return dict.fromkeys(PARTS if with_moments else PARTS[:1], tuple(shape))


def meta(run: Run, step: int) -> dict[str, Any]:
    """What state.json says beside its files."""
    return {
        "step": step, "samples": run.samples(step).stop, "seed": run.cfg.train.seed, "stack": run.stack,
        "layout": run.layout.model_dump(), "dtype": run.cfg.train.dtype, "hyperparameters": config.hyperparameters(run.whole),
        "commit": run.record["commit"],
    }  # fmt: skip


def load(net: "torch.nn.Module", optimizer: "torch.optim.Optimizer", shapes: Shapes, values: Values, step: int) -> None:
    """Set weights and optimizer state after `step` steps of a model that every rank holds whole, or in which the rows of each
    parameter are divided among the ranks (common/training/sharding.py); a collective. BadInput unless it holds the parameters
    of `shapes`."""
    named = largest_first(net.named_parameters(), shapes)
    parameters.prove({name: parameter.shape for name, parameter in named}, shapes, "the model on the baseline")
    wanted = [(name, stored_shapes(parameter, shapes[name], optimizer, step)) for name, parameter in named]
    if step:
        begin_torch_state(named, optimizer, step)
    fill([Batch([name for name, _ in named], list(_pieces(named, optimizer, bool(step))))], wanted, values, named[0][1].device)


def largest_first(named: Named, shapes: Shapes) -> list[tuple[str, "torch.nn.Parameter"]]:
    """In the order that `fill` wants; parameters that are not in `shapes` last."""
    return sorted(named, key=lambda item: -prod(shapes.get(item[0], (0,))))


def stored_shapes(
    parameter: "torch.nn.Parameter", shape: init.Shape, optimizer: "torch.optim.Optimizer", step: int
) -> PartShapes:
    """The shapes of the parts that `values` has for a parameter of this full shape after `step` steps."""
    import torch

    from common.training import adafactor

    trained = bool(step) and parameter.requires_grad
    if trained and isinstance(optimizer, adafactor.Adafactor):
        parts = {"weight": torch.empty(*shape, device="meta")}
        return {part: tuple(tensor.shape) for part, tensor in (parts | adafactor.parts_of(parts["weight"])).items()}
    return part_shapes(shape, trained)


def begin_torch_state(named: Named, optimizer: "torch.optim.Optimizer", step: int) -> None:
    """Give each trained parameter the optimizer state of `step` steps, with zeros for values."""
    import torch

    from common.training import adafactor

    for _, parameter in named:
        if not parameter.requires_grad:
            continue
        state = adam_state(parameter, step)
        if isinstance(optimizer, adafactor.Adafactor):
            state = {"step": state["step"]} | {
                n: torch.zeros_like(p) for n, p in adafactor.parts_of(parameter.detach()).items()
            }
        optimizer.state[parameter] = state


def adam_state(parameter: "torch.Tensor", step: int) -> dict[str, "torch.Tensor"]:
    """AdamW's state of one parameter (or flat partition), moments zero. Each has a `step` of its own: torch adds to it."""
    import torch

    device = parameter.device if parameter.device.type == "cuda" else None  # where fused AdamW wants it
    counter = torch.tensor(float(step), dtype=torch.float32, device=device)
    return {"step": counter, "exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}


def torch_pieces(named: Named, optimizer: "torch.optim.Optimizer") -> Batches:
    """What this rank holds of the trained parameters and their optimizer's state, to save: whole parameters, or rows."""
    named = [(name, parameter) for name, parameter in named if parameter.requires_grad]
    return [Batch([name for name, _ in named], list(_pieces(named, optimizer, True)))]


def _pieces(named: Named, optimizer: "torch.optim.Optimizer", with_state: bool) -> Iterator[Piece]:
    import torch.distributed as dist

    from common.training.sharding import first_row, own_rows

    rank, world = dist.get_rank(), dist.get_world_size()
    for name, parameter in named:
        parts = {"weight": parameter.detach()}
        if with_state and parameter.requires_grad:
            parts |= optimizer_parts(parameter, optimizer.state.get(parameter, {}))
        for part, tensor in parts.items():
            rows, begin = own_rows(tensor), first_row(tensor)
            if begin is None:
                yield from pieces.cut(pieces.whole(name, tensor.shape), part, rows.view(-1), 0, rank, world)
            else:
                yield from pieces.cut(pieces.rows_of(name, tensor.shape, begin, len(rows)), part, rows.view(-1))


def optimizer_parts(parameter: "torch.Tensor", state: Mapping[str, "torch.Tensor"]) -> dict[str, "torch.Tensor"]:
    """The state of a parameter that a checkpoint holds: AdamW's or LAMB's moments, Adafactor's means. AdamW has none for a
    parameter without a gradient: zeros, which take no memory."""
    import torch

    if not state:
        return dict.fromkeys(PARTS[1:], torch.zeros(1).expand(parameter.numel()).view(parameter.shape))
    return {part: value for part, value in state.items() if part != "step"}
