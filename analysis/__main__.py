"""``python -m analysis RUN [--text TEXT ...] [--out DIR] [--plots NAME ...]``: draw the pictures of a run, or
of what a model does with a text."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from analysis.command import Parser, run_command
from analysis.report import Report
from graphmoe.checkpoint import RunRecord, read
from graphmoe.errors import CheckpointError, ConfigError

TRACE = "trace"
"""Folder in that of a model for the pictures of a text, so that they do not replace those of the run."""


def main(argv: Sequence[str] | None = None) -> int:
    """Write ``plots/*.png`` and ``report.html`` and print their paths.

    Args:
        argv: Command line without the program's name.

    Returns:
        The exit status: 0, or 2 after one line on standard error.
    """
    parser = Parser("python -m analysis", "Draw the pictures of a run, or of what a model does with a text.")
    parser.add_argument(
        "run", type=Path, help="run directory, or a step-* directory in it; with --text also a model's folder"
    )
    parser.add_argument(
        "--text",
        nargs="+",
        help="trace the model on this text, or these, and draw that; the model, of this library or one of "
        "transformers with MoE layers, has its tokenizer beside it",
    )
    parser.add_argument(
        "--out",
        type=Path,
        help=f"where plots/ and report.html go (default: the run directory, with --text {TRACE}/ in it)",
    )
    parser.add_argument("--plots", nargs="+", metavar="NAME", help="draw only these (default: all that fit)")
    return run_command(parser, _draw, argv)


def _draw(args: argparse.Namespace) -> None:
    plots = args.plots or "all"
    if args.text is None:
        record = _read(args.run)
        report, out = Report(record, plots), args.out or record.path
    else:
        from transformers.utils import logging

        from graphmoe.viz import visualize

        if not sys.stderr.isatty():
            logging.disable_progress_bar()  # it is for those who watch
        report = visualize(args.run, plots, text=args.text)
        # Nothing is written into a checkpoint.
        home = args.run.absolute().parent if args.run.absolute().name.startswith("step-") else args.run
        out = args.out or home / TRACE
    print(*report.save(out / "plots"), report.to_html(out / "report.html"), sep="\n")


def _read(path: Path) -> RunRecord:
    try:
        return read(path)
    except CheckpointError as error:
        if (path / "config.json").is_file():
            raise ConfigError("a model shows what it does with a text", "--text", "a text", None) from error
        raise


if __name__ == "__main__":
    sys.exit(main())
