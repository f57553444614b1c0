"""Compare runs: do they have one loss curve, and what did each cost? Prints a table; --out writes table.md and curves.png.

python -m scripts.compare RUN RUN... [--out DIR] [--no-export] [--json]

Each RUN is an OUT folder of pretrain.sh. The other runs are compared with the first. Columns:

largest difference   the largest difference of the training loss at any step that both runs have
validation loss      the run's own validation loss after its last step
export's loss        the loss of OUT/hf on the same text, by plain transformers in one process (scripts/heldout.py)
tokens/s             the median over the steps after the first tenth; x: its ratio to that of the first run
peak memory          of the first process: resident set on a CPU, PyTorch's allocator on a GPU
"""

import datetime
import json
import statistics
import sys
import textwrap
from pathlib import Path
from typing import Any, NamedTuple

from common import config, screen
from common.checkpoints import checkpoint, run_record
from common.command_line import Parser
from common.comparison.layouts import name_of
from common.config import STACKS
from common.errors import BadInput, exit_cleanly
from common.preflight import task_module, unusable
from common.screen import count
from common.yaml_files import read_yaml
from scripts import heldout, plot
from scripts.check import read_json, read_lines

COLUMNS = ("run", "stack and layout", "steps", "largest difference", "validation loss", "export's loss",
           "tokens/s", "x", "peak memory")  # fmt: skip
ON_SCREEN = (*COLUMNS[:4], "valid. loss", "export loss", "tokens/s", "x", "peak GiB")
BEGINNING, LOSS = 20, 1e-5  # the bound of the tests: steps, and nats
MEASURABLE = 100  # steps whose speed is worth a look
WARM_UP = 0.1  # of a run's steps, left out of its speed


class Summary(NamedTuple):
    name: str
    layout: str
    steps: int
    losses: dict[int, float]  # step -> training loss
    valid: float | None  # after the last step
    export: float | None
    tokens_per_s: float
    memory: int  # bytes
    hyperparameters: dict[str, Any]
    info: dict[str, Any]  # content of run.json


