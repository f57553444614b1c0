"""A report of scripts/benchmark.py as text for a terminal, as Markdown, and as one HTML file that needs no network.

All three show the same tables, and no figure without its kind and the command or publication it comes from.
"""

import html as escaping
import re
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from common import pictures as style
from common.comparison.figures import Figure, Picture, Report, Table, Value, tables

KINDS = {
    "measured": "on this machine, in this report; [a .. b] is its spread",
    "counted": "exactly: the same on any hardware",
    "predicted": "for the hardware that is named; [a .. b] or the text gives the error",
    "cited": "published by others, with the date",
}
DRAWN_ONLY = "Timeline"  # tables of this name are the data of a picture: they are in report.json alone
WIDEST = 7  # columns of a table on a page; a wider one of few rows is turned on its side
GAP = 2  # blanks between two columns on a terminal


class Drawn(NamedTuple):
    picture: Picture
    svg: str
    png: str  # name of the file beside the report


def draw(pictures: Iterable[Picture], report: Report, folder: Path) -> list[Drawn]:
    """Draw the pictures whose figures are there, and write FOLDER/NAME.png and NAME.svg of each."""
    drawn = []
    for picture in pictures:
        drawing = picture.draw(report.figures)
        if drawing is None:
            continue
        style.label(drawing, picture.title, f"{picture.about.format(hardware=report.hardware)}, {report.date}")
        style.save(drawing, folder / f"{picture.name}.png")
        svg = (folder / f"{picture.name}.svg").read_text(encoding="utf-8")
        drawn.append(Drawn(picture, inline(svg, picture.name), f"{picture.name}.png"))
    return drawn


