"""Run the commands of docs/quick_tour.md and write what they print into it.

python -m scripts.document_tour

Each block of commands is followed by a block of output, and between them stands which of its lines are shown. The commands run
in a folder of their own with links to the repository's, so that paths are those of a reader. It takes about 5 minutes.
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from common.command_line import Parser
from common.errors import exit_cleanly
from common.paths import ROOT

PAGE = ROOT / "docs/quick_tour.md"
BLOCK = re.compile(
    r"```bash\n(?P<commands>(?:(?!```).)*)```\n<!-- output(?:, exit code (?P<code>\d+))?: (?P<shown>[^\n]*) -->\n"
    r"```\n(?P<output>.*?)```\n",
    re.S,
)


def main() -> None:
    Parser(prog="python -m scripts.document_tour", description=__doc__).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for entry in ROOT.iterdir():
            if entry.name not in ("out", "corpora"):
                (Path(folder) / entry.name).symlink_to(entry)
        page = BLOCK.sub(lambda block: ran(block, folder), PAGE.read_text(encoding="utf-8"))
    PAGE.write_text(page, encoding="utf-8")


def ran(block: re.Match[str], folder: str) -> str:
    """A block with today's output. An exit code that is not the expected one ends the script."""
    env = os.environ | {
        "CUDA_VISIBLE_DEVICES": "",
        "COLUMNS": "80",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    command = "set -e\n" + block["commands"]
    done = subprocess.run(
        ["bash", "-c", command], cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    print(f"{block['commands']}{done.stdout}", flush=True)
    if done.returncode != int(block["code"] or 0):
        sys.exit(f"exit code {done.returncode}: {block['commands']}")
    output = shown(done.stdout.replace(folder + "/", "").splitlines(), block["shown"])
    begin, end = block.start("output") - block.start(), block.end("output") - block.start()
    return block[0][:begin] + "\n".join(output) + "\n" + block[0][end:]


def shown(lines: list[str], which: str) -> list[str]:
    """`which` is 'all', or 'first N, last M': '...' stands for those between."""
    if which == "all":
        return lines
    first, last = (int(number) for number in re.findall(r"\d+", which))
    if len(lines) <= first + last:
        return lines
    return [*lines[:first], "...", *lines[len(lines) - last :]]


if __name__ == "__main__":
    exit_cleanly(main)
