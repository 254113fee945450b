"""The look that all figures share, and small helpers around matplotlib objects.

Figures are built without pyplot: no global figure list, no display, nothing that leaks. Every plot
function is wrapped in :func:`styled`, which also shields it from the caller's matplotlibrc.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, Normalize
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

INK, QUIET, EMPTY = "#1f2937", "#6b7280", "#e5e7eb"
BLUE, ORANGE, TEAL = "#0072b2", "#d55e00", "#009e73"
# Paul Tol's "muted" and "vibrant" schemes: distinct for every common form of colour blindness.
PRIMARIES = (
    "#332288",
    "#44aa99",
    "#cc6677",
    "#999933",
    "#88ccee",
    "#882255",
    "#117733",
    "#ddcc77",
    "#aa4499",
)
GHOSTS = ("#ee7733", "#0077bb", "#cc3311", "#009988", "#ee3377", "#33bbee")

MAX_PANELS = 24
"""Layers that get a panel of their own; deeper runs show this many, evenly spaced."""

_RC = {
    "font.size": 9.0,
    "axes.titlesize": 9.5,
    "axes.labelsize": 9.0,
    "axes.edgecolor": QUIET,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": EMPTY,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 8.0,
    "ytick.labelsize": 8.0,
    "legend.fontsize": 8.0,
    "legend.frameon": False,
    "figure.titlesize": 11.5,
    "figure.titleweight": "bold",
}


@contextmanager
def look() -> Iterator[None]:
    """Draw with this package's settings, whatever the caller's matplotlibrc or style says."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_RC)
        yield


def styled(plot: Callable[..., Figure]) -> Callable[..., Figure]:
    """Wrap a plot function so that it draws inside :func:`look`."""

    @functools.wraps(plot)
    def wrapper(*args, **kwargs) -> Figure:
        with look():
            fig = plot(*args, **kwargs)
            # matplotlib makes an axis' first tick on first use, with the settings of that moment,
            # and copies its look to the others: make it here.
            for axis in (axis for ax in fig.axes for axis in (ax.xaxis, ax.yaxis)):
                axis.get_major_ticks(1)
                axis.get_minor_ticks(1)
        return fig

    return wrapper


def new_figure(width: float, height: float, title: str, *, layout: str = "constrained") -> Figure:
    """Return an empty figure of ``width`` x ``height`` inches with an Agg canvas.

    Args:
        width: Inches.
        height: Inches.
        title: Title of the whole figure.
        layout: ``"constrained"``, or ``"compressed"`` for panels of square cells.
    """
    fig = Figure(figsize=(width, height), layout=layout, facecolor="white")
    FigureCanvasAgg(fig)
    fig.get_layout_engine().set(w_pad=0.06, h_pad=0.06, wspace=0.03, hspace=0.05)
    fig.suptitle(plain(title))
    return fig


def plain(text: object, limit: int = 160) -> str:
    """Return ``text`` as one printable line in which ``$`` does not start a formula."""
    line = "".join(char if char.isprintable() else " " for char in str(text))
    line = line if len(line) <= limit else line[: limit - 1] + "…"
    return line.replace("$", r"\$")


def shown_layers(num_layers: int) -> list[int]:
    """Return the layers that get a panel: all, or :data:`MAX_PANELS` of them, evenly spaced."""
    count = min(num_layers, MAX_PANELS)
    return [int(layer) for layer in np.linspace(0, num_layers - 1, count).round()]


