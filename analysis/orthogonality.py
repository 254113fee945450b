"""Orthogonality: how hard the experts are pushed apart, and how much they still overlap."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter

from analysis import style
from analysis.lines import from_zero, layer_colours, layer_legend, layer_lines
from analysis.series import has, live, series, steps
from graphmoe.checkpoint import RunRecord

PANELS = {
    "orthogonality_strength": ("Strength of the loss", "coefficient λ"),
    "overlap": ("Overlap of the experts", "mean squared cosine"),
}
_BOUND = {"color": style.INK, "linestyle": ":", "linewidth": 1.2}


@style.styled
def orthogonality(record: RunRecord) -> Figure:
    """Coefficient of the orthogonality loss, and overlap of mean expert outputs, over steps."""
    keys, at = [key for key in PANELS if has(record, key)], steps(record)
    fig = style.new_figure(4.4 * len(keys) + 1.4, 3.3, "Orthogonality")
    axes = style.panels(fig, len(keys), len(keys))
    for ax, key in zip(axes, keys, strict=True):
        values, (title, unit) = series(record, key), PANELS[key]
        colours = layer_colours(values.shape[1])
        layer_lines(ax, at, values, colours)
        if key == "overlap":
            ax.plot(at, least_overlap(live(record, values.shape[1])), **_BOUND)
        ax.set_title(title)
        ax.set_ylabel(unit)
        _scale(ax, values)
    bound = [Line2D([], [], label="least possible", **_BOUND)] if "overlap" in keys else []
    layer_legend(fig, colours, *bound)
    return fig


def least_overlap(alive: np.ndarray) -> np.ndarray:
    """Return the least mean squared cosine that as many centred vectors can have, ``[S]``.

    Vectors minus their mean sum to 0 and cannot all be orthogonal: E of them reach ``1 / (E - 1)^2``.
    Where layers differ, the value of the one with most experts.

    Args:
        alive: Which experts can be routed to, ``[S, L, E]``.
    """
    experts = alive.sum(axis=2).max(axis=1)
    return np.where(experts > 1, 1.0 / np.maximum(experts - 1, 1) ** 2, 0.0)


def _scale(ax: Axes, values: np.ndarray) -> None:
    """A logarithmic axis where values span decades, or else one from 0."""
    if style.spans_decades(values):
        style.log_axis(ax)
    else:
        from_zero(ax, values)
        ax.yaxis.set_major_formatter(FuncFormatter(style.amount))
