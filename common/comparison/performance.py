"""What the layouts of a family cost: speed, MFU, start, saving and memory, once their curves are found to be one.

Each table is one torchrun that runs the recipes' own scripts layout by layout, in rounds (A B C A B C). Ratios pair the same
step of the same round, so that the machine's drift affects both alike.
"""

import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from common import config as configs, families
from common.comparison import alternatives, layouts as cases_module, measuring, planned, small, starts
from common.comparison.figures import Figure, Kind, Options, Task, Value
from common.comparison.layouts import Case, Layout
from common.comparison.measuring import Record
from common.comparison.performance_pictures import PICTURES as PICTURES
from common.errors import BadInput
from common.planning import flops, memory
from common.preflight import prepare, task_module
from common.yaml_files import read_yaml

LABELS = {"gpt": "GPT", "bert": "BERT", "t5": "T5"}
# The vocabulary is small because the alternatives, such as transformers.Trainer, clip by torch's norm of the gradients, which
# on a CPU is too low for large tensors (common/training/optim.py). A step takes 50 ms or more. On a GPU the model fills it.
ON_CPU = small.Shape(layers=4, hidden=192, heads=4, seq_len=128, batch=8, micro_batch=2, vocab=768)
MRPC_IDS = 2048  # its input embedding alone has gradients, which are smaller
FINETUNED = (
    "baseline", "baseline:shard=full", "deepspeed:zero_stage=1", "deepspeed:zero_stage=2", "deepspeed:zero_stage=3",
    "megatron:distributed_optimizer=true", "megatron:distributed_optimizer=false,tp=2",
)  # fmt: skip
IDS = 640  # of the tokenizer, without T5's 100 sentinels
ON_GPU = small.Shape(layers=12, hidden=1024, heads=16, seq_len=512, batch=64, micro_batch=8, vocab=32_128)
WARMUP = 2  # steps of a run whose seconds do not count
STEPS = {"cpu": 7, "cuda": 20}  # of a run
# Within these steps they tell a wrong update from a right one: weight decay on the norms changes the gradients' norm by more
# than the level from the third step on (tests/test_benchmark_performance.py). eps: with 1e-8, Adam takes a full step for a
# gradient that is only rounding error, which grows in a comparison.
TELLING = ("optim.lr=1e-3", "optim.eps=1e-5", "optim.warmup_steps=2", "optim.weight_decay=0.1")
IN_BF16 = ("train.dtype=bf16", "optim.lr=1e-4", "optim.warmup_steps=2")  # the level for bf16 is wide
MB = 1e6


class Work(NamedTuple):
    """What one table measures."""

    label: str  # GPT
    config: Path
    overrides: list[str]


# ---- what is measured ------------------------------------------------------------------------------------------------


def pretraining(family: str, options: Options, folder: Path) -> list[Figure]:
    """The figures of the family's configs among those given, or of a small model."""
    given = [path for path in options.configs if families.of_config(path) == family]
    works = [Work(f"{label_of(family)} {path.stem}", path, []) for path in given]
    if not options.configs and family in LABELS:
        small.make_corpus(family, folder / "corpus", IDS)
        shape, more = (ON_GPU, IN_BF16) if small.has_gpu() else (ON_CPU, TELLING)
        overrides = [*small.overrides_of(family, shape, folder / "corpus"), *more]
        works = [Work(label_of(family), small.config_of(family), overrides)]
    if not works:
        raise BadInput(f"no config of recipes/{family} is given")
    return [
        figure
        for number, work in enumerate(works)
        for figure in compared(work, options, f"performance_{family}", folder / str(number))
    ]


def mrpc(options: Options, folder: Path) -> list[Figure]:
    """The figures of finetuning an untrained BERT on MRPC, with the tokenizer of the small corpus."""
    if options.configs:
        raise BadInput("configs are given; without, it finetunes a small BERT")
    data = options.source / "glue/MRPC" if options.source else None
    if data is None or not data.is_dir():
        raise BadInput("--source DIR, a folder that holds glue/MRPC, is not given")
    small.make_corpus("bert", folder / "corpus", MRPC_IDS)
    small.make_bert(folder / "corpus/tokenizer", folder / "bert", ON_CPU)
    overrides = [
        f"init.from={folder / 'bert'}", f"task.data={data.resolve()}", *TELLING,
        "data.seq_len=64", "train.global_batch=16", *(f"{stack}.micro_batch=4" for stack in configs.STACKS),
    ]  # fmt: skip
    work = Work("BERT on MRPC", small.config_of("bert").parent / "finetune_mrpc.yaml", overrides)
    usual = tuple(word for word in FINETUNED if word.partition(":")[0] in options.stacks)
    chosen = replace(options, layouts=options.layouts or usual)
    return compared(work, chosen, "performance_mrpc", folder / "runs", starts=False)