def inline(svg: str, name: str) -> str:
    """An SVG file as an element of a page: its text and axes take the page's colour, and its ids are its own."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = svg.replace(style.INK, "currentColor")
    svg = re.sub(r'id="([^"]+)"', rf'id="{name}-\1"', svg)
    svg = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", svg)
    svg = re.sub(r'xlink:href="#([^"]+)"', rf'href="#{name}-\1"', svg)
    return re.sub(
        r'<svg ([^>]*?)height="[^"]*"([^>]*?)width="[^"]*"', rf'<svg role="img" aria-label="{name}" \1\2', svg, count=1
    )


# ---- cells -----------------------------------------------------------------------------------------------------------


def number(value: float) -> str:
    """Four digits at least, none of them cut before the point: 0.9183, 12.35, 351,739."""
    if isinstance(value, int):
        return f"{value:,}"
    if value == 0 or 1e-3 <= abs(value) < 1e7:
        digits = 0 if abs(value) >= 1000 else 1 if abs(value) >= 100 else 2 if abs(value) >= 10 else 3
        return f"{value:,.{digits}f}"
    return f"{value:.3g}"


def shown(value: Value) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return value if isinstance(value, str) else number(value)


def cell(figure: Figure | None) -> str:
    if figure is None:
        return ""
    spread = f" [{number(figure.spread[0])} .. {number(figure.spread[1])}]" if figure.spread else ""
    return shown(figure.value) + spread


def is_text(figures: Iterable[Figure]) -> bool:
    return any(isinstance(figure.value, str) for figure in figures)


def heading(table: Table, metric: str) -> str:
    first = table.column(metric)[0]
    unit = "" if first.unit in ("", metric) else f", {first.unit}"
    return f"{metric}{unit} ({first.kind})"


class Grid(NamedTuple):
    """A table as text. left: whether a column is aligned to the left."""

    title: str
    head: list[str]
    body: list[list[str]]
    left: list[bool]


def grid(table: Table) -> Grid:
    """Rows are subjects and columns metrics; turned on its side if there are many metrics of few subjects."""
    if len(table.columns) > WIDEST and len(table.rows) < len(table.columns) and len(table.rows) <= WIDEST:
        body = [[heading(table, m), *(cell(table.cells.get((row, m))) for row in table.rows)] for m in table.columns]
        return Grid(table.section, ["", *table.rows], body, [True, *(False for _ in table.rows)])
    body = [[row, *(cell(table.cells.get((row, m))) for m in table.columns)] for row in table.rows]
    head = ["", *(heading(table, m) for m in table.columns)]
    return Grid(table.section, head, body, [True, *(is_text(table.column(m)) for m in table.columns)])


def sources(table: Table) -> list[tuple[str, str]]:
    """(what, source) of a table: one for each column whose cells share it, else one for each row whose other cells with a value
    do, else one for each cell; equal ones joined. The source of a cell without a value is the reason."""
    found: dict[str, list[str]] = {}
    mixed = []
    for metric in table.columns:
        column = table.column(metric)
        if len({figure.source for figure in column}) == 1:
            found.setdefault(column[0].source, []).append(metric)
        else:
            mixed.append(metric)
    for row in table.rows:
        cells = {metric: table.cells[row, metric] for metric in mixed if (row, metric) in table.cells}
        shared = {figure.source for figure in cells.values() if figure.value is not None}
        if len(shared) == 1:
            [source] = shared
            found.setdefault(source, []).append(row)
            cells = {metric: figure for metric, figure in cells.items() if figure.source != source}
        for metric, figure in cells.items():
            found.setdefault(figure.source, []).append(f"{row}, {metric}")
    everything = len(found) == 1
    return [("all" if everything else "; ".join(what), source) for source, what in found.items()]


def shown_tables(report: Report) -> list[Table]:
    return [table for table in tables(report.figures) if DRAWN_ONLY not in table.section]


# ---- a terminal ------------------------------------------------------------------------------------------------------


def terminal(report: Report, width: int = 80, sections: Sequence[str] = ()) -> str:
    """The report, or these sections of it, in at most `width` columns: a wider table is continued in further blocks, and no
    number is cut."""
    lines = []
    for table in shown_tables(report):
        if sections and table.section.partition(" / ")[0] not in sections:
            continue
        lines += ["", table.section, "-" * min(width, len(table.section)), *blocks(grid(table), width)]
    lines += ["", *(wrapped for line in report.left_out for wrapped in textwrap.wrap(line, width, subsequent_indent="  "))]
    facts = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    lines += textwrap.wrap(f"{report.date}, {report.hardware}. {facts}. Commit {report.commit}.", width)
    return "\n".join(lines)


def blocks(grid: Grid, width: int) -> list[str]:
    """The lines of a table; its columns in as many blocks as the width needs, each with the first column."""
    columns = [[grid.head[i], *(row[i] for row in grid.body)] for i in range(len(grid.head))]
    first = min(max(len(text) for text in columns[0]), width // 3)
    sizes = [column_width(column, left, width - first - GAP) for column, left in zip(columns[1:], grid.left[1:], strict=True)]
    lines: list[str] = []
    begin = 0
    while begin < len(sizes):
        end = begin + 1
        while end < len(sizes) and first + sum(size + GAP for size in sizes[begin : end + 1]) <= width:
            end += 1
        chosen = [columns[0], *columns[begin + 1 : end + 1]]
        left = [grid.left[0], *grid.left[begin + 1 : end + 1]]
        lines += ([""] if begin else []) + block(chosen, [first, *sizes[begin:end]], left)
        begin = end
    return lines


def column_width(column: Sequence[str], is_text: bool, most: int) -> int:
    """Wide enough for the longest cell and the words of the head; a column of text may wrap at a third of what is there."""
    words = max((len(word) for cell in (column if is_text else column[:1]) for word in cell.split()), default=0)
    longest = max((len(cell) for cell in column[1:]), default=0)
    return min(most, max(words, min(longest, most // 3) if is_text else longest))


def block(columns: Sequence[Sequence[str]], sizes: Sequence[int], left: Sequence[bool]) -> list[str]:
    lines = []
    for row in zip(*columns, strict=True):
        parts = [textwrap.wrap(text, size, break_on_hyphens=False) or [""] for text, size in zip(row, sizes, strict=True)]
        for i in range(max(len(part) for part in parts)):
            texts = [part[i] if i < len(part) else "" for part in parts]
            aligned = [
                text.ljust(size) if is_left else text.rjust(size)
                for text, size, is_left in zip(texts, sizes, left, strict=True)
            ]
            lines.append((" " * GAP).join(aligned).rstrip())
    return lines


# ---- Markdown --------------------------------------------------------------------------------------------------------


def markdown(report: Report, drawn: Sequence[Drawn]) -> str:
    """Each `png` of `drawn` is the path of a picture from the page."""
    lines = [*introduction(report), ""]
    part = None
    for table in shown_tables(report):
        name, _, title = table.section.partition(" / ")
        if name != part:
            lines += pictures_after(drawn, part)
            lines += [f"## {name}", ""]
            part = name
        lines += [f"### {title}", ""] if title else []
        lines += [*markdown_table(grid(table)), ""]
        lines += markdown_sources(table)
    lines += pictures_after(drawn, part)
    lines += ["## What was not run", "", *(f"- {line}" for line in report.left_out or ["Every part was run."]), ""]
    return "\n".join(lines)


def introduction(report: Report) -> list[str]:
    facts = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    return [
        "# DeepSpeed or Megatron Core?", "",
        f"Made on {report.date} by `{report.command}` at commit {report.commit}, on {report.hardware}. {facts}.", "",
        "Each column says what kind of figure it holds. What only the pictures show is in report.json. In commands, DIR is a "
        "folder of real data (`--help`).", "",
        *(f"- **{kind}** {meaning}" for kind, meaning in KINDS.items()),
    ]  # fmt: skip


def markdown_table(grid: Grid) -> list[str]:
    def line(cells: Iterable[str]) -> str:
        return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"

    return [line(grid.head), line("---" if left else "---:" for left in grid.left), *(line(row) for row in grid.body)]


def markdown_sources(table: Table) -> list[str]:
    found = sources(table)
    if len(found) == 1:
        return [f"Source: {quoted(found[0][1])}", ""]
    return [
        "<details><summary>Sources</summary>",
        "",
        *(f"- {what}: {quoted(source)}" for what, source in found),
        "",
        "</details>",
        "",
    ]


def quoted(source: str) -> str:
    """A command as code, what follows it after a semicolon and a publication as text."""
    command, semicolon, rest = source.partition("; ")
    return f"`{command}`{semicolon}{rest}" if is_command(source) else source


def is_command(source: str) -> bool:
    return source.startswith(("python ", "bash ", "torchrun "))


def pictures_after(drawn: Sequence[Drawn], section: str | None) -> list[str]:
    lines = []
    for one in drawn:
        if section is not None and one.picture.section.partition(" / ")[0] == section:
            lines += [linked(one.picture.caption, one.png), "", f"*{one.picture.caption}*", ""]
    return lines


def linked(caption: str, png: str) -> str:
    """A picture that opens its SVG, whose text is sharp at any size."""
    return f"[![{caption}]({png})]({png.removesuffix('png')}svg)"


# ---- HTML ------------------------------------------------------------------------------------------------------------

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --quiet: #59636e; --page: #fff; --line: #d1d9e0; --head: #f6f8fa; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --quiet: #9198a1; --page: #0d1117; --line: #3d444d; --head: #151b23; }
}
@media print { :root { --ink: #000; --quiet: #444; --page: #fff; --line: #999; --head: #eee; } details > * { display: block; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 62rem; color: var(--ink); background: var(--page);
       font: 16px/1.5 system-ui, sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.6rem; line-height: 1.2; } h2 { border-bottom: 1px solid var(--line); margin-top: 2.5rem; }
nav a { margin-right: 1rem; display: inline-block; } a { color: inherit; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid var(--line); padding: .3rem .6rem; vertical-align: top; text-align: right;
         white-space: nowrap; }
th { background: var(--head); font-weight: 600; white-space: normal; vertical-align: bottom; }
.text { text-align: left; white-space: normal; min-width: 9rem; }
tbody th { text-align: left; vertical-align: top; position: sticky; left: 0; max-width: 45vw; }
.kind { display: block; font-weight: 400; color: var(--quiet); }
figure { margin: 1.5rem 0; } figure svg { width: 100%; max-width: 46rem; height: auto; color: var(--ink); }
figcaption, .source, summary { color: var(--quiet); font-size: .875rem; }
code { overflow-wrap: anywhere; }
"""


