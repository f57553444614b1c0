"""Conversations about Python's library, from its docstrings.

For finetuning, without network. Each function or class whose docstring's
first paragraph says what it does gives one conversation: "What does
shutil.copyfile do?", and that paragraph. OUT/train.jsonl and OUT/valid.jsonl
have one {"prompt": ..., "response": ...} per line; every 20th line goes to
valid. About 4,100 conversations with CPython 3.12; the content depends on the
version of Python.

    python -m data.python_chat corpora/python_chat
"""

import ast
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from common.command_line import Parser
from common.errors import BadInput, exit_cleanly
from data.python_docs import PythonDocs
from data.sources import find_files

WORDS = range(4, 41)  # words of an answer
VALID_EVERY = 20


def answers(name: str, source: str) -> Iterator[tuple[str, str]]:
    """(full name, first paragraph of the docstring) of the public functions and classes of a module."""
    module = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")

    def members(node: ast.AST, prefix: str) -> Iterator[tuple[str, str]]:
        for child in ast.iter_child_nodes(node):
            if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) or child.name.startswith("_"):
                continue
            first = " ".join((ast.get_docstring(child) or "").split("\n\n")[0].split())
            if len(first.split()) in WORDS:
                yield f"{prefix}.{child.name}", first
            if isinstance(child, ast.ClassDef):
                yield from members(child, f"{prefix}.{child.name}")

    try:
        yield from members(ast.parse(source), module)
    except SyntaxError:  # templates, code of another Python
        return


def modules(sources: Sequence[str] | None) -> list[tuple[str, Path]]:
    """(name, path) of the files of the standard library, or of the Python files in `sources`."""
    if sources is None:
        return PythonDocs().files
    files = [pair for source in sources for pair in find_files(Path(source)) if pair[0].endswith(".py")]
    if not files:
        raise BadInput(f"--source {' '.join(sources)}: no Python file (.py) there")
    return files


def main() -> None:
    title, _, rest = (__doc__ or "").partition("\n")
    parser = Parser(
        prog="python -m data.python_chat",
        description=title,
        epilog=rest,
    )
    parser.add_argument("out", metavar="OUT", help="folder to fill")
    parser.add_argument(
        "--source", metavar="PATH", nargs="+", help="Python files, or folders of them, instead of the standard library"
    )
    args = parser.parse_args()
    out = Path(args.out)
    public = [(name, path) for name, path in modules(args.source) if not name.startswith("_") and "/_" not in name]
    files = [(name, path) for name, path in public if name.endswith(".py")]
    pairs = [pair for name, path in files for pair in answers(name, path.read_text(encoding="utf-8", errors="replace"))]
    lines = [json.dumps({"prompt": f"What does {name} do?", "response": answer}) + "\n" for name, answer in pairs]
    try:
        out.mkdir(parents=True, exist_ok=True)
        splits = {"train": [line for i, line in enumerate(lines) if i % VALID_EVERY], "valid": lines[::VALID_EVERY]}
        for split, chosen in splits.items():
            (out / f"{split}.jsonl").write_text("".join(chosen), encoding="utf-8")
            print(f"{out / split}.jsonl  {len(chosen):,} conversations")
    except OSError as error:
        raise BadInput(f"{out}: cannot be written: {error.strerror}; choose another OUT") from None


if __name__ == "__main__":
    exit_cleanly(main)
