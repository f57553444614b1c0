"""Times the steps of recipes: their own pretrain.py or finetune.py, with a clock around each step of its log.

torchrun ... -m common.comparison.measuring FOLDER    makes the runs of FOLDER/job.json; every rank
"""

import contextlib
import gc
import importlib
import json
import os
import shutil
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.comparison.figures import Disagreement
from common.comparison.layouts import BF16, LOSS, NORM, Case, is_first_rank, metrics, torchrun
from common.errors import BadInput
from common.launch import in_process, processes
from common.training.log import Log

if TYPE_CHECKING:
    import torch

LEVELS = {"fp32": (("loss", LOSS), ("grad_norm", NORM)), "bf16": (("loss", BF16),)}  # largest relative differences


class Enough(Exception):
    """All steps that are timed are done."""


@dataclass
class Timing:
    """Of the steps of one run, from the beginning of a step to that of the next: with its samples, update and log line."""

    seconds: list[float] = field(default_factory=list)  # of the last: to the end of its log line
    tokens: list[int] = field(default_factory=list)  # without padding, on all ranks
    after: float = 0.0  # seconds from the last step to the next: those of saving, if the run saves there
    first_at: float = 0.0  # when the first step ended, in seconds since the epoch


def timed(module: str, arguments: Sequence[str], steps: int) -> Timing:
    """The first steps of a run of a recipe's module in this process (in_process.run), which then ends without an export."""
    recipe: Any = importlib.import_module(module)
    timing = Timing()
    begins: list[float] = []
    ends: list[float] = []

    class Stopwatch(Log):
        def begin_step(self) -> None:
            begins.append(clock(self.device))
            if len(begins) > steps:
                self.close()
                raise Enough
            super().begin_step()

        def step(self, step: int, loss: float, grad_norm: float, lr: float, tokens: int, **parts: float) -> None:
            super().step(step, loss, grad_norm, lr, tokens, **parts)
            ends.append(clock(self.device))
            timing.tokens.append(tokens)
            timing.first_at = timing.first_at or time.time()

    plain, recipe.Log = recipe.Log, Stopwatch
    try:
        in_process.run(module, arguments)
    except Enough:
        pass
    finally:
        recipe.Log = plain
    if len(begins) <= steps:
        raise BadInput(f"{module}: ended after {len(begins)} steps, fewer than the {steps} that are timed")
    timing.seconds = [after - before for before, after in zip(begins, [*begins[1:steps], ends[-1]], strict=False)]
    timing.after = begins[steps] - ends[-1]
    return timing


def clock(device: "torch.device") -> float:
    """Seconds, once the device has done all that was asked of it."""
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)
    return time.perf_counter()


# ---- runs of several layouts, in rounds ------------------------------------------------------------------------------


@dataclass
class Record:
    """One run of a case."""

    case: str  # its name
    round: int
    reason: str = ""  # why it failed; then there is nothing else
    timing: Timing = field(default_factory=Timing)
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)  # of the gradients, before clipping
    saved_bytes: int = 0
    peak_bytes: int | None = None  # of PyTorch's allocator, on the GPU that needs the most; None on a CPU
    gpu: str | None = None  # its name
    disagreement: str = ""  # with the curve of the reference


@dataclass
class Job:
    """What the ranks do. The runs are made in this order."""

    runs: list[tuple[int, Case]]  # (round, case)
    reference: Case  # whose curve the others must have
    level: str  # of LEVELS
    steps: int


def measure(
    cases: Sequence[Case], timed_cases: Sequence[Case], rounds: int, level: str, steps: int, nproc: int, folder: Path
) -> list[Record]:
    """Run all cases once, and compare their curves with that of the first; then those that are timed in further rounds.

    A case that fails, for example for lack of memory, is left out of the further rounds; the others continue in a new process
    group. Disagreement if a curve is not that of the reference.
    """
    runs = [(0, case) for case in cases] + [(number, case) for number in range(1, rounds) for case in timed_cases]
    records: list[Record] = []
    while runs:
        made = launch(Job(runs, cases[0], level, steps), nproc, folder)
        if not made:  # the ranks ended before they wrote a record
            number, case = runs[0]
            lines = (folder / "ranks.log").read_text(encoding="utf-8", errors="replace").strip().splitlines()
            made = [Record(case.name, number, reason=lines[-1] if lines else "its processes ended without a word")]
        records += made
        for record in made:
            if record.disagreement:
                raise Disagreement(record.disagreement)
        if any(record.reason and record.case == cases[0].name for record in made):
            raise BadInput(f"{cases[0].name}, with which all others are compared: {made[-1].reason}")
        failed = {record.case for record in records if record.reason}
        done = {(record.round, record.case) for record in records}
        runs = [(n, case) for n, case in runs if (n, case.name) not in done and case.name not in failed]
    return records


