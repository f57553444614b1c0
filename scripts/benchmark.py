"""Compare DeepSpeed, Megatron Core and the baseline on this machine, and write a report of figures that are measured, counted,
predicted or cited, each marked so.

    python -m scripts.benchmark [CONFIG ...] --out DIR

Without CONFIG, small models of all families are measured, on corpora that the command makes. A CONFIG is one for pretraining,
and its data must exist. All layouts start from the same initial weights and read the same samples, and their losses are
compared first. DIR gets report.json (every figure), report.md, report.html (one file, no network) and pictures. Given again,
the command continues an interrupted report, or draws a finished one again; a part that was measured at another commit is
measured again.

LAYOUT is a stack, or a stack with keys of its section: baseline, deepspeed:zero_stage=3, megatron:tp=2,sequence_parallel=true.

Exit code: 0 done, 1 the losses disagree, 2 bad input.
"""

import argparse
import datetime
import importlib
import importlib.util
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from common import families
from common.command_line import Parser
from common.comparison import verdict
from common.comparison.figures import Disagreement, Figure, Options, Picture, Report, Task, figures_from_json
from common.config import STACKS
from common.errors import BadInput, exit_cleanly
from common.json_files import read_object, write_json
from common.preflight import unusable

# In the order of the report. Each has TASKS and PICTURES.
SECTIONS = ("performance", "scalability", "balance", "ease", "ecosystem", "claims", "choice")
ORDER = (
    "Verdict", "Which one for you", "Performance", "Scalability", "Load balance", "Ease of use", "Ecosystem", "Claims",
)  # fmt: skip
PACKAGES = {"baseline": "accelerate", "deepspeed": "deepspeed", "megatron": "megatron.core"}
EXIT_DISAGREEMENT = 1


def sections() -> list[Any]:
    return [importlib.import_module(f"common.comparison.{name}") for name in SECTIONS]


def tasks() -> list[Task]:
    return [task for section in sections() for task in section.TASKS]


def pictures() -> list[Picture]:
    return [*verdict.PICTURES, *(picture for section in sections() for picture in section.PICTURES)]


def main() -> int:
    args = parser().parse_args()
    known = {task.name: task for task in tasks()}
    if args.list:
        print("\n".join(f"{task.name:<22} {minutes(task.seconds):>7}  {task.section}" for task in known.values()))
        return 0
    unknown = [name for name in args.parts if name not in known]
    if unknown:
        raise BadInput([f"--parts {name}: no such part; there are {', '.join(known)}" for name in unknown])
    if args.redraw:
        finish(read_report(args.out), args.out, args.all)
        return 0
    options, left_out = options_of(args)
    chosen = [known[name] for name in dict.fromkeys(args.parts)] or list(known.values())
    report = begin(options, left_out)
    try:
        run(chosen, options, report, args.minutes, args.keep)
    except Disagreement as error:
        print(f"error: the losses disagree, so nothing is compared: {error}", file=sys.stderr)
        return EXIT_DISAGREEMENT
    finish(report, options.out, args.all or bool(args.parts))
    return 0


def parser() -> argparse.ArgumentParser:
    p = Parser(prog="python -m scripts.benchmark", description=__doc__)
    p.add_argument("configs", nargs="*", metavar="CONFIG", help="configs to measure (default: small models of all families)")
    p.add_argument("--stacks", nargs="+", choices=STACKS, default=list(STACKS), metavar="STACK", help="default: all")
    p.add_argument("--layouts", nargs="+", default=[], metavar="LAYOUT", help="to measure (default: the usual ones)")
    p.add_argument("--parts", nargs="+", default=[], metavar="PART", help="of the report (default: all; --list names them)")
    p.add_argument("--list", action="store_true", help="name the parts, with their time on 2 cores, and end")
    p.add_argument("--all", action="store_true", help="print all tables, not the verdict and the choice of a stack alone")
    p.add_argument("--keep", action="store_true", help="keep parts of other commits too; the report says which")
    p.add_argument(
        "--redraw", action="store_true", help="measure nothing: write the tables and pictures of DIR/report.json again"
    )
    p.add_argument("--minutes", type=float, metavar="N", help="leave out the parts that do not fit into this time")
    p.add_argument("--rounds", type=int, default=3, metavar="N", help="measurements of each layout, in turn (default: 3)")
    p.add_argument(
        "--micro-batches", nargs="+", type=int, default=[], metavar="N",
        help="of a step, in the pipelines of balance_pipelines (default: four per stage)",
    )  # fmt: skip
    p.add_argument("--processes", type=int, metavar="N", help="ranks (default: all GPUs of this machine, else 2)")
    p.add_argument("--source", type=Path, metavar="DIR", help="real data: glue/MRPC and tokenizers/bert, for finetuning")
    p.add_argument("--out", type=Path, default=Path("out/benchmark"), metavar="DIR", help="default: out/benchmark")
    return p


