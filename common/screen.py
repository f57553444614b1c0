"""What commands put on the screen: colour and bars on a terminal, plain lines elsewhere; tables. Torch-free."""

import contextlib
import os
import shutil
import signal
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from typing import Any, TextIO, cast

WIDTH = 80  # columns of what runs print
STYLES = {"bold": 1, "dim": 2, "red": 31, "green": 32, "cyan": 36}  # SGR numbers that light and dark terminals show well
EVERY = 10  # seconds between two lines of progress that go to a file


class Piped:
    """A stream that outlives its reader: when `| head` or a viewer has ended, what is still written goes nowhere, and this
    process gets SIGTERM once. A run then stops as it does when it is asked to, with its state saved; a BrokenPipeError in the
    middle of a step would look like a lost connection."""

    def __init__(self, stream: TextIO):
        self.stream = stream

    def write(self, text: str) -> int:
        with self._without_reader():
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._without_reader():
            self.stream.flush()

    @contextlib.contextmanager
    def _without_reader(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.stream.fileno())  # for libraries too, and for what is still in the buffer
            os.close(nowhere)
            with contextlib.suppress(OSError):  # stderr's reader may be the one that has ended
                os.write(2, b"note: nothing reads the output any more (`| head` ends after its lines), so this run stops\n")
            os.kill(os.getpid(), signal.SIGTERM)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def outlive_readers() -> None:
    """Let stdout and stderr of this process outlive their readers."""
    if not isinstance(sys.stdout, Piped):
        sys.stdout, sys.stderr = cast(TextIO, Piped(sys.stdout)), cast(TextIO, Piped(sys.stderr))


