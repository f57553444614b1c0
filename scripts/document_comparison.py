"""Write docs/comparison.md with its pictures, and the verdict in README.md, from docs/comparison/report.json.gz.

    python -m scripts.document_comparison
    python -m scripts.document_comparison --measure [arguments of scripts.benchmark]

With --measure, scripts.benchmark first measures on this machine, about 20 minutes on 2 cores, into out/comparison.
"""

import argparse
import gzip
import json
import re
import sys

from common.command_line import Parser
from common.comparison import render, verdict
from common.comparison.figures import Report
from common.errors import exit_cleanly
from common.paths import ROOT
from scripts import benchmark

FOLDER = ROOT / "docs/comparison"
REPORT = FOLDER / "report.json.gz"  # of report.json, which is larger than a file here may be
MEASURED = ROOT / "out/comparison"
PAGE = ROOT / "docs/comparison.md"
README = ROOT / "README.md"
BLOCK = re.compile(
    r"(<!-- generated: verdict \(python -m scripts\.document_comparison\) -->\n).*?(<!-- end of generated -->)", re.S
)
BROWSER = f"""
## In a browser

`report.html`, which `python -m scripts.benchmark` writes beside its other files, on a screen and on a phone:

![The first screen of report.html, 1,400 pixels wide]({FOLDER.name}/page_1400.png)

![The first screen of report.html, 390 pixels wide]({FOLDER.name}/page_390.png)
"""


def main() -> int:
    parser = Parser(prog="python -m scripts.document_comparison", description=__doc__)
    parser.add_argument("--measure", nargs=argparse.REMAINDER, metavar="WORD", help="measure first, by scripts.benchmark")
    words = parser.parse_args().measure
    if words is not None:
        sys.argv[1:] = [*words, "--out", str(MEASURED.relative_to(ROOT))]
        code = benchmark.main()
        if code:
            return code
        write(benchmark.read_report(MEASURED))
    report = read()
    render.draw(benchmark.pictures(), with_verdict(report), FOLDER)
    PAGE.write_text(page(report), encoding="utf-8")
    README.write_text(readme(README.read_text(encoding="utf-8"), report), encoding="utf-8")
    print(PAGE, README, sep="\n")
    return 0


def write(report: Report) -> None:
    FOLDER.mkdir(exist_ok=True)
    text = json.dumps(report.to_json(), separators=(",", ":"))
    REPORT.write_bytes(gzip.compress(text.encode(), mtime=0))


def read() -> Report:
    return Report.from_json(json.loads(gzip.decompress(REPORT.read_bytes())))


def page(report: Report) -> str:
    """docs/comparison.md"""
    shown = with_verdict(report)
    drawn = [render.Drawn(p, "", f"{FOLDER.name}/{p.name}.png") for p in benchmark.pictures() if p.draw(shown.figures)]
    return render.markdown(shown, drawn) + BROWSER


def readme(text: str, report: Report) -> str:
    """README.md with the verdict of a report: in words, the stack for some models and numbers of GPUs, then the figures."""
    shown = with_verdict(report)
    lines = [*verdict.in_words(shown.figures), "", *verdict.table_of_choices(shown.figures), "", verdict.ABOUT_CHOICES, ""]
    lines += [render.linked(verdict.CAPTION, f"{FOLDER.relative_to(ROOT)}/at_a_glance.png"), "", f"*{verdict.CAPTION}*", ""]
    lines += [
        *verdict.shown_in_readme(shown.figures),
        "",
        f"{verdict.ABOUT_ROWS} Measured on {report.date} on {report.hardware}, commit {report.commit[:12]}.",
    ]
    return BLOCK.sub(lambda found: found[1] + "\n" + "\n".join(lines) + "\n" + found[2], text)


def with_verdict(report: Report) -> Report:
    figures = [f for f in report.figures if not f.section.startswith(verdict.SECTION)]
    ordered = benchmark.in_order([*figures, *verdict.figures(figures)])
    return Report(report.command, report.date, report.commit, report.hardware, report.versions, ordered, report.left_out)


if __name__ == "__main__":
    exit_cleanly(main)
