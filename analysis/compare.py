"""``python -m analysis.compare RUN RUN ... [--out DIR] [--baseline LABEL]``: compare finished runs.

Runs that differ only in their seed make a group. Models are compared at equal seeds: what the seed
does to both, such as the documents it holds out, cancels in the difference.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from analysis.balance import balance, is_balanced
from analysis.command import Parser, run_command
from analysis.comparison_figure import comparison
from analysis.comparison_table import csv_table, markdown_table
from analysis.groups import Group, group_runs
from analysis.memory_ablation import is_memory_ablation, memory_ablation
from analysis.output import png, write
from analysis.trade_off import points_of, trade_off
from graphmoe.checkpoint import RunRecord, read
from graphmoe.errors import ConfigError

DEFAULT_BASELINE = "moe"


@dataclass(frozen=True)
class Comparison:
    """Groups of runs side by side.

    Attributes:
        groups: What is compared, in the order of the rows.
        baseline: Label of the group that differences are taken to; ``None`` shows no differences.
    """

    groups: tuple[Group, ...]
    baseline: str | None = None

    def markdown(self) -> str:
        """Return the table with a row a group: means over seeds, and how far the seeds spread."""
        return markdown_table(self.groups, self.baseline)

    def csv(self) -> str:
        """Return a table with a row a run and every number of its result, unrounded."""
        return csv_table(self.groups)

    def figure(self) -> Figure:
        """Draw held-out quality over steps and the final value of every seed."""
        return comparison(self.groups)

    def trade_off(self) -> Figure:
        """Draw held-out quality against FLOPs a token, a point a group."""
        return trade_off(self.groups)

    def balance(self) -> Figure:
        """Draw held-out quality against how evenly experts are loaded, a point a group."""
        return balance(self.groups)

    def save(self, directory: str | Path) -> list[Path]:
        """Write ``comparison.md``, ``comparison.csv`` and ``comparison.png``; where the results know what a
        token costs, ``trade_off.png``; where they know the load of single steps, ``balance.png``; of
        networks that recall, ``memory_ablation.png``; return their paths.

        The folder is made if it is missing; a file of that name is replaced in one step.

        Raises:
            CheckpointWriteError: If a file could not be written.
        """
        contents = {
            "comparison.md": self.markdown().encode(),
            "comparison.csv": self.csv().encode(),
            "comparison.png": png(self.figure()),
        }
        if points_of(self.groups):
            contents["trade_off.png"] = png(self.trade_off())
        if is_balanced(self.groups):
            contents["balance.png"] = png(self.balance())
        if is_memory_ablation(self.groups):
            contents["memory_ablation.png"] = png(memory_ablation(self.groups))
        return [write(Path(directory) / name, data) for name, data in contents.items()]


def compare(
    records: Sequence[RunRecord], *, baseline: str | None = None, labels: Sequence[str] | None = None
) -> Comparison:
    """Group finished runs by what they are, and set the groups side by side.

    Args:
        records: The runs, as :func:`graphmoe.checkpoint.read` returns them.
        baseline: Label of the group that differences are taken to; without it the group ``moe``, if
            there is one.
        labels: The group of each run by name; without it runs that differ only in their seed make a
            group, named by its architecture, its recipe, or the settings that differ.

    Returns:
        The comparison; nothing is written yet.

    Raises:
        CheckpointError: If a run has no result.
        ConfigError: If there is no run, if runs were made on different data sets, if two runs of a
            group have the same seed, or if no group has the label ``baseline``.
    """
    groups = tuple(group_runs(records, labels))
    known = [group.label for group in groups]
    if baseline is not None and baseline not in known:
        raise ConfigError("no group has this label", "baseline", ", ".join(known), baseline)
    return Comparison(groups, baseline or (DEFAULT_BASELINE if DEFAULT_BASELINE in known else None))


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table, write it with the picture, and print the paths.

    Args:
        argv: Command line without the program's name.

    Returns:
        The exit status: 0, or 2 after one line on standard error.
    """
    parser = Parser("python -m analysis.compare", "Compare finished runs.")
    parser.add_argument("runs", nargs="*", metavar="RUN", type=Path, help="run directories")
    parser.add_argument(
        "--out", type=Path, default=Path(), help="where the table and the pictures go (default: here)"
    )
    parser.add_argument("--baseline", metavar="LABEL", help="group to take differences to (default: moe)")
    return run_command(parser, _compare, argv)


def _compare(args: argparse.Namespace) -> None:
    result = compare([read(run) for run in args.runs], baseline=args.baseline)
    paths = result.save(args.out)
    print(result.markdown())
    print(*paths, sep="\n")


if __name__ == "__main__":
    sys.exit(main())