def has_colour(stream: TextIO) -> bool:
    """Whether the stream is a terminal that shows colour, and the user wants it (https://no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def styled(text: str, style: str, stream: TextIO | None = None) -> str:
    """`text` in one of STYLES if `stream` (default: stdout) has colour, else as it is."""
    return f"\033[{STYLES[style]}m{text}\033[0m" if has_colour(stream or sys.stdout) else text


def error_line(text: str, style: str = "red") -> str:
    """`text`, a line for stderr. On a terminal the word before its first colon is in one of STYLES, and a line that is too long
    goes on between two words, indented; no word is cut, so that paths and commands stay whole. Elsewhere it stays one line."""
    if sys.stderr.isatty():
        text = textwrap.fill(text, width(), subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
    word, colon, rest = text.partition(":")
    return styled(word + colon, style, sys.stderr) + rest if colon else text


def field(name: str, text: str) -> str:
    """'layout    megatron: ...': a name and what there is to say, in lines of WIDTH columns. Nothing is cut; a word that is
    longer than a line stays whole."""
    lines = textwrap.wrap(text, WIDTH - 10, break_long_words=False, break_on_hyphens=False) or [""]
    first, *more = lines
    return "\n".join([f"{styled(f'{name:<9}', 'dim')} {first}", *(f"{'':10}{line}" for line in more)])


def count(number: float) -> str:
    """18600 -> '18.6k'"""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.1f}{unit}"
    return f"{number:.0f}"


def duration(seconds: float) -> str:
    """77 -> '1m17s'"""
    whole = int(seconds)
    hours, minutes = whole // 3600, whole // 60 % 60
    if hours >= 24:
        return f"{hours // 24}d{hours % 24}h"
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{whole % 60:02}s" if minutes else f"{whole}s"


@contextlib.contextmanager
def progress(what: str, total: int, unit: str, shown: bool = True) -> Iterator[Callable[[int], None]]:
    """A function to call with the number of units that are done. On a terminal there is a bar, which leaves nothing behind;
    elsewhere a line every EVERY seconds. shown: whether this process shows it (rank 0)."""
    begin = last = time.monotonic()

    def line(done: int) -> None:
        nonlocal last
        now = time.monotonic()
        if done and now - last >= EVERY:
            last = now
            left = duration((now - begin) / done * max(0, total - done))
            print(f"{what:<9} {done:,} of {total:,} {unit}, {left} left", flush=True)

    if not shown:
        yield lambda done: None
        return
    if not has_colour(sys.stdout):
        yield line
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(f"{what:<9}"), BarColumn(30), MofNCompleteColumn(), TextColumn(unit), TimeRemainingColumn(True))
    with Progress(*columns, transient=True, console=Console(highlight=False)) as bars:
        task = bars.add_task("", total=total)
        yield lambda done: bars.update(task, completed=done)


def width() -> int:
    """Columns of the terminal (or COLUMNS), 80 where the output goes to a file."""
    return shutil.get_terminal_size((WIDTH, 24)).columns


def table(headings: Sequence[str], rows: Sequence[Sequence[str]], words: Set[int], columns: int | None = None) -> str:
    """A table in at most `columns` columns (default: those of the terminal) of which no cell is cut.

    words: the columns of text, left-aligned, whose cells may be wrapped between words. The others, numbers, are right-aligned.
    Where the longest words do not fit beside each other, each row becomes a block of lines.
    """
    columns = columns or width()
    natural = [max(map(len, column)) for column in zip(headings, *rows, strict=True)]
    least = [_longest_word([headings[i], *(row[i] for row in rows if i in words)]) for i in range(len(headings))]
    least = [max(n, 0 if i in words else max((len(row[i]) for row in rows), default=0)) for i, n in enumerate(least)]
    gap = 2 if sum(least) + 2 * (len(headings) - 1) <= columns else 1  # blanks between columns
    room = columns - gap * (len(headings) - 1)
    if sum(least) > room:
        return _blocks(headings, rows, columns)
    widths = list(natural)
    while sum(widths) > room:  # the widest column that can be narrower
        narrowed = max((i for i in range(len(widths)) if widths[i] > least[i]), key=lambda i: widths[i])
        widths[narrowed] -= 1

    def lines(cells: Sequence[str]) -> list[str]:
        wrapped = [_wrapped(cell, size) for cell, size in zip(cells, widths, strict=True)]
        height = max(map(len, wrapped))
        padded = [part + [""] * (height - len(part)) for part in wrapped]
        aligned = [
            [
                f"{part:<{size}}" if i in words else f"{part:>{size}}"
                for i, (part, size) in enumerate(zip(line, widths, strict=True))
            ]
            for line in zip(*padded, strict=True)
        ]
        return [(" " * gap).join(line).rstrip() for line in aligned]

    return "\n".join([*(styled(line, "dim") for line in lines(headings)), *(line for row in rows for line in lines(row))])


def _blocks(headings: Sequence[str], rows: Sequence[Sequence[str]], columns: int) -> str:
    """Below each row's first cell the others, each behind its heading."""
    blocks: list[str] = []
    for first, *rest in rows:
        blocks.append(first)
        pairs = [f"{name} {cell}" for name, cell in zip(headings[1:], rest, strict=True) if cell]
        blocks += together(pairs, columns - 4, "    ")
    return "\n".join(blocks)


def together(pieces: Iterable[str], columns: int, indent: str = "") -> list[str]:
    """Lines of as many pieces as `columns` have room for, two blanks between them. No piece is cut."""
    lines = [""]
    for piece in pieces:
        longer = f"{lines[-1]}  {piece}" if lines[-1] else piece
        lines = [*lines[:-1], longer] if len(longer) <= columns else [*lines, piece]
    return [indent + line for line in lines if line]


def _longest_word(cells: Iterable[str]) -> int:
    return max((len(word) for cell in cells for word in cell.split()), default=0)


def _wrapped(cell: str, size: int) -> list[str]:
    lead = len(cell) - len(cell.lstrip(" *"))  # the lines below an indented first one are indented further
    indent = " " * (lead + 2) if lead else ""
    return textwrap.wrap(cell, size, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False) or [""]
