"""The verdict of a report: the heads of the articles that compare DeepSpeed and Megatron, with figures in place of adjectives.

Every figure here is taken from another table of the same report, with its source. Which stack a figure is in favour of, and so
the pros and cons, follow by RULE alone.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

from common.comparison.figures import Figure, Kind, Picture, Table, tables
from common.comparison.layouts import keys_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Drawing

SECTION = "Verdict"
BETTER, UNCLEAR = "better of DeepSpeed and Megatron", "no clear difference"
PARTS = "python -m scripts.benchmark --parts"
COMPARED = ("deepspeed", "megatron")
STACKS = ("baseline", *COMPARED)
TENTH = 0.05  # on either side of a figure without a spread
RULE = (
    "DeepSpeed or Megatron is the better of the two only if their ranges do not overlap: the spread of a measurement, or the "
    "error of a prediction. Figures without a range must differ by a tenth. A pro of one is a con of the other."
)

Find = Callable[[Sequence[Figure], str], Figure | None]


class Head(NamedTuple):
    """A row: what is compared, which figure of a stack it takes, and which is better."""

    name: str
    kind: Kind
    better: Literal["higher", "lower", ""]  # "": neither is better
    find: Find


def at(section: str, subject: str, metric: str) -> Find:
    """The figure of one cell; {stack} stands for the name of the stack."""

    def find(figures: Sequence[Figure], stack: str) -> Figure | None:
        wanted = tuple(text.format(stack=stack) for text in (section, subject, metric))
        return next((f for f in figures if (f.section, f.subject, f.metric) == wanted and f.value is not None), None)

    return find


def best_row(section: str, metric: str, begin: str, choose: Callable[..., Figure | None], without: str = "\n") -> Find:
    """The greatest (max) or least (min) figure of a column among the rows that begin with `begin`, with {stack} as above, and
    do not contain `without`."""

    def find(figures: Sequence[Figure], stack: str) -> Figure | None:
        column = [f for f in figures if (f.section, f.metric) == (section, metric) and isinstance(f.value, int | float)]
        column = [f for f in column if without not in f.subject]
        return choose((f for f in column if is_of(f.subject, begin.format(stack=stack))), key=lambda f: f.value, default=None)

    return find


def published(values: dict[str, float], source: str) -> Find:
    """Figures of others, by stack."""

    def find(figures: Sequence[Figure], stack: str) -> Figure | None:
        return Figure(SECTION, stack, "", values[stack], "", "cited", source) if stack in values and figures else None

    return find


def silent_mistakes(figures: Sequence[Figure], stack: str) -> Figure | None:
    """How many of the ten mistakes the stack alone trains on."""
    rows = [f for f in figures if (f.section, f.metric) == ("Ease of use / Ten mistakes without these recipes", stack)]
    seen = [f for f in rows if isinstance(f.value, str)]
    if not seen:
        return None
    count = sum(str(f.value).startswith("trains on") for f in seen)
    return Figure(SECTION, stack, "", count, "", "measured", seen[0].source)


def is_of(subject: str, begin: str) -> bool:
    return subject == begin or subject.startswith((f"{begin} ", f"{begin},"))


LARGEST = "Scalability / Largest GPT per GPU"
NEAREST = "modelscope/ms-swift, quick start of its Megatron backend, read in 2026: Megatron 9.04 s, ZeRO 2 10.32 s per step"
HEADS = (
    *(
        Head(f"Performance: GPT {size} on {gpus} H100, MFU in %", "predicted", "higher",
             at(f"Scalability / GPT {size} on H100, one global batch", f"{gpus} GPUs", "{stack} MFU %"))
        for size, gpus in (("1.3B", "8"), ("13B", "64"))
    ),
    Head("Scalability: GPT 175B on 1,024 H100, MFU in %", "predicted", "higher",
         at("Scalability / GPT 175B on H100, one global batch", "1,024 GPUs", "{stack} MFU %")),
    Head("Scalability: largest GPT on 1 H100 with 2 TB of CPU memory, in billions of parameters", "predicted", "higher",
         best_row(LARGEST, "estimate", "1 GPU: {stack}", max)),
    *(
        Head(f"Performance: {label}, fastest layout, speed relative to the baseline", "measured", "higher",
             at(f"Performance / {label}, best", "{stack}", "ratio"))
        for label in ("GPT", "BERT", "T5", "BERT on MRPC")
    ),
    Head("Load balance: idle share of a 1F1B pipeline in its best partition, in %", "measured", "lower",
         best_row("Load balance / Pipelines", "bubble", "{stack}", min, without="vpp")),
    Head("Ease of use: of ten planted mistakes, how many the bare library trains through without an error", "measured",
         "lower", silent_mistakes),
    *(
        Head(f"Scalability: largest GPT on {number} H100 80 GB, without offload, in billions of parameters", "counted",
             "higher", best_row(LARGEST, "H100 80 GB", f"{number} GPU{'s' * (number > 1)}: {{stack}}", max))
        for number in (1, 8)
    ),
    Head("Ease of use: lines that a GPT recipe adds to the plain loop", "counted", "lower",
         at("Ease of use / Lines of a recipe", "gpt {stack}", "pretrain added")),
    Head("Ease of use: lines in the modules that GPT needs for this stack", "counted", "lower",
         at("Ease of use / Lines of a recipe", "gpt {stack}", "lines in them")),
    Head("Ease of use: lines for a change of the architecture, beside those for all stacks", "counted", "lower",
         at("Ease of use / Change of architecture", "{stack}", "added")),
    Head("Ease of use: silent traps found", "counted", "lower", at("Ease of use / Silent traps by stack", "{stack}", "traps")),
    Head("Ease of use: MB to install beyond the baseline", "counted", "",
         at("Ease of use / Packages", "{stack}, beyond it", "size")),
    Head("Ecosystem: runs compared with a plain training loop in this repository", "counted", "",
         at("Ecosystem / Checked here", "runs compared", "{stack}")),
    Head("Performance: Qwen2.5-14B on 8 A800, 8,192 tokens, s per step", "cited", "lower",
         published({"deepspeed": 10.32, "megatron": 9.04}, NEAREST)),
    Head("Ecosystem: releases in a year", "cited", "higher", at("Ecosystem / The projects", "releases in a year", "{stack}")),
)  # fmt: skip
PLACES: dict[Kind, str] = {"measured": "here", "predicted": "on H100", "counted": "in the code", "cited": "by others"}
KINDS: dict[Kind, str] = {
    "predicted": "Predicted for H100", "measured": "Measured here", "counted": "Counted", "cited": "Cited",
}  # fmt: skip


def figures(found: Sequence[Figure]) -> list[Figure]:
    """One table for each kind: a row for each head for which the report has a figure; then pros and cons, and their rule."""
    made: list[Figure] = []
    favours: dict[Kind, dict[str, str]] = {kind: {} for kind in KINDS}
    for kind, title in KINDS.items():
        for head in (head for head in HEADS if head.kind == kind):
            cells = {stack: head.find(found, stack) for stack in STACKS}
            if not any(cells[stack] for stack in COMPARED):
                continue
            made += [row(title, head, stack, cell) for stack, cell in cells.items()]
            source = next(cell.source for cell in cells.values() if cell)
            favours[kind][head.name] = verdict = in_favour(head, cells)
            made.append(Figure(f"{SECTION} / {title}", head.name, BETTER, verdict or None, "", kind, source))
    return [*made, *pros_and_cons(favours)] if made else []


def row(title: str, head: Head, stack: str, cell: Figure | None) -> Figure:
    section = f"{SECTION} / {title}"
    if cell is None:
        return Figure(section, head.name, stack, None, "", head.kind, f"no such figure of {stack} in this report")
    return Figure(section, head.name, stack, cell.value, "", head.kind, cell.source, cell.spread)


def in_favour(head: Head, cells: dict[str, Figure | None]) -> str:
    """The stack whose figure is better by RULE, UNCLEAR, or "" where one of the two has none, or neither is better."""
    first, second = (bounds(cells[stack]) for stack in COMPARED)
    if not first or not second or not head.better:
        return ""
    if head.better == "lower":
        first, second = (-first[1], -first[0]), (-second[1], -second[0])
    return COMPARED[0] if first[0] > second[1] else COMPARED[1] if second[0] > first[1] else UNCLEAR


def bounds(figure: Figure | None) -> tuple[float, float] | None:
    if figure is None or not isinstance(figure.value, int | float):
        return None
    around = abs(figure.value) * TENTH
    return figure.spread or (figure.value - around, figure.value + around)


def pros_and_cons(favours: dict[Kind, dict[str, str]]) -> Iterable[Figure]:
    section, source = f"{SECTION} / Pros and cons", "the tables above, by the rule below"
    for stack, other in (COMPARED, COMPARED[::-1]):
        for what, winner in (("pros", stack), ("cons", other)):
            for kind, names in favours.items():
                won = [name for name, favour in names.items() if favour == winner]
                if names:
                    yield Figure(section, f"{stack}: {what}", PLACES[kind], "; ".join(won) or "none", "", kind, source)
    yield Figure(f"{SECTION} / Rule", BETTER, "rule", RULE, "", "counted", "common/comparison/verdict.py")


NAMES = {"baseline": "plain data parallelism", "deepspeed": "DeepSpeed", "megatron": "Megatron Core"}
SHORT_NAMES = {"baseline": "baseline", "deepspeed": "DeepSpeed", "megatron": "Megatron"}
CHOICES, ON_16 = "Which one for you / GPT on H100", "Which one for you / 16 x H100"  # of common/comparison/choice.py
QUESTIONS: tuple[tuple[str, str, tuple[str, ...], tuple[str, ...]], ...] = (  # and the cells of a table that answer them
    ("GPT 1.3B on 8 GPUs", CHOICES, ("1.3B",), ("8 GPUs",)),
    ("GPT 13B on 16 GPUs", ON_16, ("GPT 13B",), ("take",)),
    ("GPT 13B on 64 GPUs", CHOICES, ("13B",), ("64 GPUs",)),
    ("GPT of 70B and above, on 64 GPUs or more", CHOICES, ("70B (Llama)", "175B"), ("64 GPUs", "1,024 GPUs")),
    ("BERT 1.3B on 16 GPUs", ON_16, ("BERT 1.3B",), ("take",)),
)


def in_words(figures: Sequence[Figure]) -> list[str]:
    """What to take, one sentence for each question, from the predicted layouts and the largest models of the same report."""
    lines = []
    for question, section, models, columns in QUESTIONS:
        cells = {(f.subject, f.metric): str(f.value) for f in figures if f.section == section}
        found = [cells[model, column] for model in models for column in columns if (model, column) in cells]
        if found:
            lines.append(f"- **{question}**: {take(found)}")
    find = next(head.find for head in HEADS if "CPU memory" in head.name)
    largest = {stack: figure for stack in COMPARED if (figure := find(figures, stack))}
    if len(largest) == len(COMPARED):
        first, second = sorted(COMPARED, key=lambda stack: -float(largest[stack].value or 0))
        sizes = [f"{float(largest[stack].value or 0):,.3g}" for stack in (first, second)]
        lines.append(
            f"- **A model larger than the memory of its GPUs**: {NAMES[first]}. On one GPU with 2 TB of CPU memory, a GPT of "
            f"up to {sizes[0]} billion parameters fits, against {sizes[1]} billion with {NAMES[second]}."
        )
    return lines


def named(answer: str) -> tuple[str, ...]:
    """('deepspeed', 'megatron') for 'either: deepspeed zero=1 micro=2, or megatron dist-opt micro=1'; () if nothing fits."""
    words = (part.split()[0] for part in answer.removeprefix("either: ").split(", or "))
    return tuple(word for word in words if word in STACKS)


def take(cells: Sequence[str]) -> str:
    """The sentence for the stacks, and for one cell the keys of the layout, that the cells of a question name."""
    answers = {named(cell) for cell in cells}
    if len(answers) > 1:
        return "It depends on the size and the number of GPUs; see the table."
    [stacks] = answers
    if not stacks:
        return "No layout of these recipes fits."
    layout = cells[0].removeprefix("either: ").partition(", or ")[0].partition(" (")[0]
    keys = f" (`{keys_of(layout)}`)" if len(cells) == 1 else ""
    if len(stacks) == 1:
        return f"{NAMES[stacks[0]]}{keys}. Its best layout is the fastest."
    what, least = ("All three", "simplest") if len(stacks) > 2 else (" and ".join(NAMES[stack] for stack in stacks), "simpler")
    return f"{what} are equally fast, within the error of the prediction. Take the {least}, {NAMES[stacks[0]]}{keys}."


def table_of_choices(figures: Sequence[Figure]) -> list[str]:
    """The stacks alone for each model and number of GPUs, as a Markdown table."""
    from common.comparison.render import Grid, markdown_table

    [table] = [table for table in tables(figures) if table.section == CHOICES]
    body = [[row, *(in_short(str(table.cells[row, column].value)) for column in table.columns)] for row in table.rows]
    head = ["GPT", *(column.replace("GPU", "H100").replace("100s", "100") for column in table.columns)]
    return markdown_table(Grid(CHOICES, head, body, [True] * len(head)))


ABOUT_CHOICES = (
    "These are the fastest layouts that `python -m scripts.plan` predicts; with `--write FILE`, it writes them into a config. "
    '"any": all three are equally fast within the error of the prediction. "offload": the optimizer\'s state is kept in CPU '
    "memory."
)
ABOUT_ROWS = (
    "[a .. b] is the spread of a measurement or the error of a prediction. \N{UPWARDS ARROW} means that higher is better. "
    "A stack is called better only if the ranges do not overlap; figures without a range must differ by a tenth. MFU is the "
    "share of the peak FLOP/s of the GPUs."
)


def in_short(answer: str) -> str:
    """'DeepSpeed, offload' for the answer 'deepspeed zero=3 offload=all micro=4 (231 GB of host memory per node)'."""
    stacks = named(answer)
    if not stacks:
        return "does not fit"
    offload = ", offload" if "offload" in answer else ""
    return ("any" if len(stacks) == len(STACKS) else " or ".join(SHORT_NAMES[stack] for stack in stacks)) + offload


def at_a_glance(figures: Sequence[Figure]) -> "Drawing | None":
    """GPT's losses on each other, and beside them the speed and the memory of each layout."""
    from common.pictures import INK, SMALL, STACK_COLOURS, new, whole_numbers

    found = {table.section: table for table in tables(figures) if table.section.startswith("Performance / GPT")}
    names = ("Performance / GPT, Timeline of the loss", "Performance / GPT", "Performance / GPT 1.3B on 8 GPUs, memory")
    if not all(name in found for name in names):
        return None
    losses, speed, memory = (found[name] for name in names)
    rows = speed.rows
    drawing, (left, middle, right) = new(1, 3, height=0.9 + 0.2 * len(rows))
    widths = dict(zip(STACKS, (9, 5, 1.5), strict=True))  # so that each shows beside those drawn over it
    for row in losses.rows:
        values = [number(losses, row, metric) for metric in losses.columns if metric.startswith("step ")]
        stack = row.split()[0]
        left.plot(range(1, len(values) + 1), values, color=STACK_COLOURS.get(stack, INK), linewidth=widths.get(stack, 1))
    left.set(title=f"{len(losses.rows)} layouts, one loss\n(measured)", xlabel="step", ylabel="loss, nats")
    whole_numbers(left)
    colours = [STACK_COLOURS.get(row.split()[0], INK) for row in rows]
    for axes, table, metric, title in (
        (middle, speed, "ratio", "relative speed\n(measured)"),
        (right, memory, "peak", "GB per GPU\n(predicted)"),
    ):
        values = [number(table, row, metric) for row in rows]
        ends = [cell.spread if (cell := table.cells.get((row, metric))) else None for row in rows]
        errors = [[abs(v - end[i]) if end else 0 for v, end in zip(values, ends, strict=True)] for i in (0, 1)]
        axes.barh(range(len(rows)), values, xerr=errors if any(ends) else None, color=colours, error_kw={"ecolor": INK})
        axes.set_yticks(range(len(rows)), [row.removeprefix("megatron ").removeprefix("deepspeed ") for row in rows])
        axes.set_title(title)
        axes.invert_yaxis()
    right.set_yticks([])
    for axes in (left, middle, right):
        axes.title.set_fontsize(SMALL)
    bars = {row.split()[0]: bar for row, bar in zip(rows, middle.patches, strict=True)}
    drawing.legend(bars.values(), bars.keys(), loc="outside lower center", ncols=3)
    return drawing


