"""Low-rank adapters (Hu et al., arXiv:2106.09685), by peft. W x becomes W x + alpha / rank B A x; W itself is frozen.

Only A and B are trained, and only they are in a checkpoint. OUT/adapter has them in peft's format; OUT/hf is the merged model.
Without adapters (Config.adapters is None) each function does nothing. The module does not import torch; its functions do.
"""

import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

from pydantic import Field

from common.checkpoints import checkpoint, integrity, parameters, state
from common.checkpoints.checkpoint import Checkpoint
from common.checkpoints.parameters import Shapes
from common.config import Config, NonEmpty, Positive, Section, Share
from common.contract import Family
from common.huggingface.export import write_tensors
from common.launch.processes import Ranks
from common.preflight import Run
from common.seeding import derive_seed

if TYPE_CHECKING:
    import peft
    import torch


class Lora(Section):
    """Train low-rank adapters in place of the weights (arXiv:2106.09685)."""

    rank: Positive = Field(default=8, description="Rank of the adapters.")
    alpha: Annotated[float, Field(gt=0)] = Field(
        default=16.0, description="The adapters' output is multiplied by alpha / rank."
    )
    dropout: Share = Field(default=0.0, description="Dropout of the adapters' input.")
    targets: list[NonEmpty] | None = Field(
        default=None, description="Names of the linear layers that get adapters. Default: all of the model."
    )


class Adapters(NamedTuple):
    """The section `lora` of a config, with the layers of its model."""

    rank: int
    alpha: float
    dropout: float
    targets: list[str]  # names of linear layers
    weights_are_transposed: bool  # (in, out), as in transformers' Conv1D


def is_adapter(name: str) -> bool:
    return ".lora_A." in name or ".lora_B." in name


def peft_config(adapters: Adapters, cfg: Config) -> "peft.LoraConfig":
    import peft

    return peft.LoraConfig(
        task_type="CAUSAL_LM", r=adapters.rank, lora_alpha=adapters.alpha, lora_dropout=adapters.dropout, bias="none",
        target_modules=sorted(adapters.targets), base_model_name_or_path=cfg.init.from_,
        fan_in_fan_out=adapters.weights_are_transposed,
    )  # fmt: skip


def add(net: "torch.nn.Module", cfg: Config) -> None:
    """Put adapters, still without values, into the model, and freeze all other parameters."""
    if cfg.adapters:
        import peft

        peft.inject_adapter_in_model(peft_config(cfg.adapters, cfg), net)


def expected(cfg: Config, task: Family) -> dict[str, tuple[int, ...]]:
    """As parameters.expected, with the adapters, and with the names that the model's own weights have beside adapters."""
    import torch

    shapes = parameters.expected(cfg.model, task)
    if not cfg.adapters:
        return shapes
    with torch.device("meta"):
        net = task.hf_model(cfg.model)
        add(net, cfg)
    adapted = {name: tuple(parameter.shape) for name, parameter in net.named_parameters()}
    own = {_own_name(name): shape for name, shape in adapted.items() if not is_adapter(name)}
    parameters.prove(own, shapes, "the model with adapters")
    return adapted


def _own_name(name: str) -> str:
    """The name that a weight of the model has without an adapter."""
    return name.replace(".base_layer.", ".")


def trained(shapes: Shapes, cfg: Config) -> Shapes:
    """The parameters in a checkpoint: only the adapters, if there are any."""
    return {name: shape for name, shape in shapes.items() if is_adapter(name)} if cfg.adapters else shapes


def values(cfg: Config, task: Family, shapes: Shapes, resume: Checkpoint | None) -> state.Values:
    """As state.values: adapters come from the checkpoint, else from the seed; the model's own weights never change."""
    if not cfg.adapters:
        return state.values(cfg, task, shapes, resume)
    base = state.values(cfg, task, shapes, None)
    saved = state.stored(resume, trained(shapes, cfg)) if resume else None

    def value(name: str, shape: Sequence[int]) -> state.Parts:
        if not is_adapter(name):
            return base(_own_name(name), shape)
        return saved(name, shape) if saved else {"weight": initial(cfg.train.seed, name, shape)}

    return value


def initial(seed: int, name: str, shape: Sequence[int]) -> "torch.Tensor":
    """B is zero; A (rank, in) is uniform within 1 / sqrt(in), as in peft (tuners/lora/layer.py, reset_lora_parameters:
    kaiming_uniform with a = sqrt(5)), and a function of (seed, name, shape) like every initial value."""
    import torch

    if ".lora_B." in name:
        return torch.zeros(*shape)
    generator = torch.Generator().manual_seed(derive_seed("init", seed, name, tuple(shape)))
    bound = 1 / math.sqrt(shape[1])
    return torch.empty(*shape).uniform_(-bound, bound, generator=generator)


# ---- export ----------------------------------------------------------------------------------------------------------


class Merged:
    """The whole model of a checkpoint of adapters, as huggingface/export.py reads it: W + alpha / rank B A."""

    def __init__(self, source: Checkpoint, adapters: Adapters, cfg: Config, task: Family):
        self.path, self.step, self.source, self.adapters = source.path, source.step, source, adapters
        self.whole = parameters.expected(cfg.model, task)
        self.base = state.values(cfg, task, self.whole, None)
        self.meta, self.adapted = source.meta, set(source.names())

    def names(self) -> list[str]:
        return list(self.whole)

    def shapes(self) -> Shapes:
        return self.whole

    def read(self, name: str, parts: Any = None) -> dict[str, "torch.Tensor"]:
        """{"weight": the merged weight}."""
        weight = self.base(name, self.whole[name])["weight"]
        layer = name.removesuffix(".weight")
        if f"{layer}.lora_A.default.weight" in self.adapted:
            a, b = (self.source.read(f"{layer}.lora_{which}.default.weight", ("weight",))["weight"] for which in "AB")
            change = self.adapters.alpha / self.adapters.rank * (b @ a)  # (out, in)
            weight = weight + (change.T if self.adapters.weights_are_transposed else change)
        return {"weight": weight}


def merging(cfg: Config, task: Family) -> Callable[[Checkpoint], Any]:
    """What common/huggingface/export.py reads instead of a checkpoint."""
    adapters = cfg.adapters
    return (lambda source: Merged(source, adapters, cfg, task)) if adapters else (lambda source: source)


def export(run: Run, ranks: Ranks, steps: Path) -> None:
    """Rank 0 writes OUT/adapter from the newest checkpoint in `steps`: what peft.PeftModel.from_pretrained loads."""
    adapters, source = run.cfg.adapters, checkpoint.latest(steps)
    if adapters is None or source is None or ranks.rank:
        return
    tmp, folder = run.out / "adapter.tmp", run.out / "adapter"
    shutil.rmtree(tmp, ignore_errors=True)
    tmp.mkdir()
    peft_config(adapters, run.cfg).save_pretrained(tmp)
    names = {f"base_model.model.{name.replace('.default.', '.')}": name for name in source.names()}  # {peft's name: name here}
    of_source = source.shapes()
    shapes = {peft_name: of_source[name] for peft_name, name in names.items()}
    write_tensors(tmp / "adapter_model.safetensors", shapes, lambda name: source.read(names[name], ("weight",))["weight"])
    integrity.replace_folder(tmp, folder)
