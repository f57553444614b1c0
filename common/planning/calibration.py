"""Constants fitted to measured steps: `python -m scripts.plan CONFIG --calibrate RUN...`. Imports no torch.

What is fitted are factors of a few constants of hardware.py: the rate of matrix products and the bandwidth of the memory; and
on a GPU the time in which the host launches a layer, on a CPU the rate between processes. The formulas stay step_time.py's.
"""

import math
import statistics
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from common import config, families
from common.checkpoints import checkpoint
from common.config import Config
from common.errors import BadInput
from common.json_files import is_count, read_object
from common.paths import ROOT
from common.planning import cpu, hardware, search
from common.planning.hardware import Cluster
from common.planning.validation import summary
from common.planning.workload import Workload
from common.preflight import task_module
from common.training import log

WARMUP = 3  # steps of a run, or of its last phase, that do not count
LEAST_STEPS = 3  # that count
CONSTANTS = {
    "gemm": "matrix products",
    "hbm": "elementwise kernels",
    "nvlink": "exchange between processes",
    "host": "host per layer",
}
PRIOR = 0.05  # a constant that changes by a factor of e counts as an error of 5 %


@dataclass(frozen=True)
class Measured:
    """A run whose steps were measured."""

    name: str
    cfg: Config = field(repr=False)  # resolved, of the phase that was measured
    stack: str
    world: int  # ranks
    device: str | None  # name of the GPU; None: a CPU
    threads: int  # of a rank on a CPU
    taken: tuple[float, ...]  # seconds of steps

    @property
    def seconds(self) -> float:
        return statistics.median(self.taken)

    def predicted(self, cluster: Cluster, factors: Mapping[str, float]) -> float:
        """Seconds of a step, with constants that are changed by these factors."""
        host = search.Assumed(host=search.HOST * factors.get("host", 1.0))
        return search.step_of(self.cfg, self.stack, changed(cluster, factors), self.world, host)[3].total


def changed(cluster: Cluster, factors: Mapping[str, float]) -> Cluster:
    """The cluster with constants of its GPU multiplied by factors."""
    values = {name: getattr(cluster.gpu, name) * factor for name, factor in factors.items() if name != "host"}
    if cluster.gpu.is_cpu and "nvlink" in values:
        values["network"] = values["nvlink"]
    return replace(cluster, gpu=replace(cluster.gpu, **values))


def constants_of(runs: Sequence[Measured]) -> list[str]:
    """The names of the constants that are fitted to these runs."""
    on_cpu, several = runs[0].device is None, any(run.world > 1 for run in runs)
    return ["gemm", "hbm", *(["nvlink"] if on_cpu and several else []), *([] if on_cpu else ["host"])]


def fit(runs: Sequence[Measured], clusters: Sequence[Cluster], names: Sequence[str]) -> dict[str, float]:
    """The factors of these constants with the smallest squares of log errors, and of PRIOR. clusters: of each run."""
    from scipy.optimize import least_squares

    def residuals(x: Any) -> list[float]:
        factors = dict(zip(names, map(math.exp, x), strict=True))
        errors = [math.log(run.predicted(c, factors) / run.seconds) for run, c in zip(runs, clusters, strict=True)]
        return errors + [PRIOR * float(value) for value in x]

    fitted = least_squares(residuals, [0.0] * len(names), bounds=(-3.0, 3.0))
    return dict(zip(names, map(math.exp, map(float, fitted.x)), strict=True))


def clusters_of(runs: Sequence[Measured], gpus_per_node: int = 8, network: float | None = None) -> list[Cluster]:
    """Of each run, the row of hardware.py; of a CPU, rows that are measured now, one per number of processes and threads."""
    devices = {run.device for run in runs}
    if len(devices) > 1:
        raise BadInput(f"--calibrate: runs of one kind of GPU, and not of {' and '.join(map(str, devices))}")
    if None not in devices:
        return [Cluster(hardware.gpu_of_device(run.device or ""), gpus_per_node, network) for run in runs]
    kinds = dict.fromkeys((run.world, run.threads) for run in runs)
    rows = {kind: cpu.row(cpu.measured(*kind, works(runs))) for kind in kinds}
    return [Cluster(rows[run.world, run.threads], run.world) for run in runs]


def works(runs: Sequence[Measured]) -> list[tuple[Workload, int]]:
    """What the runs compute, and their micro batches."""
    return [(run.cfg.model.workload(run.cfg.data), getattr(run.cfg, run.stack).micro_batch) for run in runs]