def grid_shape(count: int, panel_width: float) -> tuple[int, int]:
    """Return rows and columns for ``count`` panels of ``panel_width`` inches.

    A figure stays below 14 inches, so that a page can show it without making its text too small.
    """
    columns = count if count <= 3 else 2 if count == 4 else 3 if count <= 6 else 4
    columns = max(1, min(columns, int(14 // panel_width)))
    return math.ceil(count / columns), columns


def panels(
    fig: Figure, count: int, columns: int, *, sharex: bool = False, sharey: bool = False
) -> list[Axes]:
    """Return ``count`` axes on a grid of ``columns`` in reading order."""
    axes = fig.subplots(
        math.ceil(count / columns), columns, squeeze=False, sharex=sharex, sharey=sharey
    ).ravel()
    for spare in axes[count:]:
        spare.remove()
    return list(axes[:count])


def line(ax: Axes, x: np.ndarray, y: np.ndarray, **kwargs) -> None:
    """Plot ``y`` over ``x``; series of few points get markers, so that a single point is seen."""
    marker = "o" if len(x) <= 12 else None
    ax.plot(x, y, **{"marker": marker, "markersize": 3.5, "linewidth": 1.6, **kwargs})


def step_axis(ax: Axes, steps: np.ndarray, *, label: bool = True) -> None:
    """Set up the x axis in optimiser steps: whole numbers, and some width around a single step."""
    if label:
        ax.set_xlabel("optimiser step")
    if len(steps) and steps.min() == steps.max():
        ax.set_xlim(steps[0] - 1, steps[0] + 1)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))


def amount(value: float, _: int = 0) -> str:
    """Write a tick's number: ``12,000``, ``0.5``, ``3e-4``."""
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    if 0 < abs(value) < 0.01:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:g}"


def log_axis(ax: Axes) -> None:
    """Make the y axis logarithmic, with plain numbers as tick labels."""
    ax.set_yscale("log")
    ax.yaxis.set_major_formatter(FuncFormatter(amount))
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.tick_params(axis="y", which="minor", length=0)


def value_range(values: np.ndarray) -> tuple[float, float]:
    """Return the least and the largest finite value, at least 2 % apart.

    Without that margin rounding noise would fill the whole scale. (0, 1) without a finite value.
    """
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    slack = max(0.02 * max(abs(low), abs(high)) - (high - low), 1e-9) / 2
    return (max(low - slack, 0.0) if low >= 0 else low - slack), high + slack


def spans_decades(values: np.ndarray) -> bool:
    """Whether the positive part of ``values`` is worth a logarithmic axis (a factor of 30)."""
    positive = values[np.isfinite(values) & (values > 0)]
    return bool(positive.size) and bool(positive.max() > 30 * positive.min())


def name_ticks(ax: Axes, names: Sequence[str], *, axis: str) -> None:
    """Label the cells of a heatmap along ``axis`` (``"x"`` or ``"y"``), thinned to 24 labels."""
    stride = math.ceil(len(names) / 24)
    places = range(0, len(names), stride)
    (ax.set_xticks if axis == "x" else ax.set_yticks)(places, [names[place] for place in places])


def heatmap(
    ax: Axes,
    values: np.ndarray,
    *,
    cmap: Colormap | str,
    norm: Normalize,
    numbers: np.ndarray | None = None,
    form: Callable[[float], str] | None = None,
    aspect: str = "equal",
    fontsize: float = 7.0,
) -> AxesImage:
    """Draw ``values [rows, columns]`` as coloured cells; NaN cells are grey.

    Args:
        ax: Where to draw.
        values: Cell values.
        cmap: Colour map.
        norm: Scale from values to colours.
        numbers: What is written into the cells, default ``values``; a dash for NaN.
        form: Text of a number; without it nothing is written.
        aspect: ``"equal"`` for square cells, ``"auto"`` to fill the axes.
        fontsize: Size of the numbers in points.
    """
    cmap = matplotlib.colormaps[cmap] if isinstance(cmap, str) else cmap
    cmap = cmap.with_extremes(bad=EMPTY)
    image = ax.imshow(values, cmap=cmap, norm=norm, aspect=aspect, interpolation="nearest")
    ax.grid(False)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    if form is None:
        return image
    rgba = ScalarMappable(norm, cmap).to_rgba(values)  # [rows, columns, 4]
    for (row, column), number in np.ndenumerate(values if numbers is None else numbers):
        ink = _readable(rgba[row, column]) if np.isfinite(values[row, column]) else QUIET
        text = form(number) if np.isfinite(number) else "–"
        # Inside the axes anyway, and measuring hundreds of numbers would be most of the layout's work.
        ax.text(column, row, text, ha="center", va="center", color=ink, fontsize=fontsize, in_layout=False)
    return image


def _readable(rgba: np.ndarray) -> str:
    """Black or white, whichever reads better on ``rgba [4]``."""
    red, green, blue, _ = rgba
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.52 else "white"
