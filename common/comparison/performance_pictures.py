"""The pictures of the tables of performance."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from common.comparison.figures import Figure, Picture, Table, tables

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Drawing

PARTS = ("weights", "gradients", "optimizer", "buffers", "activations")
SECTION = "Performance"


def named(figures: Sequence[Figure], ending: str) -> list[Table]:
    """The tables of performance whose name ends so."""
    return [table for table in tables(figures) if table.section.startswith(f"{SECTION} / ") and table.section.endswith(ending)]


def speed_and_memory(figures: Sequence[Figure]) -> "Drawing | None":
    """A row of plots for each comparison: speed relative to the reference with its spread, and the memory of a rank by kind."""
    from common.pictures import INK, OTHER_COLOURS, STACK_COLOURS, new

    found = [
        (memory, speed) for memory in named(figures, ", memory")
        for speed in tables(figures) if speed.section == memory.section.removesuffix(", memory")
    ]  # fmt: skip
    if not found:
        return None
    rows = max(len(speed.column("ratio")) for _, speed in found)
    drawing, grid = new(len(found), 2, height=len(found) * (0.9 + 0.17 * rows) + 0.4)
    colours = [*OTHER_COLOURS, "#999999", "#8c6bb1"]  # not those of the stacks
    for (memory, speed), axes in zip(found, grid.reshape(-1, 2), strict=True):
        ratios = speed.column("ratio")
        names = [figure.subject for figure in ratios]
        for place, figure in enumerate(ratios):
            value, (low, high) = float(figure.value or 0), figure.spread or (0.0, 0.0)
            around = [[max(0.0, value - low)], [max(0.0, high - value)]] if figure.spread else None
            axes[0].barh(place, value, xerr=around, color=STACK_COLOURS.get(figure.subject.split()[0], INK), ecolor=INK)
        axes[0].axvline(1, color=INK, linewidth=0.8, linestyle=":")
        axes[0].set_yticks(range(len(names)), names)
        axes[0].set_title(title(speed))
        axes[0].set_xlabel(f"speed, {ratios[0].unit}")
        left = [0.0] * len(names)
        for part, colour in zip(PARTS, colours, strict=False):
            sizes = [number(memory, name, part) for name in names]
            axes[1].barh(range(len(names)), sizes, left=left, color=colour, label=part)
            left = [a + b for a, b in zip(left, sizes, strict=True)]
        axes[1].set_yticks([])
        axes[1].set_xlabel("MB per rank at the peak")
        for one in axes:
            one.invert_yaxis()
    handles, labels = grid.reshape(-1, 2)[0][1].get_legend_handles_labels()
    drawing.legend(handles, labels, loc="outside lower center", ncols=3)
    return drawing


def curves(figures: Sequence[Figure]) -> "Drawing | None":
    """The loss of every step of every layout, on each other, one plot for each comparison."""
    from common.pictures import STACK_COLOURS, new, whole_numbers

    found = named(figures, ", Timeline of the loss")
    if not found:
        return None
    rows = -(-len(found) // 2)
    drawing, grid = new(rows, min(2, len(found)), height=0.6 + 2.0 * rows)
    plots: list[Any] = list(grid.flat) if len(found) > 1 else [grid]
    for plot in plots[len(found) :]:
        plot.set_visible(False)
    for table, axes in zip(found, plots, strict=False):
        steps = [metric for metric in table.columns if metric.startswith("step ")]
        for place, name in enumerate(table.rows):
            style = {"linewidth": 5.0 - 4.0 * place / len(table.rows), "alpha": 0.6}  # the later ones lie within the first
            losses = [number(table, name, step) for step in steps]
            axes.plot(range(1, len(steps) + 1), losses, color=STACK_COLOURS.get(name.split()[0]), **style)
        axes.set_title(f"{title(table)}: {len(table.rows)} layouts")
        axes.set_xlabel("step")
        whole_numbers(axes)
        axes.set_ylabel("loss")
    return drawing


def number(table: Table, subject: str, metric: str) -> float:
    """The value of a cell; 0 for one that is empty."""
    figure = table.cells.get((subject, metric))
    return float(figure.value) if figure and isinstance(figure.value, int | float) else 0.0


def title(table: Table) -> str:
    return table.section.removeprefix(f"{SECTION} / ").partition(",")[0]


PICTURES = (
    Picture(
        "performance", SECTION, "Speed and memory of each layout",
        "a small model of each family; speed on {hardware}; states counted, activations predicted",
        "Speed of each layout relative to plain data parallelism, with what nine of ten steps lie "
        "within, beside the memory of a rank by kind (states counted, activations predicted).", speed_and_memory,
    ),
    Picture(
        "performance_curves", SECTION, "The losses of all layouts, drawn on each other",
        "a small model of each family, measured on {hardware}",
        "The losses of all layouts at every step: one curve for each comparison.", curves,
    ),
)  # fmt: skip
