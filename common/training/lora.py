"""Low-rank adapters (Hu et al., arXiv:2106.09685), by peft: the model's own weights stay, W x becomes W x + alpha / rank B A x.

Only A and B are trained, and only they are in a checkpoint. OUT/adapter is peft's form of them; OUT/hf is the merged model.
Without the section `lora` each function leaves things as they are. Torch-free but for what the functions import.
"""

import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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


def of(cfg: Config) -> Lora | None:
    return getattr(cfg, "lora", None)


def is_adapter(name: str) -> bool:
    return ".lora_A." in name or ".lora_B." in name


def peft_config(cfg: Config, task: Family) -> "peft.LoraConfig":
    import peft

    lora = of(cfg)
    return peft.LoraConfig(
        task_type="CAUSAL_LM", r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, bias="none",
        target_modules=sorted(lora.targets or task.linear_layers(cfg.model)), base_model_name_or_path=cfg.init.from_,
        fan_in_fan_out=task.weights_are_transposed(cfg.model),
    )  # fmt: skip


def add(net: "torch.nn.Module", cfg: Config, task: Family) -> None:
    """Put adapters into the model, without values yet, and freeze all else."""
    if of(cfg):
        import peft

        peft.inject_adapter_in_model(peft_config(cfg, task), net)


def expected(cfg: Config, task: Family) -> dict[str, tuple[int, ...]]:
    """As parameters.expected, with the adapters, and the names that the model's own weights have beside them."""
    import torch

    shapes = parameters.expected(cfg.model, task)
    if not of(cfg):
        return shapes
    with torch.device("meta"):
        net = task.hf_model(cfg.model)
        add(net, cfg, task)
    adapted = {name: tuple(parameter.shape) for name, parameter in net.named_parameters()}
    own = {_own_name(name): shape for name, shape in adapted.items() if not is_adapter(name)}
    parameters.prove(own, shapes, "the model with adapters")
    return adapted


def _own_name(name: str) -> str:
    """The name that a weight of the model has without an adapter beside it."""
    return name.replace(".base_layer.", ".")


def trained(shapes: Shapes, cfg: Config) -> Shapes:
    """The parameters that a checkpoint holds: the adapters alone where there are some."""
    return {name: shape for name, shape in shapes.items() if is_adapter(name)} if of(cfg) else shapes


def values(cfg: Config, task: Family, shapes: Shapes, resume: Checkpoint | None) -> state.Values:
    """As state.values: adapters come from the checkpoint, else from the seed; the model's own weights never change."""
    if not of(cfg):
        return state.values(cfg, task, shapes, resume)
    base, kept = state.values(cfg, task, shapes, None), resume and state.stored(resume, trained(shapes, cfg))

    def value(name: str, shape: Sequence[int]) -> state.Parts:
        if not is_adapter(name):
            return base(_own_name(name), shape)
        return kept(name, shape) if kept else {"weight": initial(cfg.train.seed, name, shape)}

    return value


def initial(seed: int, name: str, shape: Sequence[int]) -> "torch.Tensor":
    """B is zero; A (rank, in) is uniform within 1 / sqrt(in), as peft draws it (tuners/lora/layer.py, reset_lora_parameters:
    kaiming_uniform with a = sqrt(5)), from (seed, name, shape) as all that is drawn here."""
    import torch

    if ".lora_B." in name:
        return torch.zeros(*shape)
    generator = torch.Generator().manual_seed(derive_seed("init", seed, name, tuple(shape)))
    bound = 1 / math.sqrt(shape[1])
    return torch.empty(*shape).uniform_(-bound, bound, generator=generator)


# ---- export ----------------------------------------------------------------------------------------------------------


class Merged:
    """The whole model of a checkpoint that holds adapters, as huggingface/export.py reads it: W + alpha / rank B A."""

    def __init__(self, adapters: Checkpoint, cfg: Config, task: Family):
        self.path, self.step, self.adapters = adapters.path, adapters.step, adapters
        self.whole = parameters.expected(cfg.model, task)
        self.base = state.values(cfg, task, self.whole, None)
        self.meta = adapters.meta | {"files": {name: {"shape": list(shape)} for name, shape in self.whole.items()}}
        self.scale, self.transposed = of(cfg).alpha / of(cfg).rank, task.weights_are_transposed(cfg.model)

    def names(self) -> list[str]:
        return list(self.whole)

    def shapes(self) -> Shapes:
        return self.whole

    def read(self, name: str, parts: Any = None) -> dict[str, "torch.Tensor"]:
        """The weight alone."""
        weight = self.base(name, self.whole[name])["weight"]
        layer = name.removesuffix(".weight")
        if f"{layer}.lora_A.default.weight" in self.adapters.meta["files"]:
            a, b = (self.adapters.read(f"{layer}.lora_{which}.default.weight", ("weight",))["weight"] for which in "AB")
            change = self.scale * (b @ a)  # (out, in)
            weight = weight + (change.T if self.transposed else change)
        return {"weight": weight}


def merging(cfg: Config, task: Family) -> Callable[[Checkpoint], Any]:
    """What common/huggingface/export.py reads in place of a checkpoint."""
    return (lambda adapters: Merged(adapters, cfg, task)) if of(cfg) else (lambda whole: whole)


def export(run: Run, task: Family, ranks: Ranks, steps: Path) -> None:
    """OUT/adapter of the newest checkpoint in `steps`, by rank 0: what peft.PeftModel.from_pretrained loads."""
    if not of(run.cfg) or ranks.rank:
        return
    source = checkpoint.latest(steps)
    tmp, folder = run.out / "adapter.tmp", run.out / "adapter"
    shutil.rmtree(tmp, ignore_errors=True)
    tmp.mkdir()
    peft_config(run.cfg, task).save_pretrained(tmp)
    names = {f"base_model.model.{name.replace('.default.', '.')}": name for name in source.names()}
    shapes = {theirs: source.meta["files"][ours]["shape"] for theirs, ours in names.items()}
    write_tensors(tmp / "adapter_model.safetensors", shapes, lambda theirs: source.read(names[theirs], ("weight",))["weight"])
    integrity.replace_folder(tmp, folder)
