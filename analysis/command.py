"""What the commands of this package share: a parser that says what is wrong in one line."""

import argparse
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from graphmoe.errors import GraphMoEError


class Parser(argparse.ArgumentParser):
    """An argument parser without abbreviated flags, which exits with 2 after one line."""

    def __init__(self, prog: str, description: str):
        super().__init__(prog=prog, description=description, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def run_command(
    parser: Parser, command: Callable[[argparse.Namespace], None], argv: Sequence[str] | None
) -> int:
    """Parse the command line, run ``command`` on it, and return the exit status.

    Args:
        parser: Reads the command line.
        command: Does the work.
        argv: Command line without the program's name.

    Returns:
        0, or 2 after one line on standard error, or 141 where nobody reads standard output any more, as
        behind ``| head``.
    """
    args = parser.parse_args(argv)
    try:
        command(args)
        sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes once more when it exits, and would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except (GraphMoEError, OSError) as error:
        print(f"{parser.prog}: {' '.join(str(error).splitlines())}", file=sys.stderr)
        return 2
    return 0