def report(runs: Sequence[Measured], clusters: Sequence[Cluster], factors: Mapping[str, float]) -> Iterator[str]:
    """Lines of at most 80 characters: the constants, and each run's step before and after."""
    named = ", ".join(f"{CONSTANTS[name]} x {factor:.3f}" for name, factor in factors.items())
    count = f"{len(factors)} degrees of freedom, {len(runs)} run{'s' if len(runs) > 1 else ''}"
    yield from textwrap.wrap(f"calibrated ({count}): {named}; host: time, others: rate", 80, subsequent_indent="  ")
    yield f"  {'run':<33} {'measured':>9} {'before':>16} {'after':>16}"
    for run, cluster in zip(runs, clusters, strict=True):
        cells = [run.predicted(cluster, changed) for changed in ({}, factors)]
        values = " ".join(f"{value:>8.3g} ({value / run.seconds - 1:+5.0%})" for value in cells)
        yield f"  {run.name[-33:]:<33} {run.seconds:>7.3g} s {values}"


# ---- what was measured -----------------------------------------------------------------------------------------------


def read(path: Path) -> list[Measured]:
    """The runs of a path: OUT of a run, or gpu_check.json or its folder. BadInput for anything else."""
    if path.is_dir() and (path / "gpu_check.json").is_file():
        path = path / "gpu_check.json"
    return of_gpu_check(path) if path.is_file() else [of_run(path)]


def of_run(out: Path) -> Measured:
    """The median step of the last phase of OUT."""
    info = read_object(out / "run.json")
    if info is None or not {"family", "stack"} <= info.keys() or not (out / "config.yaml").is_file():
        raise BadInput(f"--calibrate {out}: is no run: run.json and config.yaml of a run are not there; give its OUT")
    if info["family"] not in families.names() or info["stack"] not in config.STACKS:
        raise BadInput(f"--calibrate {out}: run.json names a recipe that is not here: {info['family']} on {info['stack']}")
    world, gpu = info.get("world"), info.get("gpu")
    if not is_count(world):  # of a run of an earlier version
        newest = checkpoint.latest(out)
        world = newest.meta.get("layout", {}).get("world") if newest else None
    if not isinstance(world, int) or world < 1:
        raise BadInput(f"--calibrate {out}: run.json does not say how many ranks there were, and there is no checkpoint")
    whole = _resolved(out / "config.yaml", [], info["family"])
    rows = [values for values in log.read(out / "metrics.jsonl", whole.last_step) if is_time(values.get("ms"))]
    last = max((values["step"] for values in rows), default=0)
    begin = max((view.train.steps for view in config.views(whole) if view.train.steps < last), default=0)
    taken = [values["ms"] / 1e3 for values in rows if values["step"] > begin][WARMUP:]
    if len(taken) < LEAST_STEPS:
        raise BadInput(
            f"--calibrate {out}: metrics.jsonl has {len(taken)} steps after the first {WARMUP} of a phase; {LEAST_STEPS} are "
            "needed"
        )
    cfg, threads = config.at_step(whole, last - 1), info.get("threads")
    return Measured(
        str(out), cfg, info["stack"], world, gpu.get("name") if isinstance(gpu, dict) else None,
        threads if isinstance(threads, int) and threads > 0 else 1, tuple(taken),
    )  # fmt: skip


def is_time(value: Any) -> bool:
    """Is the value a number of milliseconds?"""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def of_gpu_check(file: Path) -> list[Measured]:
    """The speed runs of gpu_check.json (scripts/gpu_check.py)."""
    found, runs = read_object(file), []
    if found is None or not isinstance(found.get("parts"), list):
        raise BadInput(f"--calibrate {file}: is not gpu_check.json; give that file, or OUT of a run")
    try:
        device = found["machine"]["gpu"]["name"]
    except (KeyError, TypeError):
        device = None
    if found.get("rehearsal") or not isinstance(device, str):
        raise BadInput(f"--calibrate {file}: is a rehearsal on a CPU, whose figures mean nothing")
    for part in found["parts"]:
        if not isinstance(part, dict) or not str(part.get("part")).startswith("speed ") or not is_time(part.get("ms")):
            continue
        family = part["part"].split()[1]
        path = ROOT / "recipes" / family / "configs" / f"{part['config']}.yaml"
        cfg = _resolved(path, [*part["overrides"], "phases=[]"], family)
        name = f"{part['config']} {part['stack']}"
        runs.append(Measured(name, cfg, part["stack"], 1, device, 1, (part["ms"] / 1e3,)))
    if not runs:
        raise BadInput(f"--calibrate {file}: has no speed run that has passed; run bash scripts/gpu_check.sh OUT --only speed")
    return runs


