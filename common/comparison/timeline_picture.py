"""Draws the timeline of a pipeline: a row for each stage, a box for each pass, from the figures of a report alone."""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from common import pictures
from common.comparison.figures import Figure, Table, select, tables

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Drawing

PIPELINES = "Load balance / Pipelines"
TIMELINE = "Load balance / Timeline of "  # and the layout: rows such as "stage 0, chunk 2, forward 3", columns begin and end
NARROWEST = 0.012  # share of the width that a box needs for its number


def draw(names: str, figures: Sequence[Figure]) -> "Drawing | None":
    """The layouts whose names match this pattern, one under the other, on one axis of time. In a box is the number of its micro
    batch; forward passes are light, backward passes dark, exchanges a thin line, and idle time is blank."""
    import matplotlib.patches as patches

    sections = dict.fromkeys(f.section for f in figures if re.match(TIMELINE + names, f.section))
    found = [table for section in sections for table in tables(select(figures, section))]
    if not found:
        return None
    heights = [_stages(table) for table in found]
    rows = sum(stages * (1 + 0.4 * (_chunks(table) - 1)) for stages, table in zip(heights, found, strict=True))
    drawing, grid = pictures.new(rows=len(found), height=1.0 + 0.4 * len(found) + 0.32 * rows)
    axes = list(grid) if len(found) > 1 else [grid]
    last = max(_number(figure) for table in found for figure in table.column("end"))
    bubbles = {figure.subject: _number(figure) for figure in select(figures, PIPELINES, "bubble")}
    for axis, table, stages in zip(axes, found, heights, strict=True):
        name = table.section.removeprefix(TIMELINE)
        colour = pictures.STACK_COLOURS[name.partition(" ")[0]]
        for subject in table.rows:
            begin, end = (_number(table.cells[subject, metric]) for metric in ("begin", "end"))
            _box(axis, subject, begin, end, colour, last, _chunks(table))
        axis.set_title(name + (f", bubble {bubbles[name]:.0f} %" if name in bubbles else ""))
        axis.set(xlim=(0, last), ylim=(stages - 0.5, -0.5), yticks=range(stages))
        axis.set_yticklabels([f"stage {stage}" for stage in range(stages)])
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.tick_params(left=False, labelbottom=axis is axes[-1])
    axes[-1].set_xlabel("ms from the first forward pass of the step")
    kinds = [patches.Patch(facecolor=_light(colour), label="forward"), patches.Patch(facecolor=colour, label="backward")]
    kinds.append(patches.Patch(facecolor=pictures.INK, label="exchange"))
    drawing.legend(handles=kinds, loc="outside upper right", ncols=3)
    return drawing


def _number(figure: Figure) -> float:
    if not isinstance(figure.value, int | float):
        raise ValueError(f"{figure.section} / {figure.subject} / {figure.metric}: {figure.value!r} is no number")
    return float(figure.value)


def _stages(table: Table) -> int:
    return 1 + max(int(subject.split(",")[0].split()[1]) for subject in table.rows)


def _chunks(table: Table) -> int:
    return max((int(number) for subject in table.rows for number in re.findall(r"chunk (\d+)", subject)), default=1)


def _light(colour: str) -> str:
    from matplotlib import colors

    red, green, blue = (1 - 0.45 * (1 - part) for part in colors.to_rgb(colour))
    return colors.to_hex((red, green, blue))


def _box(axis: Any, subject: str, begin: float, end: float, colour: str, last: float, chunks: int) -> None:
    """subject: "stage 0, chunk 2, forward 3". The chunks of a stage lie below each other in its row."""
    stage, *chunk, what = subject.split(", ")
    row, (kind, number) = int(stage.split()[1]), what.split()
    if kind == "exchange":
        axis.broken_barh([(begin, end - begin)], (row - 0.05, 0.1), facecolor=pictures.INK, linewidth=0)
        return
    height = 0.84 / chunks
    low = row - 0.42 + height * (int(chunk[0].split()[1]) - 1 if chunk else 0)
    face, ink = (_light(colour), "black") if kind == "forward" else (colour, "white")
    axis.broken_barh([(begin, end - begin)], (low, height), facecolor=face, edgecolor=pictures.INK, linewidth=0.5)
    if end - begin > NARROWEST * last:
        axis.text((begin + end) / 2, low + height / 2, number, ha="center", va="center_baseline", fontsize=7, color=ink)
