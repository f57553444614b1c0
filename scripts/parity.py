"""Check that all stacks and layouts of a recipe train one loss curve. Run it after changing a recipe.

    python -m scripts.parity CONFIG [a.b=c ...] [--layouts LAYOUT ...] [--steps 20] [--nproc 2] [--json FILE]

CONFIG is a config of a recipe, recipes/FAMILY/configs/NAME.yaml; tiny.yaml takes a minute on two CPU cores. Each layout makes
the same steps from the same initial values on the same samples. The first layout, the baseline if the recipe has it, is the
reference. A row passes if its relative differences from the reference are small enough: at every step at most 1e-5 for the loss
and 1e-4 for the gradient norm, and at most 1e-5 for the validation loss after the last step, if the config has data.valid.
Layouts that the recipe refuses for this config are listed with the reason.

LAYOUT is a stack, or a stack with keys of its section: baseline, deepspeed:zero_stage=3, megatron:tp=2,sequence_parallel=true.
A name that the table prints, such as "deepspeed zero=3", is one too.
A micro batch that does not divide the batch is lowered to one that does.

With train.dtype=bf16 each layout rounds differently. Then the reference runs in fp32, and a row passes if the relative
difference of the losses is above 0 and at most 2e-3. Dropout must be 0, because the layouts draw different masks.

A ReLU has no derivative at 0, so a unit whose input is 0 within rounding can separate two correct curves. If another train.seed
passes, this was the case.

Exit code: 0 all rows pass, 1 a row fails, 2 bad input.
"""

import contextlib
import json
import math
import os
import re
import sys
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from common import config, families
from common.command_line import Parser
from common.comparison.layouts import (
    BF16,
    LOSS,
    NORM,
    Case,
    cases_of,
    farthest,
    is_first_rank,
    metrics,
    parsed,
    torchrun,
    usual_layouts,
)
from common.errors import BadInput, exit_cleanly
from common.json_files import read_object
from common.launch import in_process, processes
from common.launch.launcher import visible_gpus
from common.preflight import prepare, task_module
from common.yaml_files import read_yaml

MOVES = 1e-3  # the reference's loss must change by more than this share, otherwise equal curves prove nothing


class Row(NamedTuple):
    """A layout compared with the reference. The differences are relative; None if the runs do not have the value."""

    name: str
    verdict: str  # reference, pass or fail
    loss: float | None = None
    loss_step: int | None = None
    norm: float | None = None
    norm_step: int | None = None
    valid: float | None = None
    reason: str = ""


# ---- the runs, on every rank -----------------------------------------------------------------------------------------


def run_cases(cases: Sequence[Case], reference: Case, dtype: str) -> Iterator[Row]:
    """Run each case in this process (and process group), and compare it with the reference, which is the first case or has
    run before. After an exception other than BadInput the process group is unusable; that row is the last."""
    for case in cases:
        reason, usable = "", True
        os.makedirs(Path(case.out).parent, exist_ok=True)
        with open(f"{case.out}.log" if is_first_rank() else os.devnull, "w", encoding="utf-8") as log:
            with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
                try:
                    in_process.run(case.module, [case.config, case.out, *case.overrides])
                except BadInput as error:
                    reason = error.problems[0]
                except processes.Stopped:
                    raise
                except Exception as error:
                    traceback.print_exc()
                    reason, usable = f"{type(error).__name__}: {error}".splitlines()[0], False
        yield Row(case.name, "fail", reason=reason) if reason else compared(case, reference, dtype)
        if not usable:
            return


def compared(case: Case, reference: Case, dtype: str) -> Row:
    """The row of a finished run."""
    run, first = metrics(Path(case.out)), metrics(Path(reference.out))
    if case == reference:
        losses = [step["loss"] for step in first.values() if "loss" in step]
        moves = math.isfinite(sum(losses)) and max(losses) - min(losses) > MOVES * abs(losses[0])
        shown = f"loss {losses[0]:.4f} to {losses[-1]:.4f}"
        return Row(case.name, "reference" if moves else "fail", reason=shown if moves else f"{shown}: it does not move")
    loss, loss_step = farthest(run, first, "loss")
    norm, norm_step = farthest(run, first, "grad_norm")
    valid, _ = farthest(run, first, "valid_loss")
    if loss is None or norm is None:
        return Row(case.name, "fail", reason="it has not logged the steps of the reference")
    if dtype == "fp32":
        passes = loss <= LOSS and norm <= NORM and (valid or 0.0) <= LOSS
    else:
        passes = 0 < loss <= BF16 and (valid or 0.0) <= BF16
    return Row(case.name, "pass" if passes else "fail", loss, loss_step, norm, norm_step, valid)


def child(folder: Path) -> None:
    """The main function of a rank: it runs the cases in folder/cases.json. The first rank adds one line per run to
    folder/rows.jsonl."""
    processes.quiet()
    job = json.loads((folder / "cases.json").read_text(encoding="utf-8"))
    cases, reference = [Case(*case) for case in job["cases"]], Case(*job["reference"])
    code = 0
    try:
        for row in run_cases(cases, reference, job["dtype"]):
            if is_first_rank():
                show(row)
                with open(folder / "rows.jsonl", "a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
    except processes.Stopped as stop:
        code = stop.code
    sys.stdout.flush()
    os._exit(code)  # worker threads of the stacks outlive a normal exit by seconds


# ---- the command -----------------------------------------------------------------------------------------------------

HEAD = f"{'layout':<32} {'loss':>8} {'step':>4} {'norm':>8} {'step':>4} {'valid':>8}  verdict"


def show(row: Row) -> None:
    """Print one line of the table, and below it the reason if there is one."""

    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:.1e}"

    steps = ["-" if step is None else str(step) for step in (row.loss_step, row.norm_step)]
    values = f"{number(row.loss):>8} {steps[0]:>4} {number(row.norm):>8} {steps[1]:>4} {number(row.valid):>8}"
    print(f"{row.name:<32} {values}  {row.verdict}", flush=True)
    if row.reason:
        print(f"    {row.reason}", flush=True)


