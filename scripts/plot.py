"""Plot the loss curves of several runs in one picture, and the difference of each from the first.

python -m scripts.plot RUN... --out curves.png     RUN: an OUT folder of pretrain.sh, or a record of docs/results
"""

import argparse
from pathlib import Path
from typing import Any

from common.errors import BadInput, exit_cleanly
from scripts.check import logged

SMOOTH_ABOVE = 500  # steps; a longer curve is smoothed so that its trend can be read
# Equal curves cover each other. Later ones are thinner and have longer gaps, so that the earlier ones stay visible.
DASHES: list[Any] = ["-", (0, (6, 4)), (0, (2, 4)), (0, (8, 3, 2, 3)), (0, (1, 6)), (0, (10, 8))]
WIDTHS = [2.4, 1.8, 1.6, 1.2, 1.2, 1.0]
FLOOR = 1e-9  # differences below this are drawn here, because a logarithmic axis has no 0

Curve = dict[int, float]  # step -> loss


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m scripts.plot", description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", metavar="RUN")
    parser.add_argument("--out", default="curves.png", help="the picture (default curves.png)")
    args = parser.parse_args()
    out = Path(args.out)
    if not out.parent.is_dir():
        raise BadInput(f"--out {out}: no such folder: {out.parent}")
    problems, runs = [], {}
    for name, path in labels(args.runs).items():
        try:
            runs[name] = curves(path)
        except BadInput as error:
            problems += error.problems
    if problems:
        raise BadInput(problems)
    draw(runs, out)
    print(out)


def labels(paths: list[str]) -> dict[str, Path]:
    """{label: path} of the runs. A label is the shortest end of the path that is unique; repeated runs count once."""
    whole = list(dict.fromkeys(Path(p).resolve() for p in paths))
    for length in range(1, max(len(p.parts) for p in whole) + 1):
        short = {"/".join(p.parts[-length:]): p for p in whole}
        if len(short) == len(whole):
            break
    return short


def curves(run: Path) -> tuple[Curve, Curve]:
    """(training loss, validation loss) of a run."""
    lines = logged(run)
    train = {line["step"]: line["loss"] for line in lines if "loss" in line}
    valid = {line["step"]: line["valid_loss"] for line in lines if "valid_loss" in line}
    if not train and not valid:
        raise BadInput(f"{run / 'metrics.jsonl'}: holds no step yet")
    return train, valid


def smooth(curve: Curve, span: int) -> Curve:
    """Exponential mean over about `span` steps, with Adam's bias correction (arXiv:1412.6980, section 3)."""
    keep, mean, smoothed = 1 - 1 / span, 0.0, {}
    for count, (step, loss) in enumerate(curve.items(), 1):
        mean = keep * mean + (1 - keep) * loss
        smoothed[step] = mean / (1 - keep**count)
    return smoothed


def draw(runs: dict[str, tuple[Curve, Curve]], out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    several = len(runs) > 1
    fig, axes = plt.subplots(
        2 if several else 1, 1, sharex=True, figsize=(9, 7 if several else 5), squeeze=False, layout="constrained",
        height_ratios=[2, 1] if several else [1],
    )  # fmt: skip
    top, first = axes[0][0], next(iter(runs.values()))
    longest = max(len(train) for train, _ in runs.values())
    span = max(1, longest // 100) if longest > SMOOTH_ABOVE else 1
    for i, (name, (train, valid)) in enumerate(runs.items()):
        style = {"color": f"C{i}", "linestyle": DASHES[i % len(DASHES)], "linewidth": WIDTHS[min(i, len(WIDTHS) - 1)]}
        shown = smooth(train, span)
        top.plot(list(shown), list(shown.values()), label=f"{name}, training", **style)
        if valid:
            marks = {
                "marker": "osD^vP"[i % 6],
                "markersize": max(3, 9 - i),
                "markerfacecolor": "none",
                "linewidth": 0.8,
            }
            top.plot(list(valid), list(valid.values()), label=f"{name}, validation", **(style | marks))
        if several and i:
            for part, curve, reference in (("training", train, first[0]), ("validation", valid, first[1])):
                apart = {s: max(abs(curve[s] - reference[s]), FLOOR) for s in curve if s in reference}
                style = {"color": f"C{i}", "linewidth": 0.8, "markersize": 4, "markerfacecolor": "none"}
                mark = "o" if part == "validation" else "-"
                axes[1][0].plot(list(apart), list(apart.values()), mark, label=f"{name}, {part}", **style)
    top.set_ylabel("loss (nats per token)" + (f", training smoothed over {span} steps" if span > 1 else ""))
    top.grid(alpha=0.3)
    top.legend(fontsize=8)
    if several:
        axes[1][0].set_yscale("log")
        axes[1][0].set_ylabel(f"|difference to {next(iter(runs))}|", fontsize=8)
        axes[1][0].grid(alpha=0.3)
        axes[1][0].legend(fontsize=7)
    axes[-1][0].set_xlabel("step")
    try:
        fig.savefig(out, dpi=120)
    except (OSError, ValueError) as error:
        raise BadInput(f"--out {out}: cannot be written: {error}") from None
    finally:
        plt.close(fig)


if __name__ == "__main__":
    exit_cleanly(main)