def options_of(args: argparse.Namespace) -> tuple[Options, list[str]]:
    """(options, one line for each stack that is left out)."""
    from common.launch.launcher import visible_gpus

    problems = []
    for name in args.configs:
        if not Path(name).is_file():
            problems.append(f"{name}: no such config; give a path such as recipes/gpt/configs/gpt2_124m.yaml")
        else:
            families.of_config(name)
    if args.source and not args.source.is_dir():
        problems.append(f"--source {args.source}: no such folder; leave it out to measure pretraining alone")
    processes = args.processes if args.processes is not None else visible_gpus(os.environ) or 2
    problems += [
        f"--{name} {value}: must be at least 1"
        for name, value in (
            ("processes", processes),
            ("rounds", args.rounds),
            *(("micro-batches", number) for number in args.micro_batches),
        )
        if value < 1
    ]
    if args.minutes is not None and not args.minutes > 0:
        problems.append(f"--minutes {args.minutes:g}: must be above 0")
    problem = unusable(args.out)
    if problem:
        problems.append(f"--out {problem}")
    if problems:
        raise BadInput(problems)
    stacks, left_out = installed(args.stacks)
    words = tuple(word for word in sys.argv[1:])
    return Options(
        tuple(Path(name) for name in args.configs), stacks, tuple(args.layouts), processes, args.rounds,
        tuple(args.micro_batches), args.source, args.out, without_out(words),
    ), left_out  # fmt: skip


def without_out(words: Sequence[str]) -> tuple[str, ...]:
    """The words of a command without --out DIR, --minutes N, --all and --keep: what decides the figures."""
    kept, skip = [], False
    for word in words:
        if word in ("--all", "--keep"):
            continue
        if not skip and not word.startswith(("--out=", "--minutes=")):
            skip = word in ("--out", "--minutes")
            kept += [] if skip else [word]
        else:
            skip = False
    return tuple(kept)


def installed(stacks: Sequence[str]) -> tuple[tuple[str, ...], list[str]]:
    """(the stacks that can be run, one line for each that cannot)."""
    there, left_out = [], []
    recipes = {stack for family in families.names() for stack in families.stacks(family)}
    for stack in stacks:
        package = PACKAGES[stack]
        if stack not in recipes:
            left_out.append(f"{stack}: left out: no recipe has it")
        elif importlib.util.find_spec(package.partition(".")[0]) is None:
            left_out.append(f"{stack}: left out: {package} is not installed; bash scripts/setup.sh installs it")
        else:
            there.append(stack)
    if not there:
        raise BadInput([*left_out, "no stack is left to measure"])
    return tuple(there), left_out


def begin(options: Options, left_out: list[str]) -> Report:
    from common.checkpoints import run_record
    from scripts.compare import machine

    options.out.mkdir(parents=True, exist_ok=True)
    hardware = machine().partition(", ")[2]
    versions = {name: version for name, version in run_record.versions().items() if version}
    left_out = [
        *left_out,
        *(["GPUs: this machine has none; figures of GPUs are predicted, counted or cited"] * ("no GPU" in hardware)),
    ]
    return Report(
        options.command, datetime.date.today().isoformat(), run_record.commit(), hardware, versions, left_out=list(left_out)
    )


# ---- the parts -------------------------------------------------------------------------------------------------------