def compared(work: Work, options: Options, part: str, folder: Path, starts: bool = True) -> list[Figure]:
    """Run the layouts, and return the figures of their tables. Disagreement if their curves differ.

    starts: measure the time to the first step too, in new processes.
    """
    path, family = str(work.config.resolve()), families.of_config(work.config)
    steps = STEPS["cuda" if small.has_gpu() else "cpu"]
    overrides = [*work.overrides, *no_dropout(path, work.overrides)]
    cases, left_out = cases_module.cases_of(
        path, overrides, layouts_of(family, options), steps, options.processes, folder, optional=True
    )
    # one step more than is timed: the last one saves, and the run ends before the next
    more = [f"train.steps={steps + 1}", f"train.save_every={steps}"]
    more += [] if "task" in read_yaml(path) else ["data.valid=null"]
    cases = [case._replace(overrides=[*case.overrides, *more]) for case in cases]
    schema = task_module(family, read_yaml(path)).Config
    level = "fp32" if configs.load(path, overrides, schema).train.dtype == "fp32" else "bf16"
    timed = cases if level == "fp32" else cases[1:]  # the first is the reference in fp32
    records = measuring.measure(cases, timed, options.rounds, level, steps, options.processes, folder / "job")
    seconds = first_steps(timed, options.processes, folder / "start") if starts else {}
    return Tables(work, options, part, timed, records, level).figures(seconds, left_out)


def layouts_of(family: str, options: Options) -> list[Layout]:
    """Those of the options; else the usual ones without recomputation and without parallelism over the sequence, and of
    DeepSpeed data parallelism alone."""
    stacks = [stack for stack in families.stacks(family) if stack in options.stacks]
    if options.layouts:
        return cases_module.parsed(options.layouts, stacks)
    usual = cases_module.usual_layouts(stacks, options.processes)

    def is_wanted(layout: Layout) -> bool:
        alone = ("cp", "tp", "pp") if layout.stack == "deepspeed" else ("cp",)
        return layout.values["recompute"] in ("false", configs.written("none")) and all(
            layout.values.get(key, "1") == "1" for key in alone
        )

    return [layout for layout in usual if is_wanted(layout)]


def no_dropout(path: str, overrides: Sequence[str]) -> list[str]:
    """Overrides that turn dropout off: the layouts draw different masks, so that their curves could not be compared."""
    schema = task_module(families.of_config(path), read_yaml(path)).Config
    values = configs.flat(configs.load(path, overrides, schema).dump())
    return [f"{key}=0" for key, value in values.items() if key.endswith("dropout") and value]


def first_steps(cases: Sequence[Case], nproc: int, folder: Path) -> dict[str, float]:
    """Seconds from the start of torchrun to the end of the first step, by case: of the first layout of each stack."""
    seconds = {}
    for case in {case.module: case for case in reversed(cases)}.values():
        alone = case._replace(out=str(folder / stack_of(case)))
        begin = time.time()
        made = measuring.launch(measuring.Job([(0, alone)], alone, "fp32", 1), nproc, folder)
        if made and not made[0].reason:
            seconds[case.name] = made[0].timing.first_at - begin
    return seconds


def label_of(family: str) -> str:
    return LABELS.get(family, family)


# ---- the figures -----------------------------------------------------------------------------------------------------


