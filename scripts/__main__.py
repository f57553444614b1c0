"""Lists the commands of scripts/: `python -m scripts`."""

import ast
import re
import textwrap
from pathlib import Path


def main() -> None:
    print("python -m scripts.NAME, or bash scripts/NAME.sh; --help after the name explains it:\n")
    folder = Path(__file__).parent
    for path in sorted([*folder.glob("*.py"), *folder.glob("*.sh")]):
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".sh":
            name, title = f"bash scripts/{path.name}", re.findall(r"^# (.*)", text, re.M)[0]
        elif path.stem != "__main__" and not path.with_suffix(".sh").exists() and "__name__ ==" in text:
            name, title = f"python -m scripts.{path.stem}", (ast.get_docstring(ast.parse(text)) or "").split("\n\n")[0]
        else:
            continue
        print(f"  {name}\n" + textwrap.fill(" ".join(title.split()), 80, initial_indent=" " * 6, subsequent_indent=" " * 6))


if __name__ == "__main__":
    main()