def html(report: Report, drawn: Sequence[Drawn]) -> str:
    found = shown_tables(report)
    names = list(dict.fromkeys(table.section.partition(" / ")[0] for table in found))
    parts = ["".join(html_table(table) for table in found if table.section.partition(" / ")[0] == name) for name in names]
    sections = [
        f'<section id="{anchor(name)}"><h2>{text(name)}</h2>{html_pictures(drawn, name)}{part}</section>'
        for name, part in zip(names, parts, strict=True)
    ]
    links = "".join(f'<a href="#{anchor(name)}">{text(name)}</a>' for name in names)
    facts = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    kinds = "".join(f"<li><b>{kind}</b> {text(meaning)}</li>" for kind, meaning in KINDS.items())
    left_out = "".join(f"<li>{text(line)}</li>" for line in report.left_out or ["Every part was run."])
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>DeepSpeed or Megatron Core?</title><style>{STYLE}</style></head><body>"
        f"<h1>DeepSpeed or Megatron Core?</h1><p>Made on {text(report.date)} by <code>{text(report.command)}</code> at commit "
        f"{text(report.commit)}, on {text(report.hardware)}. {text(facts)}.</p><nav>{links}</nav>"
        f"<p>Each column says what kind of figure it holds. What only the pictures show is in report.json.</p><ul>{kinds}</ul>"
        f"{''.join(sections)}<section><h2>What was not run</h2><ul>{left_out}</ul></section></body></html>\n"
    )


