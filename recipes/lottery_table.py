"""What a search for lottery tickets has found: a row a level, means over seeds beside their spread."""

from collections.abc import Mapping, Sequence

import numpy as np

from recipes.lottery_config import BRANCHES, DENSE, TICKET
from recipes.reporting import say

Network = Mapping[str, object]
"""Summary of one trained network: its seed, level, branch, weights and accuracy."""


def curve(networks: Sequence[Network]) -> list[dict]:
    """Accuracy on the test part by level and branch.

    Args:
        networks: Summaries, of any number of seeds.

    Returns:
        A row a level: ``level``, ``weights`` that exist of ``total`` and their ``share``; of each branch
        ``accuracy`` (mean over seeds), its ``standard_error`` (none of one seed), ``by_seed``, and
        ``validation``, the mean on the validation part; weights of each of the ``layers``, mean over seeds;
        ``outside_mask``, entries of all networks that should be 0 and are not.
    """
    rows = []
    for level in sorted({network["level"] for network in networks}):
        here = [network for network in networks if network["level"] == level]
        masks = [network for network in here if network["branch"] in (DENSE, TICKET)] or here
        row = {"level": level, "weights": masks[0]["weights"], "total": masks[0]["total"]}
        row["share"] = row["weights"] / row["total"]
        row |= {key: {} for key in ("accuracy", "standard_error", "by_seed", "validation")}
        for branch in (DENSE, *BRANCHES):
            found = sorted((n for n in here if n["branch"] == branch), key=lambda n: n["seed"])
            if not found:
                continue
            values = np.array([network["accuracy"] for network in found])
            row["accuracy"][branch] = float(values.mean())
            row["standard_error"][branch] = standard_error(values)
            row["by_seed"][branch] = {str(network["seed"]): network["accuracy"] for network in found}
            row["validation"][branch] = float(np.mean([n["validation"]["accuracy"] for n in found]))
        names = masks[0]["layers"]
        row["layers"] = {name: float(np.mean([n["layers"][name] for n in masks])) for name in names}
        row["outside_mask"] = sum(network["outside_mask"] for network in here)
        rows.append(row)
    return rows


def headline(networks: Sequence[Network]) -> dict:
    """The metrics of a search: accuracy of the dense network and of the sparsest ticket, means over seeds,
    and the whole ``curve``."""
    rows = curve(networks)
    last = rows[-1]
    dense = rows[0]["accuracy"][DENSE]
    return {
        "accuracy": dense,
        "test_accuracy": dense,
        "ticket_accuracy": last["accuracy"].get(TICKET, dense),
        "weights_remaining": last["weights"],
        "outside_masks": sum(row["outside_mask"] for row in rows),
        "curve": rows,
    }


def standard_error(values: np.ndarray) -> float | None:
    """Standard error of a mean over seeds; of one seed there is none."""
    return float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else None


def say_table(result: Mapping) -> None:
    """Say accuracy by level and branch, of each seed as well, beside the baseline and chance."""
    rows = result["metrics"]["curve"]
    seeds = sorted({network["seed"] for network in result["networks"]})
    branches = [b for b in BRANCHES if any(b in row["accuracy"] for row in rows)]
    several = len(seeds) > 1
    of = f"mean ± standard error (seeds {', '.join(map(str, seeds))})" if several else f"seed {seeds[0]}"
    say(f"\ntest accuracy, %, {of}")
    width = 16 + 8 * len(seeds) * several
    say(f"{'weights':>10} {'share, %':>9} " + " ".join(f"{b:>{width}}" for b in branches) + "  outside masks")
    for row in rows:
        shown = [DENSE] if DENSE in row["accuracy"] else branches
        cells = " ".join(f"{_cell(row, branch):>{width}}" for branch in shown)
        spare = " " * (width + 1) * (len(branches) - len(shown))
        say(f"{row['weights']:>10,} {100 * row['share']:>9.2f} {cells}{spare}  {row['outside_mask']:>13}")
    for key in ("baseline", "chance"):
        say(f"{result[key]['name']}: {100 * result[key]['test_accuracy']:.2f}")


def _cell(row: dict, branch: str) -> str:
    if branch not in row["accuracy"]:
        return "–"
    text, error = f"{100 * row['accuracy'][branch]:.2f}", row["standard_error"][branch]
    if error is not None:
        values = " ".join(f"{100 * value:.2f}" for value in row["by_seed"][branch].values())
        text += f" ± {100 * error:.2f} ({values})"
    return f"dense {text}" if branch == DENSE else text