def job_json(job: Job) -> str:
    return json.dumps(asdict(job))


def job_from(values: dict[str, Any]) -> Job:
    runs = [(number, Case(*case)) for number, case in values["runs"]]
    return Job(runs, Case(*values["reference"]), values["level"], values["steps"])


def launch(job: Job, nproc: int, folder: Path) -> list[Record]:
    """The records of a job, in new processes."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "job.json").write_text(job_json(job), encoding="utf-8")
    (folder / "records.jsonl").unlink(missing_ok=True)
    torchrun(nproc, ["-m", "common.comparison.measuring", str(folder)], folder / "ranks.log")
    if not (folder / "records.jsonl").is_file():
        return []
    lines = map(json.loads, (folder / "records.jsonl").read_text(encoding="utf-8").splitlines())
    return [Record(**(values | {"timing": Timing(**values["timing"])})) for values in lines]


def disagreement(name: str, run: dict[int, dict[str, float]], first_name: str, first: dict[int, dict[str, float]],
                 level: str) -> str:  # fmt: skip
    """The first step at which two curves (values by step, as of `metrics`) differ by more than the level allows; "" if none."""
    for step, values in first.items():
        for key, bound in LEVELS[level]:
            seen = run.get(step, {}).get(key, float("nan"))
            if not abs(seen - values[key]) <= bound * abs(values[key]):
                what = {"loss": "loss", "grad_norm": "gradient norm"}[key]
                return (
                    f"{name} and {first_name} have not one curve: at step {step} the {what} is {seen:.7g} and "
                    f"{values[key]:.7g}, a relative difference of {abs(seen / values[key] - 1):.1e}, where {bound:g} is "
                    "allowed; what they cost cannot be compared"
                )
    return ""


# ---- on every rank ---------------------------------------------------------------------------------------------------


def run_case(job: Job, number: int, case: Case) -> Record:
    """One run; in the first round also the comparison of its curve."""
    import torch
    import torch.distributed as dist

    out = Path(f"{case.out}_{number}")
    first_out = Path(f"{job.reference.out}_0")
    cuda = torch.cuda.is_available()
    gc.collect()  # what the last run has left
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if cuda else 0
    timing = timed(case.module, [case.config, str(out), *case.overrides], job.steps)
    record = Record(case.name, number, timing=timing)
    if cuda:
        peak = torch.tensor(torch.cuda.max_memory_allocated() - before, device="cuda")
        dist.all_reduce(peak, dist.ReduceOp.MAX)
        record.peak_bytes, record.gpu = int(peak), torch.cuda.get_device_name()
    dist.barrier()  # the first rank has written its metrics
    values = metrics(out)
    record.losses = [values[step]["loss"] for step in sorted(values)]
    record.norms = [values[step]["grad_norm"] for step in sorted(values)]
    if number == 0 and case != job.reference:
        record.disagreement = disagreement(case.name, values, job.reference.name, metrics(first_out), job.level)
    record.saved_bytes = sum(file.stat().st_size for file in out.glob("step_*/*"))
    dist.barrier()
    if is_first_rank():
        for folder in [*out.glob("step_*"), *([out] if number else [])]:  # the curve of the first round stays
            shutil.rmtree(folder, ignore_errors=True)
    return record


def run_job(job: Job) -> Iterator[Record]:
    """The records of the runs. After an exception other than BadInput, or a disagreement, the last."""
    for number, case in job.runs:
        os.makedirs(Path(case.out).parent, exist_ok=True)
        with open(f"{case.out}.log" if is_first_rank() else os.devnull, "w", encoding="utf-8") as log:
            with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
                try:
                    record, usable = run_case(job, number, case), True
                except BadInput as error:
                    record, usable = Record(case.name, number, reason=error.problems[0]), True
                except Exception as error:
                    traceback.print_exc()
                    reason = f"{type(error).__name__}: {error}".splitlines()[0]
                    record, usable = Record(case.name, number, reason=reason), False
        yield record
        if not usable or record.disagreement:
            return


def main() -> None:
    folder = Path(sys.argv[1])
    processes.quiet()
    job = job_from(json.loads((folder / "job.json").read_text(encoding="utf-8")))
    code = 0
    try:
        for record in run_job(job):
            if is_first_rank():
                with open(folder / "records.jsonl", "a", encoding="utf-8") as file:
                    file.write(json.dumps(asdict(record)) + "\n")
            code = 1 if record.reason or record.disagreement else 0  # torchrun then ends the ranks that wait for this one
    except processes.Stopped as stop:
        code = stop.code
    sys.stdout.flush()
    os._exit(code)  # worker threads of the stacks outlive a normal exit by seconds


if __name__ == "__main__":
    main()
