"""``python -m analysis RUN [--out DIR] [--plots NAME ...]``: draw the pictures of a run."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from analysis.report import Report
from graphmoe.checkpoint import read
from graphmoe.errors import GraphMoEError


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Write ``plots/*.png`` and ``report.html`` and print their paths.

    Args:
        argv: Command line without the program's name.

    Returns:
        The exit status: 0, or 2 after one line on standard error.
    """
    parser = _Parser(prog="python -m analysis", description="Draw the pictures of a run.", allow_abbrev=False)
    parser.add_argument("run", type=Path, help="run directory, or a step-* directory in it")
    parser.add_argument(
        "--out", type=Path, help="where plots/ and report.html go (default: the run directory)"
    )
    parser.add_argument("--plots", nargs="+", metavar="NAME", help="draw only these (default: all that fit)")
    args = parser.parse_args(argv)
    try:
        record = read(args.run)
        report = Report(record, args.plots or "all")
        out = args.out or record.path
        paths = [*report.save(out / "plots"), report.to_html(out / "report.html")]
    except (GraphMoEError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    print(*paths, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
