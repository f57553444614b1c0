"""The style of all pictures: sizes that read on a phone, colours that read on a white and on a dark page. Torch-free.

A picture is drawn by `new`, gets its title and what it was made of and on by `label`, and is written by `save`.
"""

import re
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Drawing

# Okabe and Ito's palette for all kinds of colour vision (jfly.uni-koeln.de/color), without its black and yellow
STACK_COLOURS: Final = {"baseline": "#009e73", "deepspeed": "#0072b2", "megatron": "#d55e00"}
OTHER_COLOURS: Final = ("#cc79a7", "#56b4e9", "#e69f00")
INK: Final = "#7a7a7a"  # text and axes: the grey whose contrast is the same, 4.3, on white and on GitHub's dark page
WIDTH, HEIGHT = 5.0, 3.0  # inches
SMALL: Final = 8  # points of the smallest text: 9 pixels at half of the 800 pixels that a picture is wide
DPI: Final = 160
STYLE: Final[dict[Any, Any]] = {
    "figure.facecolor": "none", "axes.facecolor": "none", "savefig.facecolor": "none", "text.color": INK,
    "axes.edgecolor": INK, "axes.labelcolor": INK, "axes.titlecolor": INK, "xtick.color": INK, "ytick.color": INK,
    "grid.color": INK, "grid.alpha": 0.25, "legend.frameon": False, "legend.labelcolor": INK, "legend.fontsize": SMALL,
    "font.size": 9, "axes.titlesize": 9, "axes.titlelocation": "left", "xtick.labelsize": SMALL, "ytick.labelsize": SMALL,
    "svg.fonttype": "none", "svg.hashsalt": "twinstack",
}  # fmt: skip


def new(rows: int = 1, columns: int = 1, height: float = HEIGHT, **more: Any) -> "tuple[Drawing, Any]":
    """(figure, axes) without a display, transparent, in the colours above. more: of pyplot.subplots."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(STYLE)  # also for the legends and bars that are added later
    return plt.subplots(rows, columns, figsize=(WIDTH, height), layout="constrained", **more)


def whole_numbers(axes: "Axes") -> None:
    """No ticks between two steps, and 10,000 written so."""
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins="auto", min_n_ticks=1))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))


def label(drawing: "Drawing", title: str, about: str) -> None:
    """Write the title above and, below, what the picture is about: config, hardware, date. The picture grows by both."""
    heads, feet = textwrap.wrap(title, 58), textwrap.wrap(about, 84, break_on_hyphens=False)
    above, below, height = 0.2 * len(heads) + 0.06, 0.16 * len(feet) + 0.06, float(drawing.get_figheight())
    drawing.draw_without_rendering()  # gives the axes their places, which are then moved as they are
    drawing.set_layout_engine("none")
    whole = height + above + below
    drawing.set_figheight(whole)
    left, low, share = 0.03 / WIDTH, below / whole, height / whole
    for axes in drawing.axes:
        place = axes.get_position()
        axes.set_position((place.x0, low + share * place.y0, place.width, share * place.height))
    for legend in drawing.legends:  # those outside the axes stand at the edge of the figure
        legend.set_bbox_to_anchor((0, low, 1, share), transform=drawing.transFigure)
    drawing.text(left, 1 - 0.04 / whole, "\n".join(heads), va="top", fontsize=10, fontweight="bold")
    drawing.text(left, 0.04 / whole, "\n".join(feet), va="bottom", fontsize=SMALL)


def svg(drawing: "Drawing") -> str:
    """The picture as SVG, the same text from the same figures, with coordinates to 0.01 points."""
    import io

    text = io.StringIO()
    drawing.savefig(text, format="svg", metadata={"Date": None})
    return re.sub(r"-?\d+\.\d{3,}", lambda found: f"{float(found[0]):.2f}".rstrip("0").rstrip("."), text.getvalue())


def save(drawing: "Drawing", path: Path) -> None:
    """Write the picture; beside a PNG the same as SVG, whose text stays sharp at any size. Errors of writing are raised."""
    import matplotlib.pyplot as plt
    from PIL import Image

    try:
        if path.suffix == ".svg":
            path.write_text(svg(drawing), encoding="utf-8")
            return
        drawing.savefig(path, dpi=DPI)
        if path.suffix == ".png":
            with Image.open(path) as image:  # 128 colours and their transparency: half of the bytes
                image.quantize(128, method=Image.Quantize.FASTOCTREE).save(path, optimize=True)
            path.with_suffix(".svg").write_text(svg(drawing), encoding="utf-8")
    finally:
        plt.close(drawing)