class Tables:
    """The tables of one comparison: speed, the best of each stack, memory, and the curves."""

    def __init__(
        self, work: Work, options: Options, part: str, cases: Sequence[Case], records: Sequence[Record], level: str
    ):  # fmt: skip
        self.work, self.cases, self.level = work, cases, level
        self.world, self.reference = options.processes, cases[0].name
        self.section = f"Performance / {work.label}"
        self.source = options.command if "--parts" in options.words else f"{options.command} --parts {part}"
        self.records: dict[str, list[Record]] = {case.name: [] for case in cases}
        self.failures = {record.case: record.reason for record in records if record.reason}
        for record in records:
            if record.case in self.records and not record.reason:
                self.records[record.case].append(record)
        self.runs = [case for case in cases if self.records[case.name]]
        self.task: Any = task_module(families.of_config(work.config), read_yaml(str(work.config)))
        path, overrides, stack = cases[0].config, cases[0].overrides, stack_of(cases[0])
        run = prepare(path, f"{cases[0].out}_shapes", overrides, stack, self.task, options.processes)
        self.vocab_size = run.cfg.model.vocab_size  # which a config may leave to the tokenizer

    def figures(self, starts: dict[str, float], left_out: Sequence[str]) -> list[Figure]:
        speed = [figure for case in self.runs for figure in self.speed(case)]
        speed += [
            self.figure("", name, "speed", None, "tokens/s", "measured", source=f"failed: {reason}")
            for name, reason in self.failures.items()
        ]
        for line in left_out:
            name, _, reason = line.partition(": ")
            speed.append(self.figure("", short(name), "speed", None, "tokens/s", "measured", source=f"refused: {reason}"))
        found = [*speed, *self.best(starts), *(f for case in self.runs for f in self.memory(case)), *self.curves()]
        if self.work.label == "GPT":
            found += [figure for case in self.runs for figure in memory_of_1_3b(case)]
        return found

    def figure(
        self, table: str, subject: str, metric: str, value: Value, unit: str, kind: Kind,
        spread: tuple[float, float] | None = None, source: str = "",
    ) -> Figure:  # fmt: skip
        section = f"{self.section}, {table}" if table else self.section
        return Figure(section, subject, metric, value, unit, kind, source or self.source, spread)

    def speed(self, case: Case) -> list[Figure]:
        """The row of a layout."""

        def row(metric: str, value: Value, unit: str, spread: tuple[float, float] | None = None, why: str = "") -> Figure:
            return self.figure("", case.name, metric, value, unit, "measured", spread, why)

        seconds, rates = self.seconds(case.name), self.rates(case.name)
        median, (low, high) = statistics.median(seconds), quartiles(seconds)
        rate = statistics.median(rates)
        ratio, spread = self.ratio(case.name)
        found = [
            row("ratio", ratio, f"of {self.reference}", spread),
            row("speed", rate, "tokens/s", quartiles(rates)),
            row("step", median * 1e3, "ms", (low * 1e3, high * 1e3)),
        ]
        gpu = self.records[case.name][0].gpu
        for kind, per_token in self.flops_per_token(case).items():
            mfu = flops.mfu(per_token, rate, gpu, self.world)
            why = "" if mfu is not None else f"common/planning/flops.py has no published peak of {gpu or 'a CPU'}"
            found.append(row(f"MFU {kind}", None if mfu is None else mfu * 100, "%", why=why))
        step, loss = self.goal()
        found.append(row(f"to loss {loss:.3f}", step * median, "s"))
        saves = [record.timing.after for record in self.records[case.name]]
        found.append(row("save", statistics.median(saves), "s", (min(saves), max(saves))))
        found.append(row("checkpoint", self.records[case.name][0].saved_bytes / MB, "MB"))
        return found

    def best(self, starts: dict[str, float]) -> list[Figure]:
        """The fastest layout of each stack; and how long the stack takes to start."""
        found = []
        for stack in dict.fromkeys(stack_of(case) for case in self.runs):
            own = [case for case in self.runs if stack_of(case) == stack]
            best = max(own, key=lambda case: self.ratio(case.name)[0]).name
            ratio, spread = self.ratio(best)
            rate = statistics.median(self.rates(best))
            start = next((starts[case.name] for case in own if case.name in starts), None)
            row = partial(self.figure, "best", stack, kind="measured")
            found += [
                row("layout", best, ""), row("ratio", ratio, f"of {self.reference}", spread=spread),
                row("speed", rate, "tokens/s"),
            ]  # fmt: skip
            if starts:
                found.append(row("start", start, "s", source="" if start else "its processes failed"))
        return found

    def memory(self, case: Case) -> list[Figure]:
        """Bytes of a rank: states, which are counted, the activations and the peak, which are predicted, and on a GPU the
        measured peak of PyTorch's allocator."""
        cfg = self.config(case)
        try:
            estimate: dict[str, int] = memory.estimate_for(cfg, cfg.model, stack_of(case), self.world)
            why = ""
        except BadInput as error:
            estimate, why = {}, f"common/planning/memory.py: {error.problems[0]}"
        source = why or f"{self.source}; by common/planning/memory.py, of the same run on a GPU (its error: docs/memory.md)"
        kinds: dict[str, Kind] = {part: "counted" for part in memory.PARTS}
        kinds |= {"activations": "predicted", "total": "predicted"}
        found = [
            self.figure("memory", case.name, {"total": "peak"}.get(part, part), estimate[part] / MB if estimate else None,
                        "MB", kind, source=source)
            for part, kind in kinds.items()
        ]  # fmt: skip
        peaks = [record.peak_bytes for record in self.records[case.name] if record.peak_bytes is not None]
        if peaks:
            found.append(self.figure("memory", case.name, "allocator", max(peaks) / MB, "MB", "measured"))
        return found  # on a CPU, a process's resident set is not its tensors' alone

    def curves(self) -> list[Figure]:
        """The largest difference from the reference's curves, and the loss of every step."""
        found = []
        first = self.records[self.reference][0]
        for case in self.runs:
            run = self.records[case.name][0]
            loss, norm = farthest(run.losses, first.losses), farthest(run.norms, first.norms)
            found += [
                self.figure("curves", case.name, "loss off by", loss, "share", "measured"),
                self.figure("curves", case.name, "norm off by", norm, "share", "measured"),
            ]
            found += [
                self.figure("Timeline of the loss", case.name, f"step {step}", loss, "nats", "measured")
                for step, loss in enumerate(run.losses, 1)
            ]
        return found

    # ---- of the records

    def seconds(self, name: str) -> list[float]:
        return [s for record in self.records[name] for s in record.timing.seconds[WARMUP:]]

    def rates(self, name: str) -> list[float]:
        """Tokens per second of each step; when finetuning, steps have unequal numbers of tokens."""
        timings = [record.timing for record in self.records[name]]
        return [t / s for one in timings for t, s in zip(one.tokens[WARMUP:], one.seconds[WARMUP:], strict=True)]

    def ratio(self, name: str) -> tuple[float, tuple[float, float] | None]:
        """Speed of a layout relative to the reference: the median over pairs of the same step of the same round, and what
        nine of ten pairs lie within. No spread for the reference itself."""
        if name == self.reference:
            return 1.0, None
        own = {record.round: record.timing.seconds[WARMUP:] for record in self.records[name]}
        pairs = [
            reference / seconds
            for record in self.records[self.reference] if record.round in own
            for reference, seconds in zip(record.timing.seconds[WARMUP:], own[record.round], strict=True)
        ]  # fmt: skip
        return statistics.median(pairs), middle(pairs, 0.9)

    def goal(self) -> tuple[int, float]:
        """(step, loss): the lowest loss of the reference's curve, which is every layout's."""
        losses = self.records[self.reference][0].losses
        return losses.index(min(losses)) + 1, min(losses)

    def config(self, case: Case) -> Any:
        loaded = configs.load(case.config, case.overrides, self.task.Config)
        return configs.resolve(loaded, self.task.ResolvedConfig, self.vocab_size)

    def flops_per_token(self, case: Case) -> dict[str, float]:
        cfg = self.config(case)
        found: dict[str, float] = self.task.forward_backward_flops(cfg.model, cfg.data)
        return found


