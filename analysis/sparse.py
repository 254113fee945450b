"""Weights that are edges: how many and which, who has them, how long they stay, which pixels they hear."""

import math
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from analysis import style
from analysis.lines import from_zero, layer_colours, layer_legend, layer_lines
from analysis.series import has, series, steps
from graphmoe.checkpoint import RunRecord
from graphmoe.errors import CheckpointError

FEEDS = ("final_feeds", "final_feeds_weight", "final_feeds_age", "final_feeds_size")
MOST_CELLS = 128
"""Rows and columns of a picture of a mask; larger masks are shown as counts of blocks."""


class Feeds(NamedTuple):
    """The edges of one layer.

    Attributes:
        source, target: Ends of each, ``[M]``.
        weight: Weight of each, ``[M]``.
        age: Rewirings that each has survived, ``[M]``.
        size: Numbers of sources and of targets.
    """

    source: np.ndarray
    target: np.ndarray
    weight: np.ndarray
    age: np.ndarray
    size: tuple[int, int]

    @property
    def density(self) -> float:
        return len(self.source) / math.prod(self.size)


def has_feeds(record: RunRecord) -> bool:
    """Whether a run recorded the edges of sparse layers."""
    return has(record, *FEEDS)


def has_survival(record: RunRecord) -> bool:
    """Whether a run recorded what became of the edges of sparse layers."""
    return has(record, "sparse_edges", "sparse_survival")


def has_pixels(record: RunRecord) -> bool:
    """Whether the first sparse layer of a run hears the pixels of images."""
    if not has(record, *FEEDS, "final_image_shape"):
        return False
    shape, size = record.records["final_image_shape"], record.records["final_feeds_size"]
    return shape.shape == (3,) and size.ndim == 2 and int(shape.prod()) == int(size[0, 0])


@style.styled
def edge_survival(record: RunRecord) -> Figure:
    """Density of each sparse layer over time, and the share of the first edges that are still there; of a run
    that has not ended, which does not know the sizes, edges instead of the density."""
    at, edges, left = steps(record), series(record, "sparse_edges"), series(record, "sparse_survival")
    counts, unit = edges / 1000, "edges, thousands"
    if has(record, "sparse_density"):  # of experts, of which only some are recorded edge by edge
        counts, unit = 100 * series(record, "sparse_density"), "density, %"
    elif has_feeds(record):
        counts, unit = (
            100 * edges / np.array([math.prod(layer.size) for layer in feeds(record)]),
            "density, %",
        )
    fig = style.new_figure(10.2, 3.3, "Edges while the model was trained")
    axes, colours = style.panels(fig, 2, 2), layer_colours(edges.shape[1])
    for ax, values in zip(axes, (counts, 100 * left), strict=True):
        layer_lines(ax, at, values, colours)
        from_zero(ax, values)
    axes[0].set_title("constant" if (edges == edges[0]).all() else "NOT constant")
    axes[0].set_ylabel(unit)
    axes[1].set_title(f"at the end {100 * left[-1].mean():.0f} %, mean over layers")
    axes[1].set_ylabel("first edges still there, %")
    layer_legend(fig, colours)
    return fig


@style.styled
def edge_ages(record: RunRecord) -> Figure:
    """Rewirings that the edges of each sparse layer have survived; the oldest were there from the start."""
    layers = feeds(record)
    fig = style.new_figure(6.6, 3.3, "Ages of the edges")
    ax, colours = fig.subplots(), layer_colours(len(layers))
    most = max(int(layer.age.max()) for layer in layers)
    for layer, colour in zip(layers, colours, strict=True):
        share = np.bincount(layer.age, minlength=most + 1) / len(layer.age)
        share[share == 0] = np.nan  # a gap, not a fall to the bottom of the logarithmic axis
        ax.plot(np.arange(most + 1), share, color=colour, marker="o", markersize=3, linewidth=1.2)
    ax.set_yscale("log")
    percent = FuncFormatter(lambda share, _: f"{style.amount(100 * share)} %")
    ax.yaxis.set_major_formatter(percent)
    ax.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
    low, high = ax.get_ylim()
    ax.yaxis.set_minor_formatter(percent if high < 100 * low else NullFormatter())
    ax.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    ax.set_xlabel("rewirings survived")
    ax.set_ylabel("edges of the layer")
    layer_legend(fig, colours)
    return fig


@style.styled
def degree_distribution(record: RunRecord) -> Figure:
    """How many edges neurons have, a row a sparse layer, beside what edges drawn at random would give."""
    layers = feeds(record)
    shown = style.shown_layers(len(layers))
    fig = style.new_figure(8.6, 2.1 * len(shown) + 0.8, "Edges of a neuron")
    axes = style.panels(fig, 2 * len(shown), 2)
    for row, index in enumerate(shown):
        layer = layers[index]
        ends = (
            (layer.source, layer.size[0], "out of a source"),
            (layer.target, layer.size[1], "into a target"),
        )
        for ax, (ids, count, name) in zip(axes[2 * row : 2 * row + 2], ends, strict=True):
            _degrees(ax, np.bincount(ids, minlength=count), layer)
            ax.set_title(f"layer {index}, {name}")
            ax.set_ylabel("neurons")
    for ax in axes[-2:]:
        ax.set_xlabel("edges")
    chance = Line2D([], [], color=style.INK, linestyle="--", linewidth=1.2, label="at random")
    fig.legend(handles=[chance], loc="outside right upper")
    return fig


