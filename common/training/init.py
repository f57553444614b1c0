"""Law 4: a parameter's first value depends on (seed, its Hugging Face name, its full shape) alone."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from common.checkpoints import integrity
from common.errors import BadInput
from common.seeding import derive_seed

if TYPE_CHECKING:
    import torch

Shape = Sequence[int]
Source = Callable[[str, Shape], "torch.Tensor"]  # (Hugging Face name, full shape) -> fp32 tensor on the CPU


def scratch(seed: int, initial: Callable[[str], float | str]) -> Source:
    """Draw a parameter on the CPU: `initial(name)` is 'zeros', 'ones' or a standard deviation."""
    import torch

    def draw(name: str, shape: Shape) -> torch.Tensor:
        kind = initial(name)
        if kind == "zeros":
            return torch.zeros(*shape)
        if kind == "ones":
            return torch.ones(*shape)
        generator = torch.Generator().manual_seed(derive_seed("init", seed, name, tuple(shape)))
        return torch.empty(*shape).normal_(0.0, kind, generator=generator)

    return draw


def from_hf(
    folder: str | Path,
    stored_names: Callable[[str], Sequence[str]],
    heads: tuple[str, ...] = (),
    anew: Source | None = None,
    fresh: tuple[str, ...] = (),
) -> Source:
    """Read a parameter from the safetensors of a Hugging Face folder, converted to fp32, one at a time.

    stored_names: the names under which folders keep a parameter, the first one found counts (`task.stored_names`).
    heads: beginnings of names that a folder may lack (`task.HEADS`): those come from `anew`.
    fresh: beginnings of names that come from `anew` whatever the folder holds.
    """
    from safetensors import SafetensorError, safe_open

    from common.huggingface import hf_folder

    problems: list[str] = []
    held = hf_folder.tensors(Path(folder), f"init.from={folder}", problems)
    if problems:
        raise BadInput(problems)

    def read(name: str, shape: Shape) -> "torch.Tensor":
        stored = next((known for known in stored_names(name) if known in held), None)
        if anew is not None and (name.startswith(fresh) or stored is None and name.startswith(heads)):
            return anew(name, shape)
        if stored is None:
            raise BadInput(f"init.from={folder}: holds no {name}; it is a model of another architecture")
        if held[stored].dtype not in hf_folder.FLOATS:
            raise BadInput(f"init.from={folder}: its {stored} is {held[stored].dtype}; weights must be F32, BF16, F16 or F64")
        try:
            with safe_open(held[stored].path, framework="pt") as f:
                tensor = f.get_tensor(stored)
        except (OSError, SafetensorError) as error:
            raise BadInput(f"init.from={folder}: {held[stored].path.name} cannot be read: {error}; get it again") from None
        if tuple(tensor.shape) != tuple(shape):
            raise BadInput(f"init.from={folder}: {name} is {tuple(tensor.shape)}, the config's model wants {tuple(shape)}")
        tensor = tensor.float()
        if not integrity.is_finite(tensor):
            raise BadInput(
                f"init.from={folder}: {stored} holds NaN or infinite values; the run that made it diverged, or the file is "
                "damaged: get the folder again, or give another"
            )
        return tensor

    return read


def allocate(model: "torch.nn.Module", dtype: "torch.dtype") -> None:
    """Give a model whose parameters are on the meta device (`accelerate.init_empty_weights`) memory without values."""
    import torch

    for name, parameter in list(model.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, torch.nn.Parameter(torch.empty(parameter.shape, dtype=dtype)))
    model.tie_weights()  # named_parameters() names a shared weight once