def run(chosen: Sequence[Task], options: Options, report: Report, limit: float | None, keep: bool = False) -> None:
    """Run the parts in their order, and add their figures to the report. A part that is there is not run again, with `keep`
    neither if another commit has measured it."""
    (options.out / "parts").mkdir(exist_ok=True)
    request = {"words": list(part_words(options)), "commit": report.commit, "hardware": report.hardware}
    parts = {task.name: kept(options, task, request, keep) for task in chosen}
    commits: dict[str, list[str]] = {}
    begin, spent, planned = time.monotonic(), 1.0, 1.0  # seconds; spent / planned: this machine beside the one of the estimates
    for number, task in enumerate(chosen, 1):
        part, head = parts[task.name], f"[{number}/{len(chosen)}] {task.name}"
        expected = task.seconds * spent / planned
        if part is not None:
            print(f"{head}: kept from before", flush=True)
        elif limit is not None and time.monotonic() - begin + expected > 60 * limit:
            print(f"{head}: left out", flush=True)
            part = {"figures": [], "left_out": f"needs about {minutes(expected)}, more than --minutes {limit:g} leaves"}
        else:
            left = sum(later.seconds for later in chosen[number - 1 :] if parts[later.name] is None) * spent / planned
            print(f"{head}: about {minutes(expected)}; {minutes(left)} left in all", flush=True)
            begin_part = time.monotonic()
            part = run_task(task, options) | {"request": request}
            write_json(options.out / "parts" / f"{task.name}.json", part)
            took = time.monotonic() - begin_part
            spent, planned = spent + took, planned + task.seconds
            print(f"  {part['left_out'] or f'{len(part["figures"])} figures'}, {minutes(took)}", flush=True)
        commits.setdefault(part.get("request", request)["commit"], []).append(task.name)
        report.figures += figures_from_json(part["figures"])
        report.left_out += [f"{task.name}: left out: {part['left_out']}"] if part["left_out"] else []
    report.commit = of_parts(commits)


def of_parts(commits: dict[str, list[str]]) -> str:
    """{commit: its parts} -> 'a1b2', or 'a1b2; part ecosystem, claims at c3d4' if not all parts are of one."""
    first, *others = sorted(commits, key=lambda commit: -len(commits[commit]))
    return "; ".join([first, *(f"part {', '.join(commits[commit])} at {commit}" for commit in others)])


def part_words(options: Options) -> tuple[str, ...]:
    """The words that decide the figures of one part: not which other parts were asked for."""
    words, skip = [], False
    for word in options.words:
        skip = word == "--parts" or (skip and not word.startswith("--"))
        words += [] if skip else [word]
    return tuple(words)


def kept(options: Options, task: Task, request: dict[str, Any], any_commit: bool) -> dict[str, Any] | None:
    """The figures of a part that was run before, by the same command at the same commit on the same machine."""
    part = read_object(options.out / "parts" / f"{task.name}.json")
    if not part or part["left_out"]:
        return None
    wanted = request | ({"commit": part["request"]["commit"]} if any_commit else {})
    return part if part["request"] == wanted else None


def run_task(task: Task, options: Options) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="benchmark_") as folder:
        try:
            figures = task.run(options, Path(folder))
        except BadInput as error:
            return {"figures": [], "left_out": "; ".join(error.problems)}
    return {"figures": [asdict(figure) for figure in figures], "left_out": ""}


def minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


# ---- the report ------------------------------------------------------------------------------------------------------


def in_order(figures: Sequence[Figure]) -> list[Figure]:
    """The answers first, then what they rest on; within a section as they came."""
    return sorted(figures, key=lambda figure: ORDER.index(figure.section.partition(" / ")[0]))


def read_report(folder: Path) -> Report:
    values = read_object(folder / "report.json")
    if values is None:
        raise BadInput(f"--redraw: {folder}/report.json is not there or cannot be read; run the command without --redraw first")
    report = Report.from_json(values)
    report.figures = [figure for figure in report.figures if not figure.section.startswith("Verdict")]
    return report


def finish(report: Report, folder: Path, with_all: bool = False) -> None:
    """Write report.json, report.md, report.html and the pictures into the folder; print the answers, or all tables."""
    from common.comparison import render

    report.figures = in_order([*report.figures, *verdict.figures(report.figures)])
    write_json(folder / "report.json", report.to_json())
    drawn = render.draw(pictures(), report, folder)
    (folder / "report.md").write_text(render.markdown(report, drawn), encoding="utf-8")
    (folder / "report.html").write_text(render.html(report, drawn), encoding="utf-8")
    columns = shutil.get_terminal_size((80, 24)).columns if sys.stdout.isatty() else 80
    print(render.terminal(report, columns, () if with_all else ORDER[:2]))
    print(f"{folder}/report.html, report.md, report.json: {len(report.figures)} figures, {len(drawn)} pictures")


if __name__ == "__main__":
    exit_cleanly(main)
