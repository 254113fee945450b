"""Expert load: which experts the tokens are routed to, at the end and over time, and what overflows."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from analysis import style
from analysis.lines import from_zero, layer_colours, layer_legend, layer_lines
from analysis.series import expert_names, has, live, series, steps
from graphmoe.checkpoint import RunRecord


@style.styled
def expert_load(record: RunRecord) -> Figure:
    """Share of the routing edges that each expert gets, layer by layer, over the last quarter of the run."""
    share, alive, at = _final_share(record)
    names, uniform = expert_names(record), 100 / alive.sum(1)
    columns = {
        "MaxVio": [f"{value:.2f}" for value in max_violation(share)],
        "entropy": [f"{value:.3f}" for value in load_entropy(share)],
    }
    layers = [str(layer) for layer in range(len(share))]
    fig, ax = draw_load(share, uniform, names, layers, columns, f"Expert load, {_when(at)}")
    ax.set_title(f"uniform share {span(uniform)} %")
    ax.set_xlabel("expert (g: ghost, –: dormant)" if names[-1].startswith("g") else "expert")
    return fig


@style.styled
def expert_load_over_time(record: RunRecord) -> Figure:
    """Share of the routing edges that each expert gets while the model was trained, a panel a layer."""
    load, at = series(record, "load"), steps(record)
    alive = live(record, load.shape[1])
    share = np.where(alive, 100 * load, np.nan)  # [S, L, E], per cent
    names = expert_names(record)
    colours = _colours(names)
    shown = style.shown_layers(load.shape[1])
    rows, columns = style.grid_shape(len(shown), 3.1)
    fig = style.new_figure(max(3.1 * columns + 1.0, 5.5), 2.3 * rows + 0.6, "Expert load over time")
    share_at_end = _final_share(record)[0]
    violation, entropy = max_violation(share_at_end), load_entropy(share_at_end)
    width = 1.3 if len(names) <= 24 else 0.7
    axes = style.panels(fig, len(shown), columns, sharey=True)
    for index, (ax, layer) in enumerate(zip(axes, shown, strict=True)):
        for expert, (name, colour) in enumerate(zip(names, colours, strict=True)):
            dashes = "--" if name.startswith("g") else "-"
            style.line(ax, at, share[:, layer, expert], color=colour, linestyle=dashes, linewidth=width)
        uniform = {"color": style.INK, "linestyle": ":", "linewidth": 1.2}
        if len(at) == 1:
            ax.axhline(100 / alive[0, layer].sum(), **uniform)
        ax.step(at, 100 / alive[:, layer].sum(1), where="post", **uniform)
        ax.set_title(f"layer {layer} · MaxVio {violation[layer]:.2f} · entropy {entropy[layer]:.3f}")
        style.step_axis(ax, at, label=index + columns >= len(shown))
        if index % columns == 0:
            ax.set_ylabel("routing edges, %")
    axes[0].set_ylim(bottom=0)
    met = alive.any((0, 1))
    _legend(fig, [(name, colour) for name, colour, once in zip(names, colours, met, strict=True) if once])
    return fig


@style.styled
def drop_rate(record: RunRecord) -> Figure:
    """Share of the routing edges that the capacity of the experts dropped while the model was trained.

    The dashed line is what a router drops that chooses at random; an even load drops nothing.
    """
    dropped, at = 100 * series(record, "drop_rate"), steps(record)  # [S, L], per cent
    fig = style.new_figure(6.6, 3.4, "Dropped edges")
    ax, colours = fig.subplots(), layer_colours(dropped.shape[1])
    layer_lines(ax, at, dropped, colours)
    ax.set_ylabel("routing edges dropped, %")
    others, highest = [], dropped
    if has(record, "drop_rate_random"):
        chance = 100 * series(record, "drop_rate_random")
        look = {"color": style.INK, "linestyle": "--", "linewidth": 1.2}
        if len(at) == 1:
            ax.axhline(chance.max(), **look)
        ax.plot(at, chance.max(axis=1), **look)
        others, highest = [Line2D([], [], label="random choice", **look)], np.append(dropped, chance)
    last = dropped[-max(1, len(at) // 4) :]
    ax.set_title(
        f"training batches · at the end {np.nanmean(last):.2f} %, mean over layers"
        if np.isfinite(last).any()
        else ""
    )
    from_zero(ax, highest)
    layer_legend(fig, colours, *others)
    return fig


def draw_load(
    share: np.ndarray,
    uniform: np.ndarray,
    names: Sequence[str],
    layers: Sequence[str],
    columns: Mapping[str, Sequence[str]],
    title: str,
    *,
    idle: str = "0.0",
) -> tuple[Figure, Axes]:
    """Draw loads as a heatmap, a row a layer, with columns of text beside it.

    Args:
        share: Edges of each expert, per cent, ``[L, E]``, NaN where there is no live expert.
        uniform: Share of each expert of an even load, ``[L]``; marked on the colour scale.
        names: Names of the experts.
        layers: Names of the layers.
        columns: Texts beside the rows, by their heading; of more than 48 layers none are shown.
        title: Title of the figure.
        idle: What marks an expert without any edge.

    Returns:
        The figure and the axes of the heatmap.
    """
    rows, experts = share.shape
    numbers, beside = experts <= 24 and rows <= 48, columns if rows <= 48 else {}
    width = 0.52 * experts if numbers else 0.2 * experts
    fig = style.new_figure(
        float(np.clip(width + 2.1 + sum(map(_column_width, beside.items())) / 72, 5.8, 16)),
        float(np.clip(0.42 * rows + 1.7, 2.6, 24)),
        title,
    )
    ax = fig.subplots()
    norm = Normalize(0, max(np.nanmax(share, initial=0), 1.5 * uniform.max()))
    form = (lambda value: f"{value:.1f}" if value else idle) if numbers else None
    image = style.heatmap(ax, share, cmap="cividis", norm=norm, form=form, aspect="auto", fontsize=8)
    ax.set_ylabel("layer")
    style.name_ticks(ax, names, axis="x")
    style.name_ticks(ax, layers, axis="y")
    _beside(ax, experts - 0.5, beside)
    bar = fig.colorbar(image, ax=ax, pad=0.03, label="routing edges, %")
    bar.outline.set_visible(False)
    for share_of_layer in set(np.round(uniform, 3)):
        bar.ax.axhline(share_of_layer, color="white", linewidth=1.5, linestyle="--")
    return fig, ax


def max_violation(share: np.ndarray) -> np.ndarray:
    """Return MaxVio, ``max / mean - 1`` over the live experts of each layer, ``[L]``: 0 is perfect balance.

    Args:
        share: Load of each expert, ``[L, E]`` in any unit, NaN for an expert that is not live.
    """
    known = np.isfinite(share)
    total, count = np.where(known, share, 0).sum(1), known.sum(1)
    mean = np.divide(total, count, out=np.full(len(share), np.nan), where=total > 0)
    return np.where(known, share, 0).max(1) / mean - 1


def load_entropy(share: np.ndarray) -> np.ndarray:
    """Return the entropy of the load of each layer as a fraction of a uniform one's, ``[L]``.

    1 is perfect balance over the live experts, 0 is all load on one of several; NaN without any load.

    Args:
        share: Load of each expert, ``[L, E]`` in any unit, NaN for an expert that is not live.
    """
    known = np.isfinite(share)
    values = np.where(known, share, 0)
    total = values.sum(1, keepdims=True)
    part = np.divide(values, total, out=np.full_like(values, np.nan), where=total > 0)
    bits = -(part * np.log2(np.where(part > 0, part, 1))).sum(1)
    most = np.log2(np.maximum(known.sum(1), 1))
    # One expert alone carries its uniform load, though both entropies are 0.
    return np.divide(bits, most, out=np.where(np.isnan(bits), np.nan, 1.0), where=most > 0)


def _final_share(record: RunRecord) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean load of the last quarter of the records.

    Returns:
        Per cent ``[L, E]``, NaN for an expert dormant at the end; who is live at the end ``[L, E]``;
        the steps that were averaged.
    """
    load, at = series(record, "load"), steps(record)
    window, alive = max(1, len(load) // 4), live(record, load.shape[1])[-1]
    return np.where(alive, 100 * load[-window:].mean(0), np.nan), alive, at[-window:]


def _beside(ax: Axes, x: float, columns: Mapping[str, Sequence[str]]) -> None:
    """Write columns of text, a line a layer, to the right of a heatmap that ends at ``x``."""
    look, offset = {"textcoords": "offset points", "annotation_clip": False, "fontsize": 8}, 8.0
    for name, texts in columns.items():
        ax.annotate(name, (x, -0.5), xytext=(offset, 6), color=style.QUIET, **look)
        for layer, text in enumerate(texts):
            ax.annotate(text, (x, layer), xytext=(offset, 0), va="center", **look)
        offset += _column_width((name, texts))


def _column_width(column: tuple[str, Sequence[str]]) -> float:
    """Points that a column of text takes, its heading included."""
    return 4.6 * max(map(len, [column[0], *column[1]])) + 16


def _colours(names: list[str]) -> list[str]:
    """Return one colour an expert: one scheme for primaries, another for ghosts (``g0`` ...)."""
    primaries = sum(not name.startswith("g") for name in names)
    colours = [style.PRIMARIES[index % len(style.PRIMARIES)] for index in range(primaries)]
    return colours + [style.GHOSTS[index % len(style.GHOSTS)] for index in range(len(names) - primaries)]


def _legend(fig: Figure, experts: list[tuple[str, str]]) -> None:
    """One legend for all panels; with more than 24 experts colours repeat, so none is named."""
    handles = [Line2D([], [], color=style.INK, linestyle=":", label="uniform")]
    for name, colour in experts if len(experts) <= 24 else []:
        dashes = "--" if name.startswith("g") else "-"
        handles.append(Line2D([], [], color=colour, linestyle=dashes, label=name))
    title = "expert" if len(experts) <= 24 else "a line an expert"
    fig.legend(handles=handles, loc="outside right upper", title=title, title_fontsize=8.5)


def span(values: np.ndarray) -> str:
    """``12.5``, or ``10.0 to 12.5`` where layers differ."""
    low, high = f"{values.min():.1f}", f"{values.max():.1f}"
    return low if low == high else f"{low} to {high}"


def _when(at: np.ndarray) -> str:
    """``step 20``, or ``mean over steps 3020 to 4000``."""
    return f"step {at[0]}" if len(at) == 1 else f"mean over steps {at[0]} to {at[-1]}"
