"""TransformerEngine and Apex as packages that can be imported and do nothing: `python tests/fake_extensions.py MODULE ARGS`
runs a recipe where Megatron finds both. Whatever of them is called ends the run."""

import contextlib
import importlib.abc
import importlib.machinery
import importlib.metadata
import os
import runpy
import sys
import types
from typing import Any

NAMES = (
    "transformer_engine",
    "transformer_engine_torch",
    "apex",
    "amp_C",
    "fused_layer_norm_cuda",
    "fused_weight_gradient_mlp_cuda",
)


def refuse(*_: Any, **__: Any) -> None:
    raise AssertionError("a stand-in for TransformerEngine or Apex was called")


def anything(owner: Any, name: str) -> Any:
    """A class under any name, which in turn has any name, and of which no object can be made."""
    if name.startswith("__"):
        raise AttributeError(name)
    value = Anything(name, (), {"__init__": refuse})
    setattr(owner, name, value)
    return value


class Anything(type):
    __getattr__ = anything


class Package(types.ModuleType):
    __getattr__ = anything
    __version__ = "2.9.0"
    __path__: list[str] = []


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if name.partition(".")[0] in NAMES else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return Package(spec.name)

    def exec_module(self, module: Any) -> None:
        if module.__name__ == "transformer_engine.pytorch.cpu_offload":  # Megatron asks for it although nothing is offloaded
            module.get_cpu_offload_context = lambda *_, **__: (contextlib.nullcontext(), None)


if __name__ == "__main__":
    sys.path.insert(0, os.getcwd())
    sys.meta_path.insert(0, Finder())
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
