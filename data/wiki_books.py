"""Wikipedia and books in sentences: BERT's training text.

Wikipedia of November 2023 (6.4 million articles) and English books of Project
Gutenberg, in place of BookCorpus, which is no longer distributed. Both are
streamed from the hub, or read from --source: text files and folders of them,
or local folders of these datasets (column: text or TEXT). --max-mb takes the
first MB of each.

Only the text between Project Gutenberg's marks is taken from a book. Closing
sections (References, See also, ...) are dropped. Documents of fewer than
--min-words words and duplicates (apart from case and blanks) are skipped and
counted. Duplicates are searched within each dataset, and among all files.

    python -m data.wiki_books corpora/wiki_books
    python -m data.wiki_books corpora/books --source books/ --vocab-size 8192
"""

import hashlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from common.errors import BadInput, exit_cleanly
from data import build
from data.sources import Document, Errors, Files, Hub, Source

WIKI = ("wikimedia/wikipedia", "20231101.en", "text")  # name, config, column
BOOKS = ("sedthh/gutenberg_english", None, "TEXT")
CLOSING_CHARS = 20_000  # a closing section begins at most this far from the end, and in the second half

_BEGIN = re.compile(r"^\*\*\* ?START OF [^*]*\*\*\*", re.MULTILINE)
_END = re.compile(r"^\*\*\* ?END OF ", re.MULTILINE)
_CLOSING = re.compile(
    r"^[ \t]*(References|See also|External links|Further reading|Notes|Bibliography|Sources)[ \t\r]*$", re.MULTILINE
)


def clean(text: str) -> str:
    """A text without Project Gutenberg's header and footer and without the closing sections of an article."""
    begin, end = _BEGIN.search(text), _END.search(text)
    text = text[begin.end() if begin else 0 : end.start() if end else None]
    closing = _CLOSING.search(text, max(len(text) // 2, len(text) - CLOSING_CHARS))
    return text[: closing.start()].strip() if closing else text.strip()


def _key(text: str) -> bytes:
    return hashlib.blake2b(" ".join(text.casefold().split()).encode("utf-8", "surrogatepass"), digest_size=8).digest()


class WikiBooks:
    """Combines sources, one part each: cleans their documents, and leaves out short documents and duplicates."""

    def __init__(self, sources: Sequence[Source], min_words: int):
        self.sources, self.min_words = list(sources), min_words
        self.parts: list[str | None] = [None] * len(self.sources)
        self.whole_files = self.sources[0].whole_files if len(self.sources) == 1 else None
        sizes = [source.total_bytes for source in self.sources if source.total_bytes is not None]
        self.total_bytes = sum(sizes) if len(sizes) == len(self.sources) else None

    def identity(self) -> Any:
        return [[source.identity() for source in self.sources], self.min_words]

    def names(self) -> list[str]:
        return [name for source in self.sources for name in source.names()]

    def documents(self, part: int, cursor: list[int], errors: Errors) -> Iterator[Document]:
        """A cursor is that of the source. Documents before it are read again, to know which ones are duplicates."""
        source, seen = self.sources[part], set[bytes]()
        if cursor:
            for document in source.documents(0, [], Errors("skip")):
                text = clean(document.text)
                if self._long_enough(text):
                    seen.add(_key(text))
                if document.cursor == cursor:
                    break
        for document in source.documents(0, cursor, errors):
            text = clean(document.text)
            if not self._long_enough(text):
                errors.counts[f"shorter than {self.min_words} words"] += 1
            elif (key := _key(text)) in seen:
                errors.counts["came before"] += 1
            else:
                seen.add(key)
                yield Document(text, document.where, document.cursor)

    def _long_enough(self, text: str) -> bool:
        return len(text.split(None, self.min_words)) >= self.min_words


def _is_dataset(folder: Path) -> bool:
    marks = ("dataset_dict.json", "state.json", "*.parquet", "*.arrow")
    return folder.is_dir() and any(True for mark in marks for _ in folder.rglob(mark))


def sources(paths: Sequence[str] | None, max_document_mb: float | None = None) -> list[Source]:
    """The sources for these paths: one per dataset, and one for all files. None: Wikipedia and books from the hub."""
    if paths is None:
        return [Hub(name, config, [(None, "train")], column, max_document_mb) for name, config, column in (WIKI, BOOKS)]
    folders = [path for path in paths if _is_dataset(Path(path))]
    files = [path for path in paths if path not in folders]
    datasets: list[Source] = [Hub(path, None, [(None, "train")], ("text", "TEXT"), max_document_mb) for path in folders]
    return datasets + ([Files(files, max_document_mb=max_document_mb)] if files else [])


def main() -> None:
    p = build.parser(__doc__, valid_share=0.005, tokenizer="bert-base-uncased", tokenizer_type="wordpiece", sentences=True)
    p.add_argument("--source", metavar="PATH", nargs="+", help="text files, folders of them, or folders of datasets instead")
    p.add_argument(
        "--min-words", metavar="N", type=int, default=32, help="skip documents of fewer words (default: %(default)s)"
    )
    args = p.parse_args()
    if args.min_words < 1:
        raise BadInput(f"--min-words {args.min_words}: must be at least 1")
    build.build(build.options(args, "wiki_books"), WikiBooks(sources(args.source, args.max_document_mb), args.min_words))


if __name__ == "__main__":
    exit_cleanly(main)
