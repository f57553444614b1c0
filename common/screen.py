"""What commands put on the screen: colour and bars on a terminal, plain lines elsewhere. Torch-free."""

import contextlib
import os
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from typing import TextIO

WIDTH = 80  # columns of what runs print
STYLES = {"bold": 1, "dim": 2, "red": 31, "green": 32, "cyan": 36}  # SGR numbers that light and dark terminals show well
EVERY = 10  # seconds between two lines of progress that go to a file


def has_colour(stream: TextIO) -> bool:
    """Whether the stream is a terminal that shows colour, and the user wants it (https://no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def styled(text: str, style: str, stream: TextIO | None = None) -> str:
    """`text` in one of STYLES if `stream` (default: stdout) has colour, else as it is."""
    return f"\033[{STYLES[style]}m{text}\033[0m" if has_colour(stream or sys.stdout) else text


def error_line(text: str) -> str:
    """`text`, a line for stderr, with the word before its first colon in red on a terminal."""
    word, colon, rest = text.partition(":")
    return styled(word + colon, "red", sys.stderr) + rest if colon else text


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
