"""Wikipedia and books: BERT's training text as it can still be had, cut into sentences, WordPiece.

Wikipedia of November 2023 (6.4 million articles) and English books of Project Gutenberg, in place of BookCorpus, which
is no longer distributed: both streamed from the hub. Or --source: text files and folders of them, local folders of these
data sets (column: text or TEXT). --max-mb takes the first MB of each.

Of a book what stands between Project Gutenberg's marks is taken; of any text the closing sections (References, See also,
...) are dropped. A document of fewer than --min-words words, and one that came before, case and blanks aside, is skipped
and counted; each data set is compared with itself, files with each other.

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
    """A text without Project Gutenberg's head and foot and without the closing sections of an article."""
    begin, end = _BEGIN.search(text), _END.search(text)
    text = text[begin.end() if begin else 0 : end.start() if end else None]
    closing = _CLOSING.search(text, max(len(text) // 2, len(text) - CLOSING_CHARS))
    return text[: closing.start()].strip() if closing else text.strip()


def _key(text: str) -> bytes:
    return hashlib.blake2b(" ".join(text.casefold().split()).encode("utf-8", "surrogatepass"), digest_size=8).digest()


class WikiBooks:
    """Other sources, one part each; their documents cleaned, the short ones and those that came before left out."""

    def __init__(self, sources: Sequence[Source], min_words: int):
        self.sources, self.min_words = list(sources), min_words
        self.parts: list[str | None] = [None] * len(self.sources)
        self.whole_files = self.sources[0].whole_files if len(self.sources) == 1 else None
        sizes = [source.total_bytes for source in self.sources]
        self.total_bytes = None if None in sizes else sum(sizes)

    def identity(self) -> Any:
        return [[source.identity() for source in self.sources], self.min_words]

    def names(self) -> list[str]:
        return [name for source in self.sources for name in source.names()]

    def documents(self, part: int, cursor: list[int], errors: Errors) -> Iterator[Document]:
        """A cursor is the source's own. What came before it is read again, for what must not come twice."""
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


def sources(given: Sequence[str] | None, max_document_mb: float | None = None) -> list[Source]:
    """Wikipedia and books of the hub, or what was given: each data set by itself, all files together."""
    if given is None:
        return [Hub(name, config, [(None, "train")], column, max_document_mb) for name, config, column in (WIKI, BOOKS)]
    sets = [path for path in given if _is_dataset(Path(path))]
    files = [path for path in given if path not in sets]
    found: list[Source] = [Hub(path, None, [(None, "train")], ("text", "TEXT"), max_document_mb) for path in sets]
    return found + ([Files(files, max_document_mb=max_document_mb)] if files else [])


def main() -> None:
    p = build.parser(__doc__, valid_share=0.005, tokenizer="bert-base-uncased", tokenizer_type="wordpiece", sentences=True)
    p.add_argument("--source", metavar="PATH", nargs="+", help="text files, folders of them or of data sets instead")
    told = "skip documents of fewer words (default: %(default)s)"
    p.add_argument("--min-words", metavar="N", type=int, default=32, help=told)
    args = p.parse_args()
    if args.min_words < 1:
        raise BadInput(f"--min-words {args.min_words}: at least 1")
    build.build(build.options(args, "wiki_books"), WikiBooks(sources(args.source, args.max_document_mb), args.min_words))


if __name__ == "__main__":
    exit_cleanly(main)