def memory_of_1_3b(case: Case) -> list[Figure]:
    """Memory per GPU of a model for which layouts matter: GPT 1.3B on 8 GPUs in the layout of a case and micro batches of two.
    Nothing for a layout whose memory is not estimated."""
    stack, path = stack_of(case), "recipes/gpt/configs/gpt3_1.3b.yaml"
    own = [word for word in case.overrides if word.startswith(f"{stack}.") and ".micro_batch=" not in word]
    try:
        cfg = planned.resolved(path, [*own, f"{stack}.micro_batch=2"])
        estimate = memory.estimate_for(cfg, cfg.model, stack, 8)
    except BadInput:
        return []
    source = f"common/planning/memory.py, of {path} with {' '.join(own)} {stack}.micro_batch=2 (its error: docs/memory.md)"
    kinds: dict[str, Kind] = {part: "counted" for part in memory.PARTS}
    kinds |= {"activations": "predicted", "total": "predicted"}
    section = "Performance / GPT 1.3B on 8 GPUs, memory"
    return [
        Figure(section, case.name, {"total": "peak"}.get(part, part), estimate[part] / 1e9, "GB", kind, source)
        for part, kind in kinds.items()
    ]


def stack_of(case: Case) -> str:
    return case.module.split(".")[2]


def short(name: str) -> str:
    """megatron:tp=1,pp=2,recompute="none" -> megatron pp=2"""
    stack, _, rest = name.partition(":")
    words = [word for word in rest.split(",") if word.partition("=")[2].strip('"') not in ("1", "false", "none")]
    return " ".join([stack, *words])


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def middle(values: Sequence[float], share: float) -> tuple[float, float]:
    """The bounds of the middle of the values that holds this share of them."""
    ordered = sorted(values)
    rest = round(len(ordered) * (1 - share) / 2)
    return ordered[rest], ordered[-1 - rest]


def farthest(run: Sequence[float], first: Sequence[float]) -> float:
    """The largest relative difference of two curves."""
    return max(abs(a / b - 1) if b else 0.0 for a, b in zip(run, first, strict=True))


TASKS = (
    *(
        Task(f"performance_{family}", f"Performance / {label_of(family)}", 115,
             partial(pretraining, family))
        for family in families.names()
    ),
    Task("performance_mrpc", "Performance / BERT on MRPC", 90, mrpc),
    *alternatives.TASKS,
    *starts.TASKS,
)  # fmt: skip
