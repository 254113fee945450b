"""What the examples share: flags with typed errors, and how sure a difference is."""

import argparse
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

import torch
from scipy.stats import t as student_t

from graphmoe.errors import ConfigError, DataError


class Flags(argparse.ArgumentParser):
    """Command-line flags whose errors are :class:`~graphmoe.errors.ConfigError`, and those all examples have.

    Args:
        name: Of the example.
        about: One sentence.
        seeds: Default of ``--seeds``.
        steps: Default of ``--steps``.
    """

    def __init__(self, name: str, about: str, *, seeds: int, steps: int):
        super().__init__(
            prog=f"python -m examples.{name}",
            description=about,
            allow_abbrev=False,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        self.number("--seeds", seeds, "independent repetitions: data, split and weights", least=2)
        self.number("--steps", steps, "optimiser steps of each model")
        self.number("--num_threads", 1, "CPU threads")
        self.add_argument("--out_dir", default=f"runs/{name}", help="folder of figure and figures.json")

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)

    def number(self, name: str, default: int, help: str, *, least: int = 1) -> None:
        """Add a flag of an integer of at least ``least``."""

        def convert(text: str) -> int:
            try:
                value = int(text)
            except ValueError:
                value = least - 1
            if value < least:
                # An error of this library would pass for a ValueError, whose message argparse replaces.
                raise argparse.ArgumentTypeError(f"expected an integer, at least {least}; got {text!r}")
            return value

        self.add_argument(name, type=convert, default=default, metavar="N", help=help)

    def read(self, argv: Sequence[str] | None) -> argparse.Namespace:
        """The flags; threads are set, and the folder of the output is there."""
        args = self.parse_args(argv)
        torch.set_num_threads(args.num_threads)
        args.out_dir = Path(args.out_dir)
        try:
            args.out_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError("folder cannot be made", args.out_dir, got=os.strerror(error.errno)) from error
        return args


def mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation over seeds."""
    mean = math.fsum(values) / len(values)
    return mean, math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1))


def paired(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float]:
    """Mean difference of two models on the same seeds, and its standard error."""
    mean, spread = mean_and_spread([a - b for a, b in zip(ours, theirs, strict=True)])
    return mean, spread / math.sqrt(len(ours))


def verdict(name: str, ours: Sequence[float], other: str, theirs: Sequence[float]) -> str:
    """One line: whether a model gains, loses or ties, by the 95 % interval of the paired difference."""
    mean, error = paired(ours, theirs)
    reach = student_t.ppf(0.975, len(ours) - 1) * error
    word = "ties with" if abs(mean) <= reach else "gains over" if mean > 0 else "loses to"
    return (
        f"{name} {word} {other}: {100 * mean:+.1f} points, standard error {100 * error:.1f} "
        f"({len(ours)} paired seeds)"
    )


def print_table(scores: Mapping[str, Sequence[float]], notes: Mapping[str, str]) -> None:
    """Accuracies of each row in per cent: mean and standard deviation over seeds, and a note."""
    width = max(map(len, scores))
    for name, values in scores.items():
        mean, spread = mean_and_spread(values)
        print(f"  {name:{width}}  {100 * mean:5.1f} ± {100 * spread:4.1f} %  {notes.get(name, '')}".rstrip())


def save_json(folder: Path, content: Mapping) -> None:
    """Write ``figures.json``."""
    (folder / "figures.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
