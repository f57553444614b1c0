"""How evenly the ranks of a run are loaded: the stages of a pipeline, and the copies of a model in data parallelism.

`balance_pipelines` trains a small GPT on as many pipeline stages as there are processes, and `balance_ranks` on as many copies,
with the recipes' own scripts. passes.py notes when each pass begins and ends, and timeline.py says what that means.
"""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from common import families
from common.comparison import layouts, padding, timeline
from common.comparison.figures import Figure, Kind, Options, Picture, Task
from common.comparison.timeline import Step
from common.comparison.timeline_picture import PIPELINES, TIMELINE, draw
from common.errors import BadInput
from common.launch.launcher import visible_gpus
from common.paths import ROOT
from common.preflight import prepare, task_module
from common.stacks import pipeline, stages
from common.yaml_files import read_yaml

WARMUP, STEPS = 2, 8  # steps of each run; the first ones do not count
SLOW_COPY, SLOW_STAGE = 1.3, 1.6  # times as long as the others; the work of a stage is known by its FLOPs alone
HEAD_LAYERS = 2  # the output of the small GPT takes as long as so many of its layers

STAGES, RANKS, SLOW = "Load balance / Stages", "Load balance / Data-parallel ranks", "Load balance / Slow ranks"


class Case(NamedTuple):
    """A layout to run."""

    name: str
    run: tuple[str, str, list[str]]  # module, config, overrides
    work: list[float]  # of each rank, in FLOPs per sample
    micro_batches: int
    chunks: int = 1


class Cell(NamedTuple):
    """A figure, without what all figures of a task share."""

    section: str
    subject: str
    metric: str
    values: Sequence[float] | str  # of each step
    unit: str = ""
    kind: Kind = "measured"


# ---- the model and its layouts


