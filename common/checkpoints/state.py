"""Parameters and optimizer state by Hugging Face name, for torch's own AdamW; where they come from; what state.json records.

DeepSpeed's counterpart is common/stacks/zero.py, Megatron's common/stacks/mcore.py. All use `Values` and `checkpoint.Entry`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from common import config
from common.checkpoints import parameters
from common.checkpoints.checkpoint import Checkpoint, Entry
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

Parts = Mapping[str, "torch.Tensor"]  # `weight`, and where the run has made steps its optimizer's, as `exp_avg`; fp32, CPU
Values = Callable[[str, init.Shape], Parts]  # (Hugging Face name, full shape) -> parts
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


def meta(run: Run, step: int) -> dict[str, Any]:
    """What state.json says beside its files."""
    return {
        "step": step, "samples": run.samples(step).stop, "seed": run.cfg.train.seed, "stack": run.stack,
        "layout": run.layout.model_dump(), "dtype": run.cfg.train.dtype, "hyperparameters": config.hyperparameters(run.whole),
        "commit": run.record["commit"],
    }  # fmt: skip


def load(net: "torch.nn.Module", optimizer: "torch.optim.Optimizer", shapes: Shapes, values: Values, step: int) -> None:
    """As load_torch_state, for a model that every rank holds whole. BadInput unless it holds the parameters of `shapes`."""
    named = list(net.named_parameters())
    parameters.prove({name: parameter.shape for name, parameter in named}, shapes, "the model on the baseline")
    load_torch_state(named, optimizer, values, step)


def load_torch_state(named: Named, optimizer: "torch.optim.Optimizer", values: Values, step: int) -> None:
    """Set whole fp32 parameters and their AdamW state after `step` steps."""
    import torch

    for name, parameter in named:
        parts = values(name, parameter.shape)
        with torch.no_grad():
            parameter.copy_(parts["weight"])
        if step and parameter.requires_grad:
            state = adam_state(parameter, step)
            names = parts.keys() - {"weight"}
            if not state.keys() >= names:  # Adafactor's
                state = {"step": state["step"]} | {n: torch.empty_like(parts[n], device=parameter.device) for n in names}
            for part in names:
                state[part].copy_(parts[part])
            optimizer.state[parameter] = state


def adam_state(parameter: "torch.Tensor", step: int) -> dict[str, "torch.Tensor"]:
    """AdamW's state of one parameter (or flat partition), moments zero. Each has a `step` of its own: torch adds to it."""
    import torch

    device = parameter.device if parameter.device.type == "cuda" else None  # where fused AdamW wants it
    counter = torch.tensor(float(step), dtype=torch.float32, device=device)
    return {"step": counter, "exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}


def gather_torch_state(named: Named, optimizer: "torch.optim.Optimizer", ranks: Ranks) -> Iterator[Entry]:
    """Trained parameters that every rank holds whole: they take turns to write."""
    trained = [(name, parameter) for name, parameter in named if parameter.requires_grad]
    for number, (name, parameter) in enumerate(trained):
        if number % ranks.world != ranks.rank:
            yield name, None
            continue
        state = optimizer.state.get(parameter, {})
        if "exp_avg" in state or not state:
            yield name, parts_of(parameter, state.get("exp_avg"), state.get("exp_avg_sq"))
        else:  # Adafactor's
            parts = {"weight": parameter} | {part: value for part, value in state.items() if part != "step"}
            yield name, {part: value.detach().float().cpu() for part, value in parts.items()}


def parts_of(
    weight: "torch.Tensor", exp_avg: "torch.Tensor | None", exp_avg_sq: "torch.Tensor | None"
) -> dict[str, "torch.Tensor"]:
    """The three parts of a checkpoint's file, fp32 on the CPU; a moment that does not exist yet is zero."""
    import torch

    weight = weight.detach().float().cpu()
    moments = [torch.zeros_like(weight) if m is None else m.detach().float().cpu() for m in (exp_avg, exp_avg_sq)]
    return dict(zip(("weight", "exp_avg", "exp_avg_sq"), (weight, *moments), strict=True))
