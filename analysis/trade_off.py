"""Quality against cost: what each group of runs reaches for the FLOPs of a token."""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from analysis import style
from analysis.comparison_figure import group_look, label_lines
from analysis.comparison_table import METRICS, better, metric_of, references
from analysis.groups import Group, Spread
from analysis.labels import Label, place_labels

BASELINES = ("dense", "moe", "dense_lm", "moe_lm")
"""First words of the labels of models that others are held against."""
MOST_NAMES = 12
"""Up to so many groups are named beside their points; more get a number each, and a key."""
MARKERS = ("o", "s", "^", "v", "P", "X")


class Point(NamedTuple):
    """Where a group lies.

    Attributes:
        group: The runs.
        index: Place of the group in the comparison.
        flops: FLOPs of a token's forward pass, mean over runs.
        quality: The held-out figure.
        sign: 1 where less of it is better, -1 where more is.
    """

    group: Group
    index: int
    flops: float
    quality: Spread
    sign: int = 1

    @property
    def is_baseline(self) -> bool:
        return self.group.label.split(" ")[0] in BASELINES

    @property
    def marker(self) -> str:
        return "D" if self.is_baseline else MARKERS[self.index // len(style.PRIMARIES) % len(MARKERS)]


def points_of(groups: Sequence[Group]) -> list[Point]:
    """Return the groups that know both what they cost and what they reach."""
    found, metric = [], metric_of(groups)
    for index, group in enumerate(groups):
        flops, quality = group.spread("flops_per_token"), group.spread("metrics", metric)
        if flops is not None and flops.mean > 0 and quality is not None:
            found.append(Point(group, index, flops.mean, quality, -1 if better(metric) == "more" else 1))
    return found


def frontier(points: Sequence[Point]) -> list[Point]:
    """Return the points that no other one beats at the same or a lower cost, cheapest first."""
    best: list[Point] = []
    for point in sorted(points, key=lambda point: (point.flops, point.sign * point.quality.mean)):
        if not best or point.sign * point.quality.mean < best[-1].sign * best[-1].quality.mean:
            best.append(point)
    return best


@style.styled
def trade_off(groups: Sequence[Group]) -> Figure:
    """Held-out quality of each group against its FLOPs a token: mean over seeds ± standard deviation.

    Baselines are diamonds with a dotted line at their height; the steps join the best for their cost.
    """
    points, metric = points_of(groups), metric_of(groups)
    numbered = len(points) > MOST_NAMES
    height = max(5.0, 0.2 * len(points) + 1.2) if numbered else 5.0
    fig = style.new_figure(12.0 if numbered else 9.0, height, "Quality against cost")
    ax = fig.subplots()
    for point in points:
        _draw(ax, point, numbered=numbered)
    steps = _steps(frontier(points))
    ax.plot(*zip(*steps, strict=True), color=style.QUIET, linewidth=1.0, alpha=0.6, zorder=1, scalex=False)
    _axes(ax, points, f"held-out {METRICS[metric]} ({better(metric)} is better)")
    if numbered:
        fig.legend(loc="outside right upper", fontsize=7.5, handlelength=1.0)
    note = [f"{row['name']} {row[f'held-out {METRICS[metric]}']}" for row in references(groups, metric)]
    note = [f"off the scale: {', '.join(note)}"] if note else []
    if len(points) < len(groups):
        note.append(f"{len(groups) - len(points)} of {len(groups)} groups without FLOPs or score")
    if note:
        fig.supxlabel(style.plain("   ·   ".join(note)), fontsize=8, color=style.QUIET)
    lines = [*pairwise(steps), *(line for point in points for line in _lines(ax, point))]
    place_labels(ax, [_label(point, numbered=numbered) for point in points], lines)
    return fig


def _draw(ax: Axes, point: Point, *, numbered: bool) -> None:
    """Draw a point with its spread, and the height of a baseline."""
    colour, quality = group_look(point.index)[0], point.quality
    edge = style.INK if point.is_baseline else "white"
    look = {"fmt": point.marker, "color": colour, "elinewidth": 1.2, "capsize": 2.5, "zorder": 3}
    look |= {"markersize": 8 if point.is_baseline else 7, "markeredgecolor": edge}
    name = style.plain(f"{point.index + 1}  {point.group.label}", 64) if numbered else None
    ax.errorbar(point.flops, quality.mean, yerr=quality.spread, ecolor=colour, label=name, **look)
    if point.is_baseline:
        ax.axhline(quality.mean, color=colour, linestyle=":", linewidth=1.0, zorder=1)


def _steps(best: Sequence[Point]) -> list[tuple[float, float]]:
    """Corners of the steps from each of the best points to the right: more FLOPs need not be used."""
    corners = []
    for point in best:
        if corners:
            corners.append((point.flops, corners[-1][1]))
        corners.append((point.flops, point.quality.mean))
    return [*corners, (10 * corners[-1][0], corners[-1][1])] if corners else [(1e6, 0.0)]


def _axes(ax: Axes, points: Sequence[Point], quality: str) -> None:
    """A logarithmic axis of cost with plain numbers, and room for the labels."""
    ax.set_xscale("log")
    ax.set_xlabel("FLOPs per token in a forward pass, millions (fewer is cheaper)")
    ax.set_ylabel(quality)
    flops = np.array([point.flops for point in points] or [1e6])
    slack = max((flops.max() / flops.min()) ** 0.12, 1.08)
    ax.set_xlim(flops.min() / slack, flops.max() * slack)
    narrow = flops.max() / flops.min() < 8
    ax.xaxis.set_major_locator(MaxNLocator(7) if narrow else LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: style.amount(float(f"{value / 1e6:.4g}"))))
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.tick_params(axis="x", which="minor", length=0)
    ax.set_title("Mean over seeds ± standard deviation; steps: the best for their FLOPs; dotted: baselines")
    means = np.array([point.quality.mean for point in points] or [0.0])
    reach = np.array([point.quality.spread or 0.0 for point in points] or [1.0])
    low, high = style.value_range(np.concatenate([means - reach, means + reach]))
    ax.set_ylim(low - 0.12 * (high - low), high + 0.12 * (high - low))


def _label(point: Point, *, numbered: bool) -> Label:
    text = str(point.index + 1) if numbered else label_lines(point.group.label)
    weight = "bold" if point.is_baseline else "normal"
    return Label(text, point.flops, point.quality.mean, weight)


def _lines(ax: Axes, point: Point) -> list[tuple]:
    """The error bar of a point, and the line of a baseline."""
    (mean, spread, _), x = point.quality, point.flops
    bar = ((x, mean - (spread or 0.0)), (x, mean + (spread or 0.0)))
    left, right = ax.get_xlim()
    return [bar, ((left, mean), (right, mean))] if point.is_baseline else [bar]
