"""The published rows beside their predictions: how far common/planning/step_time.py is off, and where nothing is known.

The rows are in docs/planner/published.csv. A constant that was fitted is fitted again on half of its table's rows and tested on
the other half, both ways round.
"""

import csv
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, NamedTuple

from common.paths import ROOT
from common.planning import hardware, step_time
from common.planning.hardware import Cluster, Gpu
from common.planning.step_time import Constants, Plan, Software
from common.planning.workload import Attention, Block, Workload

ROWS = ROOT / "docs/planner/published.csv"
SOFTWARE = {"megatron-2021": step_time.MEGATRON_2021, "megatron-te": step_time.MEGATRON_TE}


class Table(NamedTuple):
    """A table of published rows. fitted: the names of the constants that were fitted on it, and where their fit starts."""

    kind: str  # what ran: megatron, zero 3 or deepspeed pipeline
    title: str
    note: str
    fitted: dict[str, float]


TABLES = {
    "ptdp-1": Table(
        "megatron", "PTD-P, table 1 (arXiv:2104.04473)",
        "v, DDP and micro batches from run_table_1.sh at Megatron-LM f2e72c8a16.", {"gemm": 0.82},
    ),
    "megatron-h100": Table(
        "megatron", "H100, Megatron-LM's README (images/model_table.png)",
        "Micro batch and v are not published. Here the micro batch is 1, and v the divisor of the layers per stage that is\n"
        "nearest to 4 (1 for p <= 2), as strong scaling to 12 micro batches implies. v alone moves a row by up to 15 %.",
        {"gemm": 0.7, "tp_hidden": 0.7},
    ),
    "megatron-h100-strong": Table("megatron", "H100, 177B, strong scaling (Megatron-LM's README)", "Layout as above.", {}),
    "korthikanti-5": Table("megatron", "arXiv:2205.05198, table 5", "Seconds, confirmed by Calculon's validation files.", {}),
    "ptdp-2-ptd": Table("megatron", "PTD-P, table 2, tensor and pipeline parallel", "v as in table 1.", {}),
    "gpt3-175b": Table("megatron", "GPT-3 175B on 1,024 A100 (Megatron-LM's README, v2.6)", "About 32 s per step.", {}),
    "ptdp-2-zero3": Table(
        "zero 3", "PTD-P, table 2, ZeRO 3 without model parallelism", "Two constants, six rows.",
        {"sharded_network": 0.7, "sharded_exposed": 0.5},
    ),
    "mt-nlg": Table(
        "deepspeed pipeline", "MT-NLG 530B (arXiv:2201.11990), DeepSpeed's pipeline with Megatron's tensor parallelism",
        "Predicted with the constants of Megatron: DeepSpeed's pipeline of 2022 was that much slower.", {},
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """What was run, and its published value in `unit`: hardware TFLOP/s, model TFLOP/s, seconds or MFU %."""

    table: str
    model: str
    unit: str
    value: float
    cluster: Cluster
    software: Software
    work: Workload
    plan: Plan

    def predicted(self, constants: dict[str, float] | None = None) -> float:
        """In the row's unit. constants: values of attributes of the GPU, of the software and of step_time.CONSTANTS."""
        cluster = replace(self.cluster, gpu=_changed(self.cluster.gpu, constants))
        software, others = _changed(self.software, constants), _changed(step_time.CONSTANTS, constants)
        seconds = step_time.step_seconds(cluster, software, self.work, self.plan, others).total
        if self.unit == "seconds":
            return seconds
        if self.unit == "MFU %":
            return 100 * step_time.mfu(cluster, self.work, self.plan, seconds)
        flops = self.work.flops(recomputed=self.unit.startswith("hardware")) * self.plan.global_batch
        return flops / self.plan.world / seconds / 1e12

    def error(self, constants: dict[str, float] | None = None) -> float:
        """Predicted / published - 1, of the throughput."""
        ratio = self.predicted(constants) / self.value
        return (1 / ratio if self.unit == "seconds" else ratio) - 1


def _changed[T: (Gpu, Software, Constants)](old: T, constants: dict[str, float] | None) -> T:
    """`old` with those of the constants that are its attributes."""
    own: dict[str, Any] = {name: value for name, value in (constants or {}).items() if hasattr(old, name)}
    return replace(old, **own)


def row_of(fields: dict[str, str]) -> Row:
    n = {name: int(value) for name, value in fields.items() if value.isdigit()}
    hidden, seq_len = n["hidden"], n["seq_len"]
    block = Block(
        count=n["layers"], tokens=seq_len, hidden=hidden, heads=n["heads"], inner=hidden, kv_inner=hidden, ffn=4 * hidden,
        gated=False, attention=(Attention(seq_len, seq_len, causal=True),),
    )  # fmt: skip
    plan = Plan(
        dp=n["dp"], tp=n["tp"], pp=n["pp"], vpp=n["vpp"], micro_batch=n["micro_batch"],
        accumulate=n["global_batch"] // (n["dp"] * n["micro_batch"]), sequence_parallel=bool(n["sequence_parallel"]),
        recompute=fields["recompute"], shard=fields["shard"], gradient_bytes=n["gradient_bytes"],
        torch_ddp=bool(n["torch_ddp"]),
    )  # fmt: skip
    return Row(
        fields["table"], fields["model"], fields["unit"], float(fields["value"]), Cluster(hardware.gpu(fields["gpu"])),
        SOFTWARE[fields["software"]], Workload((block,), n["vocab"], seq_len), plan,
    )  # fmt: skip


@cache
def published() -> tuple[Row, ...]:
    with open(ROWS, encoding="utf-8", newline="") as file:
        return tuple(row_of(fields) for fields in csv.DictReader(file))


# ---- how far off -----------------------------------------------------------------------------------------------------


def fit(rows: Sequence[Row], start: dict[str, float]) -> dict[str, float]:
    """The values of the constants in `start` with the smallest squares of log errors. A relative change of 1 counts as an
    error of 10 %, which keeps a constant near its start where the rows say little about it."""
    from scipy.optimize import least_squares

    def residuals(x: Any) -> list[float]:
        constants = dict(zip(start, map(float, x), strict=True))
        errors = [math.log(1 + row.error(constants)) for row in rows]
        return errors + [0.1 * (constants[name] - value) / value for name, value in start.items()]

    fitted = least_squares(residuals, list(start.values()), bounds=([0.01] * len(start), [1.0] * len(start)))
    return dict(zip(start, map(float, fitted.x), strict=True))


def held_out(rows: Sequence[Row], start: dict[str, float]) -> list[tuple[Row, float]]:
    """(row, error) of each row, with the constants fitted on the half of the rows to which it does not belong."""
    halves = [(rows[1::2], fit(rows[0::2], start)), (rows[0::2], fit(rows[1::2], start))]
    return [(row, row.error(constants)) for tested, constants in halves for row in tested]


def days_of_gpt3(row: Row) -> float:
    """Of 300 billion tokens, for which PTD-P (section 5.1) has 34 days on 1,024 A100."""
    return row.predicted() * 300e9 / (row.plan.global_batch * row.work.blocks[0].tokens) / 86400


def summary(errors: Sequence[float]) -> str:
    sizes = [abs(error) for error in errors]
    return f"median {statistics.median(sizes):.1%}, worst {max(sizes):.1%} of {len(sizes)} rows"


def page() -> str:
    """docs/planner.md."""
    return "\n".join(_lines()) + "\n"


def _lines() -> Iterator[str]:
    yield "# Predicted step times beside published ones"
    yield ""
    yield (
        "`python -m scripts.plan --validate` writes this page. `common/planning/step_time.py` predicts each row from its\n"
        "shapes, its layout and the constants of `common/planning/hardware.py`. The errors are those of the throughput: +5 %\n"
        "predicts 5 % more. Where constants were fitted on a table, each of its rows is also predicted with constants that\n"
        "were fitted on the half of the rows to which it does not belong."
    )
    for name, table in TABLES.items():
        rows = [row for row in published() if row.table == name]
        others = dict((row.model, error) for row, error in held_out(rows, table.fitted)) if table.fitted else {}
        yield f"\n## {table.title}\n"
        yield table.note
        if table.fitted:
            constants = ", ".join(f"`{key}` {value:.3f}" for key, value in fit(rows, table.fitted).items())
            yield f"Fitted on these rows: {constants}. Held-out halves: {summary(list(others.values()))}."
        else:
            yield "Nothing was fitted on these rows."
        yield f"As shipped: {summary([row.error() for row in rows])}.\n"
        if name == "gpt3-175b":
            yield f"300 billion tokens: {days_of_gpt3(rows[0]):.1f} days predicted, 34 published (PTD-P, section 5.1).\n"
        yield "| model | published | predicted | error |" + (" held out |" if others else "")
        yield "|---|---|---|---|" + ("---|" if others else "")
        for row in rows:
            cells = [row.model, f"{row.value:g} {row.unit}", f"{row.predicted():.4g}", f"{row.error():+.1%}"]
            cells += [f"{others[row.model]:+.1%}"] if others else []
            yield f"| {' | '.join(cells)} |"


# ---- how far off a prediction may be ---------------------------------------------------------------------------------

NEAR = 3.0  # factor between the numbers of parameters


def nearest(kind: str, cluster: Cluster, work: Workload) -> tuple[str, float] | None:
    """The largest error of the published rows that are near: of the same kind and GPU, and with up to 3 x more or fewer
    parameters. ('PTD-P, table 1 ...: 7.5B, 18.4B', 0.03), or None if no published row is near.

    kind: of Table. Encoders and encoder-decoders have no published row.
    """
    if len(work.blocks) > 1 or not all(a.causal for a in work.blocks[0].attention):
        return None
    size = work.parameters
    near = [
        (name, error)
        for of_kind, gpu, parameters, name, error in _as_shipped()
        if of_kind == kind and gpu == cluster.gpu.name and max(size / parameters, parameters / size) <= NEAR
    ]
    if not near:
        return None
    return ", ".join(dict.fromkeys(name for name, _ in near)), max(error for _, error in near)


@cache
def _as_shipped() -> tuple[tuple[str, str, int, str, float], ...]:
    """(kind, GPU, parameters, name, size of the error) of each published row."""
    return tuple(
        (TABLES[row.table].kind, row.cluster.gpu.name, row.work.parameters, f"{row.model} of {row.table}", abs(row.error()))
        for row in published()
    )
