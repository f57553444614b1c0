"""Questions about Python's standard library and their answers, made of the docstrings of the installation: conversations to
finetune on that need no network.

    python -m data.python_chat corpora/python_chat

One a function or class that says in one paragraph what it does: "What does shutil.copyfile do?", and that paragraph. Writes
OUT/train.jsonl and OUT/valid.jsonl, {"prompt": ..., "response": ...} a line; every 20th is for validation. About 4,100 with
CPython 3.12; the content follows the version of Python.
"""

import argparse
import ast
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from common.errors import BadInput, exit_cleanly
from data.python_docs import PythonDocs
from data.sources import find_files

WORDS = range(4, 41)  # of an answer
VALID_EVERY = 20


def answers(name: str, source: str) -> Iterator[tuple[str, str]]:
    """(full name, first paragraph of the docstring) of what a module defines for others to use."""
    module = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")

    def inside(node: ast.AST, prefix: str) -> Iterator[tuple[str, str]]:
        for child in ast.iter_child_nodes(node):
            if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) or child.name.startswith("_"):
                continue
            first = " ".join((ast.get_docstring(child) or "").split("\n\n")[0].split())
            if len(first.split()) in WORDS:
                yield f"{prefix}.{child.name}", first
            if isinstance(child, ast.ClassDef):
                yield from inside(child, f"{prefix}.{child.name}")

    try:
        yield from inside(ast.parse(source), module)
    except SyntaxError:  # templates, code of another Python
        return


def modules(sources: Sequence[str] | None) -> list[tuple[str, Path]]:
    """(name, path) of the files of the standard library, or of the Python files in `sources`."""
    if sources is None:
        return PythonDocs().files
    found = [pair for source in sources for pair in find_files(Path(source)) if pair[0].endswith(".py")]
    if not found:
        raise BadInput(f"--source {' '.join(sources)}: no Python file (.py) there")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m data.python_chat", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", metavar="OUT", help="folder to fill")
    parser.add_argument("--source", metavar="PATH", nargs="+", help="Python files or folders of them instead")
    args = parser.parse_args()
    out = Path(args.out)
    public = [(name, path) for name, path in modules(args.source) if not name.startswith("_") and "/_" not in name]
    files = [(name, path) for name, path in public if name.endswith(".py")]
    found = [pair for name, path in files for pair in answers(name, path.read_text(encoding="utf-8", errors="replace"))]
    lines = [json.dumps({"prompt": f"What does {name} do?", "response": answer}) + "\n" for name, answer in found]
    try:
        out.mkdir(parents=True, exist_ok=True)
        parts = {"train": [line for i, line in enumerate(lines) if i % VALID_EVERY], "valid": lines[::VALID_EVERY]}
        for part, chosen in parts.items():
            (out / f"{part}.jsonl").write_text("".join(chosen), encoding="utf-8")
            print(f"{out / part}.jsonl  {len(chosen):,} conversations")
    except OSError as error:
        raise BadInput(f"{out}: cannot be written: {error.strerror}; choose another OUT") from None


if __name__ == "__main__":
    exit_cleanly(main)