def run_all(cases: Sequence[Case], dtype: str, nproc: int, folder: Path) -> list[Row]:
    """The rows of all cases. A case that breaks its process group fails; the other cases continue in a new group."""
    rows: list[Row] = []
    while len(rows) < len(cases):
        job = {"cases": cases[len(rows) :], "reference": cases[0], "dtype": dtype}
        (folder / "cases.json").write_text(json.dumps(job), encoding="utf-8")
        code = torchrun(nproc, ["-m", "scripts.parity", "--child", str(folder)], folder / "ranks.log")
        path = folder / "rows.jsonl"
        done = [Row(*json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
        if len(done) == len(rows):  # the ranks ended without writing a row
            case = cases[len(rows)]
            text = (folder / "ranks.log").read_text(encoding="utf-8", errors="replace").strip()
            done.append(
                Row(case.name, "fail", reason=f"ended with code {code}: {text.splitlines()[-1] if text else 'no output'}")
            )
            show(done[-1])
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(done[-1]) + "\n")
        rows = done
        if rows[0].verdict == "fail":
            break  # without the reference there is nothing to compare with
    return rows


def main() -> int:
    if sys.argv[1:2] == ["--child"]:
        child(Path(sys.argv[2]))
    gpus = visible_gpus(os.environ)
    parser = Parser(prog="python -m scripts.parity", description=__doc__)
    parser.add_argument("config", metavar="CONFIG")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="overrides of the config")
    parser.add_argument(
        "--layouts", nargs="+", action="extend", metavar="LAYOUT", help="only these layouts (default: all that fit --nproc)"
    )
    parser.add_argument("--steps", type=int, default=20, metavar="N", help="optimizer steps of each run (default: 20)")
    parser.add_argument(
        "--nproc", type=int, default=min(gpus, 2) or 2, metavar="N", help="processes (default: %(default)s here)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows there")
    args = parser.parse_intermixed_args()
    layouts = [word for word in args.layouts or [] if "=" not in re.split("[: ]", word)[0]]
    overrides = args.overrides + [word for word in args.layouts or [] if word not in layouts]  # given after --layouts
    problems = [
        f"--{name} {value}: must be 1 or more" for name, value in (("steps", args.steps), ("nproc", args.nproc)) if value < 1
    ]
    if gpus and args.nproc > gpus:
        problems.append(
            f"--nproc {args.nproc}: there are {gpus} GPUs; give --nproc {gpus}, or CUDA_VISIBLE_DEVICES= for the CPU"
        )
    if args.json and not args.json.parent.is_dir():
        problems.append(f"--json {args.json}: no such folder: {args.json.parent}")
    if args.json and args.json.exists() and "rows" not in (read_object(args.json) or {}):
        problems.append(f"--json {args.json}: exists, and is no earlier result of this command; give another file")
    if problems:
        raise BadInput(problems)

    family = families.of_config(args.config)
    stacks = families.stacks(family)
    if not stacks:
        raise BadInput(f"recipes/{family}: has no stack, so that there is nothing to compare")
    with tempfile.TemporaryDirectory(prefix="parity_") as name:
        chosen = parsed(layouts, stacks) if layouts else usual_layouts(stacks, args.nproc)
        path, folder = str(Path(args.config).resolve()), Path(name)
        cases, left_out = cases_of(path, overrides, chosen, args.steps, args.nproc, folder, optional=not layouts)
        if len(layouts) == 1:
            raise BadInput(f"--layouts {layouts[0]}: nothing to compare it with; give two or more, the reference first")
        first = cases[0]
        task = task_module(family, read_yaml(path))
        prepare(path, first.out, first.overrides, first.module.split(".")[2], task, args.nproc)  # checks the corpus
        dtype = config.load(path, overrides, task.Config).train.dtype
        print(f"recipes/{family}, {Path(path).stem}: {args.steps} steps, {args.nproc} processes, {', '.join(stacks)}")
        bound = f"loss {LOSS:g}, gradient norm {NORM:g}" if dtype == "fp32" else f"loss {BF16:g} against fp32, above 0"
        print(f"relative differences to the first layout; allowed: {bound}\n\n{HEAD}", flush=True)
        rows = run_all(cases, dtype, args.nproc, folder)
    for line in left_out:
        print(f"left out: {line}")
    failed = sum(row.verdict == "fail" for row in rows)
    others = len(rows) - 1
    follow = f"{others} layout{'s follow' if others > 1 else ' follows'} {rows[0].name}"
    print(f"\n{failed} of {len(rows)} rows fail" if failed else f"\none curve: {follow}")
    if args.json:
        values = {"family": family, "config": Path(path).stem, "steps": args.steps, "nproc": args.nproc, "dtype": dtype,
                  "left_out": left_out, "rows": [row._asdict() for row in rows]}  # fmt: skip
        args.json.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    return 1 if failed else 0


if __name__ == "__main__":
    exit_cleanly(main)
