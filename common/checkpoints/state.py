"""Parameters and optimizer state by Hugging Face name, for torch's own AdamW; where they come from; what state.json records.

DeepSpeed's counterpart is common/stacks/zero.py, Megatron's common/stacks/mcore.py. All use `Values` and `checkpoint.Entry`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from math import prod
from typing import TYPE_CHECKING, Any

from common import config
from common.checkpoints import parameters
from common.checkpoints.checkpoint import PARTS, Checkpoint, Entry
from common.checkpoints.parameters import Shapes
from common.config import Config
from common.contract import Family
from common.launch import heartbeat
from common.launch.processes import Ranks
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
    source = _source(cfg, task, shapes, resume)

    def value(name: str, shape: init.Shape) -> Parts:
        heartbeat.beat("reading parameters")
        return source(name, shape)

    return value


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


def in_turns(
    values: Values,
    wanted: Sequence[tuple[str, PartShapes]],
    device: "torch.device",
    group: "dist.ProcessGroup | None" = None,
) -> Iterator[Parts]:
    """The parts of each parameter of `wanted` (name, shapes of the parts), each read or drawn by one rank of `group` (default:
    all ranks) and sent to the others, which get them on `device`.

    A collective: every rank of the group wants the same, in the same order. Of as many successive parameters as there are
    ranks each rank reads one, all at the same time, so that parameters of similar size should follow each other.
    """
    import torch
    import torch.distributed as dist

    world, rank = dist.get_world_size(group), dist.get_rank(group)
    if world == 1:
        yield from (values(name, shapes["weight"]) for name, shapes in wanted)
        return
    for begin in range(0, len(wanted), world):
        window = wanted[begin : begin + world]
        own = None
        if rank < len(window):
            name, shapes = window[rank]
            parts = values(name, shapes["weight"])
            own = torch.cat([parts[part].flatten() for part in shapes]).to(device)
        for owner, (_, shapes) in enumerate(window):
            sizes = [prod(shape) for shape in shapes.values()]
            flat = torch.empty(sum(sizes), device=device) if own is None or owner != rank else own
            heartbeat.wait("parameters of other ranks")
            dist.broadcast(flat, group=group, group_src=owner)
            heartbeat.beat("reading parameters")
            yield {part: piece.view(*shapes[part]) for part, piece in zip(shapes, flat.split(sizes), strict=True)}


def part_shapes(shape: init.Shape, with_moments: bool) -> PartShapes:
    """What in_turns is to send of a parameter: its weight, and AdamW's moments."""
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
    turns = in_turns(values, wanted, named[0][1].device)
    load_torch_state(((parameter, parts) for (_, parameter), parts in zip(named, turns, strict=True)), optimizer, step)


def largest_first(named: Named, shapes: Shapes) -> list[tuple[str, "torch.nn.Parameter"]]:
    """In the order that in_turns wants; parameters that are not in `shapes` last."""
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


def load_torch_state(
    filled: Iterable[tuple["torch.nn.Parameter", Parts]], optimizer: "torch.optim.Optimizer", step: int
) -> None:
    """Set fp32 parameters, each given with its whole parts, and their optimizer's state after `step` steps."""
    import torch

    from common.training.sharding import own_rows, rows_of

    for parameter, whole in filled:
        parts = {part: rows_of(tensor, parameter) for part, tensor in whole.items()}
        with torch.no_grad():
            own_rows(parameter).copy_(parts["weight"])
        if step and parameter.requires_grad:
            state = adam_state(parameter, step)
            names = parts.keys() - {"weight"}
            if not state.keys() >= names:  # Adafactor's
                state = {"step": state["step"]} | {n: torch.empty_like(parts[n], device=parameter.device) for n in names}
            for part in names:
                own_rows(state[part]).copy_(parts[part])
            optimizer.state[parameter] = state


def adam_state(parameter: "torch.Tensor", step: int) -> dict[str, "torch.Tensor"]:
    """AdamW's state of one parameter (or flat partition), moments zero. Each has a `step` of its own: torch adds to it."""
    import torch

    device = parameter.device if parameter.device.type == "cuda" else None  # where fused AdamW wants it
    counter = torch.tensor(float(step), dtype=torch.float32, device=device)
    return {"step": counter, "exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}


def gather_torch_state(named: Named, optimizer: "torch.optim.Optimizer", ranks: Ranks) -> Iterator[Entry]:
    """Trained parameters that every rank holds whole, or whose rows are gathered, one parameter at a time: the ranks take turns
    to write."""
    from common.training.sharding import gathered

    trained = [(name, parameter) for name, parameter in named if parameter.requires_grad]
    for number, (name, parameter) in enumerate(trained):
        state = {part: value for part, value in optimizer.state.get(parameter, {}).items() if part != "step"}
        parts = {part: gathered(value.detach()) for part, value in ({"weight": parameter} | state).items()}
        if number % ranks.world != ranks.rank:
            yield name, None
        elif "exp_avg" in state or not state:
            yield name, parts_of(parts["weight"], parts.get("exp_avg"), parts.get("exp_avg_sq"))
        else:  # Adafactor's
            yield name, {part: value.float().cpu() for part, value in parts.items()}


def parts_of(
    weight: "torch.Tensor", exp_avg: "torch.Tensor | None", exp_avg_sq: "torch.Tensor | None"
) -> dict[str, "torch.Tensor"]:
    """The three parts of a checkpoint's file, fp32 on the CPU; a moment that does not exist yet is zero."""
    import torch

    weight = weight.detach().float().cpu()
    moments = [torch.zeros_like(weight) if m is None else m.detach().float().cpu() for m in (exp_avg, exp_avg_sq)]
    return dict(zip(("weight", "exp_avg", "exp_avg_sq"), (weight, *moments), strict=True))
