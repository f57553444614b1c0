"""Python's standard library and reference, without network.

Documents are the sources of the installed standard library, its text files
(licence, history, grammars), and each topic of the language reference that
`help()` shows: 10 to 12 MB with CPython 3.12. Tests, installed packages and
generated tables are left out. The content depends on the version of Python;
--source takes any text instead.

    python -m data.python_docs corpora/python_docs
    python -m data.python_docs corpora/python_docs --source notes/ \\
        --vocab-size 8192
"""

import hashlib
import importlib
import json
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common.errors import BadInput, exit_cleanly
from data import build
from data.sources import Document, Errors, Files, Source, hash_of_files, read_text

EXCLUDED_FOLDERS = frozenset(
    {"__pycache__", "dist-packages", "idle_test", "lib-dynload", "pydoc_data", "site-packages", "test", "tests"}
)
TABLE = "decoding_table = ("  # in the generated modules of encodings/


class PythonDocs:
    """Files of the standard library, sorted, then the topics of the reference, sorted."""

    whole_files: int | None = None  # hundreds of documents: shares by document

    def __init__(self, root: Path | None = None):
        self.parts: list[str | None] = [None]
        self.root = root or Path(sysconfig.get_path("stdlib"))
        paths = sorted((path.relative_to(self.root).as_posix(), path) for path in self.root.rglob("*"))
        self.files = [(name, path) for name, path in paths if self._wanted(path)]
        self.topics: list[tuple[str, str]] = []
        try:
            topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
            self.topics = sorted(topics.items())
        except ImportError:
            pass  # some installations lack it
        if not self.files:
            raise BadInput(f"{self.root}: no sources of the standard library; give other text: --source PATH")
        self.total_bytes: int | None = sum(p.stat().st_size for _, p in self.files) + sum(len(text) for _, text in self.topics)

    def _wanted(self, path: Path) -> bool:
        relative = path.relative_to(self.root)
        if EXCLUDED_FOLDERS.intersection(relative.parts) or relative.name.startswith("_sysconfigdata"):
            return False
        return path.suffix in (".py", ".txt") and path.is_file() and path.stat().st_size > 0

    def identity(self) -> Any:
        return [hash_of_files(self.files), hashlib.sha256(json.dumps(self.topics).encode()).hexdigest()]

    def names(self) -> list[str]:
        version = ".".join(map(str, sys.version_info[:3]))
        return [f"Python {version}", *(name for name, _ in self.files), *(f"topic {name}" for name, _ in self.topics)]

    def documents(self, part: int, cursor: list[int], errors: Errors) -> Iterator[Document]:
        """A cursor is [documents done], which counts tables too."""
        done = cursor[0] if cursor else 0
        for number in range(done, len(self.files) + len(self.topics)):
            if number < len(self.files):
                name, path = self.files[number]
                text = read_text(path, errors)
                if text is None or name.startswith("encodings/") and TABLE in text:
                    continue
            else:
                name, text = self.topics[number - len(self.files)]
            yield Document(text, name, [number + 1])


def main() -> None:
    p = build.parser(__doc__, valid_share=0.1, vocab_size=4096)
    p.add_argument("--source", metavar="PATH", nargs="+", help="text files or folders instead")
    args = p.parse_args()
    source: Source = Files(args.source, max_document_mb=args.max_document_mb) if args.source else PythonDocs()
    build.build(build.options(args, "python_docs"), source)


if __name__ == "__main__":
    exit_cleanly(main)
