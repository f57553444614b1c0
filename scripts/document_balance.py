"""Write the table of docs/layouts.md that says how evenly the stages of a pipeline are loaded.

python -m scripts.document_balance          from docs/planner/balance.json
python -m scripts.document_balance DIR      from DIR/report.json of scripts.benchmark, whose figures are kept in that file first
"""

import re
from dataclasses import asdict
from pathlib import Path

from common.command_line import Parser
from common.comparison.figures import Report, select, tables
from common.comparison.timeline_picture import PIPELINES
from common.errors import BadInput, exit_cleanly
from common.json_files import read_object, write_json
from common.paths import ROOT

PAGE, KEPT = ROOT / "docs/layouts.md", ROOT / "docs/planner/balance.json"
TABLE = re.compile(
    r"(<!-- generated: balance \(python -m scripts\.document_balance\) -->\n).*?(<!-- end of generated -->)", re.S
)
COLUMNS = ("slowest stage / mean", "bubble", "of it exchanges", "bubble of equal stages", "bubble of these stages")


def main() -> None:
    parser = Parser(prog="python -m scripts.document_balance", description=__doc__.splitlines()[0])
    parser.add_argument("dir", nargs="?", type=Path, metavar="DIR")
    folder = parser.parse_args().dir
    if folder:
        write_json(KEPT, kept(folder))
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


def kept(folder: Path) -> dict[str, object]:
    """The report in a folder, with the figures of the table alone."""
    values = read_object(folder / "report.json")
    report = Report.from_json(values) if values else None
    figures = select(report.figures, PIPELINES) if report else []
    if not report or not figures:
        raise BadInput(
            f"{folder}: has no report.json with pipelines; type: python -m scripts.benchmark --parts balance_pipelines"
        )
    return report.to_json() | {"figures": [asdict(figure) for figure in figures]}


def page(text: str) -> str:
    """docs/layouts.md with the table of the report that is kept."""
    values = read_object(KEPT)
    if values is None:
        raise BadInput(f"{KEPT}: is not there or cannot be read; give the folder of a report")
    return TABLE.sub(lambda match: match[1] + table(Report.from_json(values)) + match[2], text)


def table(report: Report) -> str:
    [found] = tables(report.figures)
    lines = [f"| layout | {' | '.join(COLUMNS)} |", "|---" * (1 + len(COLUMNS)) + "|"]
    for row in found.rows:
        cells = []
        for figure in (found.cells[row, column] for column in COLUMNS):
            digits, unit = (1, " %") if figure.unit == "%" else (2, "")
            low, high = figure.spread or (None, None)
            spread = f" [{low:.{digits}f} .. {high:.{digits}f}]" if low is not None and "exchanges" not in figure.metric else ""
            cells.append(f"{figure.value:.{digits}f}{unit}{spread}")
        lines.append(f"| {row} | {' | '.join(cells)} |")
    versions = ", ".join(f"{name} {report.versions[name]}" for name in ("torch", "deepspeed", "megatron-core"))
    return "\n".join([*lines, "", f"Measured on {report.date}: {report.hardware}; {versions}. `{report.command}`", ""])


if __name__ == "__main__":
    exit_cleanly(main)
