"""Initial values (invariant 4): they depend only on the seed, the parameter's Hugging Face name and its full shape."""

from collections.abc import Callable, Container, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from common.checkpoints import integrity
from common.errors import BadInput
from common.seeding import derive_seed

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

Shape = Sequence[int]
Source = Callable[[str, Shape], "torch.Tensor"]  # (Hugging Face name, full shape) -> fp32 tensor on the CPU


def scratch(seed: int, initializer: Callable[[str], float | str]) -> Source:
    """Draw a parameter on the CPU: `initializer(name)` is 'zeros', 'ones' or a standard deviation."""
    import torch

    def draw(name: str, shape: Shape) -> torch.Tensor:
        how = initializer(name)
        if how == "zeros":
            return torch.zeros(*shape)
        if how == "ones":
            return torch.ones(*shape)
        generator = torch.Generator().manual_seed(derive_seed("init", seed, name, tuple(shape)))
        return torch.empty(*shape).normal_(0.0, float(how), generator=generator)

    return draw


def from_hf(
    folder: str | Path,
    stored_names: Callable[[str], Sequence[str]],
    optional_prefixes: tuple[str, ...] = (),
    scratch: Source | None = None,
    new_head_prefixes: tuple[str, ...] = (),
) -> Source:
    """Read a parameter from the safetensors of a Hugging Face folder, converted to fp32, one at a time.

    stored_names: the names under which a folder may hold a parameter; the first that is there counts (`task.stored_names`).
    optional_prefixes: prefixes of parameters that a folder may lack; if it does, they come from `scratch`.
    new_head_prefixes: prefixes of parameters that always come from `scratch`, even if the folder has them.
    """
    from safetensors import SafetensorError, safe_open

    from common.huggingface import hf_folder

    problems: list[str] = []
    tensors = hf_folder.tensors(Path(folder), f"init.from={folder}", problems)
    if problems:
        raise BadInput(problems)

    def read(name: str, shape: Shape) -> "torch.Tensor":
        stored = next((candidate for candidate in stored_names(name) if candidate in tensors), None)
        is_new = name.startswith(new_head_prefixes) or stored is None and name.startswith(optional_prefixes)
        if scratch is not None and is_new:
            return scratch(name, shape)
        if stored is None:
            raise BadInput(f"init.from={folder}: holds no {name}; it is a model of another architecture")
        if tensors[stored].dtype not in hf_folder.FLOATS:
            raise BadInput(
                f"init.from={folder}: its {stored} is {tensors[stored].dtype}; weights must be F32, BF16, F16 or F64"
            )
        try:
            with safe_open(tensors[stored].path, framework="pt") as f:
                tensor = f.get_tensor(stored)
        except (OSError, SafetensorError) as error:
            raise BadInput(f"init.from={folder}: {tensors[stored].path.name} cannot be read: {error}; get it again") from None
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


def allocate(
    model: "PreTrainedModel",
    dtype: "torch.dtype",
    names: Container[str] | None = None,
    device: "torch.device | str" = "cpu",
) -> None:
    """Give a model whose parameters are on the meta device (`accelerate.init_empty_weights`) memory without values; with names,
    only these parameters; of a parameter that is divided among the ranks, only this rank's part."""
    import torch

    for name, parameter in list(model.named_parameters()):
        if names is not None and name not in names:
            continue
        owner, _, leaf = name.rpartition(".")
        values = torch.empty_like(parameter, dtype=dtype, device=device)
        setattr(model.get_submodule(owner), leaf, torch.nn.Parameter(values, requires_grad=parameter.requires_grad))
    model.tie_weights()  # named_parameters() names a shared weight once
