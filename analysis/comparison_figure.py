"""The picture of a comparison: held-out quality over steps, and where each seed ended."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis import style
from analysis.comparison_table import METRICS, metric_of
from analysis.groups import Group
from analysis.series import metric

LINES = ("-", "--", ":", "-.")


@style.styled
def comparison(groups: Sequence[Group]) -> Figure:
    """Held-out quality of each group over steps with its spread over seeds, and its final values."""
    key = metric_of(groups)
    height = max(4.0, 0.4 * len(groups) + 1.6)
    fig = style.new_figure(12.0, height, "Comparison of runs")
    curves, finals = fig.subplots(1, 2, width_ratios=(1.25, 1))
    seen = np.empty(0)
    for index, group in enumerate(groups):
        at, values = held_out(group, key)  # [S], [runs, S]
        seen = np.append(seen, at)
        if len(at):
            _curve(curves, at, values, group, index)
    style.step_axis(curves, seen)
    # Classifiers are watched on one part and scored on another.
    curves.set_ylabel("validation accuracy" if key == "accuracy" else f"held-out {METRICS[key]}")
    curves.set_title("Mean over seeds, band: ± standard deviation")
    if len(seen):
        curves.legend()
    _finals(finals, groups, key)
    return fig


def held_out(group: Group, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the steps at which every run of a group was evaluated, ``[S]``, and its values ``[runs, S]``."""
    points = [metric(run, "eval", key) for run in group.runs]
    common = sorted(set.intersection(*(set(at.tolist()) for at, _ in points)))
    rows = [[dict(zip(at, values, strict=True))[step] for step in common] for at, values in points]
    return np.array(common), np.array(rows).reshape(len(points), len(common))


def _curve(ax: Axes, at: np.ndarray, values: np.ndarray, group: Group, index: int) -> None:
    """Draw the mean of ``values [runs, S]`` and, with several runs, its band."""
    colour, dashes = group_look(index)
    mean = values.mean(axis=0)
    style.line(ax, at, mean, color=colour, linestyle=dashes, label=label_lines(group.label))
    if len(values) > 1:
        deviation = values.std(axis=0, ddof=1)
        ax.fill_between(at, mean - deviation, mean + deviation, color=colour, alpha=0.18, linewidth=0)


def _finals(ax: Axes, groups: Sequence[Group], key: str) -> None:
    """Draw a dot a seed and a bar at the mean, a row a group."""
    for row, group in enumerate(groups):
        values = list(group.values("metrics", key).values())
        places = row + 0.12 * (np.arange(len(values)) - (len(values) - 1) / 2).clip(-2, 2)
        colour, _ = group_look(row)
        ax.scatter(values, places, s=26, color=colour, alpha=0.8, linewidths=0, zorder=3)
        if values:
            mean = float(np.mean(values))
            ax.vlines(mean, row - 0.32, row + 0.32, color=style.INK, linewidth=1.8, zorder=4)
            text = f"{mean:.4f}"
            ax.annotate(
                text, (1, row), xycoords=("axes fraction", "data"), xytext=(5, 0),
                textcoords="offset points", va="center", fontsize=8, annotation_clip=False,
            )  # fmt: skip
    ax.set_yticks(range(len(groups)), [label_lines(group.label) for group in groups])
    ax.set_ylim(len(groups) - 0.4, -0.6)
    ax.tick_params(axis="y", length=0)
    ax.grid(False, axis="y")
    ax.margins(x=0.08)
    ax.set_xlabel(f"held-out {METRICS[key]}")
    when = "On the test part" if key == "accuracy" else "At the end"
    ax.set_title(f"{when}: a dot a seed, line: mean")


def label_lines(label: str) -> str:
    """A label on a line, or its name above the settings that tell it from others of that name."""
    return "\n".join(style.plain(part, 48) for part in label.split(" · ", 1))


def group_look(index: int) -> tuple[str, str]:
    """Colour and dashes of a group; after all colours the dashes change."""
    colours = len(style.PRIMARIES)
    return style.PRIMARIES[index % colours], LINES[index // colours % len(LINES)]
