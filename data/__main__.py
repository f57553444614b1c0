"""Lists the modules of data/: `python -m data`."""

import ast
from pathlib import Path

from common.errors import exit_cleanly

NOT_COMMANDS = {"__init__", "__main__", "build", "sentences", "sources"}


def main() -> None:
    print("python -m data.NAME OUT builds a corpus; --help after a NAME lists its options.\n")
    for path in sorted(Path(__file__).parent.glob("*.py")):
        if path.stem not in NOT_COMMANDS:
            title = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split("\n")[0]
            print(f"  {path.stem:<16} {title}")


if __name__ == "__main__":
    exit_cleanly(main)