def main() -> None:
    parser = Parser(prog="python -m scripts.compare", description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN")
    parser.add_argument("--out", metavar="DIR", help="folder for table.md and curves.png; created if needed")
    parser.add_argument("--no-export", action="store_true", help="do not evaluate the exports")
    parser.add_argument("--json", action="store_true", help="print numbers and notes as JSON in place of the table")
    args = parser.parse_args()
    out = Path(args.out) if args.out else None
    problem = out and unusable(out)
    if problem:
        raise BadInput(f"--out {out}: {problem}; give another folder")
    paths = plot.labels(args.runs)
    if len(paths) < 2:
        raise BadInput("give at least two different runs to compare")
    runs, problems = [], []
    for name, path in paths.items():
        try:
            runs.append(summary(name, path, not args.no_export))
        except BadInput as error:
            problems += error.problems
    if problems:
        raise BadInput(problems)
    rows, notes = [row(run, runs[0]) for run in runs], footnotes(runs)
    if args.json:
        print(json.dumps({"runs": [as_json(run, runs[0]) for run in runs], "notes": notes}, indent=1))
    else:
        print(screen.table(ON_SCREEN, on_screen(rows, notes), words={0, 1, 3}))
        print("\n".join(textwrap.fill(note, max(40, screen.width()), break_on_hyphens=False) for note in ["", *notes]))
    if out:
        out.mkdir(parents=True, exist_ok=True)
        plot.draw(paths, out / "curves.png")
        (out / "table.md").write_text(markdown(rows, notes), encoding="utf-8")
        print(f"{out / 'table.md'}  {out / 'curves.png'}", file=sys.stderr if args.json else sys.stdout)


def summary(name: str, run: Path, with_export: bool) -> Summary:
    info = read_json(run / "run.json")
    if not isinstance(info, dict) or info.get("stack") not in STACKS or not isinstance(info.get("family"), str):
        raise BadInput(f"{run / 'run.json'}: must hold family and stack (one of {', '.join(STACKS)})")
    values = read_yaml(run / "config.yaml")
    cfg = config.load(run / "config.yaml", [], task_module(info["family"], values).Config, recorded=True)
    lines = read_lines(run / "metrics.jsonl")
    steps = [line for line in lines if "loss" in line]
    if not steps:
        raise BadInput(f"{run / 'metrics.jsonl'}: holds no step yet")
    if not all(
        isinstance(line.get(key), int | float) and not abs(line[key]) > 1e300
        for line in steps
        for key in ("tokens_per_s", "mem_bytes")
    ):
        raise BadInput(f"{run / 'metrics.jsonl'}: has a line of training without tokens_per_s or mem_bytes")
    valid = {line["step"]: line["valid_loss"] for line in lines if "valid_loss" in line}
    last = steps[-1]["step"]
    exported = "task" not in values and cfg.data.valid and (run / "hf" / "config.json").is_file()
    export = heldout.evaluate(run)[0] if with_export and exported else None
    warm = steps[int(len(steps) * WARM_UP) :]
    return Summary(
        name=name, layout=layout_of(run, cfg, info["stack"]), steps=last,
        losses={line["step"]: line["loss"] for line in steps}, valid=valid.get(last), export=export,
        tokens_per_s=statistics.median(line["tokens_per_s"] for line in warm),
        memory=max(line["mem_bytes"] for line in steps), hyperparameters=config.hyperparameters(cfg), info=info,
    )  # fmt: skip


def layout_of(run: Path, cfg: config.Config, stack: str) -> str:
    """'megatron tp=2 sp dist-opt, 2 processes'; of a run that was continued on another stack 'deepspeed, then megatron ...'"""
    stacks = (read_json(run / "run.json") or {}).get("stacks") or [stack]
    name = " then ".join([*map(str, stacks[:-1]), name_of(cfg, stack)])
    saved = checkpoint.latest(run)
    if saved is None or "layout" not in saved.meta:  # a checkpoint that was imported has no layout
        return name
    world = saved.meta["layout"]["world"]
    return f"{name}, {world} process{'es' if world > 1 else ''}"


def difference(run: Summary, first: Summary) -> tuple[float, int] | None:
    """The largest difference of the loss, and its step; None if the runs have no step in common."""
    common = run.losses.keys() & first.losses.keys()
    return max(((abs(run.losses[s] - first.losses[s]), s) for s in common), default=None)


def row(run: Summary, first: Summary) -> list[str]:
    largest = difference(run, first)
    return [
        run.name, run.layout, f"{run.steps:,}",
        "-" if run is first or largest is None else f"{largest[0]:.1e} at step {largest[1]:,}" if largest[0] else "0",
        "-" if run.valid is None else f"{run.valid:.5f}", "-" if run.export is None else f"{run.export:.5f}",
        count(run.tokens_per_s), f"{run.tokens_per_s / first.tokens_per_s:.2f}", f"{run.memory / 2**30:.2f} GiB",
    ]  # fmt: skip


def on_screen(rows: list[list[str]], notes: list[str]) -> list[list[str]]:
    """Shorter cells: the unit stands in the head, and a number of processes that all runs have becomes a note."""
    layouts = [row[1].rpartition(", ") for row in rows]
    is_shared = len({processes for _, _, processes in layouts}) == 1 and all(name for name, _, _ in layouts)
    if is_shared:
        notes.insert(0, f"{layouts[0][2]} each.")
    return [
        [row[0], layout[0] if is_shared else row[1], *row[2:-1], row[-1].removesuffix(" GiB")]
        for row, layout in zip(rows, layouts, strict=True)
    ]


def as_json(run: Summary, first: Summary) -> dict[str, Any]:
    """The row of a run as numbers: losses in nats, memory in bytes."""
    largest = None if run is first else difference(run, first)
    return {
        "run": run.name, "layout": run.layout, "steps": run.steps,
        "largest_difference": largest and {"value": largest[0], "step": largest[1]},
        "validation_loss": run.valid, "export_loss": run.export, "tokens_per_s": run.tokens_per_s,
        "tokens_per_s_ratio": run.tokens_per_s / first.tokens_per_s, "peak_memory_bytes": run.memory,
    }  # fmt: skip


def footnotes(runs: list[Summary]) -> list[str]:
    """The notes below the table: which runs are not comparable, then machine, versions and commits."""
    notes, first = [], runs[0]
    for run in runs[1:]:
        differ = [key for key in first.hyperparameters if first.hyperparameters[key] != run.hyperparameters.get(key)]
        if run.info.get("data") != first.info.get("data"):
            differ.append("the content of data")
        if differ:
            notes.append(f"Another experiment: {run.name} differs from {first.name} in {', '.join(differ)}.")
    if not notes and (note := start_of_curves(runs)):
        notes.append(note)
    if min(run.steps for run in runs) < MEASURABLE:
        notes.append(f"The speed of fewer than {MEASURABLE} steps says little.")
    for run in runs:
        if run.valid is not None and run.export is not None and abs(run.valid - run.export) > 1e-3:
            notes.append(f"The export of {run.name} does not reach the validation loss of its run.")
    versions = first.info.get("versions")
    versions = {k: v for k, v in versions.items() if v} if isinstance(versions, dict) else {}
    version_list = ", ".join(f"{name} {version}" for name, version in versions.items())
    commits = dict.fromkeys(str(run.info.get("commit")) for run in runs)
    notes.append(f"{plot.made_on([run.info for run in runs]) or machine()}. {version_list}. Commit {', '.join(commits)}.")
    return notes


def start_of_curves(runs: list[Summary]) -> str:
    """Whether the losses of the first 20 steps, before rounding differences grow, differ by more than rounding does. "" for
    runs in bf16 or with dropout, which differ by more."""
    first, values = runs[0], runs[0].hyperparameters
    steps = [step for step in range(1, BEGINNING + 1) if all(step in run.losses for run in runs)]
    if not steps or values.get("train.dtype") != "fp32" or values.get("model.dropout"):
        return ""
    largest = max(abs(run.losses[step] - first.losses[step]) for run in runs for step in steps)
    if not largest:
        return f"Up to step {steps[-1]} the losses are equal, as those of the same layout are."
    judged = "as rounding does" if largest <= LOSS else f"more than rounding does, up to {LOSS:.0e}"
    return f"Up to step {steps[-1]} the losses differ by at most {largest:.1e}, {judged} (docs/loss_differences.md)."


def machine() -> str:
    """The date, and the machine that compares: its GPUs, else its processor and cores."""
    return f"{datetime.date.today().isoformat()}, {run_record.hardware()}"


def markdown(rows: list[list[str]], notes: list[str]) -> str:
    lines = [COLUMNS, ["---"] * len(COLUMNS), *rows]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    return table + "\n\n" + "\n\n".join(notes) + "\n"


if __name__ == "__main__":
    exit_cleanly(main)