def _resolved(path: Path, overrides: list[str], family: str) -> Config:
    """A config whose samples have one length. BadInput for finetuning."""
    task = task_module(family, {})
    try:
        cfg = config.load(path, overrides, task.Config, recorded=True)
        return config.resolve(cfg, task.ResolvedConfig, None)
    except (BadInput, ValidationError) as error:
        raise BadInput(f"--calibrate {path}: is not read as a config for pretraining: {str(error).splitlines()[0]}") from None


# ---- the recorded runs of a CPU (scripts/bench_plan.py) --------------------------------------------------------------

FILE = ROOT / "docs/planner/cpu.json"
HEAD = """
## Calibrated to runs of one's own

`python -m scripts.plan CONFIG --calibrate OUT ...` fits constants to the steps of runs, from `run.json`, `config.yaml` and
`metrics.jsonl` in their OUT, or to `gpu_check.json`. They are factors of the rates of matrix products and of elementwise
kernels, and of the host's time per layer on a GPU, or of the rate between processes on a CPU. It prints each run's step as
measured, and as predicted before and after.

Here on a CPU ({cpu}): GPT in fp32, one thread per process, the median of the steps after the first {warmup}. The rates of
products, attention, elementwise kernels, copies and all-reduce are measured (`common/planning/cpu.py`). Then {freedom} factors
are fitted to the {fitted} rows marked *: {factors}.
The other rows: {errors}. The errors are those of the seconds. `python -m scripts.bench_plan --write` repeats all measurements.

| processes | layout and size | measured, s | before | predicted | error |
|---|---|---|---|---|---|
"""


def recorded(found: Mapping[str, Any]) -> tuple[list[Measured], list[Cluster], list[bool]]:
    """The runs of a content of FILE, their clusters, and to which of them the constants are fitted."""
    rows = {values["ranks"]: cpu.row(values) for values in found["hardware"]}
    runs = [
        Measured(
            f"{row['stack']} {row['words']}", _resolved(ROOT / row["config"], row["overrides"], "gpt"), row["stack"],
            row["world"], None, 1, (row["seconds"],),
        )
        for row in found["rows"]
    ]  # fmt: skip
    return runs, [Cluster(rows[run.world], run.world) for run in runs], [row["is_fitted"] for row in found["rows"]]


def fit_recorded(
    runs: Sequence[Measured], clusters: Sequence[Cluster], fitted: Sequence[bool]
) -> tuple[dict[str, float], list[float]]:
    """The factors that are fitted to some of the runs, and the error of the seconds of each run."""
    own = [(run, cluster) for run, cluster, is_fitted in zip(runs, clusters, fitted, strict=True) if is_fitted]
    factors = fit([run for run, _ in own], [cluster for _, cluster in own], constants_of(runs))
    return factors, [run.predicted(c, factors) / run.seconds - 1 for run, c in zip(runs, clusters, strict=True)]


def page(found: Mapping[str, Any] | None = None) -> str:
    """The section of docs/planner.md."""
    found = read_object(FILE) if found is None else found
    if found is None:
        return ""
    runs, clusters, fitted = recorded(found)
    factors, errors = fit_recorded(runs, clusters, fitted)
    others = [error for error, is_fitted in zip(errors, fitted, strict=True) if not is_fitted]
    named = ", ".join(f"{CONSTANTS[name]} x {factor:.3f}" for name, factor in factors.items())
    lines = []
    for run, cluster, is_fitted, error in zip(runs, clusters, fitted, errors, strict=True):
        cells = [str(run.world), run.name + " *" * is_fitted, f"{run.seconds:.3g}", f"{run.predicted(cluster, {}):.3g}"]
        lines.append(f"| {' | '.join([*cells, f'{run.seconds * (1 + error):.3g}', f'{error:+.1%}'])} |")
    head = HEAD.format(
        cpu=found["cpu"], warmup=WARMUP, freedom=len(factors), fitted=sum(fitted), factors=named, errors=summary(others)
    )
    return head + "\n".join(lines) + "\n"
