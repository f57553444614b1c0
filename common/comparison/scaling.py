"""Weak and strong scaling over the processes of this machine: tokens/s of plain data parallel layouts, and of Megatron's tensor
parallelism, on 1, 2, 4, ... processes (GPUs, where there are any). Runs with as many samples per step must have one curve.

The process groups of all sizes are started once and take turns, a round each: 1, 2, 4, 1, 2, 4, ...

torchrun ... -m common.comparison.scaling FOLDER    makes the runs of FOLDER/job.json, when it is its turn; every rank
"""

import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from common import families
from common.comparison import layouts, measuring, performance, small
from common.comparison.figures import Disagreement, Figure, Options, Task
from common.comparison.layouts import Case, Layout
from common.config import load
from common.errors import BadInput
from common.launch import processes
from common.paths import ROOT
from common.preflight import task_module
from common.yaml_files import read_yaml

SECTION = "Scalability"
PART = "scaling_measured"
STEPS, WARMUP = 8, 2  # steps of a run; those at its beginning that do not count
PAUSE = 0.1  # seconds between two looks at whose turn it is
TENSOR = "megatron tp=all"
PLAIN = {
    "baseline": Layout("baseline", {"shard": "none"}),
    "deepspeed": Layout("deepspeed", {"zero_stage": "1"}),
    "megatron": Layout("megatron", {"tp": "1", "pp": "1", "sequence_parallel": "false", "distributed_optimizer": "false"}),
}


@dataclass(frozen=True)
class Run:
    """A layout on a number of processes, with a number of samples per step."""

    layout: str
    processes: int
    batch: int
    case: Case


@dataclass(frozen=True)
class Speed:
    layout: str
    processes: int
    batch: int
    round: int
    tokens_per_s: float


# ---- what is run -----------------------------------------------------------------------------------------------------


def counts(limit: int) -> list[int]:
    """1, 2, 4, ... and the number of processes itself."""
    return sorted({2**k for k in range(limit.bit_length()) if 2**k <= limit} | {limit})


def runs_of(options: Options, path: str, overrides: Sequence[str], batch: int, folder: Path) -> list[Run]:
    """Strong scaling has `batch` samples per step on any number of processes, weak scaling a share of them per process, so that
    on all processes the two are one run."""
    script, most, found = "finetune" if "task" in read_yaml(path) else "pretrain", options.processes, []
    for size in counts(most):
        for samples in dict.fromkeys((batch, batch * size // most)):
            shared = layouts.shared_overrides(path, [*overrides, f"train.global_batch={samples}"], STEPS + 1)
            for stack in options.stacks:
                chosen = {f"{stack}": PLAIN[stack]}
                if stack == "megatron" and size > 1:
                    chosen[TENSOR] = Layout(stack, PLAIN[stack].values | {"tp": str(size)})
                for name, layout in chosen.items():
                    out = folder / f"{name.replace(' ', '_')}_{size}_{samples}"
                    try:
                        case = layouts.case_of(path, shared, layout, script, size, out)
                    except BadInput:
                        if name == TENSOR:  # the heads do not divide among so many
                            continue
                        raise
                    found.append(Run(name, size, samples, case))
    return found


# ---- the runs --------------------------------------------------------------------------------------------------------


def measured(runs: Sequence[Run], rounds: int, folder: Path) -> list[Speed]:
    """The speed of each run in each round."""
    groups = {size: folder / f"{size}" for size in dict.fromkeys(run.processes for run in runs)}
    started = {}
    for size, place in groups.items():
        place.mkdir(parents=True)
        job = {"rounds": rounds, "runs": [asdict(run) for run in runs if run.processes == size]}
        (place / "job.json").write_text(json.dumps(job), encoding="utf-8")
        started[size] = begin(size, place)
    try:
        for number in range(rounds):
            for size, place in groups.items():
                (place / f"turn_{number}").touch()
                while not (place / f"done_{number}").exists():
                    if started[size].poll() is not None and not (place / f"done_{number}").exists():
                        raise BadInput(f"on {size} processes: {last_line(place / 'ranks.log')}")
                    time.sleep(PAUSE)
    finally:
        for process in started.values():
            process.terminate()
        for process in started.values():
            process.wait()
    lines = [line for place in groups.values() for line in (place / "speeds.jsonl").read_text(encoding="utf-8").splitlines()]
    return [Speed(**json.loads(line)) for line in lines]


def begin(size: int, place: Path) -> "subprocess.Popen[bytes]":
    words = [f"--nproc-per-node={size}", "-m", "common.comparison.scaling", str(place)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "NVIDIA_TF32_OVERRIDE": "0"}
    environment.setdefault("OMP_NUM_THREADS", "1")
    with open(place / "ranks.log", "wb") as log:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", *words]
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)


def last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1] if lines else "its processes ended without a word"


