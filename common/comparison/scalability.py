"""Scalability: what is measured over the processes there are, counted, and predicted from 8 to 4,096 GPUs.

scaling.py measures, largest_model.py finds the largest models, communication.py counts bytes.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from common import pictures
from common.comparison import communication, largest_model, planned, scaling
from common.comparison.figures import Figure, Options, Picture, Task, select
from common.comparison.planned import GPU, Best
from common.config import STACKS
from common.planning import validation

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Drawing

SECTION = "Scalability"
SIZES = {"1.3B": "gpt3_1.3b", "13B": "gpt3_13b", "175B": "gpt3_175b"}
GPUS = tuple(2**k for k in range(3, 13))  # 8 to 4,096
TABLE_2 = f"{SECTION} / PTD-P, table 2, A100"
PUBLISHED = "PTD-P (arXiv:2104.04473, April 2021), table 2; docs/planner/published.csv"


def scaling_predicted(options: Options, folder: Path) -> list[Figure]:
    return [
        *(figure for size in SIZES for gpus in GPUS for figure in predicted_on(size, gpus, options.stacks)),
        *published_beside_predicted(),
    ]


def table_of(size: str) -> str:
    return f"{SECTION} / GPT {size} on {GPU}, one global batch"


def predicted_on(size: str, gpus: int, stacks: Sequence[str]) -> list[Figure]:
    """The fastest layout of each stack, with the global batch of the config (strong scaling)."""
    path = f"recipes/gpt/configs/{SIZES[size]}.yaml"
    cfg = planned.resolved(path)
    best, source = Best(cfg, stacks, gpus), planned.command(path, (), gpus, stacks)
    found, section, row = [], table_of(size), f"{gpus:,} GPUs"
    for unit in ("s/step", "MFU %", "tokens/s per GPU"):
        for stack in stacks:
            one, metric = best.of.get(stack), f"{stack} {unit}"
            if one is None:
                found.append(Figure(section, row, metric, None, "", "predicted", f"{best.none[stack]}: {source}"))
                continue
            value = {"s/step": one.seconds, "MFU %": 100 * one.mfu_full, "tokens/s per GPU": one.tokens_per_s / gpus}[unit]
            found.append(planned.predicted(section, row, metric, value, "", source, planned.error_of(one)))
    return found


def published_beside_predicted() -> list[Figure]:
    """Table 2 of PTD-P: the same models on the same machine by ZeRO 3 and by tensor and pipeline parallelism."""
    found = []
    for row in validation.published():
        if not row.table.startswith("ptdp-2"):
            continue
        kind = "ZeRO 3" if row.table == "ptdp-2-zero3" else "PTD"
        subject = f"{row.model.split()[0]}, {kind}, {row.plan.world:,} GPUs"
        error = max(abs(other.error()) for other in validation.published() if other.table == row.table)
        found.append(Figure(TABLE_2, subject, "published", row.value, "TFLOP/s per GPU", "cited", PUBLISHED))
        source = "python -m scripts.plan --validate"
        found.append(planned.predicted(TABLE_2, subject, "predicted", row.predicted(), "TFLOP/s per GPU", source, error))
    return found


# ---- pictures --------------------------------------------------------------------------------------------------------


def draw_predicted(figures: Sequence[Figure]) -> "Drawing | None":
    """MFU of each stack's fastest layout over the GPUs, one plot per model, with the predictor's error."""
    sizes = [size for size in SIZES if select(figures, table_of(size))]
    if not sizes:
        return None
    drawing, axes = pictures.new(1, len(sizes), height=3.0)
    for plot, size in zip([axes] if len(sizes) == 1 else axes, sizes, strict=True):
        for stack in STACKS:
            found = [f for f in select(figures, table_of(size), f"{stack} MFU %") if f.value is not None and f.spread]
            gpus = [gpus_of(f) for f in found]
            colour = pictures.STACK_COLOURS[stack]
            plot.plot(gpus, [float(f.value or 0) for f in found], color=colour, marker=".", label=stack)
            bounds = [f.spread for f in found if f.spread]
            plot.fill_between(gpus, [low for low, _ in bounds], [high for _, high in bounds], color=colour, alpha=0.15, lw=0)
        plot.set(xscale="log", title=f"GPT {size}", xlabel="GPUs", xlim=(GPUS[0] / 1.3, GPUS[-1] * 1.3), ylim=(0, 60))
        plot.set_xticks([8, 64, 512, 4096], ["8", "64", "512", "4,096"])
        plot.minorticks_off()
    (axes if len(sizes) == 1 else axes[0]).set_ylabel("MFU, %")
    (axes if len(sizes) == 1 else axes[0]).legend()
    return drawing


def gpus_of(figure: Figure) -> int:
    return int(figure.subject.split()[0].replace(",", ""))


def draw_table_2(figures: Sequence[Figure]) -> "Drawing | None":
    """PTD-P's table 2 as points, and the prediction of the same rows as lines."""
    if not select(figures, TABLE_2):
        return None
    drawing, axes = pictures.new(1, 2, height=3.2)
    for plot, model in zip(axes, ("175B", "530B"), strict=True):
        for kind, stack in (("PTD", "megatron"), ("ZeRO 3", "deepspeed")):
            for metric, style in (("predicted", "-"), ("published", "o")):
                found = [f for f in select(figures, TABLE_2, metric) if f.subject.startswith(f"{model}, {kind},")]
                gpus = [int(f.subject.split()[-2].replace(",", "")) for f in found]
                values = [float(f.value or 0) for f in found]
                plot.plot(gpus, values, style, color=pictures.STACK_COLOURS[stack], label=f"{kind}, {metric}")
        plot.set(title=f"GPT {model} on A100", xlabel="GPUs", ylim=(0, 200))
    axes[0].set_ylabel("TFLOP/s per GPU")
    axes[0].legend()
    return drawing


TASKS = (
    *scaling.TASKS, *largest_model.TASKS, *communication.TASKS, Task("scaling_predicted", SECTION, 25, scaling_predicted),
)  # fmt: skip
PICTURES = (
    Picture(
        "scaling_predicted", SECTION, "MFU of the fastest layout of each stack, predicted",
        f"{', '.join(SIZES.values())}; predicted for {GPU}",
        f"Predicted MFU of the fastest layout of each stack on {GPU}, with the predictor's error, at the global batch of each "
        "config. Where a line ends, no layout fits or the batch does not divide.", draw_predicted,
    ),
    Picture(
        "scaling_table_2", SECTION, "Table 2 of PTD-P, and its prediction",
        "GPT on up to 2,240 A100; published in 2021, predicted",
        "PTD-P's table 2 (2021): points are published, lines predicted. PTD is tensor and pipeline parallelism of Megatron-LM.",
        draw_table_2,
    ),
    *communication.PICTURES,
)  # fmt: skip