def small_gpt(processes: int, folder: Path) -> tuple[str, list[str]]:
    """(config, overrides) of a GPT whose last stage is heavy: its output takes as long as HEAD_LAYERS of its layers, and its
    embedding, of as many parameters, no time. On GPUs it is larger, so that kernels take longer than their launch."""
    corpus = folder / "corpus"
    command = [sys.executable, "-m", "data.python_docs", str(corpus), "--vocab-size", "512", "--max-mb", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise BadInput(f"{' '.join(command)}: ended with code {done.returncode}: {done.stderr.strip()[-300:]}")
    hidden, tokens = (1024, 1024) if visible_gpus(os.environ) else (128, 128)
    vocab = (12 * hidden + 2 * tokens) * HEAD_LAYERS  # a layer has 2 x 12 hidden^2 + 4 x hidden x tokens FLOPs per token
    return str(ROOT / "recipes/gpt/configs/tiny.yaml"), [
        f"model.layers={4 * processes}", f"model.hidden={hidden}", f"model.heads={hidden // 32}", f"data.seq_len={tokens}",
        f"model.vocab_size={vocab}", f"data.train={corpus / 'train'}",
    ]  # fmt: skip


def model_of(options: Options, folder: Path) -> tuple[str, list[str], bool]:
    """(config, overrides, whether it is the small GPT): the first config for pretraining that was asked for, else the GPT."""
    if not options.configs:
        return *small_gpt(options.processes, folder), True
    for path in options.configs:
        if "task" not in read_yaml(path):
            return str(path), [], False
    raise BadInput("the load balance is measured in pretraining, and all of the configs are for finetuning")


def stacks_of(config: str, options: Options) -> set[str]:
    """Those that were asked for and that the recipe has."""
    return set(options.stacks) & set(families.stacks(families.of_config(config)))


def balanced(layers: int, last: float, parts: int) -> list[int]:
    """Layers of each of `parts` stages, the last of which also has the work of `last` layers: as equal as they can be."""
    ends = [min(layers, round(part * (layers + last) / parts)) for part in range(parts)]
    return [end - begin for begin, end in pairwise([*ends, layers])]


def pipelines(layers: int, last: float, p: int) -> list[tuple[str, dict[str, str]]]:
    """(stack, its keys): the pipelines of p stages that are compared by default, as the stacks divide layers, and balanced."""
    counts = balanced(layers, last, p)
    chunks = [*(count - count // 2 for count in counts), *(count // 2 for count in counts)]

    def string(counts: Sequence[int]) -> str:
        return "E" + "|".join(f"t*{count}" for count in counts) + "L"

    return [
        ("deepspeed", {"partition": "parameters"}),
        ("deepspeed", {"partition": "uniform"}),
        ("deepspeed", {"partition": str(counts).replace(" ", "")}),
        ("megatron", {}),
        ("megatron", {"pipeline_layout": string(counts)}),
        ("megatron", {"vpp": "2"}),
        ("megatron", {"vpp": "2", "pipeline_layout": string(chunks)}),
    ]


def asked(options: Options) -> list[tuple[str, dict[str, str]]]:
    """(stack, its keys) of --layouts, such as deepspeed:partition=[5,3]. A value may hold commas between brackets."""
    found = []
    for word in options.layouts:
        stack, _, rest = word.partition(":")
        keys = [key.partition("=") for key in _parts(rest)]
        found.append((stack, {key: value for key, _, value in keys}))
    return found


def _parts(text: str) -> list[str]:
    parts = text.split(",") if text else []
    joined: list[str] = []
    for part in parts:
        if joined and joined[-1].count("[") > joined[-1].count("]"):
            joined[-1] += f",{part}"
        else:
            joined.append(part)
    return joined


def case_of(config: str, overrides: Sequence[str], stack: str, keys: dict[str, str], processes: int, folder: Path) -> Case:
    """A layout, whose name says the layers of each stage. BadInput if the recipe refuses it."""
    family = families.of_config(config)
    words = [
        *overrides, *(f"{stack}.{key}={value}" for key, value in keys.items()), f"train.steps={WARMUP + STEPS}", "phases=null",
        "train.save_every=0", "data.valid=null",
    ]  # fmt: skip
    run = prepare(config, str(folder / "unused"), words, stack, task_module(family, read_yaml(config)), processes)
    system, model = getattr(run.cfg, stack), run.cfg.model
    workload, p = model.workload(run.cfg.data), run.layout.pp
    head = 6.0 * (workload.vocab * workload.hidden + workload.head_matrices) * workload.logit_tokens
    of_layer = (workload.flops() - head) / workload.layers
    if p == 1:
        counts = [workload.layers]
    elif stack == "megatron":
        counts = pipeline.stage_layers(model.layers, system)
    else:
        counts = list(stages.transformer_layers(system.partition, workload.sizes(model.parameter_count()), p))
    work = [count * of_layer for count in counts]
    work[-1] += head
    chunks = getattr(system, "vpp", 1)
    shown = [stack, *([f"vpp={chunks}"] if chunks > 1 else []), *(["+".join(map(str, counts))] if p > 1 else [])]
    shown += [f"{key}={value}" for key, value in keys.items() if key not in ("pp", "vpp", "partition", "pipeline_layout")]
    arguments = (f"recipes.{family}.{stack}.pretrain", config, words)
    return Case(" ".join(shown), arguments, work, run.layout.accumulate, chunks)


# ---- the runs


def measure(cases: Sequence[Case], options: Options, folder: Path) -> dict[str, list[Step]]:
    """The counted steps of each case, which is run `options.rounds` times in turn, in one process group."""
    write_runs([case for _ in range(options.rounds) for case in cases], folder)
    torchrun(options.processes, folder)
    return steps_of(folder, [case.name for case in cases], options.processes)


def write_runs(cases: Sequence[Case], folder: Path) -> None:
    runs = [[*case.run[:2], str(folder / f"run_{number}"), case.run[2]] for number, case in enumerate(cases)]
    (folder / "runs.json").write_text(json.dumps(runs), encoding="utf-8")


def torchrun(processes: int, folder: Path) -> None:
    log, problems = folder / "ranks.log", folder / "problems.json"
    code = layouts.torchrun(processes, ["-m", "common.comparison.passes", str(folder)], log)
    if problems.exists():
        raise BadInput(json.loads(problems.read_text(encoding="utf-8")))
    if code:
        text = log.read_text(encoding="utf-8", errors="replace")
        raise RuntimeError(f"the ranks of the measurement ended with code {code}:\n{text[-3000:]}")


def steps_of(folder: Path, names: Sequence[str], processes: int) -> dict[str, list[Step]]:
    """Read what passes.py wrote: the steps of each case over all rounds, without the first ones of each run."""
    ranks = []
    for rank in range(processes):
        text = (folder / f"rank_{rank}.jsonl").read_text(encoding="utf-8")
        ranks.append([json.loads(line) for line in text.splitlines()])
    found: dict[str, list[Step]] = {name: [] for name in names}
    for number, lines in enumerate(zip(*ranks, strict=True)):
        found[names[number % len(names)]] += list(timeline.steps_of(lines))[WARMUP:]
    return found


# ---- the figures


def figures_of(cells: Iterable[Cell], source: str) -> list[Figure]:
    """The median of each cell's values, with its quartiles."""
    found = []
    for cell in cells:
        spread = None
        if isinstance(cell.values, str):
            value: Any = cell.values
        else:
            value = statistics.median(cell.values)
            if len(cell.values) > 1 and cell.kind == "measured":
                low, _, high = statistics.quantiles(cell.values, n=4, method="inclusive")
                spread = (low, high)
        found.append(Figure(cell.section, cell.subject, cell.metric, value, cell.unit, cell.kind, source, spread))
    return found


def command_of(options: Options, part: str) -> str:
    """The command that yields the figures of one task again."""
    words = [*map(str, options.configs), "--parts", part, *(["--layouts", *options.layouts] if options.layouts else [])]
    words += ["--micro-batches", *map(str, options.micro_batches)] if options.micro_batches else []
    return " ".join(["python -m scripts.benchmark", *words])


def pipeline_cells(case: Case, steps: Sequence[Step]) -> list[Cell]:
    """The row of a pipeline, those of its stages, and the boxes of the step whose duration is the median."""
    p = len(case.work)
    seen = [timeline.bubble(step) for step in steps]
    shares = [timeline.shares(step) for step in steps]
    equal = timeline.bubble_of_equal_stages(p, case.micro_batches, case.chunks)
    predicted = timeline.bubble(timeline.simulated(timeline.order_of(steps[0]), timeline.median_seconds(steps)))
    exchanges = [
        sum(share.exchange for share in step_shares) / (p * (end - begin))
        for step_shares, (begin, end) in zip(shares, map(timeline.window, steps), strict=True)
    ]
    cells = [
        Cell(PIPELINES, case.name, "slowest stage / mean", [timeline.imbalance(step) for step in steps]),
        Cell(PIPELINES, case.name, "bubble", [100 * value for value in seen], "%"),
        Cell(PIPELINES, case.name, "of it exchanges", [100 * value for value in exchanges], "%"),
        Cell(PIPELINES, case.name, "bubble of equal stages", [100 * equal], "%", "predicted"),
        Cell(PIPELINES, case.name, "bubble of these stages", [100 * predicted], "%", "predicted"),
        Cell(PIPELINES, case.name, "seen - predicted", [100 * (value - predicted) for value in seen], "points"),
    ]
    for stage in range(p):
        for name in timeline.Share._fields:
            values = [1e3 * getattr(share[stage], name) for share in shares]
            cells.append(Cell(STAGES, f"{case.name}, stage {stage}", name, values, "ms"))
    slow = timeline.slow_ranks(steps, case.work, SLOW_STAGE)
    cells.append(Cell(SLOW, case.name, "slow ranks", "; ".join(map(str, slow)) or "none"))
    durations = [end - begin for begin, end in map(timeline.window, steps)]
    middle = min(range(len(steps)), key=lambda i: abs(durations[i] - statistics.median(durations)))
    return cells + box_cells(case, steps[middle])


def box_cells(case: Case, step: Step) -> list[Cell]:
    """Begin and end of each pass and exchange, from the first forward pass on."""
    begin, _ = timeline.window(step)
    cells = []
    for stage, (spans, sent) in enumerate(zip(step, timeline.exchanges(step), strict=True)):
        names = [(span, f"{span.kind} {span.micro + 1}", span.chunk) for span in timeline.passes(spans)]
        names += [(span, f"exchange {number + 1}", 0) for number, span in enumerate(sent)]
        for span, name, chunk in names:
            of_chunk = f"chunk {chunk + 1}, " if case.chunks > 1 and span.kind in timeline.PASSES else ""
            subject = f"stage {stage}, {of_chunk}{name}"
            for metric, time in (("begin", span.begin), ("end", span.end)):
                cells.append(Cell(TIMELINE + case.name, subject, metric, [1e3 * (time - begin)], "ms"))
    return cells


def copy_cells(case: Case, steps: Sequence[Step]) -> list[Cell]:
    """The rows of the ranks of a data-parallel run."""
    ranks, cells = len(steps[0]), []
    for rank in range(ranks):
        own = [timeline.compute_seconds(step[rank]) for step in steps]
        waits = [timeline.waits(step)[rank] for step in steps]
        mean = [statistics.mean(map(timeline.compute_seconds, step)) for step in steps]
        name = f"{case.name}, rank {rank}"
        cells += [
            Cell(RANKS, name, "forward and backward", [1e3 * seconds for seconds in own], "ms"),
            Cell(RANKS, name, "waits for others", [1e3 * seconds for seconds in waits], "ms"),
            Cell(RANKS, name, "to the mean", [a / b for a, b in zip(own, mean, strict=True)]),
        ]
    slow = timeline.slow_ranks(steps, [1.0] * ranks, SLOW_COPY)
    return [*cells, Cell(SLOW, f"{case.name} dp={ranks}", "slow ranks", "; ".join(map(str, slow)) or "none")]


# ---- the tasks


def balance_pipelines(options: Options, folder: Path) -> list[Figure]:
    p = options.processes
    if p < 2:
        raise BadInput(f"{p} process: a pipeline needs two or more; there is no bubble with one stage")
    config, overrides, is_small = model_of(options, folder)
    layers = 4 * p
    if is_small:
        overrides += ["deepspeed.micro_batch=4", "megatron.micro_batch=4"]
        chosen = pipelines(layers, HEAD_LAYERS, p)
    else:
        chosen = [("deepspeed", {}), ("megatron", {})]
    chosen = [(stack, keys) for stack, keys in asked(options) or chosen if stack in stacks_of(config, options) - {"baseline"}]
    cases: dict[str, Case] = {}
    for batch in batches(options, is_small, p):
        for stack, keys in chosen:
            case = case_of(config, [*overrides, *batch], stack, {"pp": str(p)} | keys, p, folder)
            if len(options.micro_batches) > 1:
                case = case._replace(name=f"{case.name} m={case.micro_batches}")
            if len(case.work) == p:  # else a layout of --layouts that has other ranks beside its stages
                cases.setdefault(case.name, case)  # deepspeed's two ways to divide layers may agree
    if not cases:
        raise BadInput(f"none of the layouts is a pipeline of {p} stages on {p} processes")
    steps = measure(list(cases.values()), options, folder)
    cells = [cell for name, case in cases.items() for cell in pipeline_cells(case, steps[name])]
    return figures_of(cells, command_of(options, "balance_pipelines"))


def batches(options: Options, is_small: bool, p: int) -> list[list[str]]:
    """Overrides that give a step each of the micro batches of --micro-batches; the small GPT's have four samples."""
    if is_small:
        return [[f"train.global_batch={4 * number}"] for number in options.micro_batches or (4 * p,)]
    if options.micro_batches:
        raise BadInput("--micro-batches: is of the small GPT; give a config train.global_batch and micro_batch")
    return [[]]


def balance_ranks(options: Options, folder: Path) -> list[Figure]:
    p = options.processes
    if p < 2:
        raise BadInput(f"{p} process: no rank waits for another one")
    config, overrides, is_small = model_of(options, folder)
    if is_small:
        overrides += [f"train.global_batch={16 * p}", *(f"{stack}.micro_batch=8" for stack in options.stacks)]
    own = stacks_of(config, options)
    cases = [case_of(config, overrides, stack, {}, p, folder) for stack in options.stacks if stack in own]
    cases = [case for case in cases if len(case.work) == 1]
    steps = measure(cases, options, folder)
    cells = [cell for case in cases for cell in copy_cells(case, steps[case.name])]
    return figures_of(cells, command_of(options, "balance_ranks"))


TASKS = (
    Task("balance_pipelines", "Load balance", 120, balance_pipelines),
    Task("balance_ranks", "Load balance", 50, balance_ranks),
    Task("balance_data", "Load balance", 60, padding.balance_data),
)

PICTURES = tuple(
    Picture(
        f"timeline_{name}",
        PIPELINES,
        f"A step of {what.partition(',')[0]}",
        "a small GPT on 2 stages, measured on {hardware}",
        f"{what}: the step of median duration, by the clock on each stage.",
        partial(draw, own),
    )  # fmt: skip
    for name, what, own in (
        ("deepspeed", "DeepSpeed's pipeline", "deepspeed "),
        ("megatron_1f1b", "Megatron's 1F1B", "megatron (?!vpp=)"),
        (
            "megatron_interleaved",
            "Megatron's interleaved 1F1B, the chunks of a stage below each other",
            "megatron vpp=",
        ),
    )
)