def agree(runs: Sequence[Run], level: str) -> None:
    """Disagreement if runs with as many samples per step have not one curve. level: of measuring.LEVELS."""
    first: dict[int, Run] = {}
    for run in runs:
        reference = first.setdefault(run.batch, run)
        names = [f"{one.case.name} on {one.processes}" for one in (run, reference)]
        curves = [layouts.metrics(Path(f"{one.case.out}_0")) for one in (run, reference)]
        text = measuring.disagreement(names[0], curves[0], names[1], curves[1], level)
        if text:
            raise Disagreement(text)


def main() -> None:
    """On every rank: wait for the turn of this group, make its runs, and say that they are done."""
    place = Path(sys.argv[1])
    processes.quiet()
    job = json.loads((place / "job.json").read_text(encoding="utf-8"))
    runs = [Run(**(values | {"case": Case(*values["case"])})) for values in job["runs"]]
    for number in range(job["rounds"]):
        while not (place / f"turn_{number}").exists():
            time.sleep(PAUSE)
        for run in runs:
            out = f"{run.case.out}_{number}"
            timing = measuring.timed(run.case.module, [run.case.config, out, *run.case.overrides], STEPS)
            if layouts.is_first_rank():
                rate = sum(timing.tokens[WARMUP:]) / sum(timing.seconds[WARMUP:])
                speed = Speed(run.layout, run.processes, run.batch, number, rate)
                with open(place / "speeds.jsonl", "a", encoding="utf-8") as file:
                    file.write(json.dumps(asdict(speed)) + "\n")
        if layouts.is_first_rank():
            (place / f"done_{number}").touch()
    sys.stdout.flush()
    os._exit(0)  # worker threads of the stacks outlive a normal exit by seconds


# ---- the part --------------------------------------------------------------------------------------------------------


def scaling_measured(options: Options, folder: Path) -> list[Figure]:
    if options.processes == 1:
        raise BadInput("scaling needs several processes: --processes 2 or more")
    path, overrides, batch = workload_of(options, folder)
    runs = runs_of(options, path, overrides, batch, folder / "runs")
    speeds = measured(runs, options.rounds, folder / "groups")
    dtype = load(path, overrides, task_module(families.of_config(path), read_yaml(path)).Config).train.dtype
    agree(runs, "fp32" if dtype == "fp32" else "bf16")
    most = options.processes
    source = options.command if "--parts" in options.words else f"{options.command} --parts {PART}"
    strong = figures(speeds, f"Strong scaling, {batch} samples per step", lambda size: batch, most, source)
    share = batch // most
    weak = figures(speeds, f"Weak scaling, {share} samples per process and step", lambda size: share * size, most, source)
    return [*strong, *weak]


def workload_of(options: Options, folder: Path) -> tuple[str, list[str], int]:
    """(config, overrides, samples per step on all processes): the first config that is given, or the small GPT of the part
    performance."""
    if options.configs:
        path, overrides = str(options.configs[0]), performance.no_dropout(str(options.configs[0]), [])
        batch = load(path, overrides, task_module(families.of_config(path), read_yaml(path)).Config).train.global_batch
        if batch % options.processes:
            raise BadInput(f"{path}: train.global_batch={batch} does not divide among {options.processes} processes")
        return path, overrides, batch
    on_cpu, on_gpu = (performance.ON_CPU, performance.TELLING), (performance.ON_GPU, performance.IN_BF16)
    shape, more = on_gpu if small.has_gpu() else on_cpu
    batch = math.lcm(shape.batch, options.processes)
    small.make_corpus("gpt", folder / "corpus", performance.IDS)
    overrides = small.overrides_of("gpt", shape._replace(batch=batch), folder / "corpus")
    return str(small.config_of("gpt")), [*overrides, *more], batch


def figures(speeds: Sequence[Speed], title: str, batch_of: Callable[[int], int], most: int, source: str) -> list[Figure]:
    """tokens/s by number of processes, and the efficiency: the speed to that of as many single processes, in each round."""
    found, section = [], f"{SECTION} / {title}"
    for layout in dict.fromkeys(one.layout for one in speeds):
        rates = {
            size: [s.tokens_per_s for s in speeds if (s.layout, s.processes, s.batch) == (layout, size, batch_of(size))]
            for size in counts(most)
        }
        alone = rates[1] or [s.tokens_per_s for s in speeds if (s.layout, s.processes, s.batch) == ("megatron", 1, batch_of(1))]
        for size, values in rates.items():
            if values:
                name = f"{size} process{'es' * (size > 1)}"
                found.append(figure(section, layout, name, values, "tokens/s", source))
        for size, values in rates.items():
            if values and size > 1:
                shares = [100 * rate / one / size for rate, one in zip(values, alone, strict=True)]
                found.append(figure(section, layout, f"efficiency at {size}", shares, "%", source))
    return found


def figure(section: str, subject: str, metric: str, values: Sequence[float], unit: str, source: str) -> Figure:
    bounds = (min(values), max(values))
    return Figure(section, subject, metric, statistics.median(values), unit, "measured", source, bounds)


TASKS = (Task(PART, SECTION, 75, scaling_measured),)


if __name__ == "__main__":
    main()