def number(table: Table, row: str, metric: str) -> float:
    """The value of a cell; 0 for one that is empty."""
    figure = table.cells.get((row, metric))
    return float(figure.value) if figure and isinstance(figure.value, int | float) else 0.0


CAPTION = (
    "Left, the losses of a small GPT in all layouts, drawn on each other (measured). Middle, the speed of each layout on this "
    "machine, with its spread (measured); its cores share one memory, so that sharding costs speed and gains nothing. Right, "
    "the peak memory per GPU of GPT 1.3B in these layouts on 8 GPUs, in micro batches of two (predicted)."
)
ABOUT = "small GPT on {hardware}; memory: GPT 1.3B on 8 GPUs"
PICTURES = (Picture("at_a_glance", SECTION, "One loss, and what each layout costs", ABOUT, CAPTION, at_a_glance),)


IN_README = {  # HEADS -> their shorter names
    "Performance: GPT 1.3B on 8 H100, MFU in %": "MFU of GPT 1.3B on 8 H100, %",
    "Performance: GPT 13B on 64 H100, MFU in %": "MFU of GPT 13B on 64 H100, %",
    "Scalability: GPT 175B on 1,024 H100, MFU in %": "MFU of GPT 175B on 1,024 H100, %",
    "Scalability: largest GPT on 1 H100 with 2 TB of CPU memory, in billions of parameters":
        "Largest GPT on 1 H100 and 2 TB of CPU memory, billions of parameters",
    "Scalability: largest GPT on 8 H100 80 GB, without offload, in billions of parameters":
        "Largest GPT on 8 H100, billions of parameters",
    "Performance: GPT, fastest layout, speed relative to the baseline": "Speed of a small GPT, x baseline",
    "Performance: BERT, fastest layout, speed relative to the baseline": "Speed of a small BERT, x baseline",
    "Performance: T5, fastest layout, speed relative to the baseline": "Speed of a small T5, x baseline",
    "Load balance: idle share of a 1F1B pipeline in its best partition, in %": "Idle share of a pipeline of two stages, %",
    "Ease of use: lines that a GPT recipe adds to the plain loop": "Lines that the GPT recipe has beyond a plain loop",
    "Ease of use: of ten planted mistakes, how many the bare library trains through without an error":
        "Of ten mistakes in a script, those that the library does not report",
    "Ecosystem: releases in a year": "Releases in a year",
}  # fmt: skip
ARROWS = {"higher": " \N{UPWARDS ARROW}", "lower": " \N{DOWNWARDS ARROW}", "": ""}


def shown_in_readme(figures: Sequence[Figure]) -> list[str]:
    """Some rows of the verdict as one Markdown table, with the kind of each row; an arrow says which is better."""
    lines = [f"| | kind | baseline | DeepSpeed | Megatron | {BETTER} |", "|---|---|---:|---:|---:|---|"]
    from common.comparison.render import cell

    arrows = {head.name: ARROWS[head.better] for head in HEADS}
    for table in tables(f for f in figures if f.section in {f"{SECTION} / {title}" for title in KINDS.values()}):
        for name in (name for name in table.rows if name in IN_README):
            kind = table.cells[name, BETTER].kind
            cells = [cell(table.cells.get((name, metric))) for metric in (*STACKS, BETTER)]
            cells[-1] = SHORT_NAMES.get(cells[-1], cells[-1])
            lines.append(f"| {IN_README[name]}{arrows[name]} | {kind} | {' | '.join(cells)} |")
    return lines
