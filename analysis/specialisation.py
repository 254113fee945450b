"""Specialisation: how much the experts differ, and how much their choice says about the token.

Every figure stands beside what chance gives: vectors of many dimensions are nearly orthogonal even
if they are random, and a small sample finds information where there is none.
"""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke

from analysis import style
from analysis.lines import from_zero, layer_colours, layer_legend, layer_lines
from analysis.matrices import Wording, draw_matrices
from analysis.series import expert_names, final, has, series, steps
from graphmoe.checkpoint import RunRecord

BARS = {
    "routing_entropy": ("Routing entropy", "bits per token", "uniform over live experts"),
    "mutual_information": ("Mutual information of expert and token", "bits", "shuffled among tokens"),
}
"""What :func:`routing_information` draws a layer: title, unit, and what the reference is."""
_BAR = "#7fb2d6"


@style.styled
def specialisation(record: RunRecord) -> Figure:
    """How far the mean outputs of the experts differ while the model was trained, a panel a layer.

    The dashed line is the same measure of random vectors, and not a goal.
    """
    values, at = series(record, "specialisation"), steps(record)  # [S, L]
    shown = style.shown_layers(values.shape[1])
    rows, columns = style.grid_shape(len(shown), 3.1)
    fig = style.new_figure(max(3.1 * columns + 0.4, 5.5), 2.2 * rows + 0.9, "Expert specialisation")
    axes = style.panels(fig, len(shown), columns, sharey=True)
    reference = _final(record, "specialisation_random")
    measured = _final(record, "specialisation")
    for index, (ax, layer) in enumerate(zip(axes, shown, strict=True)):
        style.line(ax, at, values[:, layer], color=style.BLUE, label="training batches")
        if reference is not None:
            label = "random vectors"
            ax.axhline(reference[layer], color=style.QUIET, linestyle="--", linewidth=1.2, label=label)
        if measured is not None:
            ax.plot(at[-1], measured[layer], "o", color=style.ORANGE, label="held-out text", clip_on=False)
        ax.set_title(f"layer {layer}{_random(reference, layer)}")
        style.step_axis(ax, at, label=index + columns >= len(shown))
        if index % columns == 0:
            ax.set_ylabel("specialisation")
    from_zero(axes[0], values[:, shown], reference, measured)
    fig.legend(handles=axes[0].get_legend_handles_labels()[0], loc="outside lower center", ncols=3)
    return fig


@style.styled
def expert_similarity(record: RunRecord) -> Figure:
    """Linear CKA of the experts' outputs for the same held-out tokens: 1 where two do the same."""
    cka, reference = final(record, "cka"), _final(record, "cka_random")
    wording = Wording("Similarity of experts (linear CKA)", "expert", "expert", "linear CKA", "measurement")
    fig, axes = draw_matrices(cka, expert_names(record), wording, norm=Normalize(0, 1), cmap="cividis")
    for ax, layer in zip(axes, style.shown_layers(len(cka)), strict=True):
        ax.set_title(f"layer {layer}{_random(reference, layer)}")
    return fig


@style.styled
def routing_information(record: RunRecord) -> Figure:
    """How decided the router is, and what the chosen expert says about the token, beside chance."""
    names = [name for name in BARS if has(record, f"final_{name}")]
    over_time = has(record, "routing_entropy")
    count = len(names) + over_time
    layers = len(final(record, names[0])) if names else series(record, "routing_entropy").shape[1]
    width = float(np.clip(0.45 * layers + 1.6, 3.9, 6.0))
    fig = style.new_figure(width * count + (0.8 if over_time else 0.2), 3.5, "Routing information")
    axes = style.panels(fig, count, count)
    for ax, name in zip(axes, names, strict=False):
        title, unit, reference = BARS[name]
        _bars(ax, final(record, name), _final(record, f"{name}_random"), reference)
        ax.set_title(title)
        ax.set_ylabel(unit)
    if over_time:
        colours = layer_colours(layers)
        layer_lines(axes[-1], steps(record), series(record, "routing_entropy"), colours)
        axes[-1].set_title("Routing entropy in training")
        axes[-1].set_ylabel("bits per token")
        from_zero(axes[-1], series(record, "routing_entropy"))
        layer_legend(fig, colours)
    return fig


def _bars(ax: Axes, values: np.ndarray, reference: np.ndarray | None, name: str) -> None:
    """Draw one bar a layer, with a mark across it where the reference lies."""
    layers = np.arange(len(values))
    ax.bar(layers, values, width=0.62, color=_BAR)
    if reference is not None:
        ax.hlines(reference, layers - 0.4, layers + 0.4, color=style.ORANGE, linewidth=2)
    known = np.append(values, [] if reference is None else reference)
    top = float(np.nanmax(known, initial=0)) or 1.0
    ax.set_ylim(0, 1.3 * top)
    if len(layers) <= 12:
        for layer, value in zip(layers, values, strict=True):
            _number(ax, layer, value, top)
    style.name_ticks(ax, [str(layer) for layer in layers], axis="x")
    ax.set_xlabel("layer")
    ax.grid(False, axis="x")
    handles = [Line2D([], [], color=_BAR, linewidth=6, label="held-out text")]
    if reference is not None:
        handles.append(Line2D([], [], color=style.ORANGE, linewidth=2, label=name))
    ax.legend(handles=handles, loc="upper center", ncols=2)


def _number(ax: Axes, layer: int, value: float, top: float) -> None:
    """Write ``value`` below the end of its bar, or above a bar that is too short for that."""
    text, height = (f"{value:.2f}", value) if np.isfinite(value) else ("–", 0.0)
    inside = height > 0.12 * top
    place = height - 0.02 * top if inside else height + 0.02 * top
    mark = ax.text(layer, place, text, ha="center", va="top" if inside else "bottom", fontsize=8)
    mark.set_path_effects([withStroke(linewidth=2, foreground=_BAR if inside else "white")])


def _final(record: RunRecord, name: str) -> np.ndarray | None:
    """What was measured at the end, or ``None`` if it was not."""
    return final(record, name) if has(record, f"final_{name}") else None


def _random(reference: np.ndarray | None, layer: int) -> str:
    """`` · random 0.85``, to end a title with."""
    return "" if reference is None else f" · random {reference[layer]:.3g}"
