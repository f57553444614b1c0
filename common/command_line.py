"""The argument parser of the commands."""

import argparse
import difflib
import re
import sys
from typing import NoReturn

from common import screen
from common.errors import EXIT_BAD_INPUT, printable, shortened


class Parser(argparse.ArgumentParser):
    """argparse's, which reports wrong arguments in one line, with the option that was probably meant; --help has the usage."""

    def error(self, message: str) -> NoReturn:
        unknown = re.search(r"unrecognized arguments: .*?(--[\w-]+)", message)
        close = difflib.get_close_matches(unknown[1], self._option_string_actions, 1) if unknown else []
        hint = f"; did you mean {close[0]}?" if close else ""
        line = printable(shortened(f"error: {message}{hint} (type {self.prog} --help)", 400))
        print(screen.error_line(line), file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)
