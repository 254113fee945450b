"""Names beside points: put where they cover neither one another nor a point."""

from collections.abc import Sequence
from itertools import product
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patheffects import withStroke
from matplotlib.transforms import Bbox

from analysis import style

_DIRECTIONS = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (1, -1), (-1, 1), (-1, -1))
_DISTANCES = (7.0, 14.0, 24.0, 36.0, 52.0, 72.0, 96.0)
_MARKER = 6.0  # half its size; all in points


class Label(NamedTuple):
    """A name of the point ``(x, y)``, in data coordinates."""

    text: str
    x: float
    y: float
    weight: str = "normal"


def place_labels(
    ax: Axes, labels: Sequence[Label], lines: Sequence[tuple] = (), *, fontsize: float = 8.0
) -> None:
    """Write names beside their points; a thin line joins a name to a point that is not beside it.

    Each name takes the place around its point, of several directions and distances, where it covers least;
    when all have one, each chooses once more. The axes must have their final limits, and the figure all its
    other parts: it is laid out here.

    Args:
        ax: Where the points are.
        labels: Their names.
        lines: Ends ``((x, y), (x, y))`` of upright and level lines to keep off, too, in data coordinates.
        fontsize: Points.
    """
    fig = ax.get_figure()
    fig.draw_without_rendering()
    scale, inside = fig.dpi / 72, ax.get_window_extent()
    anchors = ax.transData.transform(np.array([(label.x, label.y) for label in labels]).reshape(-1, 2))
    half = _MARKER * scale
    taken = [Bbox([anchor - half, anchor + half]) for anchor in anchors] + _thin(ax, lines, scale)
    sizes = [_size(ax, label, fontsize) for label in labels]
    offsets = list(product(_DISTANCES, _DIRECTIONS))
    boxes: list[Bbox | None] = [None] * len(labels)
    chosen = [offsets[0]] * len(labels)
    for _ in range(3):
        for index, (anchor, size) in enumerate(zip(anchors, sizes, strict=True)):
            others = [box for place, box in enumerate(boxes) if place != index and box is not None]
            tried = [_box(anchor, size, offset, scale) for offset in offsets]
            costs = [_cost(box, taken, others, inside) + 0.1 * order for order, box in enumerate(tried)]
            best = int(np.argmin(costs))
            boxes[index], chosen[index] = tried[best], offsets[best]
    for label, (distance, (right, up)) in zip(labels, chosen, strict=True):
        line = {"arrowstyle": "-", "color": style.QUIET, "linewidth": 0.6, "shrinkA": 1, "shrinkB": 4}
        text = ax.annotate(
            label.text,
            (label.x, label.y),
            xytext=(right * distance, up * distance),
            textcoords="offset points",
            ha=("center", "left", "right")[right],
            va=("center", "bottom", "top")[up],
            fontsize=fontsize,
            fontweight=label.weight,
            linespacing=1.05,
            arrowprops=line if distance > _DISTANCES[0] else None,
            zorder=5,
        )
        text.set_in_layout(False)
        text.set_path_effects([withStroke(linewidth=2, foreground="white")])


def _thin(ax: Axes, lines: Sequence[tuple], scale: float) -> list[Bbox]:
    """Boxes around upright and level lines, in pixels."""
    ends = ax.transData.transform(np.array(lines, dtype=float).reshape(-1, 2)).reshape(-1, 2, 2)
    return [Bbox([low, high]).padded(scale) for low, high in zip(ends.min(1), ends.max(1), strict=True)]


def _size(ax: Axes, label: Label, fontsize: float) -> np.ndarray:
    """Width and height of a name in pixels."""
    text = ax.text(0, 0, label.text, fontsize=fontsize, fontweight=label.weight, linespacing=1.05)
    box = text.get_window_extent()
    text.remove()
    return np.array([box.width, box.height])


def _box(anchor: np.ndarray, size: np.ndarray, offset: tuple, scale: float) -> Bbox:
    """Where a name comes to lie: beyond its offset from the point, to that side of it."""
    distance, direction = offset
    corner = anchor + np.array(direction) * distance * scale + size * (np.array(direction) - 1) / 2
    return Bbox([corner, corner + size])


def _cost(box: Bbox, taken: Sequence[Bbox], others: Sequence[Bbox], inside: Bbox) -> float:
    """Pixels that a name would cover: of the space beyond the axes, of other names, of points."""
    area = box.width * box.height
    visible = _common(box, inside)
    covered = sum(_common(box.padded(2), other) for other in others)
    return 3 * (area - visible) + 2 * covered + sum(_common(box, other) for other in taken)


def _common(first: Bbox, second: Bbox) -> float:
    """Area of the intersection."""
    width = min(first.x1, second.x1) - max(first.x0, second.x0)
    height = min(first.y1, second.y1) - max(first.y0, second.y0)
    return max(width, 0.0) * max(height, 0.0)
