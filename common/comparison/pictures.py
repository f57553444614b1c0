"""Colours and sizes of the pictures in a report: they read on a phone, in print and on a dark page."""

from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Drawing

# Okabe and Ito's palette for all kinds of colour vision (jfly.uni-koeln.de/color), without its black and yellow
STACK_COLOURS: Final = {"baseline": "#009e73", "deepspeed": "#0072b2", "megatron": "#d55e00"}
OTHER_COLOURS: Final = ("#cc79a7", "#56b4e9", "#e69f00")
INK: Final = "#7f7f7f"  # text and axes: reads on white and on black
WIDTH, HEIGHT = 5.0, 3.0  # inches: text of 9 points stays so on a phone


def new(rows: int = 1, columns: int = 1, height: float = HEIGHT) -> "tuple[Drawing, Any]":
    """(figure, axes) without a display, transparent, in the colours above."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    style: dict[Any, Any] = {
        "figure.facecolor": "none", "axes.facecolor": "none", "savefig.facecolor": "none", "text.color": INK,
        "axes.edgecolor": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK, "font.size": 9,
        "legend.frameon": False, "svg.fonttype": "none",
    }  # fmt: skip
    with plt.rc_context(style):
        return plt.subplots(rows, columns, figsize=(WIDTH, height), layout="constrained")
