"""Plot the loss curves of several runs in one picture, and the difference of each from the first.

python -m scripts.plot RUN... --out curves.png     RUN: an OUT folder of pretrain.sh, or a record of docs/results
"""

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from common import pictures
from common.command_line import Parser
from common.errors import BadInput, exit_cleanly
from common.json_files import read_object
from scripts.check import logged, record_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SMOOTH_ABOVE = 500  # steps; a longer curve is smoothed so that its trend can be read
THICK, THIN = 4.0, 0.9  # points: equal curves cover each other, so the later ones lie within the first

Curve = dict[int, float]  # step -> loss


class Run(NamedTuple):
    train: Curve
    valid: Curve
    colour: str


def main() -> None:
    parser = Parser(prog="python -m scripts.plot", description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", metavar="RUN")
    parser.add_argument("--out", default="curves.png", help="the picture; beside a .png also an .svg (default curves.png)")
    args = parser.parse_args()
    out = Path(args.out)
    if out.suffix not in (".png", ".svg", ".pdf"):
        raise BadInput(f"--out {out}: must end in .png, .svg or .pdf")
    if not out.parent.is_dir():
        raise BadInput(f"--out {out}: no such folder: {out.parent}")
    draw(labels(args.runs), out)
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


def colours(paths: Sequence[Path]) -> list[str]:
    """Of each run: the colour of its stack, unless an earlier run has it."""
    left = [*pictures.OTHER_COLOURS, *pictures.STACK_COLOURS.values()]
    found: list[str] = []
    for path in paths:
        own = pictures.STACK_COLOURS.get(str(info_of(path).get("stack")))
        free = [colour for colour in left if colour not in found] or left
        found.append(own if own and own not in found else free[0])
    return found


def info_of(run: Path) -> dict[str, Any]:
    """What a run says of itself in run.json, and a record in record.yaml."""
    return (record_of(run) or {}) | (read_object(run / "run.json") or {})


def made_on(infos: Sequence[dict[str, Any]]) -> str:
    """'2026-11-23, 2 cores of AMD EPYC, no GPU': the dates and the hardware of runs, "" if none of them says so."""
    facts = [", ".join(str(info[key]) for key in ("date", "hardware") if info.get(key)) for info in infos]
    return "; ".join(dict.fromkeys(fact for fact in facts if fact))


def draw(paths: dict[str, Path], out: Path) -> None:
    """Draw the runs, {label: path}, with title, config, hardware and date."""
    problems, runs = [], {}
    for (name, path), colour in zip(paths.items(), colours(list(paths.values())), strict=True):
        try:
            runs[name] = Run(*curves(path), colour)
        except BadInput as error:
            problems += error.problems
    if problems:
        raise BadInput(problems)
    several = len(runs) > 1
    figure, axes = pictures.new(
        2 if several else 1, height=4.4 if several else 3.0, sharex=True, squeeze=False,
        height_ratios=[3, 2] if several else [1],
    )  # fmt: skip
    draw_losses(axes[0][0], runs)
    if several:
        draw_differences(axes[1][0], runs)
    axes[-1][0].set_xlabel("step")
    pictures.whole_numbers(axes[-1][0])
    handles, names = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=2 if max(map(len, names)) > 20 else 4)
    infos = [info_of(path) for path in paths.values()]
    configs = ", ".join(dict.fromkeys(f"{info.get('family', '')} {info.get('config', '')}".strip() for info in infos))
    title = f"Losses of {len(runs)} runs, and their differences" if several else "Loss"
    pictures.label(figure, title, "; ".join(part for part in (configs, made_on(infos) or "hardware not recorded") if part))
    try:
        pictures.save(figure, out)
    except (OSError, ValueError) as error:
        raise BadInput(f"--out {out}: cannot be written: {error}") from None


def draw_losses(axes: "Axes", runs: dict[str, Run]) -> None:
    longest = max(len(run.train) for run in runs.values())
    span = max(1, longest // 100) if longest > SMOOTH_ABOVE else 1
    for place, (name, run) in enumerate(runs.items()):
        width = THICK - (THICK - THIN) * place / max(1, len(runs) - 1) if len(runs) > 1 else 1.5
        shown = smooth(run.train, span)
        first = place == 0 and len(runs) > 1
        axes.plot(list(shown), list(shown.values()), color=run.colour, linewidth=width, label=name, alpha=0.5 if first else 1)
    for place, run in enumerate(runs.values()):
        size = max(3, 8 - 2 * place)
        axes.plot(
            list(run.valid), list(run.valid.values()), "o", color=run.colour, markersize=size, markerfacecolor="none",
            label="validation" if run.valid and place == len(runs) - 1 else "_",
        )  # fmt: skip
    axes.set_ylabel("loss, nats per token")
    axes.set_title("training" + (f", smoothed over {span} steps" if span > 1 else "") + "; circles: validation")
    axes.grid()


def draw_differences(axes: "Axes", runs: dict[str, Run]) -> None:
    """The differences of each run from the first on a logarithmic axis, with a row of their own for steps that are equal."""
    reference, first = next(iter(runs.items()))
    apart = {
        name: [{s: abs(curve[s] - base[s]) for s in curve if s in base} for curve, base in zip(run[:2], first[:2], strict=True)]
        for name, run in runs.items() if name != reference
    }  # fmt: skip
    sizes = [size for train, valid in apart.values() for size in (*train.values(), *valid.values()) if size]
    low, high = (math.floor(math.log10(min(sizes))), math.ceil(math.log10(max(sizes)))) if sizes else (-1, 0)
    floor, equal = 10.0 ** (low - 1), []  # the row of equal steps
    for name, parts in apart.items():
        for curve, mark in zip(parts, ("-", "o"), strict=True):
            steps, values = list(curve), [size or math.nan for size in curve.values()]  # a gap where they are equal
            style = {"color": runs[name].colour, "linewidth": 0.8, "markersize": 4, "markerfacecolor": "none"}
            axes.plot(steps, values, mark, **style)
        same = [step for step, size in parts[0].items() if not size]
        if same:
            axes.plot(same, [floor] * len(same), "|", color=runs[name].colour, markersize=6)
            equal.append(f"{name} {len(same):,}")
    axes.set_yscale("log")
    axes.set_ylim(floor / 3, 10.0**high * 2)
    decades = range(low, high + 1, 1 + (high - low) // 5)
    ticks, names = [10.0**n for n in decades], [f"1e{n}" for n in decades]
    axes.set_yticks([floor] * bool(equal) + ticks, ["equal"] * bool(equal) + names)
    axes.minorticks_off()
    largest = max(((size, name, step) for name, (train, _) in apart.items() for step, size in train.items()), default=None)
    lines = [
        f"difference to {reference}" + (f": at most {largest[0]:.1e} ({largest[1]}, step {largest[2]:,})" if largest else "")
    ]
    if equal:
        lines += textwrap.wrap(f"steps with equal losses, as logged: {', '.join(equal)}", 62)
    axes.set_title("\n".join(lines))
    axes.grid()


if __name__ == "__main__":
    exit_cleanly(main)
