"""Balance against quality: how evenly each group of runs loads its experts, and what it reaches."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from analysis import style
from analysis.comparison_figure import group_look, label_lines
from analysis.comparison_table import METRICS, better, metric_of
from analysis.groups import Group
from analysis.labels import Label, place_labels
from graphmoe.checkpoint import RunRecord

VIOLATION = "step_max_violation"
"""Series of a run's records and figure of its result: MaxVio of single steps."""


def is_balanced(groups: Sequence[Group]) -> bool:
    """Return whether there is anything to draw: two groups or more whose load in single steps is known."""
    return sum(_is_uneven(group) for group in groups) > 1


def _is_uneven(group: Group) -> bool:
    """Whether the load of single steps is known, and not even by construction, which has no logarithm."""
    value = group.spread("experts", VIOLATION)
    return value is not None and value.mean > 0


@style.styled
def balance(groups: Sequence[Group]) -> Figure:
    """Held-out quality of each group against the violation of its last 100 steps, and violations over time.

    Points are means over seeds, bars their standard deviation. The stroke at the height of a point is what
    would remain of its violation if the load were even in the long run, as the tokens of a text resemble one
    another; the dotted line is what a router that chooses blindly would show.
    """
    known = [(index, group) for index, group in enumerate(groups) if _is_uneven(group)]
    fig = style.new_figure(12.0, 5.0, "Balance against quality")
    points, curves = fig.subplots(1, 2)
    floors = [group.spread("experts", f"{VIOLATION}_random") for _, group in known]
    floor = float(np.mean([value.mean for value in floors if value is not None] or [np.nan]))
    labels = [_point(points, index, group, metric_of(groups)) for index, group in known]
    _finish_points(points, floor, metric_of(groups))
    seen = np.concatenate([_curve(curves, index, group) for index, group in known] or [np.empty(0)])
    style.step_axis(curves, seen)
    curves.set_yscale("log")
    _plain_log(curves.yaxis)
    curves.set_ylabel("MaxVio of a step, mean over layers")
    curves.set_title("Over training: mean over seeds, smoothed over 2 % of the steps")
    if np.isfinite(floor):
        curves.axhline(floor, color=style.INK, linestyle=":", linewidth=1.0)
    if known:
        curves.legend(fontsize=8)
    place_labels(points, [label for label in labels if label is not None])
    return fig


def _point(ax: Axes, index: int, group: Group, metric: str) -> Label | None:
    across, up = group.spread("experts", VIOLATION), group.spread("metrics", metric)
    if up is None:
        return None
    colour = group_look(index)[0]
    ax.errorbar(
        across.mean,
        up.mean,
        xerr=across.spread,
        yerr=up.spread,
        fmt="o",
        color=colour,
        capsize=2.5,
        markersize=7,
    )
    even = group.spread("experts", "batch_violation_even")
    if even is not None:
        ax.plot(even.mean, up.mean, "|", color=colour, markersize=16, markeredgewidth=2)
    return Label(label_lines(group.label), across.mean, up.mean)


def _finish_points(ax: Axes, floor: float, metric: str) -> None:
    ax.set_xscale("log")
    _plain_log(ax.xaxis)
    if np.isfinite(floor):
        ax.axvline(floor, color=style.INK, linestyle=":", linewidth=1.0)
        ax.annotate(
            f"blind choice {floor:.3f}", (floor, 0.01), xycoords=("data", "axes fraction"), xytext=(4, 2),
            textcoords="offset points", fontsize=8, color=style.QUIET,
        )  # fmt: skip
    ax.margins(0.15)
    ax.set_xlabel("MaxVio of a step, mean of the last 100 steps (less is more even)")
    ax.set_ylabel(f"held-out {METRICS[metric]} ({better(metric)} is better)")
    ax.set_title("Mean over seeds ± standard deviation; stroke: were the load even in the long run")


def _plain_log(axis: Axis) -> None:
    """Plain numbers on a logarithmic axis of a decade or two."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    axis.set_minor_formatter(NullFormatter())


def _curve(ax: Axes, index: int, group: Group) -> np.ndarray:
    """Draw the mean over the runs of a group that have the series; returns its steps."""
    runs = [run for run in group.runs if run.records is not None and VIOLATION in run.records]
    if not runs:
        return np.empty(0)
    steps = runs[0].records["step"]
    same = [run for run in runs if np.array_equal(run.records["step"], steps)]
    colour, dashes = group_look(index)
    values = np.mean([_smooth(run) for run in same], axis=0)
    style.line(ax, steps, values, color=colour, linestyle=dashes, label=label_lines(group.label))
    return steps


def _smooth(run: RunRecord) -> np.ndarray:
    """Violations, mean over layers, ``[S]``: single steps vary more than the models do."""
    values = run.records[VIOLATION].mean(axis=1)
    width = max(1, len(values) // 50)
    padded = np.pad(values, (width // 2, width - 1 - width // 2), mode="edge")
    return np.convolve(padded, np.full(width, 1 / width), mode="valid")