@style.styled
def sparse_mask(record: RunRecord) -> Figure:
    """Where the edges of each sparse layer are; large layers as edges a place in blocks of neurons. Each
    layer has its own scale: small ones are denser."""
    layers = feeds(record)
    shown = style.shown_layers(len(layers))
    rows, columns = style.grid_shape(len(shown), 3.4)
    fig = style.new_figure(3.4 * columns + 1.0, 3.2 * rows + 0.6, "Places of the edges")
    for ax, index in zip(style.panels(fig, len(shown), columns), shown, strict=True):
        layer = layers[index]
        block = 100 * block_density(layer)
        extent = (0, layer.size[0], layer.size[1], 0)
        image = ax.imshow(block, cmap="cividis", norm=Normalize(0, block.max()), aspect="auto",
                          extent=extent, interpolation="nearest")  # fmt: skip
        ax.grid(False)
        ax.set_title(f"layer {index}: {len(layer.source):,} edges, {100 * layer.density:.2f} %")
        ax.set_xlabel("source")
        ax.set_ylabel("target")
        bar = fig.colorbar(image, ax=ax)
        bar.outline.set_visible(False)
    bar.set_label("places with an edge, %")
    return fig


@style.styled
def pixel_importance(record: RunRecord) -> Figure:
    """Which pixels the first sparse layer hears: edges out of each, and the sum of their absolute weights."""
    layer, shape = feeds(record)[0], record.records["final_image_shape"].tolist()
    degree = np.bincount(layer.source, minlength=layer.size[0])
    strength = np.bincount(layer.source, np.abs(layer.weight), minlength=layer.size[0])
    fig = style.new_figure(7.6, 3.4, "What the first layer hears of an image")
    even = len(layer.source) / layer.size[0]
    names = (f"edges; {even:.1f} would be even", "sum of absolute weights")
    for ax, values, name in zip(style.panels(fig, 2, 2), (degree, strength), names, strict=True):
        pixels = values.reshape(shape).sum(0)  # colours of a pixel are three sources
        # From the least on: pixels that are all alike would hide what differs.
        norm = Normalize(pixels.min(), max(pixels.max(), pixels.min() + 1e-9))
        image = style.heatmap(ax, pixels, cmap="cividis", norm=norm)
        ax.set_xticks([])
        ax.set_yticks([])
        ax.set_title(name)
        fig.colorbar(image, ax=ax).outline.set_visible(False)
    return fig


def feeds(record: RunRecord) -> list[Feeds]:
    """The edges of each sparse layer.

    Raises:
        CheckpointError: They do not fit one another, or an id is out of range.
    """
    edges, weight, age, size = (record.records[key] for key in FEEDS)
    count = edges.shape[-1] if edges.ndim == 2 else -1
    fits = (
        edges.shape == (3, count)
        and weight.shape == age.shape == (count,)
        and size.ndim == 2
        and size.shape[1] == 2
        and {edges.dtype.kind, age.dtype.kind, size.dtype.kind} == {"i"}
        and weight.dtype.kind == "f"
        and np.isfinite(weight).all()
        and age.min() >= 0
        and size.min() >= 1
        and edges.min() >= 0
        and edges[0].max() < len(size)
        and (edges[1:] < size[edges[0]].T).all()
        and (np.bincount(edges[0], minlength=len(size)) > 0).all()
    )
    if not fits:
        where, expected = str(record.path / "records.safetensors"), "edges of layers, ids within their sizes"
        raise CheckpointError("edges cannot be drawn", where, expected, list(edges.shape))
    found = []
    for index, (sources, targets) in enumerate(size.tolist()):
        mine = edges[0] == index
        found.append(Feeds(edges[1][mine], edges[2][mine], weight[mine], age[mine], (sources, targets)))
    return found


def block_density(layer: Feeds) -> np.ndarray:
    """Share of the places that have an edge, in at most ``MOST_CELLS`` by as many blocks of neurons,
    ``[targets, sources]``."""
    sides = [min(count, MOST_CELLS) for count in layer.size]
    bins = [np.linspace(0, count, side + 1).round() for count, side in zip(layer.size, sides, strict=True)]
    counts, *_ = np.histogram2d(layer.target, layer.source, bins=(bins[1], bins[0]))
    return counts / np.outer(np.diff(bins[1]), np.diff(bins[0]))


def _degrees(ax: Axes, degree: np.ndarray, layer: Feeds) -> None:
    """A histogram, and the numbers that edges drawn at random give in the mean."""
    least, most = int(degree.min()), int(degree.max())
    trials = len(layer.source) / layer.density / len(degree)
    width = max(1, (most - least + 1) // 40)
    edges = np.arange(least, most + width + 1, width) - 0.5
    ax.hist(degree, bins=edges, color=style.BLUE, alpha=0.8)
    at = np.arange(least, most + 1)
    ax.plot(
        at, width * len(degree) * _binomial(at, trials, layer.density), "--", color=style.INK, linewidth=1.2
    )


def _binomial(at: np.ndarray, trials: float, chance: float) -> np.ndarray:
    """Probability of each count in ``at``."""
    trials = round(trials)
    logs = np.array([math.lgamma(trials + 1) - math.lgamma(k + 1) - math.lgamma(trials - k + 1)
                     if k <= trials else -math.inf for k in at.tolist()])  # fmt: skip
    if chance >= 1:
        return (at == trials).astype(float)
    return np.exp(logs + at * math.log(chance) + (trials - at) * math.log1p(-chance))
