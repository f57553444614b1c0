"""Lists what can be built: `python -m data`."""

import ast
import textwrap
from pathlib import Path

ENGINE = {"__main__", "build", "sentences", "sources"}


def main() -> None:
    print("python -m data.NAME OUT, or --help after the name:\n")
    for path in sorted(Path(__file__).parent.glob("*.py")):
        if path.stem not in ENGINE:
            title = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split("\n")[0]
            print(f"  {path.stem:<16} {textwrap.shorten(title, 60, placeholder=' ...')}")


if __name__ == "__main__":
    main()
