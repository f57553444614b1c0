"""Bytes that a rank sends in a step, against the number of ranks: counted from shapes by the formulas of
common/planning/traffic.py, and beside the theory in runs that were simulated (docs/planner/simulation_report.json).

tests/test_benchmark_scalability.py holds both to the collectives of simulated runs.
"""

import json
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from common import pictures
from common.comparison import planned
from common.comparison.figures import Figure, Options, Picture, Task, select
from common.comparison.layouts import name_of
from common.config import Config
from common.layout import layout_for
from common.paths import ROOT
from common.planning import search, traffic

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Drawing

SECTION = "Scalability"
SENT = f"{SECTION} / GB that a rank sends per step, GPT 1.3B"
BY_MICRO_BATCHES = f"{SECTION} / GB that a rank of 64 sends per step, by micro batches"
THEORY = f"{SECTION} / Counted and theory"
PART = "python -m scripts.benchmark --parts bytes_counted"
SIMULATED = ROOT / "docs/planner/simulation_report.json"
CONFIG = "recipes/gpt/configs/gpt3_1.3b.yaml"
SAMPLES = 8  # of a rank and step, in one micro batch
RANKS = (2, 4, 8, 16, 64, 512)
MICRO_BATCHES, MANY = (1, 2, 4, 8), 64  # of ranks
NODE = 8  # ranks that tp and pp divide at most
LAYOUTS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("baseline", {"shard": "none"}),
    ("baseline", {"shard": "full"}),
    *(("deepspeed", {"zero_stage": stage}) for stage in (1, 2, 3)),
    ("megatron", {"distributed_optimizer": False}),
    ("megatron", {"distributed_optimizer": True}),
    ("megatron", {"distributed_optimizer": False, "tp": NODE}),
    ("megatron", {"distributed_optimizer": False, "tp": NODE, "sequence_parallel": True}),
    ("megatron", {"distributed_optimizer": False, "pp": NODE}),
)


def overrides_of(stack: str, keys: dict[str, Any], ranks: int, micro_batches: int = 1) -> list[str]:
    """Of a layout on so many ranks, each of which has as many samples: where several ranks share a replica of the model, it
    has as many micro batches more. With fewer ranks than a node, tp or pp is as many."""
    given = {key: min(value, ranks) if key in ("tp", "pp") else value for key, value in keys.items()}
    words = [f"{stack}.{key}={str(value).lower()}" for key, value in given.items()]
    return [*words, f"{stack}.micro_batch={SAMPLES}", f"train.global_batch={ranks * SAMPLES * micro_batches}"]


# ---- counted from shapes ---------------------------------------------------------------------------------------------


