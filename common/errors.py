"""How bad input is told: one clear line a problem, exit code 2, nothing started.

Exit codes of every command: 0 done, 2 bad input, 3 the loss became NaN or infinite, 143 (SIGTERM) or 130 (SIGINT) stopped
with the state saved; anything else is a fault and shows its traceback. A bare `torchrun -m` gives 1 for all but 0; the launch
scripts give the code itself, and two of their own: 4 no rank made progress for train.hang_seconds, 5 the connection to another
node was lost. 128 + N: signal N killed a rank (137: SIGKILL).
"""

import errno
import io
import sys
from collections.abc import Callable

EXIT_BAD_INPUT = 2
EXIT_NOT_FINITE = 3
EXIT_HANG = 4
EXIT_LOST = 5
EXIT_SIGINT = 130
EXIT_SIGTERM = 143
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO)  # full, or not to be written to


LINE = 4000  # characters of a problem at most, which must stay one that is read


def printable(text: str) -> str:
    """`text` in one line that does nothing to a terminal: control characters and the like as Python escapes them."""
    return text if text.isprintable() else "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def shortened(text: str, most: int = 200) -> str:
    """`text`, of which the middle is left out where it has more than `most` characters."""
    return text if len(text) <= most else f"{text[: most - 60]} ... ({len(text):,} characters) ... {text[-30:]}"


class BadInput(Exception):
    """Input that we refuse. Each line says what was given, what is allowed, and what to type."""

    def __init__(self, problems: str | list[str]):
        lines = [problems] if isinstance(problems, str) else problems
        self.problems = [printable(shortened(line, LINE)) for line in lines]
        super().__init__("\n".join(self.problems))


class Missing(BadInput):
    """Input that is not there yet: a dry run goes on without it."""


def exit_cleanly(main: Callable[[], int | None]) -> None:
    """Run a command's `main`; tell bad input on stderr and exit 2, else exit with what it returns (None is 0)."""
    for stream in (sys.stdout, sys.stderr):  # paths need not be text of the terminal's encoding
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        code = main() or 0
    except BadInput as error:
        for line in error.problems:
            print(f"error: {line}", file=sys.stderr)
        code = EXIT_BAD_INPUT
    except BrokenPipeError:
        sys.stderr.close()
        code = 0
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:  # what was given as a path can be none: bad input, wherever it is looked at first
            line = f"{str(error.filename)[:100]}...: {error.strerror}; give a path whose parts are shorter"
        elif error.errno in DISK_ERRORS:
            where = f"{error.filename}: " if error.filename else ""
            line = f"{where}{error.strerror}; make room there, or choose another place, and try again"
        else:
            raise
        print(f"error: {printable(line)}", file=sys.stderr)
        code = EXIT_BAD_INPUT
    except KeyboardInterrupt:
        code = EXIT_SIGINT
    sys.exit(code)
