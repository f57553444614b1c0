"""The figures of the comparison of the stacks (scripts/benchmark.py), and the work that yields them.

A figure has one of four kinds, which are never mixed in one column of a table:
  measured   on this machine, in this report
  counted    exactly: bytes, collectives, lines, keys; the same on any hardware
  predicted  for hardware that is named, by common/planning, with its error
  cited      published by others, with the source and its date
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Drawing

Kind = Literal["measured", "counted", "predicted", "cited"]
Value = float | int | str | bool | None  # None: does not apply, or not run here; the reason is the figure's `source`


@dataclass(frozen=True)
class Figure:
    """One cell of one table.

    section: the table: "Performance / GPT" is the table GPT of the section Performance
    subject: the row, such as "deepspeed zero_stage=2"
    metric:  the column, such as "tokens/s"
    unit:    of the value, "" for words and plain counts
    spread:  [least, greatest] or [first, third quartile] of a measured value, error bounds of a predicted one; else None
    source:  the command that yields the figure again, or of a cited figure the publication, its date and where it stands
    """

    section: str
    subject: str
    metric: str
    value: Value
    unit: str
    kind: Kind
    source: str
    spread: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        name = f"{self.section} / {self.subject} / {self.metric}"
        if self.kind not in get_args(Kind):
            raise ValueError(f"{name}: kind {self.kind!r} is none of {', '.join(get_args(Kind))}")
        if not self.source.strip():
            raise ValueError(f"{name}: has no source")
        if isinstance(self.value, float) and not math.isfinite(self.value):
            raise ValueError(f"{name}: {self.value} is no figure; None means that there is none")


class Picture(NamedTuple):
    """A plot, drawn from the figures of a report alone, so that report.json is all that it needs.

    `draw` returns a new figure of common/pictures.py, or None where the figures that it needs are not there.
    """

    name: str  # of its file, such as timeline_deepspeed
    section: str  # after whose tables it stands
    title: str
    about: str  # config, and hardware: {hardware} is that of the report, {date} is added
    caption: str  # what it shows, in one sentence
    draw: "Callable[[Sequence[Figure]], Drawing | None]"


@dataclass(frozen=True)
class Options:
    """What scripts/benchmark.py was asked for."""

    configs: tuple[Path, ...] = ()  # empty: small models of all families, made here
    stacks: tuple[str, ...] = ("baseline", "deepspeed", "megatron")  # asked for and installed
    layouts: tuple[str, ...] = ()  # as of scripts/parity.py: stack:key=value,...; empty: the usual ones
    processes: int = 2  # ranks on this machine
    rounds: int = 3  # of A B C A B C
    micro_batches: tuple[int, ...] = ()  # of a step, in the pipelines of balance_pipelines; empty: four per stage
    source: Path | None = None  # folder of real data, for finetuning
    out: Path = Path("out/benchmark")
    words: tuple[str, ...] = ()  # the command line, without --out

    @property
    def command(self) -> str:
        """The command that makes the report, with DIR for a folder of this machine."""
        words = ["DIR" if before == "--source" else word for before, word in zip(("", *self.words), self.words, strict=False)]
        words = ["--source=DIR" if word.startswith("--source=") else word for word in words]
        return " ".join(["python -m scripts.benchmark", *words])


class Disagreement(Exception):
    """Layouts that must have one loss curve do not: what they cost says nothing. The message names the step."""


@dataclass(frozen=True)
class Task:
    """A piece of the report, whose figures are kept in OUT/parts/NAME.json: an interrupted report continues after it.

    `run` gets the options and a folder of its own for temporary files, which is deleted after it. It raises `Disagreement`, or
    BadInput to be left out of the report with the message as the reason.
    """

    name: str  # performance_gpt
    section: str
    seconds: float  # estimate for 2 cores
    run: Callable[[Options, Path], "list[Figure]"]


@dataclass
class Report:
    """The content of OUT/report.json."""

    command: str
    date: str
    commit: str
    hardware: str
    versions: dict[str, str]
    figures: list[Figure] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)  # one line for each part that was not run, with the reason

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Report":
        return cls(**(values | {"figures": figures_from_json(values["figures"])}))


def figures_from_json(values: Iterable[dict[str, Any]]) -> list[Figure]:
    return [Figure(**(v | {"spread": tuple(v["spread"]) if v["spread"] else None})) for v in values]


class Table(NamedTuple):
    """The figures of one section as rows and columns."""

    section: str
    rows: list[str]  # subjects
    columns: list[str]  # metrics
    cells: dict[tuple[str, str], Figure]  # (subject, metric)

    def column(self, metric: str) -> list[Figure]:
        return [self.cells[row, metric] for row in self.rows if (row, metric) in self.cells]


def tables(figures: Iterable[Figure]) -> list[Table]:
    """The tables of a report in the order of their first figures.

    A column has one kind and one unit, and a cell has one figure; otherwise ValueError.
    """
    found: dict[str, Table] = {}
    for figure in figures:
        table = found.setdefault(figure.section, Table(figure.section, [], [], {}))
        if (figure.subject, figure.metric) in table.cells:
            raise ValueError(f"{figure.section}: two figures for {figure.subject}, {figure.metric}")
        table.cells[figure.subject, figure.metric] = figure
        if figure.subject not in table.rows:
            table.rows.append(figure.subject)
        if figure.metric not in table.columns:
            table.columns.append(figure.metric)
        first = table.column(figure.metric)[0]
        if (first.kind, first.unit) != (figure.kind, figure.unit):
            raise ValueError(
                f"{figure.section}, column {figure.metric}: {first.kind} in {first.unit!r} and {figure.kind} in {figure.unit!r}"
            )
    return list(found.values())


def select(figures: Iterable[Figure], section: str, metric: str | None = None) -> list[Figure]:
    """The figures of a table, or of all tables of a section that is given without its table."""
    return [
        f for f in figures
        if (f.section == section or f.section.startswith(f"{section} / ")) and metric in (None, f.metric)
    ]  # fmt: skip