def text(value: str) -> str:
    return escaping.escape(value)


def anchor(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower())


def html_table(table: Table) -> str:
    shape = grid(table)
    title = table.section.partition(" / ")[2]
    head = "".join(
        f"<th{' class="text"' if left else ''}>{html_head(cell)}</th>"
        for cell, left in zip(shape.head, shape.left, strict=True)
    )
    rows = []
    for row in shape.body:
        cells = [
            f"<td{' class="text"' if left else ''}>{text(cell)}</td>"
            for cell, left in zip(row[1:], shape.left[1:], strict=True)
        ]
        rows.append(f"<tr><th>{html_head(row[0])}</th>{''.join(cells)}</tr>")
    body = f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    heading = f"<h3>{text(title)}</h3>" if title else ""
    return heading + body + html_sources(table)


def html_head(cell: str) -> str:
    """The kind of a column on a line of its own."""
    found = re.fullmatch(r"(.*) \((\w+)\)", cell)
    return f'{text(found[1])}<span class="kind">{found[2]}</span>' if found and found[2] in KINDS else text(cell)


def html_sources(table: Table) -> str:
    def written(source: str) -> str:
        command, semicolon, rest = source.partition("; ")
        return f"<code>{text(command)}</code>{text(semicolon + rest)}" if is_command(source) else text(source)

    found = sources(table)
    if len(found) == 1:
        return f'<p class="source">Source: {written(found[0][1])}</p>'
    items = "".join(f"<li>{text(what)}: {written(source)}</li>" for what, source in found)
    return f'<details class="source"><summary>Sources</summary><ul>{items}</ul></details>'


def html_pictures(drawn: Sequence[Drawn], section: str) -> str:
    return "".join(
        f"<figure>{one.svg}<figcaption>{text(one.picture.caption)}</figcaption></figure>"
        for one in drawn
        if one.picture.section.partition(" / ")[0] == section
    )
