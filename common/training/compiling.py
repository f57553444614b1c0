"""torch.compile of single functions, and of the transformers classes, layer by layer: baseline.compile, deepspeed.compile."""

import os
import shutil
from collections.abc import Callable, Iterator
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

GRAPHS = 64  # of one class of layers: T5 has four kinds of them, in training and evaluation, of fixed and of any length


def _refuse_plain_functions() -> None:
    """More graphs of one function than GRAPHS are an error. By default the ninth would be the plain function, in silence:
    slower, and with other dropout where the forward pass of a recomputed layer was compiled."""
    import torch

    settings: Any = torch._dynamo.config
    settings.recompile_limit, settings.fail_on_recompile_limit_hit = GRAPHS, True


@cache
def kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, compiled at its first call."""
    import torch

    _refuse_plain_functions()
    compiled: Callable[..., Any] = torch.compile(function)
    return compiled


@cache
def has_triton() -> bool:
    """Can torch.compile make kernels for the GPU here? Triton needs a C compiler for their launchers."""
    from torch.utils._triton import has_triton as is_installed

    return bool(is_installed()) and any(map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang")))


def transformer_layers(net: "torch.nn.Module") -> Iterator["torch.nn.Module"]:
    """The transformer layers of a transformers class: what it recomputes, each by itself."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return (module for module in net.modules() if isinstance(module, GradientCheckpointingLayer))


def layers(net: "torch.nn.Module") -> None:
    """Compile each transformer layer of a transformers class, in place. The parameters keep their names.

    Layers of one class share their graphs. fullgraph: an operator that cannot be compiled, or more graphs than GRAPHS, is an
    error, where torch.compile would otherwise go on with the plain layer.
    """
    _refuse_plain_functions()
    inner: Any
    for layer in transformer_layers(net):
        for part in layer.children():
            for inner in part.modules():
                # T5's attention would mark zeros as trained, which only reentrant recomputation needs
                if getattr(inner, "gradient_checkpointing", False):
                    inner.gradient_checkpointing = False
        layer.compile(fullgraph=True)