def sent(cfg: Config, stack: str, ranks: int) -> float:
    """Bytes that a rank sends in a step; in a pipeline, the rank that sends the most."""
    layout = layout_for(cfg, stack, ranks)
    if layout.tp == layout.pp == 1:
        return sum(ring(op, ranks, size) for op, size in of_replicas(cfg, stack, ranks).items())
    of_stages = [traffic.collectives(cfg, stack, ranks, stage) for stage in {0, layout.pp // 2, layout.pp - 1}]
    return max(sum(ring(name.split()[0], int(name.split()[-1]), size) for name, size in one.items()) for one in of_stages)


def of_replicas(cfg: Config, stack: str, ranks: int) -> traffic.Bytes:
    """Of ranks that each hold the whole model, or a share of it. Sums of a few numbers are left out."""
    layout, work, parameters = layout_for(cfg, stack, ranks), cfg.model.workload(cfg.data), cfg.model.parameter_count()
    plan = search.plan_of(cfg, stack, layout, work)
    kept = 0.0
    if plan.shard == "parameters" and stack == "deepspeed":
        kept = kept_by_zero_3()
    elif plan.shard == "parameters" and work.ends:  # FSDP2 gathers what is outside the layers once
        kept = sum(work.ends) - work.vocab * work.hidden * work.tied
    return traffic.replicas(parameters, plan.shard, plan.gradient_bytes, plan.width, plan.accumulate, plan.all_reduced, kept)


def ring(op: str, ranks: int, size: float) -> float:
    """Bytes that a rank sends where collectives are rings: of an all-reduce 2 (n - 1) / n of its bytes, of a gather, a scatter
    or a reduction (n - 1) / n of its larger side."""
    if op in ("send", "recv"):
        return size if op == "send" else 0.0
    return (2 if op == "all_reduce" else 1) * size * (ranks - 1) / ranks


# ---- simulated -------------------------------------------------------------------------------------------------------


@cache
def simulated() -> list[dict[str, Any]]:
    """The rows of docs/simulation_report.md. Each has 2 micro batches per rank, a pipeline's 2 per stage."""
    rows: list[dict[str, Any]] = json.loads(SIMULATED.read_text(encoding="utf-8"))["rows"]
    return [row for row in rows if row["world"] > 1 and row.get("collectives")]


def row_of(config: str, stack: str, words: Sequence[str] = (), rank: int = 0) -> dict[str, Any]:
    """The first row of a config and stack with these overrides among its own."""
    path = f"recipes/gpt/configs/{config}.yaml"
    return next(
        row for row in simulated()
        if (row["config"], row["stack"], row["rank"]) == (path, stack, rank) and set(words) <= set(row["overrides"])
    )  # fmt: skip


def size_of(row: dict[str, Any], op: str, dtype: str, ranks: int) -> int:
    """Bytes of an operation in one step."""
    return sum(one["bytes"] for one in row["collectives"] if (one["op"], one["dtype"], one["group_size"]) == (op, dtype, ranks))


@cache
def kept_by_zero_3() -> int:
    """Parameters of CONFIG that ZeRO 3 gathers once for the forward and the backward pass of a micro batch. Which they are is
    decided while it runs (stage3_max_live_parameters, stage3_max_reuse_distance): as simulated on 8 ranks."""
    row = row_of(Path(CONFIG).stem, "deepspeed", ("deepspeed.zero_stage=3",))
    gathered = size_of(row, "all_gather", "bf16", 8) // 2 // 2  # bytes of an element, micro batches
    return 2 * planned.resolved(CONFIG).model.parameter_count() - gathered


def command_of(row: dict[str, Any]) -> str:
    rank = [f"--rank {row['rank']}"] if row["rank"] else []
    return " ".join(["python -m scripts.simulate", row["config"], f"--stack {row['stack']} --world {row['world']}", *rank,
                     *row["overrides"]])  # fmt: skip


class Beside(NamedTuple):
    """What a simulated run sent, in the unit that the subject names, beside a formula of a paper."""

    subject: str
    theory: float
    simulated: float
    row: dict[str, Any]
    paper: str


def of_parameters() -> Iterator[Beside]:
    """What ranks send that hold copies of the model, or share it, with as many ranks that (n - 1) / n is 1."""
    paper = "ZeRO, arXiv:1910.02054, section 7.2"
    once, each = 1, 2  # micro batches in which gradients are reduced
    for subject, theory, config, stack, words, op, reductions in (
        ("DDP, 1.3B: x parameters", 2, "gpt3_1.3b", "baseline", (), "all_reduce", once),
        ("ZeRO 1, 1.3B: x parameters", 2, "gpt3_1.3b", "deepspeed", (), "reduce", once),
        ("ZeRO 2, 2.5B, one micro batch: x parameters", 2, "megatron_2.5b", "deepspeed", (), "reduce", each),
        ("ZeRO 3, 13B, one micro batch: x parameters", 3, "gpt3_13b", "deepspeed", ("deepspeed.zero_stage=3",),
         "reduce_scatter", each),
        ("FSDP2, 13B, one micro batch: x parameters", 3, "gpt3_13b", "baseline", ("baseline.shard=full",),
         "reduce_scatter", each),
        ("distributed optimizer, 1.3B: x parameters", 2, "gpt3_1.3b", "megatron", (), "reduce_scatter", once),
    ):  # fmt: skip
        row = row_of(config, stack, words)
        dtype, width = ("bf16", 2) if stack == "deepspeed" else ("fp32", 4)  # of the gradients
        reduced = size_of(row, op, dtype, 8) / width / reductions * (2 if op == "all_reduce" else 1)
        gathers = each if theory == 3 else once
        gathered = size_of(row, "all_gather", "bf16", 8) / 2 / gathers
        parameters = planned.resolved(row["config"], row["overrides"]).model.parameter_count()
        yield Beside(subject, theory, (reduced + gathered) / parameters, row, paper)


def of_activations() -> Iterator[Beside]:
    """What ranks send that share a layer or a pipeline."""
    row = row_of("gpt3_13b", "megatron")
    cfg = planned.resolved(row["config"], row["overrides"])
    layout = layout_for(cfg, "megatron", row["world"])
    activation = 2 * cfg.data.seq_len * layout.micro_batch * cfg.model.hidden * layout.accumulate  # bytes, of all micro batches
    # outside the layers the output scatters once; the embedding gathers once, the output twice
    scattered = size_of(row, "reduce_scatter", "bf16", layout.tp) / activation - 1
    gathered = size_of(row, "all_gather", "bf16", layout.tp) / activation - 3
    paper = "arXiv:2205.05198, section 4.2.2: a scatter and a gather for each of 4 all-reduces"
    yield Beside("tp=4 sp, 13B: scatters per layer and micro batch", 4, scattered / cfg.model.layers, row, paper)
    paper += ", and 2 gathers more for the gradients of weights"
    yield Beside("tp=4 sp, 13B: gathers per layer and micro batch", 6, gathered / cfg.model.layers, row, paper)
    row = row_of("gpt3_175b", "megatron")
    cfg = planned.resolved(row["config"], row["overrides"])
    layout = layout_for(cfg, "megatron", row["world"])
    activation = 2 * cfg.data.seq_len * layout.micro_batch * cfg.model.hidden // layout.tp * layout.accumulate
    passed = size_of(row, "send", "bf16", layout.pp) / activation
    yield Beside("pp=8, 175B: activations per boundary and micro batch", 1, passed, row, "arXiv:2104.04473, section 3.2")


def beside_theory() -> list[Figure]:
    found = []
    for one in (*of_parameters(), *of_activations()):
        found.append(Figure(THEORY, one.subject, "theory", one.theory, "", "counted", one.paper))
        found.append(Figure(THEORY, one.subject, "simulated", one.simulated, "", "counted", command_of(one.row)))
    return found


# ---- the part --------------------------------------------------------------------------------------------------------


def bytes_counted(options: Options, folder: Path) -> list[Figure]:
    found = []
    chosen = [(stack, keys) for stack, keys in LAYOUTS if stack in options.stacks]
    for stack, keys in chosen:
        for ranks in RANKS:
            size = gigabytes_of(stack, keys, ranks)
            found.append(Figure(SENT, label(stack, keys), f"{ranks} ranks", size, "GB", "counted", PART))
    for stack, keys in chosen:
        for micro in () if {"tp", "pp"} & set(keys) else MICRO_BATCHES:
            size = gigabytes_of(stack, keys, MANY, micro)
            found.append(Figure(BY_MICRO_BATCHES, label(stack, keys), f"{micro}", size, "GB", "counted", PART))
    return [*found, *(beside_theory() if set(options.stacks) >= {"baseline", "deepspeed", "megatron"} else [])]


def gigabytes_of(stack: str, keys: dict[str, Any], ranks: int, micro_batches: int = 1) -> float:
    return sent(planned.resolved(CONFIG, overrides_of(stack, keys, ranks, micro_batches)), stack, ranks) / 1e9


def label(stack: str, keys: dict[str, Any]) -> str:
    """'megatron tp<=8 sp': on fewer ranks than a node, tp and pp are as many."""
    return name_of(planned.resolved(CONFIG, overrides_of(stack, keys, NODE)), stack).replace(f"p={NODE}", f"p<={NODE}")


def draw(figures: Sequence[Figure]) -> "Drawing | None":
    """GB per rank and step over the ranks, a line per layout."""
    rows = list(dict.fromkeys(figure.subject for figure in select(figures, SENT)))
    if not rows:
        return None
    drawing, axes = pictures.new(height=4.2)
    styles, drawn = ("-", "--", ":", "-.", (0, (6, 1, 1, 1, 1, 1))), dict.fromkeys(pictures.STACK_COLOURS, 0)
    for row in rows:
        stack = row.split()[0]
        points = [
            (int(f.metric.split()[0]), float(f.value))
            for f in select(figures, SENT)
            if f.subject == row and f.value is not None
        ]
        ranks, gigabytes = zip(*points, strict=True)
        colour, style = pictures.STACK_COLOURS[stack], styles[drawn[stack] % len(styles)]
        axes.plot(ranks, gigabytes, linestyle=style, color=colour, marker=".", label=row)
        drawn[stack] += 1
    axes.set(xscale="log", yscale="log", xlabel="ranks", ylabel="GB sent per rank and step", xticks=RANKS)
    axes.set_xticklabels([str(ranks) for ranks in RANKS])
    axes.minorticks_off()
    drawing.legend(loc="outside lower center", ncols=2)
    return drawing


TASKS = (Task("bytes_counted", SECTION, 10, bytes_counted),)
PICTURES = (
    Picture(
        "bytes_sent", SENT, "GB that a rank sends per step of GPT 1.3B",
        f"{Path(CONFIG).stem}, {SAMPLES} samples per rank; counted, the same on any hardware",
        "Bytes that a rank sends per step of GPT 1.3B, 8 samples per rank: those of data parallelism approach a multiple of "
        "the model, those of tensor parallelism are activations, which grow with the samples of a replica.", draw,
    ),
)  # fmt: skip
