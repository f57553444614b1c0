"""How commands report bad input: one clear line per problem on stderr, exit code 2, and nothing is started."""

import errno
import importlib.util
import io
import sys
from collections.abc import Callable

from common import screen

# The exit codes of every command; --help of the launch scripts prints EXIT_CODES. Any other code is a bug, which shows its
# traceback. A bare `torchrun -m` exits with 1 in place of each of these.
EXIT_BAD_INPUT = 2
EXIT_NOT_FINITE = 3
EXIT_HANG = 4  # from the launch scripts alone, as EXIT_LOST
EXIT_LOST = 5
EXIT_SIGINT = 130
EXIT_SIGTERM = 143
EXIT_CODES = """\
0 done, 1 an error with its traceback, 2 bad input, 3 loss NaN or
infinite, 4 no progress for train.hang_seconds, 5 connection to
another node lost, 143 or 130 stopped by SIGTERM or SIGINT with the
state saved, 128 + N: signal N killed a rank"""
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO)  # full, or not to be written to


LINE = 4000  # characters of a problem at most: a longer line would not be read


def printable(text: str) -> str:
    """`text` as one line that is safe for a terminal: control characters and the like are escaped as in Python."""
    return text if text.isprintable() else "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def shortened(text: str, most: int = 200) -> str:
    """`text`, without its middle if it has more than `most` characters."""
    return text if len(text) <= most else f"{text[: most - 60]} ... ({len(text):,} characters) ... {text[-30:]}"


class BadInput(Exception):
    """Input that is refused. Each line says what was given, what is allowed, and what to type."""

    def __init__(self, problems: str | list[str]):
        lines = [problems] if isinstance(problems, str) else problems
        self.problems = [printable(shortened(line, LINE)) for line in lines]
        super().__init__("\n".join(self.problems))


class Missing(BadInput):
    """A file that does not exist yet: a dry run continues without it."""


def require_environment() -> None:
    """Exit with 2 and one line where this Python has not the packages: in a shell without the environment."""
    if sys.version_info >= (3, 12) and all(map(importlib.util.find_spec, ("pydantic", "numpy"))):
        return
    python = f"{sys.executable} (Python {sys.version_info[0]}.{sys.version_info[1]})"
    print(
        f"error: {python} is not the environment of these commands: activate it by `. .venv/bin/activate`, or make it first by "
        "`bash scripts/setup.sh`",
        file=sys.stderr,
    )
    sys.exit(EXIT_BAD_INPUT)


def exit_cleanly(main: Callable[[], int | None]) -> None:
    """Run a command's `main` and exit with what it returns (None is 0). Bad input is printed to stderr, and the code is 2."""
    for stream in (sys.stdout, sys.stderr):  # a path need not be text in the terminal's encoding
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        code = main() or 0
    except BadInput as error:
        for line in error.problems:
            print(screen.error_line(f"error: {line}"), file=sys.stderr)
        code = EXIT_BAD_INPUT
    except BrokenPipeError:
        sys.stderr.close()
        code = 0
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:  # an argument that cannot be a path: bad input, wherever it is used first
            line = f"{str(error.filename)[:100]}...: {error.strerror}; give a path whose parts are shorter"
        elif error.errno in DISK_ERRORS:
            where = f"{error.filename}: " if error.filename else ""
            line = f"{where}{error.strerror}; make room there, or choose another folder, and try again"
        else:
            raise
        print(screen.error_line(f"error: {printable(line)}"), file=sys.stderr)
        code = EXIT_BAD_INPUT
    except KeyboardInterrupt:
        code = EXIT_SIGINT
    sys.exit(code)
