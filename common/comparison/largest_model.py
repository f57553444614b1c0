"""The largest GPT that trains on a GPU: found by bisection over its layers with real steps on the GPU that does nothing
(common/simulation), so that the answer is that of PyTorch's own allocator.

python -m common.comparison.largest_model CELLS RESULT    searches the cells of a JSON file, in a process with the null GPU
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from common.comparison import planned
from common.comparison.figures import Figure, Options, Task
from common.comparison.layouts import name_of
from common.config import Config
from common.errors import BadInput
from common.paths import ROOT
from common.planning import hardware, memory

SECTION = "Scalability / Largest GPT per GPU"
PART = "python -m scripts.benchmark --parts largest_model"
CONFIG = "recipes/gpt/configs/gpt3_1.3b.yaml"
GPUS = {"H100": "H100 80 GB", "A100": "A100 80 GB"}
SHAPE = "layers x width; micro batch 1, recomputed"
STEPS = 2  # in the second the optimizer has its state
# (layers, width, heads): GPT-3 (arXiv:2005.14165, table 2.1) to 13B, then PTD-P (arXiv:2104.04473, table 1)
SERIES = (
    (12, 768, 12), (24, 1024, 16), (24, 1536, 16), (24, 2048, 16), (32, 2560, 32), (32, 4096, 32), (40, 5120, 40),
    (40, 6144, 48), (48, 8192, 64), (60, 10240, 80), (80, 12288, 96),
)  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """A layout, and where the search for its largest number of layers begins."""

    stack: str
    keys: dict[str, Any]
    gpus: int
    hidden: int = 0
    heads: int = 0
    start: int = 0  # layers that fit by the estimate of common/planning/memory.py

    def overrides(self, layers: int, hidden: int = 0, heads: int = 0) -> list[str]:
        """Micro batches of 1 sample, two of them per step; layers are recomputed."""
        replicas = self.gpus // (self.keys.get("tp", 1) * self.keys.get("pp", 1))
        words = {"micro_batch": 1, "recompute": True} | self.keys
        return [
            f"model.layers={layers}", f"model.hidden={hidden or self.hidden}", f"model.heads={heads or self.heads}",
            f"train.global_batch={2 * replicas}", *(f"{self.stack}.{key}={str(value).lower()}" for key, value in words.items()),
        ]  # fmt: skip

    def config(self, layers: int, hidden: int = 0, heads: int = 0) -> Config:
        return planned.resolved(CONFIG, self.overrides(layers, hidden, heads))

    def parameters(self, layers: int) -> int:
        return self.config(layers).model.parameter_count()

    def command(self, layers: int, capacity: int) -> str:
        words = f"--stack {self.stack} --world {self.gpus} --steps {STEPS} --memory {capacity / 1e9:.3f}"
        return " ".join(["python -m scripts.simulate", CONFIG, words, *self.overrides(layers)])


ONE: tuple[tuple[str, dict[str, Any]], ...] = (
    ("baseline", {}),
    ("deepspeed", {"zero_stage": 1}),
    ("megatron", {"distributed_optimizer": False}),
)
EIGHT: tuple[tuple[str, dict[str, Any]], ...] = (
    ("baseline", {"shard": "full"}),
    *(("deepspeed", {"zero_stage": stage}) for stage in (1, 2, 3)),
    ("megatron", {"distributed_optimizer": True}),
    ("megatron", {"distributed_optimizer": True, "tp": 8, "sequence_parallel": True}),
)
OFFLOADED: tuple[tuple[int, dict[str, Any]], ...] = tuple((gpus, {"zero_stage": 3, "offload": "all"}) for gpus in (1, 8))


def capacity(gpu: str, gpus: int) -> int:
    """Bytes that PyTorch's allocator can have: without the CUDA context and, on several GPUs, NCCL's two communicators."""
    return hardware.gpu(gpu).memory - memory.CONTEXT - (2 * memory.NCCL if gpus > 1 else 0)


# ---- where to begin --------------------------------------------------------------------------------------------------


def placed(stack: str, keys: dict[str, Any], gpus: int, room: int) -> Cell:
    """The cell with its width and start: the width of the largest model of SERIES that fits, by the estimate, and the most
    layers of this width. BadInput if none fits."""
    cell = Cell(stack, keys, gpus)
    allowed = [shape for shape in SERIES if shape[2] % keys.get("tp", 1) == 0]
    fitting = [shape for shape in allowed if is_estimated_to_fit(cell, *shape, room)]
    if not fitting:
        raise BadInput(f"{stack} {keys}: not even the smallest model of the series fits")
    layers, hidden, heads = fitting[-1]
    start = boundary(layers, lambda n: is_estimated_to_fit(cell, n, hidden, heads, room))
    return Cell(stack, keys, gpus, hidden, heads, start)


def is_estimated_to_fit(cell: Cell, layers: int, hidden: int, heads: int, room: int) -> bool:
    """Does the peak of the allocator fit into `room` bytes, and what is offloaded into the memory of a node?"""
    cfg = cell.config(layers, hidden, heads)
    needed = memory.estimate_for(cfg, cfg.model, cell.stack, cell.gpus)
    return needed["total"] <= room and needed["host"] * cell.gpus <= hardware.HOST_MEMORY


def boundary(start: int, fits: Callable[[int], bool]) -> int:
    """The largest n for which `fits` is true, 0 if there is none, where it is true up to some n: steps of 1, 2, 4, ... from
    `start`, then bisection. Asks twice if `start` is the answer."""
    step = 1
    if fits(start):
        low, high = start, start + 1
        while fits(high):
            low, high, step = high, high + 2 * step, 2 * step
    else:
        low, high = max(start - 1, 0), start
        while low and not fits(low):
            low, high, step = max(low - 2 * step, 0), low, 2 * step
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


# ---- real steps ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    layers: int  # 0: not known
    reserved: int  # bytes that the allocator had from the GPU
    reason: str = ""  # a run ended otherwise than by lack of memory


def search(cell: Cell) -> Found:
    """The largest number of layers. Only in a process with the null GPU, after run.prepare."""
    from common.simulation import run

    reserved: dict[int, int] = {}

    def fits(layers: int) -> bool:
        case = run.Case(CONFIG, cell.stack, cell.gpus, 0, STEPS, cell.overrides(layers), roofline=False)
        found = run.forked(case)
        if found["fault"] and "OutOfMemoryError" not in found["fault"]:
            raise BadInput(found["fault"])
        print(f"{' '.join(case.overrides)}: {found['fault'] or 'fits'}", flush=True)  # for FOLDER/NAME.log
        if not found["fault"]:
            reserved[layers] = max(phase["reserved_bytes"] for phase in found["phases"].values())
        return not found["fault"]

    try:
        layers = boundary(cell.start, fits)
    except BadInput as error:
        return Found(0, 0, error.problems[0])
    return Found(layers, reserved.get(layers, 0))


def begin(cells: Sequence[Cell], room: int, folder: Path, name: str) -> "subprocess.Popen[bytes]":
    """A process on a null GPU of `room` bytes that searches these cells and writes FOLDER/NAME.found."""
    from common.simulation import build

    (folder / name).write_text(json.dumps([asdict(cell) for cell in cells]), encoding="utf-8")
    environment = os.environ | {
        "LD_PRELOAD": build.preload(), "NULL_GPU_MEMORY": str(room), "CUDA_DEVICE_MAX_CONNECTIONS": "1", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    environment.pop("CUDA_VISIBLE_DEVICES", None)
    words = ["-m", "common.comparison.largest_model", str(folder / name), str(folder / f"{name}.found")]
    with open(folder / f"{name}.log", "wb") as log:
        return subprocess.Popen([sys.executable, *words], cwd=ROOT, env=environment, stdout=log, stderr=log)


def searched(groups: dict[str, tuple[list[Cell], int]], folder: Path) -> dict[str, list[Found]]:
    """What each group of (cells, bytes of the GPU) finds; the groups run side by side. CannotSimulate where nothing can be."""
    started = {name: begin(cells, room, folder, name) for name, (cells, room) in groups.items() if cells}
    try:
        for process in started.values():
            process.wait()
    finally:
        for process in started.values():
            process.kill()
    results: dict[str, list[Found]] = {}
    for name in started:
        path = folder / f"{name}.found"
        if not path.is_file():
            lines = (folder / f"{name}.log").read_text(encoding="utf-8", errors="replace").strip().splitlines()
            raise BadInput(f"the simulation ended without a result: {lines[-1] if lines else 'no output'}")
        results[name] = [Found(**values) for values in json.loads(path.read_text(encoding="utf-8"))]
    return results


def main() -> None:
    from common.simulation import run

    cells = [Cell(**values) for values in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))]
    run.prepare([run.Case(CONFIG, cell.stack) for cell in cells])
    found = [asdict(search(cell)) for cell in cells]
    Path(sys.argv[2]).write_text(json.dumps(found), encoding="utf-8")
    sys.stdout.flush()
    os._exit(0)  # a normal exit would wait for threads of the stacks


# ---- the part --------------------------------------------------------------------------------------------------------


def largest_model(options: Options, folder: Path) -> list[Figure]:
    from common.simulation import build

    build.preload()  # CannotSimulate, with the reason
    cells = {
        gpus: [placed(stack, keys, gpus, capacity("H100", gpus)) for stack, keys in rows if stack in options.stacks]
        for gpus, rows in ((1, ONE), (8, EIGHT))
    }
    first = on_gpu("H100", cells, folder)
    # a smaller GPU that has what the allocator took gives the same answer; otherwise it is asked
    unsure = {
        gpus: [cell for cell in of if first[subject_of(cell)].reserved > capacity("A100", gpus)] for gpus, of in cells.items()
    }
    second = first | on_gpu("A100", unsure, folder)
    figures = []
    for cell in (*cells[1], *cells[8]):
        name = subject_of(cell)
        figures += row(cell, {"H100": first[name], "A100": second[name]})
    if "deepspeed" in options.stacks:
        for gpus, keys in OFFLOADED:
            figures += offloaded(placed("deepspeed", keys, gpus, capacity("H100", gpus)))
    return figures


def on_gpu(gpu: str, cells: dict[int, list[Cell]], folder: Path) -> dict[str, Found]:
    """What is found for cells, which are given by number of GPUs; by their subject."""
    found = searched({f"{gpu}_{gpus}": (of, capacity(gpu, gpus)) for gpus, of in cells.items()}, folder)
    return {
        subject_of(cell): one
        for gpus, of in cells.items() if of
        for cell, one in zip(of, found[f"{gpu}_{gpus}"], strict=True)
    }  # fmt: skip


def row(cell: Cell, found: dict[str, Found]) -> list[Figure]:
    """The figures of a layout, by GPU."""
    subject, figures = subject_of(cell), []
    for gpu, one in found.items():
        size = cell.parameters(one.layers) / 1e9 if one.layers else None
        source = cell.command(one.layers, capacity(gpu, cell.gpus)) if one.layers else f"not found: {one.reason}"
        figures.append(Figure(SECTION, subject, GPUS[gpu], size, "billion parameters", "counted", source))
    layers = found["H100"].layers
    shape = f"{layers} x {cell.hidden}" if layers else None
    return [
        *figures, Figure(SECTION, subject, SHAPE, shape, "", "counted", PART),
        Figure(SECTION, subject, "estimate", cell.parameters(cell.start) / 1e9, "billion parameters", "predicted", PART),
    ]  # fmt: skip


def offloaded(cell: Cell) -> list[Figure]:
    """The estimate alone: a simulated rank keeps what it offloads in the real memory of this machine's host."""
    subject = f"{subject_of(cell)} (2 TB of host memory)"
    why = "not simulated: a rank would keep its offloaded states in the memory of this machine"
    return [
        *(Figure(SECTION, subject, name, None, "billion parameters", "counted", why) for name in GPUS.values()),
        Figure(SECTION, subject, SHAPE, None, "", "counted", why),
        Figure(SECTION, subject, "estimate", cell.parameters(cell.start) / 1e9, "billion parameters", "predicted", PART),
    ]


def subject_of(cell: Cell) -> str:
    """'8 GPUs: megatron tp=8 sp dist-opt'"""
    name = name_of(cell.config(cell.start), cell.stack).replace(" recompute=full", "").replace(" recompute", "")
    return f"{cell.gpus} GPU{'s' * (cell.gpus > 1)}: {name}"


TASKS = (Task("largest_model", SECTION, 200, largest_model),)


if __name__ == "__main__":
    main()
