"""The argument parser of the commands."""

import argparse
import difflib
import re
import sys
import textwrap
from typing import NoReturn

from common import screen
from common.errors import EXIT_BAD_INPUT, printable, shortened

NAMES = 40  # columns that the names of a list have at most
WRAPPED = 100  # a longer line of a docstring goes on in the next one: they have up to 128 columns


class Help(argparse.RawDescriptionHelpFormatter):
    """The docstring of a command with its own lines, wrapped where the terminal is narrower."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "\n".join(indent + line for line in reflowed(text, width + 2))


def reflowed(text: str, width: int) -> list[str]:
    """The lines of a text whose paragraphs were wrapped in wider lines. Wrapped lines are indented as the text of theirs, also
    in a list such as 'name       what it means'."""
    joined: list[str] = []
    last = ""  # the last line as it was written
    for line in text.splitlines():
        column = _column(joined[-1]) if joined else 0
        goes_on = len(last) > WRAPPED and len(line) - len(line.lstrip()) == column
        if goes_on and line.strip() and not line.strip().startswith(("python ", "bash ", "torchrun ")):
            joined[-1] += f" {line.strip()}"
        else:
            joined.append(line)
        last = line
    return [
        part
        for line in joined
        for part in textwrap.wrap(
            line, width, subsequent_indent=" " * _column(line), break_long_words=False, break_on_hyphens=False,
            drop_whitespace=True, replace_whitespace=False,
        ) or [""]
    ]  # fmt: skip


def _column(line: str) -> int:
    """Where the text of a line begins: after its indentation, or after the name and two or more spaces of a list."""
    found = re.match(r"\s*(\S+( \S+)*\s{2,})?", line)
    assert found is not None
    return found.end() if found.end() <= NAMES else len(line) - len(line.lstrip())


class Parser(argparse.ArgumentParser):
    """argparse's, which reports wrong arguments in one line, with the option that was probably meant; --help has the usage, and
    the docstring of the command as it stands there."""

    def __init__(self, *words: object, **options: object) -> None:
        super().__init__(*words, **({"formatter_class": Help} | options))  # type: ignore[arg-type]

    def error(self, message: str) -> NoReturn:
        options = [word.partition("=")[0] for word in sys.argv[1:] if word.startswith("--")]
        known = self._option_string_actions
        unknown = next((word for word in options if not any(name.startswith(word) for name in known)), None)
        close = difflib.get_close_matches(unknown, known, 1) if unknown else []
        hint = f"; {unknown}: did you mean {close[0]}?" if close else ""
        line = printable(shortened(f"error: {message}{hint} (type {self.prog} --help)", 400))
        print(screen.error_line(line), file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)
