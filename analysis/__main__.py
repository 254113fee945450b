"""``python -m analysis RUN [--out DIR] [--plots NAME ...]``: draw the pictures of a run."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from analysis.command import Parser, run_command
from analysis.report import Report
from graphmoe.checkpoint import read


def main(argv: Sequence[str] | None = None) -> int:
    """Write ``plots/*.png`` and ``report.html`` and print their paths.

    Args:
        argv: Command line without the program's name.

    Returns:
        The exit status: 0, or 2 after one line on standard error.
    """
    parser = Parser("python -m analysis", "Draw the pictures of a run.")
    parser.add_argument("run", type=Path, help="run directory, or a step-* directory in it")
    parser.add_argument(
        "--out", type=Path, help="where plots/ and report.html go (default: the run directory)"
    )
    parser.add_argument("--plots", nargs="+", metavar="NAME", help="draw only these (default: all that fit)")
    return run_command(parser, _draw, argv)


def _draw(args: argparse.Namespace) -> None:
    record = read(args.run)
    report = Report(record, args.plots or "all")
    out = args.out or record.path
    print(*report.save(out / "plots"), report.to_html(out / "report.html"), sep="\n")


if __name__ == "__main__":
    sys.exit(main())
