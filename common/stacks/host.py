"""What a host must have for some keys of a stack, asked before a run starts. Torch-free."""

import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from common.paths import find

if TYPE_CHECKING:
    from common.config import DeepSpeed

SUBMITS = "#include <libaio.h>\nint main() { return io_submit(0, 0, 0); }\n"  # as AsyncIOBuilder.is_compatible asks


def problems(system: "DeepSpeed") -> Iterator[str]:
    """Why this host cannot run what the section `deepspeed` asks for."""
    from common.launch.launcher import visible_gpus

    for key in ("quantized_weights", "quantized_gradients"):
        if getattr(system, key) and not visible_gpus(os.environ):
            yield (
                f"deepspeed.{key}=true needs a GPU: DeepSpeed quantizes by CUDA kernels alone "
                f"(deepspeed/ops/op_builder/quantizer.py); use deepspeed.{key}=false"
            )
    if system.nvme is None:
        return
    folder = find(system.nvme)
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        yield f"deepspeed.nvme={system.nvme}: must be a folder that can be written to; create it on each node"
    if not has_libaio():
        yield (
            f"deepspeed.nvme={system.nvme} needs libaio, with which DeepSpeed compiles its aio operator; type apt install "
            "libaio-dev g++ (Red Hat: libaio-devel gcc-c++) on each node, or leave deepspeed.nvme out"
        )


@cache
def has_libaio() -> bool:
    """Has DeepSpeed its aio operator, or can it be compiled and linked here (deepspeed/ops/op_builder/async_io.py)?"""
    spec = find_spec("deepspeed")
    roots = spec.submodule_search_locations if spec else None
    if any(path for root in roots or () for path in Path(root).glob("ops/aio/async_io_op*.so")):
        return True
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        return False
    flags = [word for name in ("CFLAGS", "LDFLAGS") for word in shlex.split(os.environ.get(name, ""))]
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "submit.cpp"
        source.write_text(SUBMITS, encoding="utf-8")
        command = [compiler, str(source), "-o", f"{folder}/submit", *flags, "-laio"]
        return subprocess.run(command, capture_output=True).returncode == 0
